"""The notebook of the tour: it runs without the network, and shows what its stored outputs show."""

import getpass
import re
from pathlib import Path

import pytest
from support.tour import NOTEBOOK, executed, read


@pytest.fixture(scope="module")
def stored():
    for package in ("nbclient", "ipykernel"):
        pytest.importorskip(package, reason="needs the group test")
    return read()


def kinds(cell):
    """Of each output its type, its forms, and how many pictures and tables its HTML has."""
    for output in cell.get("outputs", []):
        html = output.get("data", {}).get("text/html", "")
        yield output.output_type, {*output.get("data", {})}, html.count("<img "), html.count("<tr")


def test_it_runs_and_each_cell_shows_what_is_stored(stored, tmp_path):
    fresh = executed(tmp_path)
    for now, before in zip(fresh.cells, stored.cells, strict=True):
        assert [*kinds(now)] == [*kinds(before)], now.source
    page = (tmp_path / "tour" / "report.html").read_text(encoding="utf-8")
    assert "tumour-1.svs" in page


def test_what_is_stored_ran_in_order_without_a_word_of_the_machine(stored):
    code = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    outputs = [kind for cell in code for kind in kinds(cell)]
    assert {kind for kind, *_ in outputs} == {"execute_result", "stream"}
    assert sum(images for _, _, images, _ in outputs) == 4  # slide, tissue, plan, bag
    assert sum("image/jpeg" in forms for _, forms, *_ in outputs) == 3
    text = re.sub(r"base64,[^\"\\]+|\"image/jpeg\": \"[^\"]+\"", "", NOTEBOOK.read_text("utf-8"))
    for word in ("/tmp", "/home", "/Users", "C:\\", str(Path.home()), getpass.getuser(), "stderr"):
        assert word not in text
    assert all(cell.metadata == {} for cell in stored.cells)
    assert NOTEBOOK.stat().st_size < 1_500_000
