"""What is in the page of a cohort and what is not, without a browser; and the report it is of."""

import base64
import io
import itertools
import json
import math
import re
import time
import warnings
from dataclasses import replace
from importlib.resources import files

import numpy as np
import pytest
import tifffile
from PIL import Image
from support.encoders import ColourEncoder
from support.patient import SECRET, plant
from support.slides import texture, write_svs

from xmag import draw
from xmag.bag import FeatureBag
from xmag.cli import main
from xmag.cohort import CohortReport, CohortRow, extract_cohort
from xmag.errors import InputError, OutputError, XmagWarning
from xmag.geometry import TileSpec
from xmag.mil import MILClassifier
from xmag.plan import plan_tiles
from xmag.slide import Slide
from xmag.tissue import TissueMask, find_tissue

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


def test_the_scan_of_a_row_is_loaded_as_a_number(slides, tmp_path):
    slide = next(path for path in sorted(slides.iterdir()) if path.suffix == ".svs")
    extract_cohort([slide], tmp_path, model=ColourEncoder(spec=SPEC), processes=0, region=0)
    assert [row.region for row in CohortReport.load(tmp_path)] == [0]


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


@pytest.fixture(scope="module")
def given(slides, tmp_path_factory):
    """The folders of a mask and of a region of interest of a slide, and reports made with them."""
    root = tmp_path_factory.mktemp("given")
    mask = np.zeros((1100, 1450), np.uint8)  # a px of the slide each
    mask[200:650, 300:900] = 255
    ring = [[400, 250], [900, 250], [900, 800], [400, 800]]
    for folder in ("masks", "regions"):
        (root / folder).mkdir()
    Image.fromarray(mask).save(root / "masks" / "a.png")
    (root / "regions" / "a.geojson").write_text(
        json.dumps({"type": "Polygon", "coordinates": [ring]})
    )
    options = {"model": ColourEncoder(spec=SPEC), "processes": 0}
    kinds = {
        "masks": {"tissue": root / "masks"},
        "regions": {"roi": root / "regions"},
        "both": {"tissue": root / "masks", "roi": root / "regions"},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", XmagWarning)  # of tissue that is not covered
        reports = {
            kind: extract_cohort([slides / "a.svs"], root / kind, **given, **options)
            for kind, given in kinds.items()
        }
    return reports, kinds


def layer_of(card, path):
    """The tissue that a card shows, at the px of the slide."""
    picture = cards(path)[f"picture-{card['picture']}"]
    data = base64.b64decode(picture["mask"].partition(",")[2])
    with Image.open(io.BytesIO(data)) as image:
        shown = np.asarray(image) > 0
    rows, columns = (
        np.minimum((np.arange(side) / picture["downsample"]).astype(int), count - 1)
        for side, count in zip((1100, 1450), shown.shape, strict=True)
    )
    return shown[np.ix_(rows, columns)]


@pytest.mark.parametrize("kind", ["masks", "regions", "both"])
@pytest.mark.parametrize("is_loaded", [False, True])
def test_a_card_shows_the_mask_and_the_region_that_were_used(
    given, slides, kind, is_loaded, tmp_path
):
    reports, kinds = given
    report, options = reports[kind], {}
    if is_loaded:  # by a program that has to be told where they are
        report = CohortReport.load(report.folder)
        options = {"slides": [slides / "a.svs"], **kinds[kind]}
    report.to_html(tmp_path / "report.html", **options)
    card = card_of(tmp_path / "report.html", "a.svs")
    with Slide(slides / "a.svs") as slide:
        tissue, roi = find_tissue(slide), None
        if "tissue" in kinds[kind]:
            mask = np.zeros((1100, 1450), bool)
            mask[200:650, 300:900] = True
            tissue = TissueMask.from_array(mask, slide)
        if "roi" in kinds[kind]:
            roi = kinds[kind]["roi"] / "a.geojson"
        plan = plan_tiles(slide, SPEC, tissue=tissue, roi=roi)
    assert card["cells"] == list(plan.cells)
    assert ("r" in "".join(card["cells"])) == (roi is not None)
    shown = layer_of(card, tmp_path / "report.html")
    wanted = np.repeat(np.repeat(plan.tissue.mask, round(plan.tissue.downsample), 0),
                       round(plan.tissue.downsample), 1)[:1100, :1450]  # fmt: skip
    shown = shown[: wanted.shape[0], : wanted.shape[1]]
    assert (shown != wanted).mean() < 0.005
    assert 0.05 < shown.mean() < 0.5
    facts = dict(card["facts"])["tissue"]
    assert ("by a given mask" in facts) == ("tissue" in kinds[kind])
    assert ("in a region of interest" in facts) == ("roi" in kinds[kind])


def test_a_mask_that_is_another_one_now_is_not_shown_as_the_one_that_was_used(
    given, slides, tmp_path
):
    reports, _ = given
    loaded = CohortReport.load(reports["masks"].folder)
    Image.new("L", (145, 110), 255).save(tmp_path / "a.png")
    for options in ({"tissue": tmp_path}, {}):
        loaded.to_html(tmp_path / "report.html", slides=[slides / "a.svs"], **options)
        card = card_of(tmp_path / "report.html", "a.svs")
        assert any("mask was given, and is not here" in note for note in card["notes"])
        assert cards(tmp_path / "report.html")["picture-0"]["mask"] is None
    with pytest.raises(InputError, match="tissue and roi go with slides"):
        loaded.to_html(tmp_path / "report.html", tissue=tmp_path)


def test_a_region_that_is_not_there_now_is_told_by_the_tiles(given, slides, tmp_path):
    """Of the cells that would be tiles of the whole slide, those that are none lie outside."""
    reports, _ = given
    loaded = CohortReport.load(reports["regions"].folder)
    loaded.to_html(tmp_path / "report.html", slides=[slides / "a.svs"])
    text = "".join(card_of(tmp_path / "report.html", "a.svs")["cells"])
    assert text.count("#") + text.count("p") == reports["regions"][0].tiles
    assert "r" in text


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


@pytest.mark.parametrize("max_mb", [2.0, 0.12, 0.02, 0.002])
def test_the_size_is_bounded(report, tmp_path, max_mb):
    report.to_html(tmp_path / "report.html", max_mb=max_mb)
    own = sum(len(json.dumps(card)) for card in cards(tmp_path / "report.html").values())
    card = card_of(tmp_path / "report.html", "a.svs")
    assert own <= 1e6 * max_mb + (1000 if max_mb > 0.01 else 4000)  # text is always there
    assert card["facts"]
    assert ("colours" in card) == (max_mb > 0.01)


def test_tiles_that_lie_on_no_grid_are_not_shown(report, tmp_path):
    row = next(row for row in report if row.slide == "a.svs")
    bag = FeatureBag.load(report.folder / row.output)
    places = np.stack([np.arange(5000), np.arange(5000)], axis=1)
    FeatureBag(np.zeros((5000, 6), "f4"), places, tiles=bag.tiles).save(tmp_path / "a.h5")
    CohortReport((row,), tmp_path).to_html(tmp_path / "report.html")
    assert card_of(tmp_path / "report.html", "a.svs")["cells"] == []


def test_tiles_that_were_damaged_and_dropped_are_cells_that_say_so(tmp_path):
    path = tmp_path / "slides" / "a.svs"
    path.parent.mkdir()
    write_svs(path, size=(1200, 960), mpp=0.5, power=20)
    with tifffile.TiffFile(path) as tiff:
        start, count = tiff.pages[0].dataoffsets[6], tiff.pages[0].databytecounts[6]
    data = bytearray(path.read_bytes())
    data[start : start + count] = bytes(count)
    path.write_bytes(data)
    spec = TileSpec(mpp=0.5, size_px=120)
    with pytest.warns(XmagWarning, match="damaged"):
        report = extract_cohort(
            path.parent, tmp_path, model=ColourEncoder(spec=spec), processes=0, tissue=None,
            damaged="drop",
        )  # fmt: skip
    report.to_html(tmp_path / "report.html")
    card = card_of(tmp_path / "report.html", "a.svs")
    # The seventh tile of 240 px: the second column of the second row of five.
    lost = [
        (y, x) for y, row in enumerate(card["cells"]) for x, cell in enumerate(row) if cell == "d"
    ]
    assert lost == [(2, 2), (2, 3), (3, 2), (3, 3)]
    assert "4 tiles damaged, and left out" in card["notes"]


def test_several_models_have_a_card_each_and_one_picture(slides, tmp_path):
    models = [ColourEncoder(spec=SPEC, name=name) for name in ("one", "two")]
    report = extract_cohort(slides, tmp_path, model=models, processes=0, tissue=None)
    report.to_html(tmp_path / "report.html")
    found = cards(tmp_path / "report.html")
    assert len([name for name in found if name.startswith("picture-")]) == 3
    names = [card["name"] for card in found.values() if "name" in card]
    assert names == [f"{row.slide} ({row.model})" for row in report]
    assert len({card["picture"] for card in found.values() if "name" in card}) == 3
    assert all(card["cells"][0].startswith("#") for card in found.values() if "name" in card)


def test_a_classifier_that_does_not_fit_leaves_its_layer_out_and_says_so(report, tmp_path):
    bags = [FeatureBag(np.random.default_rng(n).normal(size=(4, 3)).astype("f4"), np.zeros((4, 2)))
            for n in range(8)]  # fmt: skip
    classifier = MILClassifier(random_state=0, epochs=2)
    classifier.fit(bags, [0, 1] * 4, groups=list("abcdefgh"), validation=None)
    with pytest.warns(XmagWarning, match="2 of 3 cards have no attention"):
        report.to_html(tmp_path / "report.html", classifier=classifier)
    assert any("No attention" in n for n in card_of(tmp_path / "report.html", "a.svs")["notes"])


def test_the_page_says_as_the_heatmap_whether_attention_is_nearly_even(report, tmp_path):
    """A network of which two epochs are trained looks at all tiles nearly alike."""
    bag = FeatureBag.load(report.folder / "a.h5")
    classifier = MILClassifier(random_state=0, epochs=2)
    bags = [bag.features + n for n in range(8)]
    classifier.fit(bags, [0, 1] * 4, groups=list("abcdefgh"), validation=None)
    attention = classifier.attention(bag)
    share = np.sort(attention.scores)[-math.ceil(len(bag) / 10) :].sum() / attention.scores.sum()
    even = ": nearly even" if draw.is_nearly_even(attention) else ""
    assert even
    report.to_html(tmp_path / "report.html", classifier=classifier)
    words = card_of(tmp_path / "report.html", "a.svs")["attention"]
    assert words.startswith(f"The top {math.ceil(len(bag) / 10)} of {len(bag)} tiles hold")
    assert words.endswith(f" {share:.0%} of the weight{even}.")


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


def made_up_comparison():
    pytest.importorskip("matplotlib")
    from xmag.evaluate import ComparedModel, Comparison, Estimate
    from xmag.metrics.bootstrap import Interval

    def model(name, value):
        estimate = Estimate(value=value, interval=Interval(value - 0.1, value + 0.05))
        return ComparedModel(
            model=name, training="frozen", mpp=2.0, parameters=86_000_000, tiles=1234.5, gflop=57.0,
            slides_per_minute=8.8, megabytes=3.1, estimates={"internal": estimate},
            differences={"internal": estimate},
        )  # fmt: skip

    models = (model("a <b>", 0.8), model("10x", 0.75))
    return Comparison(metric="auroc_ovr", title="AUROC", models=models, reports={})


def test_a_comparison_is_a_page_that_sorts_by_numbers(tmp_path):
    made_up_comparison().to_html(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert '<th scope="row">a &lt;b&gt;</th>' in text
    assert '<th scope="row">10x</th>' in text  # a name, and no number
    assert '<td class="number" data-value="0.75">0.750 (0.650–0.800)</td>' in text
    assert '<td class="number" data-value="1234.5">1,234.5</td>' in text
    assert text.count("<figure>") == 1


def test_the_commands_know_the_folder_of_a_comparison(tmp_path, capsys):
    comparison = made_up_comparison()
    comparison.save(tmp_path)
    assert type(comparison).load(tmp_path) == comparison
    comparison.to_html(tmp_path / "mine.html")
    assert main(["report", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").read_text() == (tmp_path / "mine.html").read_text()
    assert main(["report", str(tmp_path), "--title", "x"]) == 2
    assert "a comparison, which has no slides: leave out --title" in capsys.readouterr().err
    assert main(["info", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert all(line in out for line in str(comparison).splitlines())
    (tmp_path / "compare.json").write_text('{"format": "xmag.Comparison", "schema_version": 1}')
    assert main(["report", str(tmp_path)]) == 2
    assert "is not what Comparison.save wrote" in capsys.readouterr().err


_SEEN_AS = {  # Machado, Oliveira and Fernandes 2009, severity 1, of linear RGB
    "protanope": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                  [-0.003882, -0.048116, 1.051998]],
    "deuteranope": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                    [-0.011820, 0.042940, 0.968881]],
    "tritanope": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
                  [0.004733, 0.691367, 0.303900]],
}  # fmt: skip
_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def lab(linear):
    xyz = _XYZ @ np.clip(linear, 0, 1) / [0.95047, 1, 1.08883]
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("eyes", _SEEN_AS)
def test_a_colour_blind_reader_tells_the_colours_apart(eyes):
    folder = files("xmag.draw") / "html"
    script, style = ((folder / name).read_text() for name in ("cohort.js", "page.css"))
    cells = re.findall(r'", "(#[0-9a-f]{6})", \[', script)
    cells += re.findall(r'const (?:KEPT|PIECE) = "(#[0-9a-f]{6})"', script)
    cells += re.findall(r"\.swatch\.tissue { border-color: (#[0-9a-f]{6})", style)
    stages = re.findall(r"--(?:planning|reading|embedding|saving): (#[0-9a-f]{6})", style)
    assert (len(cells), len(stages)) == (7, 4)
    for colours in (cells, stages):
        values = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in colours]) / 255
        linear = np.where(values > 0.04045, ((values + 0.055) / 1.055) ** 2.4, values / 12.92)
        seen = [lab(np.array(_SEEN_AS[eyes]) @ colour) for colour in linear]
        apart = min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2))
        assert apart > 12  # 2.3 is just noticed
