"""The pages of docs/: reachable, in llms.txt, as wide as the theme shows, and their code runs."""

import itertools
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

import xmag
from xmag.cli.parser import parse
from xmag.demo import write_demo_slide

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))
MADE = ["tour.md"]
"""Pages that mkdocs makes of something else."""
COLUMNS = 88
"""Columns of code that extra.css fits into a window of 1280 px."""


def _navigation() -> dict[str, list[str]]:
    def pages(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        inside = entry.values() if isinstance(entry, dict) else entry
        return [page for one in inside for page in pages(one)]

    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    return {name: pages(entry) for group in settings["nav"] for name, entry in group.items()}


def _blocks(page: Path, language: str = r"\w*") -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_the_navigation_has_four_groups_and_every_page_once() -> None:
    groups = _navigation()
    assert len(groups) == 4
    assert sorted(page for pages in groups.values() for page in pages) == sorted([*PAGES, *MADE])


def test_llms_txt_has_every_page_in_the_navigation_by_groups() -> None:
    title, summary, *_ = text = (DOCS / "llms.txt").read_text(encoding="utf-8").split("\n\n")
    assert title == "# xmag"
    assert summary.startswith("> ")
    assert "\n" not in summary.replace("\n> ", "")
    found: dict[str, list[str]] = {}
    for name, entries in itertools.pairwise(text):
        if name.startswith("## "):
            matches = [re.fullmatch(r"- \[.+\]\((.+)\): .+", e) for e in entries.splitlines()]
            found[name[3:]] = [_page_at(match[1]) for match in matches if match]
            assert all(matches), entries
    assert found == _navigation()


def _page_at(url: str) -> str:
    """The page that MkDocs shows at a place below the site's root."""
    places = (url.replace(".html", ".md"), url.removesuffix("/") + ".md", url + "index.md")
    return next((place for place in places if place in [*PAGES, *MADE]), url)


@pytest.mark.parametrize("page", PAGES)
def test_code_is_no_wider_than_the_page(page: str) -> None:
    wide = [line for b in _blocks(DOCS / page) for line in b.splitlines() if len(line) > COLUMNS]
    assert wide == []


@pytest.mark.parametrize("page", ["../README.md", *PAGES])
def test_command_lines_are_as_the_parser_has_them(page: str) -> None:
    for block in _blocks(DOCS / page, "(?:sh|console)"):
        for line in block.replace("\\\n", " ").splitlines():
            name, *words = [*shlex.split(line, comments=True, posix=True), ""]
            if name == "xmag":
                assert "run" in parse(words[:-1]), line


@pytest.mark.filterwarnings("ignore:the .* tiles of 'slide.svs' cover")  # as the page says
def test_the_python_of_the_first_page_and_of_the_questions_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_demo_slide(tmp_path / "slide.svs", size=(3600, 3000))
    Path("slides").mkdir()
    shutil.copy("slide.svs", "slides/a.svs")
    Image.fromarray(np.full((1800, 1800, 3), (200, 120, 170), np.uint8)).save("slide.tif")

    first = _blocks(DOCS / "index.md", "python")
    assert len(first) == 1
    exec(compile(first[0].replace('svs")', 'svs", model="xmag-mini")'), "index.md", "exec"), {})
    assert len(xmag.FeatureBag.load("slide.h5")) > 0

    names: dict[str, Any] = {}
    blocks = _blocks(DOCS / "questions.md", "python")
    assert len(blocks) == 9
    for block in blocks:
        exec(compile(block, "questions.md", "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    assert "2.0" in printed
    assert "(8, 2)" in printed
    assert names["slowest"].slide == "a.svs"
    assert names["carried"].embed_dim == names["encoder"].embed_dim
    assert 0 < len(names["bag"]) < len(names["again"])
    assert {"overlay.png", "slide.pt", "model"} <= {path.name for path in tmp_path.iterdir()}
