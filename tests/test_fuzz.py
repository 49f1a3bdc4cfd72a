"""Some hundred damaged files, and each finding of benchmarks/fuzz.py, in supervised processes."""

import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
from fuzz import pool, seeds
from fuzz.planted import EXPECTED
from fuzz.regressions import CASES

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="limits and looks at a process by /proc"
)

COUNTS = {
    "slides": 250, "tiffslide": 60, "sectors": 150, "zarrs": 120, "bags": 250, "checkpoints": 100
}  # fmt: skip
if find_spec("wsidicom") is not None:
    COUNTS["dicom"] = 200
"""How many cases of each kind run here; benchmarks/fuzz.py runs tens of thousands."""


_HANGS_S = 300.0
"""benchmarks/fuzz.py looks for slow cases too, on a machine that does nothing else."""

FOUND = (27430, 32430, 38930, 48198, 48537, 55791, 68977, 80713, 84163, 86228, 201662)
"""Cases of slides, with seed 0, that were findings once, one of each kind."""


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of undamaged files, by what they are; "regressions" has all of them."""
    folders = {name: tmp_path_factory.mktemp(name) for name in (*COUNTS, "regressions", "planted")}
    for name in COUNTS:
        seeds.write(name, folders[name])
        for path in folders[name].iterdir() if name not in ("zarrs", "dicom") else ():
            (folders["regressions"] / path.name).write_bytes(path.read_bytes())
    return folders


@pytest.mark.parametrize("target", COUNTS)
def test_damaged_files_are_read_or_refused_and_nothing_else(
    originals: dict[str, Path], target: str
) -> None:
    results = list(
        pool.run(target, originals[target], range(COUNTS[target]), seed=1, seconds=_HANGS_S)
    )
    findings = [result for result in results if result.is_finding]
    assert not findings, findings[0]
    assert len(results) == COUNTS[target]
    outcomes = Counter(result.outcome for result in results)
    # Where nearly all is read, or nearly nothing, the damage tests little.
    fine = outcomes["read"] + outcomes["loaded"] + outcomes["equal"]
    assert 0.05 < fine / len(results) < 0.8, outcomes


def test_cases_that_were_findings_are_none_any_more(originals: dict[str, Path]) -> None:
    results = list(pool.run("slides", originals["slides"], FOUND, seconds=_HANGS_S))
    assert not [result for result in results if result.is_finding]
    assert len(results) == len(FOUND)


def test_what_the_fuzzer_found_is_refused(originals: dict[str, Path]) -> None:
    results = pool.run("regressions", originals["regressions"], range(len(CASES)), seconds=_HANGS_S)
    outcomes = {list(CASES)[result.number]: result for result in results}
    findings = {name: result for name, result in outcomes.items() if result.is_finding}
    assert not findings, findings
    # A text or an animation in a PNG is nothing that its pixels need.
    read = {name for name, result in outcomes.items() if result.outcome == "fine"}
    assert read == {
        "a profile without an end",
        "an animation of no frames",
        "a text of a GB",
    }


def test_the_fuzzer_finds_faults_that_were_planted(originals: dict[str, Path]) -> None:
    results = pool.run(
        "planted",
        originals["planted"],
        range(len(EXPECTED)),
        seconds=15.0,  # all but one take none, and that one would take for ever
        memory=1 << 28,
    )
    found = {list(EXPECTED)[result.number]: result.outcome for result in results}
    assert found == EXPECTED


def test_the_same_seed_gives_the_same_cases(originals: dict[str, Path]) -> None:
    from random import Random

    from fuzz import bags, slides

    for target in (slides, bags):
        files = {p.name: p.read_bytes() for p in originals[target.__name__[5:]].iterdir()}
        made = [target.make(files, n, Random(f"5 {n}")) for n in range(30)]
        assert made == [target.make(files, n, Random(f"5 {n}")) for n in range(30)]
        assert len({content for _, content in made}) > 25
