"""docs/evaluate.md does what it says: its code, run in order, prints what stands there."""

import re
from pathlib import Path

import pytest

from xmag import evaluate, metrics
from xmag.metrics.bootstrap import TASKS

_PAGE = Path(__file__).parents[2] / "docs" / "evaluate.md"


def _blocks(language: str) -> list[str]:
    text = _PAGE.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def test_the_code_of_the_page_prints_what_the_page_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    printed = []
    for block in _blocks("python"):
        exec(compile(block, _PAGE.name, "exec"), names)
        printed.append(capsys.readouterr().out)
    assert len(printed) == 7
    number = re.compile(r"\d+\.\d+")
    for shown, found in zip(_blocks("text"), printed, strict=False):
        assert number.sub("#", found).strip() == number.sub("#", shown).strip()
        values = [[float(v) for v in number.findall(text)] for text in (found, shown)]
        # Another scikit-learn or BLAS may move a prediction or two.
        assert values[0] == pytest.approx(values[1], abs=0.03)
    assert {path.name for path in Path("evaluation").iterdir()} == {
        "report.json", "roc.png", "confusion.png", "calibration.png",
    }  # fmt: skip
    assert sorted(path.name for path in Path("survival").iterdir()) == [
        "kaplan-meier.png", "report.json",
    ]  # fmt: skip
    assert (Path("regression") / "scatter.png").is_file()
    assert (Path("markers") / "calibration.png").is_file()
    report = names["report"]
    assert isinstance(report, evaluate.Report)
    assert evaluate.Report.load("evaluation") == report
    low, high = names["low"], names["high"]
    assert isinstance(low, float)
    assert isinstance(high, float)
    assert low < high


def test_the_page_names_all_metrics_probes_and_functions() -> None:
    named = set(re.findall(r"[\w]+", _PAGE.read_text(encoding="utf-8")))
    known = {name for table in TASKS.values() for name in table}
    assert known <= named
    functions = {name for name in evaluate.__all__ if name[0].islower()}
    assert functions <= named
    assert {"LinearProbe", "NearestNeighbours", "SimpleShot", "Folds", "Report"} <= named
    for name in known:
        assert name in metrics.__all__


def test_every_table_of_the_pages_has_a_head() -> None:
    for page in sorted(_PAGE.parent.glob("*.md")):
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
        for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
            assert re.match(r"\|.*\n\|[-:| ]+\|\n", table), (page.name, table)
