import subprocess
import sys
from pathlib import Path

import pytest

import xmag
from xmag.demo import write_demo_slide

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def slide_path(tmp_path: Path) -> Path:
    (tmp_path / "slides").mkdir()
    return write_demo_slide(tmp_path / "slides" / "a.svs", size=(5400, 4500))


def _run(script: str, *arguments: Path) -> str:
    command = [sys.executable, EXAMPLES / script, *arguments, "--model", "xmag-mini"]
    return subprocess.run(
        command, check=True, timeout=100, stdout=subprocess.PIPE, text=True
    ).stdout


def test_one_slide(slide_path: Path, tmp_path: Path) -> None:
    printed = _run("extract_one_slide.py", slide_path, tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"a.h5", "a.pt", "a.png"}
    tiles = len(xmag.FeatureBag.load(tmp_path / "out" / "a.h5"))
    assert printed.startswith(f"a: {tiles} tiles at ")


def test_a_cohort_and_again(slide_path: Path, tmp_path: Path) -> None:
    first = _run("extract_cohort.py", slide_path.parent, tmp_path / "out")
    again = _run("extract_cohort.py", slide_path.parent, tmp_path / "out")
    assert first.startswith("done ")
    assert again.startswith("skipped ")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"a.h5", "a.h5.png", "report.csv"}
