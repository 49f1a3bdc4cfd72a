"""Damages slides, feature files, weights and classifiers, and sees what becomes of each.

    python benchmarks/fuzz.py --count 20000 --seed 0 [--target slides] [--json OUT] [--keep FOLDER]

Every case runs in a child process with a limit on time and memory. It has to end in what the
file holds or in an XmagError; anything else is a finding: another exception, a warning or a line
on stderr that is not xmag's, a descriptor or thread left over, a crash, a time-out, too much
memory. The same seed and numbers give the same cases; --keep writes those of findings to a folder.
"""

import argparse
import re
import sys
import tempfile
import time
from collections import Counter, defaultdict
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any

from common import report

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from fuzz import pool, seeds

TARGETS = {
    "dicom": "DICOM slides",
    "slides": "slides in every format and coding",
    "tiffslide": "slides that are read through tiffslide",
    "sectors": "slides with lost sectors, their pixels compared",
    "zarrs": "OME-Zarr slides",
    "bags": "feature files (.h5, .safetensors)",
    "checkpoints": "weights, model configurations, classifiers",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=TARGETS, default="slides")
    parser.add_argument("--count", type=int, default=20_000, help="cases")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--children", type=int, default=1, help="processes at once")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--keep", type=Path, help="where to write the files of findings")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        originals = Path(folder)
        seeds.write(options.target, originals)
        start = time.monotonic()
        results = _run(options, originals)
        seconds = time.monotonic() - start
        findings = [result for result in results if result.is_finding]
        if options.keep:
            _keep(findings, options, originals)
    report(
        f"fuzz: {TARGETS[options.target]}", _rows(results), options.json, **_facts(options, results)
    )
    print(f"\n{len(results)} cases in {seconds:.0f} s, {len(findings)} findings")
    _print_kinds(findings)
    sys.exit(1 if findings else 0)


def _run(options: argparse.Namespace, originals: Path) -> list[pool.Result]:
    numbers = range(options.first, options.first + options.count)
    results = []
    for result in pool.run(
        options.target, originals, numbers, seed=options.seed, children=options.children
    ):
        results.append(result)
        if result.is_finding:
            print(f"case {result.number} ({result.name}): {result.outcome}", file=sys.stderr)
        if len(results) % 1000 == 0:
            print(f"{len(results)} of {options.count}", file=sys.stderr, flush=True)
    return results


def _rows(results: list[pool.Result]) -> list[dict[str, Any]]:
    """Outcomes, by the file that was damaged; the last row counts all."""
    outcomes = [outcome for outcome, _ in Counter(r.outcome for r in results).most_common()]
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for result in results:
        for name in (result.name or "(died)", "~ all"):
            counts[name][result.outcome] += 1
    return [
        {"damaged": name, "cases": found.total(), **{o: found[o] for o in outcomes}}
        for name, found in sorted(counts.items())
    ]


def _facts(options: argparse.Namespace, results: list[pool.Result]) -> dict[str, Any]:
    return {
        "seed": options.seed,
        "first": options.first,
        "limits": {"seconds": pool.SECONDS, "memory_mb": pool.MEMORY >> 20},
        "most_memory_mb": max(r.peak_mb for r in results),
        "longest_seconds": max(r.seconds for r in results),
        "findings": [
            {"case": r.number, "name": r.name, "outcome": r.outcome, "detail": r.detail[-500:]}
            for r in results
            if r.is_finding
        ],
    }


def _print_kinds(findings: list[pool.Result]) -> None:
    """One example of each kind of finding."""
    kinds: dict[tuple[str, str], list[pool.Result]] = defaultdict(list)
    for finding in findings:
        lines = finding.detail.strip().splitlines() or [""]
        kinds[finding.outcome, re.sub(r"\d+", "N", lines[-1])].append(finding)
    for (outcome, _), same in sorted(kinds.items(), key=lambda kind: -len(kind[1])):
        numbers = ", ".join(str(finding.number) for finding in same[:5])
        print(f"\n{outcome} {len(same)} times, cases {numbers}\n{same[0].detail[-2000:]}")


def _keep(findings: list[pool.Result], options: argparse.Namespace, originals: Path) -> None:
    target: Any = import_module(f"fuzz.{options.target}")
    files = {path.name: path.read_bytes() for path in sorted(originals.iterdir())}
    options.keep.mkdir(parents=True, exist_ok=True)
    for finding in findings:
        rng = Random(f"{options.seed} {finding.number}")
        name, content = target.make(files, finding.number, rng)
        (options.keep / f"{options.target}-{finding.number}-{name}").write_bytes(content)


if __name__ == "__main__":
    main()
