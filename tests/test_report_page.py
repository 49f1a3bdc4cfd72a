"""What is in the page of a cohort and what is not, without a browser; and the report it is of."""

import json
import re
import time
from dataclasses import replace

import numpy as np
import pytest
from support.encoders import ColourEncoder
from support.patient import SECRET, plant
from support.slides import texture, write_svs

from xmag.bag import FeatureBag
from xmag.cli import main
from xmag.cohort import CohortReport, CohortRow, extract_cohort
from xmag.errors import InputError, OutputError, XmagWarning
from xmag.geometry import TileSpec
from xmag.mil import MILClassifier
from xmag.plan import plan_tiles
from xmag.slide import Slide
from xmag.tissue import find_tissue

SPEC = TileSpec(size_px=56)


class SlowEncoder(ColourEncoder):
    def embed(self, tiles):
        time.sleep(0.15)
        return super().embed(tiles)


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides")
    for name, size in (("a.svs", (700, 600)), ("=1+1.svs", (400, 300)), ("blank.svs", (0, 0))):
        pixels = np.full((1100, 1450, 3), 244, np.uint8)
        pixels[150 : 150 + size[1], 250 : 250 + size[0]] = texture(*size) if any(size) else 0
        write_svs(folder / name, pixels=pixels, mpp=0.5, power=20)
    path = folder / "a.svs"
    path.write_bytes(plant(path.read_bytes()))
    return folder


@pytest.fixture(scope="module")
def report(slides, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return extract_cohort(slides, out, model=SlowEncoder(spec=SPEC), processes=0)


def cards(path):
    """The JSON of each card, as the script of the page gets it."""
    found = re.findall(
        r'<script type="application/json" id="(.+?)">(.*?)</script>', path.read_text()
    )
    return {name: json.loads(text) for name, text in found}


def card_of(path, slide):
    return next(card for card in cards(path).values() if card.get("name") == slide)


def test_a_row_has_the_seconds_of_each_stage(report):
    for row in report:
        stages = row.planning_seconds, row.reading_seconds, row.saving_seconds
        assert all(0 <= seconds <= row.seconds for seconds in stages)
        assert row.planning_seconds > 0 < row.saving_seconds
        assert row.embedding_seconds >= 0.15 * bool(row.tiles)
        assert row.embedding_seconds <= row.seconds


def test_a_report_is_loaded_as_it_was_written(report):
    loaded = CohortReport.load(report.folder)
    assert [row.slide for row in loaded] == [row.slide for row in report]
    assert "=1+1.svs" in [row.slide for row in loaded]  # which the CSV has an apostrophe before
    for mine, its in zip(loaded, report, strict=True):
        near = {"coverage": mine.coverage, "seconds": mine.seconds} | {
            name: getattr(mine, name) for name in CohortRow.__slots__ if name.endswith("_seconds")
        }
        assert mine == replace(its, **near)
        assert mine.seconds == pytest.approx(its.seconds, abs=0.01)
        assert mine.coverage == pytest.approx(its.coverage, abs=0.001)


def test_shares_of_a_cohort_are_loaded_together(slides, tmp_path):
    whole = []
    for share in (0, 1):
        whole += extract_cohort(
            slides, tmp_path, model=ColourEncoder(spec=SPEC), processes=0, shard=(share, 2)
        )
    assert {row.slide for row in CohortReport.load(tmp_path)} == {row.slide for row in whole}


def test_a_folder_without_a_report_or_with_another_ones_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"report\.csv"):
        CohortReport.load(tmp_path)
    (tmp_path / "report.csv").write_text("slide,status,tiles\na.svs,done,many\n")
    with pytest.raises(InputError, match=r"line 2 .* was not written by xmag"):
        CohortReport.load(tmp_path)


def test_the_grid_of_a_card_is_the_plan(report, slides, tmp_path):
    report.to_html(tmp_path / "report.html")
    card = card_of(tmp_path / "report.html", "a.svs")
    with Slide(slides / "a.svs") as slide:
        plan = plan_tiles(slide, SPEC, tissue=find_tissue(slide))
    assert (card["cells"], card["columns"], card["rows"]) == (
        list(plan.cells), list(plan.columns), list(plan.rows),
    )  # fmt: skip


def test_nothing_of_labels_and_of_what_a_file_says_of_its_patient_is_in_it(report, tmp_path):
    path = tmp_path / "report.html"
    report.to_html(path, title="A cohort")
    text = path.read_text()
    assert SECRET not in text
    assert "ScanScope" not in text
    assert str(report.folder) not in text
    assert str(report.jobs[0].path.parent) not in text
    # Pictures: of each slide its thumbnail, tissue and tiles, and none of a label's size.
    pictures = [name for name in cards(path) if name.startswith("picture-")]
    assert len(pictures) == 3
    tiles = sum(len(card.get("top", ())) for card in cards(path).values())
    masks = sum(bool(card.get("mask")) for card in cards(path).values())
    assert text.count("data:image/") == len(pictures) + tiles + masks


def test_without_slides_cards_have_the_tiles_of_the_bags(report, tmp_path):
    CohortReport.load(report.folder).to_html(tmp_path / "report.html")
    card = card_of(tmp_path / "report.html", "a.svs")
    bag = FeatureBag.load(report.folder / "a.h5")
    letters = [
        [x, y]
        for y, row in zip(card["rows"], card["cells"], strict=True)
        for x, letter in zip(card["columns"], row, strict=True)
        if letter == "#"
    ]
    assert letters == bag.coords.tolist()
    assert "data:image/" not in (tmp_path / "report.html").read_text()


def test_a_slide_that_was_changed_is_not_shown_and_one_that_failed_not_opened(
    report, slides, tmp_path, monkeypatch
):
    other = tmp_path / "slides"
    other.mkdir()
    for name in ("a.svs", "blank.svs", "=1+1.svs"):
        (other / name).write_bytes((slides / "=1+1.svs").read_bytes())
    changed = replace(report, rows=tuple(
        replace(row, status="failed", output="") if row.slide == "blank.svs" else row
        for row in report
    ))  # fmt: skip
    opened = []

    def noted(path, **options):
        opened.append(path.name)
        return Slide(path, **options)

    monkeypatch.setattr("xmag.cohort.cards.Slide", noted)
    changed.to_html(tmp_path / "report.html", slides=other)
    assert sorted(opened) == ["=1+1.svs", "a.svs"]
    notes = card_of(tmp_path / "report.html", "a.svs")["notes"]
    assert any("changed since, or is another file" in note for note in notes)
    assert [name for name in cards(tmp_path / "report.html") if "picture" in name] == ["picture-0"]


def test_a_slide_that_cannot_be_read_any_more_costs_its_picture_alone(report, slides, tmp_path):
    other = tmp_path / "slides"
    other.mkdir()
    for name in ("a.svs", "blank.svs", "=1+1.svs"):
        (other / name).write_bytes(
            (slides / name).read_bytes()[: 3000 if name == "a.svs" else None]
        )
    report.to_html(tmp_path / "report.html", slides=other)
    notes = " ".join(card_of(tmp_path / "report.html", "a.svs")["notes"])
    assert "The slide cannot be shown: a.svs" in notes
    assert str(tmp_path) not in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("max_mb", [2.0, 0.12, 0.02])
def test_the_size_is_bounded(report, tmp_path, max_mb):
    report.to_html(tmp_path / "report.html", max_mb=max_mb)
    own = sum(len(json.dumps(card)) for card in cards(tmp_path / "report.html").values())
    assert own <= 1e6 * max_mb + 1000
    assert card_of(tmp_path / "report.html", "a.svs")["facts"]


def test_a_classifier_that_does_not_fit_leaves_its_layer_out_and_says_so(report, tmp_path):
    bags = [FeatureBag(np.random.default_rng(n).normal(size=(4, 3)).astype("f4"), np.zeros((4, 2)))
            for n in range(8)]  # fmt: skip
    classifier = MILClassifier(random_state=0, epochs=2)
    classifier.fit(bags, [0, 1] * 4, groups=list("abcdefgh"), validation=None)
    with pytest.warns(XmagWarning, match="2 of 3 cards have no attention"):
        report.to_html(tmp_path / "report.html", classifier=classifier)
    assert any("No attention" in n for n in card_of(tmp_path / "report.html", "a.svs")["notes"])


def test_a_file_of_another_program_is_not_replaced(report, tmp_path):
    path = tmp_path / "report.html"
    path.write_text("<html>mine</html>")
    with pytest.raises(OutputError, match="not one that xmag wrote"):
        report.to_html(path)
    assert path.read_text() == "<html>mine</html>"
    path.unlink()
    report.to_html(path)
    report.to_html(path)


def test_slides_of_another_cohort_are_refused(report, tmp_path):
    write_svs(tmp_path / "z.svs", size=(300, 300))
    with pytest.raises(InputError, match="none of the 1 slides is in the report"):
        report.to_html(tmp_path / "report.html", slides=tmp_path)


@pytest.mark.parametrize("max_mb", [0, -1, float("nan"), float("inf")])
def test_an_impossible_size_is_refused(report, tmp_path, max_mb):
    with pytest.raises(InputError, match="max_mb"):
        report.to_html(tmp_path / "report.html", max_mb=max_mb)


def test_the_command_writes_the_page(report, slides, tmp_path, capsys):
    path = tmp_path / "page.html"
    assert main(["report", str(report.folder), "-o", str(path), "--slides", str(slides),
                 "--title", "Mine & yours", "--max-mb", "1"]) == 0  # fmt: skip
    assert capsys.readouterr().out == f"written   {path}\n"
    text = path.read_text()
    assert "<title>Mine &amp; yours</title>" in text
    assert len([name for name in cards(path) if name.startswith("picture-")]) == 3
    assert main(["report", str(report.folder)]) == 0
    assert (report.folder / "report.html").exists()
    assert main(["report", str(tmp_path / "none")]) == 2


def test_the_command_writes_the_page_of_an_evaluation(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    from support.cohorts import NearestMeanOfBags, as_bags, cohort

    from xmag.evaluate import cross_validate

    few = cohort(0, patients=12)
    found = cross_validate(
        NearestMeanOfBags(), as_bags(few.x), few.y, groups=few.groups, folds=2, resamples=10
    )
    found.save(tmp_path)
    assert main(["report", str(tmp_path)]) == 0
    text = (tmp_path / "report.html").read_text()
    assert text.count("<figure>") == 3
    assert f">{found.estimate('accuracy').value:.3f}</td>" in text
    assert main(["report", str(tmp_path), "--slides", "x.svs"]) == 2
    assert "leave out --slides" in capsys.readouterr().err
