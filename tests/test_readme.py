"""README and quickstart do what they say: their Python and command lines, run on a slide."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import xmag
from xmag.demo import write_demo_slide

ROOT = Path(__file__).parents[1]


def _blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "slides").mkdir()
    write_demo_slide(tmp_path / "slide.svs", size=(5800, 4700))
    shutil.copy(tmp_path / "slide.svs", tmp_path / "slides" / "a.svs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_python_of_the_readme_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = _blocks("README.md", "python")
    assert len(blocks) == 3
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    bag = names["bag"]
    assert isinstance(bag, xmag.FeatureBag)
    assert len(bag) > 0
    assert len(xmag.FeatureBag.load("slide.h5")) == len(bag)
    assert (folder / "overlay.png").stat().st_size > 0
    assert capsys.readouterr().out.splitlines()[-1] == f"a.svs done {len(bag)} {bag.coverage} "


def test_the_python_of_the_quickstart_runs(folder: Path) -> None:
    names: dict[str, object] = {}
    for block in _blocks("docs/quickstart.md", "python"):
        offline = block.replace("xmag.load_model()", 'xmag.load_model("xmag-mini")')
        exec(compile(offline, "quickstart.md", "exec"), names)
    assert names["report"].counts() == {"done": 1}
    assert names["features"].shape == names["bag"].features.shape
    assert len(names["embeddings"]) == len(names["plan"]) > 0


def test_the_command_lines_of_the_readme_run(folder: Path) -> None:
    lines = [line for block in _blocks("README.md", "sh") for line in block.splitlines()]
    commands = [line for line in lines if line.startswith("xmag ")]
    assert {shlex.split(line)[1] for line in commands} == {"info", "extract"}
    for line in commands:
        program = shlex.quote(str(Path(sys.executable).with_name("xmag")))
        subprocess.run(line.replace("xmag", program, 1), shell=True, check=True, timeout=800)
    assert {p.name for p in Path("features").iterdir()} >= {"a.h5", "report.csv"}


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "examples/README.md"])
def test_links_lead_to_files_that_are_there(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = [t for t in re.findall(r"\]\(([^)#]+)", text) if "://" not in t]
    assert targets
    assert [t for t in targets if not (ROOT / page).parent.joinpath(t).exists()] == []
