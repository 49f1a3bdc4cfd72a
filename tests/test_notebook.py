"""What a notebook shows of public objects, by IPython's own formatters, and their reprs."""

import base64
import inspect
import io
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from support.encoders import ColourEncoder
from support.fake_reader import FakeTileReader, noise
from support.slides import write_svs

import xmag
from xmag.cohort import CohortReport, CohortRow
from xmag.colours import component_colours, principal_components
from xmag.extract import extract_features
from xmag.geometry import TileSpec
from xmag.mil import Attention, SurvivalFunction
from xmag.plan import plan_tiles
from xmag.slide import Slide
from xmag.tissue import TissueMask

SECRET = "patient-4711"


@pytest.fixture(scope="module")
def formatted():
    """The data by type that IPython makes of an object."""
    formatters = pytest.importorskip("IPython.core.formatters", reason="needs the group test")
    display = formatters.DisplayFormatter()

    def of(thing):
        return display.format(thing)[0]

    return of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp(SECRET)


@pytest.fixture(scope="module")
def path(folder):
    write_svs(folder / "a.svs", size=(2000, 1500), mpp=1.0, power=10, levels=(1, 4))
    return folder / "a.svs"


@pytest.fixture(scope="module")
def bag(path):
    return extract_features(path, model=ColourEncoder(), tissue=None)


class _Page(HTMLParser):
    """Tags, text, cells and pictures of some HTML; every tag is closed in its turn."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.rows, self.text, self.pictures = [], set(), [], "", []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "img":
            kind, _, data = dict(attrs)["src"].partition(",")
            assert kind == "data:image/png;base64"
            picture = Image.open(io.BytesIO(base64.b64decode(data)))
            self.pictures.append(np.asarray(picture.convert("RGB")).astype(int))
            return
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def page_of(thing, formatted):
    data = formatted(thing)
    assert data["text/plain"] == repr(thing)
    return _Page(data["text/html"])


def plan_of(slide):
    mask = np.zeros((75, 100), bool)
    mask[0:10, 0:12] = mask[40:60, 60:90] = True
    tissue = TissueMask(mask=mask, mpp=16.0, downsample=16.0, method={})
    return plan_tiles(slide, TileSpec(size_px=100), tissue=tissue)


def white_slide(name="white.svs"):
    pixels = np.full((1200, 1600, 3), 240, np.uint8)
    return Slide.from_reader(FakeTileReader(pixels, mpp=1.0), name=name)


def test_a_slide_shows_its_thumbnail(path, formatted):
    with Slide(path) as slide:
        page = page_of(slide, formatted)
        thumbnail = np.asarray(slide.thumbnail(max_px=480), int)
    assert page.text == "Slide 'a.svs' aperio 2000x1500 px, 1 µm/px"
    np.testing.assert_array_equal(page.pictures[0], thumbnail)


def test_a_slide_that_is_closed_or_gone_still_says_what_it_was(folder, formatted):
    path = folder / "gone.svs"
    write_svs(path, size=(1300, 900), mpp=0.25)
    slide = Slide(path)
    slide.close()
    path.unlink()
    assert repr(slide) == "<Slide 'gone.svs' aperio 1300x900 px, 0.25 µm/px, closed>"
    assert page_of(slide, formatted).pictures == []


def test_a_slide_whose_thumbnail_is_damaged_is_shown_without(formatted, capsys):
    reader = FakeTileReader(noise(600, 400), damaged=range(6))
    slide = Slide.from_reader(reader, name="damaged")
    assert page_of(slide, formatted).pictures == []
    assert capsys.readouterr() == ("", "")


def test_a_slide_without_a_small_level_is_not_decoded_to_be_shown(formatted, monkeypatch):
    slide = white_slide()
    assert page_of(slide, formatted).pictures
    monkeypatch.setattr("xmag.slide.slide._SHOWN_PX", 1600 * 1200 - 1)
    slide.reader.decoded.clear()
    assert page_of(slide, formatted).pictures == []
    assert not slide.reader.decoded


def test_a_tissue_mask_shows_where_tissue_is(formatted):
    mask = np.zeros((30, 60), bool)
    mask[10:20, 15:45] = True
    tissue = TissueMask(mask=mask, mpp=50.0, downsample=100.0, method={"name": "given"})
    page = page_of(tissue, formatted)
    assert page.text == "TissueMask of 17% of the slide, 0.75 mm², at 50 µm/px"
    picture = page.pictures[0]
    assert picture.shape == (240, 480, 3)
    expected = np.kron(mask, np.ones((8, 8), bool))
    np.testing.assert_array_equal((picture != 255).any(axis=2), expected)
    empty = TissueMask(mask=np.zeros((0, 0), bool), mpp=50.0, downsample=100.0, method={})
    assert page_of(empty, formatted).pictures == []


def test_a_plan_shows_its_tiles_over_the_tissue(formatted):
    plan = plan_of(white_slide())
    page = page_of(plan, formatted)
    assert page.text == (
        f"TilePlan of {len(plan)} tiles of 100 px at 2 µm/px, {plan.coverage:.0%} of the tissue;"
        f" dropped {len(plan.dropped['tissue'])} tissue"
    )
    picture, scale = page.pictures[0], 480 / 1600
    assert picture.shape == (360, 480, 3)
    blue = (picture == (0, 90, 160)).all(axis=2)
    expected = np.zeros((360, 480), bool)
    for x, y in (plan.coords * scale).round().astype(int):
        expected[y : y + 60, x : x + 60] = True
        expected[y + 1 : y + 59, x + 1 : x + 59] = False
    np.testing.assert_array_equal(blue, expected)
    assert tuple(picture[10, 10]) == (246, 221, 166)  # tissue
    assert tuple(picture[350, 10]) == (255, 255, 255)


def test_a_bag_shows_the_colours_of_its_embeddings(bag, formatted):
    page = page_of(bag, formatted)
    by = bag.provenance.record["model"]["name"]
    assert (
        page.text
        == f"FeatureBag of {len(bag)} tiles, {bag.features.shape[1]} features each, by {by}"
    )
    colours = component_colours(principal_components(bag.features.astype(float))[0])
    scale = 480 / 2000
    for (x, y), colour in zip(bag.coords * scale, colours.astype(int), strict=True):
        middle = bag.tiles.size_level0 * scale / 4  # less is under the next tile
        assert tuple(page.pictures[0][int(y + middle), int(x + middle)]) == tuple(colour)
    bare = xmag.FeatureBag(bag.features, None)
    assert page_of(bare, formatted).pictures == []


def test_nothing_is_opened_or_embedded_to_be_shown(path, bag, formatted, monkeypatch):
    monkeypatch.setattr(ColourEncoder, "embed", lambda *_: pytest.fail("embedded"))
    opened = []
    is_on = True
    sys.addaudithook(
        lambda name, args: opened.append(args[0]) if is_on and name == "open" else None
    )
    with Slide(path) as slide:
        plan = plan_tiles(slide, bag_spec(bag))
        opened.clear()
        for thing in (slide, plan, bag):
            formatted(thing)
        is_on = False
    assert not [name for name in opened if name.endswith((".svs", ".h5"))]


def bag_spec(bag):
    return TileSpec(size_px=bag.tiles.size_px)


def rows_of(count):
    yield CohortRow(slide="a.svs", status="done", tiles=1200, coverage=0.934, seconds=1.25)
    yield CohortRow(slide="<script>alert(1)</script>", status="failed", error="it is & was\x00 <b>")
    for number in range(2, count):
        yield CohortRow(slide=f"{number}.svs", status="skipped", tiles=3)


def test_a_cohort_shows_what_went_wrong_first(formatted):
    report = CohortReport(tuple(rows_of(40)))
    page = page_of(report, formatted)
    assert repr(report) == (
        "<CohortReport of 40 slides: 1 done, 1 failed, 38 skipped; 1,314 tiles>"
    )
    assert "script" not in page.tags
    assert page.rows[0] == ["status", "slide", "model", "tiles", "coverage", "seconds", "error"]
    assert page.rows[1][:2] == ["failed", "<script>alert(1)</script>"]
    assert page.rows[1][-1] == "it is & was\ufffd <b>"
    assert page.rows[2] == ["done", "a.svs", "", "1,200", "93%", "1.2", ""]
    assert len(page.rows) == 31
    assert "and 10 more" in page.text
    assert page_of(CohortReport(()), formatted).rows == []


def test_an_encoder_shows_its_model_device_and_terms(formatted):
    encoder = xmag.load_model("xmag-mini", device="cpu")
    assert repr(encoder) == (
        "<Encoder 'xmag-mini': tiles of 224 px at 2 µm/px,"
        f" {encoder.embed_dim} features; cpu, float32>"
    )
    assert ["terms", encoder.provenance["terms"]] in page_of(encoder, formatted).rows
    elsewhere = encoder.named(f"/home/{SECRET}/model")
    assert SECRET not in str(formatted(elsewhere))


def test_an_estimator_shows_parameters_and_what_it_learned(formatted):
    clf = xmag.MILClassifier(aggregator="mean", epochs=2, device="cpu", random_state=0)
    assert repr(clf) == "MILClassifier(aggregator='mean', epochs=2, device='cpu', random_state=0)"
    rows = page_of(clf, formatted).rows
    assert {tuple(row) for row in rows} >= {("epochs", "2"), ("not fitted yet", "")}
    assert [row[0] for row in rows[1:-1]] == sorted(clf.get_params())
    rng = np.random.default_rng(0)
    bags = [rng.normal(size=(4, 3)).astype(np.float32) for _ in range(6)]
    clf.fit([xmag.FeatureBag(x, None) for x in bags], list("ababab"), validation=None)
    rows = {tuple(row) for row in page_of(clf, formatted).rows}
    assert rows >= {
        ("fitted", ""), ("n_features_in_", "3"), ("classes_", "['a', 'b']"),
        ("history_", "2 epochs"), ("aggregator_", "MeanPool"),
    }  # fmt: skip


def test_evaluations_show_their_tables(formatted):
    evaluate = pytest.importorskip("xmag.evaluate")
    pytest.importorskip("sklearn", reason="needs the extra evaluate")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 3)), np.arange(40) % 2
    probe = evaluate.SimpleShot()
    assert repr(probe) == "SimpleShot()"
    report = evaluate.cross_validate(
        probe, x + y[:, None], y, groups=np.arange(40), folds=2, resamples=20
    )
    estimate = report.estimate("auroc_ovr")
    page = page_of(report, formatted)
    assert repr(report) == f"<Report of {report.title}: AUROC of 1 {estimate}>"
    assert page.rows == cells_of(report.table())
    assert repr(report.results[0]) == "<Result of classification, tested on the cohort: 40 cases>"
    assert repr(report.folds) == "<Folds: 2 splits of 40 cases>"
    models = [compared(evaluate, name, estimate) for name in ("one", "two")]
    comparison = evaluate.Comparison(
        metric="auroc_ovr", title="AUROC", models=tuple(models), reports={}
    )
    value = f"{estimate.value:.3f}"
    assert repr(comparison) == f"<Comparison of 2 models, AUROC: one {value}, two {value}>"
    assert page_of(comparison, formatted).rows == cells_of(comparison.to_markdown())


def compared(evaluate, name, estimate):
    return evaluate.ComparedModel(
        model=name, training="frozen", mpp=2.0, parameters=10**6, tiles=12.5, gflop=3.0,
        slides_per_minute=None, megabytes=0.1, estimates={"internal": estimate},
        differences={"internal": estimate},
    )  # fmt: skip


def cells_of(markdown):
    lines = [line.strip("|").split("|") for line in markdown.splitlines()]
    return [[cell.strip() for cell in line] for number, line in enumerate(lines) if number != 1]


def test_every_repr_is_one_short_line_without_folders(path, folder, bag):
    with Slide(path) as slide:
        plan = plan_tiles(slide, bag_spec(bag))
        scores = np.full(len(bag), 1 / len(bag), np.float32)
        attention = Attention(scores=scores, coords=bag.coords, kind="softmax", tiles=bag.tiles)
        things = [slide, plan, bag, bag.provenance, attention, slide.facts]
        for thing in things:
            assert "\n" not in repr(thing)
            assert len(repr(thing)) < 400
            assert SECRET not in repr(thing)
        assert slide.facts.version not in repr(slide.facts)  # when it was scanned, maybe
    assert re.match(r"<Provenance: .*, weights \S{12}, fp32>", repr(bag.provenance))
    assert repr(attention).startswith(f"<Attention of {len(bag)} tiles, softmax, from 0.0")


def test_curves_are_told_in_a_line():
    roc = xmag.metrics.roc_curve([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
    assert repr(roc) == "<RocCurve of 5 points>"
    kaplan_meier = xmag.metrics.kaplan_meier(np.array([(1, 2.0), (0, 3.0), (1, 5.5), (0, 7.0)]))
    assert repr(kaplan_meier) == "<KaplanMeier of 4 times: 0.375 at 7>"
    steps = SurvivalFunction(np.array([1.0, 4.0]), np.array([0.9, 0.25]))
    assert repr(steps) == "<SurvivalFunction: 0.25 at 4, 2 steps>"


def test_completion_shows_what_is_public(path, bag):
    with Slide(path) as slide:
        encoder = xmag.load_model("xmag-mini", device="cpu")
        things = [slide, plan_of(white_slide()), bag, encoder, xmag.MILClassifier()]
        for thing in things:
            shown = {name for name in dir(thing) if not name.startswith("__")}
            public = {n for n, _ in inspect.getmembers_static(type(thing)) if n[0] != "_"}
            assert shown >= public
            assert not {name for name in shown if name.startswith("_")}
            assert {"__class__", "__repr__"} <= set(dir(thing))
    for part in ("draw", "metrics", "mil"):
        module = getattr(xmag, part)
        assert dir(module) == sorted(module.__all__)
