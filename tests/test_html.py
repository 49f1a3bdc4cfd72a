"""Pages as a person uses them: driven in headless Chromium, which also says what they ask for."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.browser import CHROMIUM, Browser
from support.encoders import ColourEncoder
from support.slides import texture, write_svs

from xmag.bag import FeatureBag
from xmag.cohort import CohortReport, CohortRow, extract_cohort
from xmag.geometry import TileSpec
from xmag.mil import MILClassifier
from xmag.plan import plan_tiles
from xmag.slide import Slide
from xmag.tissue import TissueMask, find_tissue

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, which is not installed")

EVIL = "<img src=x onerror=window.hacked=1>.svs"
SPEC, SIDE = TileSpec(size_px=56), 224
"""Tiles, and their side on slides of 0.5 µm/px."""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """The folder of slides, that of their features, their report, and a classifier."""
    root = tmp_path_factory.mktemp("cohort")
    slides, out = root / "slides", root / "out"
    slides.mkdir()
    for number, name in enumerate(["a.svs", "b.svs", EVIL, "small.svs"]):
        pixels = np.full((1100, 1450, 3), 244, np.uint8)
        if name != "small.svs":
            pixels[150:850, 250 : 650 + 250 * number] = texture(400 + 250 * number, 700)
        write_svs(slides / name, pixels=pixels, mpp=0.5, power=20)
    (slides / "broken.svs").write_bytes((slides / "a.svs").read_bytes()[:9000])
    report = extract_cohort(slides, out, model=ColourEncoder(spec=SPEC), processes=0)
    bags = [FeatureBag.load(out / row.output) for row in report if row.tiles] * 4
    classifier = MILClassifier(random_state=0, epochs=8)
    groups = [str(n) for n in range(len(bags))]
    classifier.fit(bags, [n % 2 for n in range(len(bags))], groups=groups, validation=None)
    return slides, out, report, classifier


@pytest.fixture(scope="module")
def path(cohort):
    _, out, report, classifier = cohort
    report.to_html(out / "report.html", classifier=classifier)
    return out / "report.html"


@pytest.fixture
def page(browser, path):
    browser.open(path)
    return browser


def open_card(page, name):
    """Open the card of a slide, and wait for its pictures."""
    page.run(
        "[...document.querySelectorAll('tbody button')]"
        f".find(b => b.textContent === {name!r}).click()"
    )
    page.until(
        "viewer && viewer.scale && viewer.thumbnail && (viewer.mask || !viewer.layers.tissue)"
    )


def bag_of(cohort, name):
    """The bag of a slide, and the attention that the classifier has for it."""
    _, out, report, classifier = cohort
    (row,) = (row for row in report if row.slide == name)
    bag = FeatureBag.load(out / row.output)
    return bag, classifier.attention(bag).scores


def points(bag, tile, mask, *, tissue):
    """Points in a tile that lie in tissue, or in glass, with all px of the mask around them."""
    steps = np.arange(20, SIDE - 20, 8)
    found = []
    for at in np.stack(np.meshgrid(steps, steps), -1).reshape(-1, 2) + bag.coords[tile]:
        left, top = np.floor(at / mask.downsample - 0.5).astype(int).clip(0)
        if (mask.mask[top : top + 2, left : left + 2] == tissue).all():
            found.append(at.tolist())
    return found


def order(page):
    return page.run("visible().map(row => Number(row.dataset.card))")


def view(page):
    return np.array(page.run("[viewer.x, viewer.y, viewer.scale]"))


def on_screen(page, x, y):
    """Where a point in level-0 px of the open slide is."""
    left, top = page.place("canvas", 0, 0)
    at_x, at_y, scale = view(page)
    return left + (x - at_x) * scale, top + (y - at_y) * scale


def colour_at(page, x, y):
    """The colour at a point in level-0 px: the mean of 5 x 5 px, with the mouse elsewhere."""
    page.mouse("mouseMoved", (2, 2))
    left, top = (round(v) for v in on_screen(page, x, y))
    shown = np.asarray(Image.open(io.BytesIO(page.pixels())).convert("RGB")).astype(int)
    return shown[top - 2 : top + 3, left - 2 : left + 3].mean((0, 1))


# ---- what it asks for, and what it runs ----


def test_the_page_asks_for_nothing_but_itself_and_nothing_goes_wrong(page, path):
    open_card(page, "a.svs")
    for key in "123456+-0][jk":
        page.press(key)
    asked = [url for url in page.requests if not url.startswith("data:")]
    assert asked == [path.as_uri()]
    assert page.faults == []


@pytest.mark.parametrize(
    "attempt",
    [
        "fetch('data:text/plain,x').then(() => 'sent', () => 'refused')",
        "new Promise(done => { const i = new Image(); i.onload = () => done('sent');"
        " i.onerror = () => done('refused'); i.src = 'pixel.png'; })",
        "new Promise(done => { const s = document.createElement('script');"
        " s.textContent = 'window.ran = 1'; document.body.append(s);"
        " setTimeout(() => done(window.ran ? 'ran' : 'refused'), 50); })",
        "new Promise(done => { document.body.insertAdjacentHTML('beforeend',"
        ' \'<img src="data:image/png;base64,AA" onerror="window.ran = 1">\');'
        " setTimeout(() => done(window.ran ? 'ran' : 'refused'), 50); })",
    ],
)
def test_the_policy_refuses_requests_and_scripts(page, path, attempt):
    Image.new("RGB", (1, 1)).save(path.with_name("pixel.png"))
    assert page.run(attempt) == "refused"


def test_names_and_errors_are_text(browser, tmp_path):
    evil = "</script x='><script>window.hacked = 1</script><!--<script "
    rows = (
        CohortRow(slide=EVIL, status="failed", error=evil),
        CohortRow(slide='"><svg onload=window.hacked=1>', status="lost", model=evil),
    )
    CohortReport(rows).to_html(tmp_path / "report.html", title=evil)
    browser.open(tmp_path / "report.html")
    assert browser.run("document.title") == evil.strip()
    names = browser.run("[...document.querySelectorAll('tbody button')].map(b => b.textContent)")
    assert names == [row.slide for row in rows]
    for number in range(2):
        browser.run(f"open(body.rows[{number}])")
        assert browser.run("card.querySelector('.name').textContent").startswith(rows[number].slide)
    assert evil in browser.run("content('card-0').notes[0]")
    assert browser.run("window.hacked === undefined")
    assert browser.faults == []


# ---- the table ----


@pytest.mark.parametrize("column", ["slide", "status", "tiles", "coverage", "seconds", "embedding"])
def test_the_table_sorts_by_each_column_and_back(page, cohort, column):
    report = cohort[2]
    field = {"embedding": "embedding_seconds"}.get(column, column)
    values = [getattr(row, field) for row in report]
    if "seconds" in field:
        values = [round(value, 3) for value in values]  # as they are shown
    missing = [
        n
        for n, v in enumerate(values)
        if v is None or ("seconds" in field and not getattr(report[n], field))
    ]
    known = [n for n in range(len(values)) if n not in missing]
    ascending = sorted(known, key=lambda n: values[n])
    place = page.run(f"columns.findIndex(c => c.startsWith({column!r}))") + 1
    for direction, wanted in (
        ("ascending", ascending),
        ("descending", sorted(known, key=lambda n: values[n], reverse=True)),
    ):
        page.click(f"thead th:nth-child({place}) button")
        head = f"document.querySelector('thead th:nth-child({place})')"
        assert page.run(f"{head}.getAttribute('aria-sort')") == direction
        shown = order(page)
        assert [values[n] for n in shown[: len(known)]] == [values[n] for n in wanted]
        assert set(shown[len(known) :]) == set(missing)


@pytest.mark.parametrize(
    ("text", "keeps"),
    [
        ("a.svs", lambda row: "a.svs" in row.slide),
        ("tiles>0", lambda row: row.tiles > 0),
        ("tiles<40 tiles>0", lambda row: 0 < row.tiles < 40),
        ("coverage>0.5", lambda row: (row.coverage or 0) > 0.5),
        ("truncated", lambda row: "truncated" in row.error),
        ("nothing has this", lambda row: False),
    ],
)
def test_the_table_filters_by_words_and_numbers(page, cohort, text, keeps):
    page.click("#filter")
    page.call("Input.insertText", text=text)
    wanted = [n for n, row in enumerate(cohort[2]) if keeps(row)]
    assert order(page) == wanted
    assert page.run("shown.textContent").startswith(f"{len(wanted)} of 5")


def test_the_table_filters_by_status(page, cohort):
    page.click("input[value=done]")
    assert order(page) == [n for n, row in enumerate(cohort[2]) if row.status != "done"]


# ---- a card ----


def test_a_card_opens_by_mouse_and_by_key_and_gives_the_focus_back(page):
    assert page.run("card.hidden")
    page.click("tr[data-card='2'] button")
    assert page.run("card.querySelector('.name').textContent") == "b.svs"
    page.press("Escape")
    assert page.run("card.hidden && document.activeElement.textContent") == "b.svs"
    page.press("ArrowUp")
    page.press("Enter")
    assert page.run("card.querySelector('.name').textContent") == "a.svs"
    page.press("j")
    assert page.run("card.querySelector('.name').textContent") == "b.svs"
    page.press("k")
    assert page.run("card.querySelector('.name').textContent") == "a.svs"


def test_the_mouse_shows_the_values_of_a_tile(page, cohort):
    bag, scores = bag_of(cohort, "b.svs")
    open_card(page, "b.svs")
    for tile in (0, len(bag) // 2):
        x, y = bag.coords[tile].tolist()
        page.mouse("mouseMoved", on_screen(page, x + SIDE / 2, y + SIDE / 2))
        told = page.run("viewer.tip.hidden ? '' : viewer.tip.textContent")
        assert f"tile {tile + 1} of {len(bag)}\nat {x:,}, {y:,} px" in told
        found = re.search(r"attention ([\d.e-]+), ([\d.]+)× the mean, rank (\d+) of 100", told)
        assert float(found[1]) == pytest.approx(scores[tile], rel=0.01)
        assert float(found[2]) == pytest.approx(scores[tile] / scores.mean(), rel=0.06)
        below = np.mean(np.delete(scores, tile) < scores[tile])
        assert int(found[3]) == pytest.approx(100 * below, abs=1)


def test_dropped_cells_say_why(page, cohort):
    with Slide(cohort[0] / "a.svs") as slide:
        plan = plan_tiles(slide, SPEC, tissue=find_tissue(slide))
    open_card(page, "a.svs")
    x, y = plan.dropped["tissue"][0].tolist()
    page.mouse("mouseMoved", on_screen(page, x + SIDE / 2, y + SIDE / 2))
    assert page.run("viewer.tip.textContent") == (f"no tile: too little tissue\nat {x:,}, {y:,} px")
    labels = page.run("card.querySelector('.layers').textContent")
    assert f"{len(plan.dropped['tissue'])} dropped: too little tissue" in labels
    assert f"{len(plan)} tiles" in labels


@pytest.mark.filterwarnings("ignore:the .* tiles? of .* cover")
def test_the_mask_and_the_region_that_were_given_are_what_is_shown(browser, cohort, tmp_path):
    own = np.zeros((110, 145), np.uint8)  # a px is 10 of the slide
    own[25:80, 28:60] = 255
    Image.fromarray(own).save(tmp_path / "mask.png")
    ring = [[250, 0], [560, 0], [560, 1100], [250, 1100]]
    roi = {"type": "Polygon", "coordinates": [ring]}
    (tmp_path / "roi.json").write_text(json.dumps(roi))
    slide = cohort[0] / "a.svs"
    report = extract_cohort(
        [slide], tmp_path / "out", model=ColourEncoder(spec=SPEC), processes=0,
        tissue=tmp_path / "mask.png", roi=tmp_path / "roi.json",
    )  # fmt: skip
    report.to_html(tmp_path / "report.html")
    with Slide(slide) as opened:
        mask = TissueMask.from_array(own > 0, opened)
        plan = plan_tiles(opened, SPEC, tissue=mask, roi=roi)
    browser.open(tmp_path / "report.html")
    open_card(browser, "a.svs")
    labels = browser.run("card.querySelector('.layers').textContent")
    assert f"{len(plan)} tiles" in labels
    assert f"{len(plan.dropped['roi'])} dropped: outside the region of interest" in labels
    x, y = plan.dropped["roi"][0].tolist()
    browser.mouse("mouseMoved", on_screen(browser, x + SIDE / 2, y + SIDE / 2))
    said = browser.run("viewer.tip.textContent")
    assert said == f"no tile: outside the region of interest\nat {x:,}, {y:,} px"
    # The map of the features stays on the mask, and in the region.
    bag = FeatureBag.load(tmp_path / "out" / "a.h5")
    rows, columns = np.nonzero(plan.tissue.mask)
    tissue = (np.stack([columns, rows], -1) + 0.5) * plan.tissue.downsample

    def deepest(is_inside):
        """The point in a tile that lies deepest in the tissue, or farthest from it."""
        places = np.array([
            place for tile in (0, 1)  # in the middle of the view
            for place in points(bag, tile, plan.tissue, tissue=is_inside)
            if place[0] > 250  # where what is stained begins
        ])  # fmt: skip
        gaps = np.linalg.norm(places[:, None] - tissue, axis=2)
        return places[(gaps < 100).sum(1).argmax() if is_inside else gaps.min(1).argmax()]

    names = browser.run("Object.keys(viewer.layers)")
    browser.press(str(1 + names.index("features")))  # its colours, over the slide in grey
    inside, outside = (colour_at(browser, *deepest(is_inside)) for is_inside in (True, False))
    assert np.ptp(inside) > 20
    assert np.ptp(outside) < 3


def test_layers_are_drawn_where_they_belong_and_switch_by_key_and_box(page, cohort):
    bag, scores = bag_of(cohort, "a.svs")
    open_card(page, "a.svs")
    names = page.run("Object.keys(viewer.layers)")
    assert {"tissue", "tiles", "t", "features", "attention"} <= {*names}
    with Slide(cohort[0] / "a.svs") as slide:
        mask = find_tissue(slide)
    middle = {
        name: np.median(points(bag, tile, mask, tissue=True), axis=0).tolist()
        for name, tile in (("most", scores.argmax()), ("least", scores.argmin()))
    }
    most, least = (colour_at(page, *middle[name]) for name in ("most", "least"))
    assert most[:2].mean() > most[2] + 60  # yellow
    assert least[2] > least[1] + 20  # violet
    page.press(str(1 + names.index("attention")))
    assert not page.run("viewer.layers.attention.checked")
    plain = colour_at(page, *middle["most"])
    assert plain[0] > plain[1] + 20  # pink as the tissue is, and no longer grey
    page.click("input[name=features]")
    mapped = colour_at(page, *middle["most"])
    assert np.abs(mapped - plain).max() > 20
    page.press(str(1 + names.index("attention")))  # both colour tiles: one of them at a time
    assert not page.run("viewer.layers.features.checked")
    assert np.abs(colour_at(page, *middle["most"]) - most).max() < 3


def test_colours_of_tiles_stay_on_the_tissue(page, cohort):
    bag, _ = bag_of(cohort, "a.svs")
    open_card(page, "a.svs")
    with Slide(cohort[0] / "a.svs") as slide:
        mask = find_tissue(slide)
    glass = [point for tile in range(len(bag)) for point in points(bag, tile, mask, tissue=False)]
    assert glass
    assert colour_at(page, *glass[0]).min() > 235


def test_wheel_drag_and_keys_move_and_zoom(page):
    open_card(page, "a.svs")
    whole = view(page)
    place = on_screen(page, 450, 400)
    at = (round(place[0]), round(place[1]))  # as a mouse has it
    x, y = view(page)[:2] + np.subtract(at, page.place("canvas", 0, 0)) / view(page)[2]
    page.mouse("mouseMoved", at)
    page.mouse("mouseWheel", at, deltaX=0, deltaY=-600)
    page.until(f"viewer.scale > {whole[2]}")
    assert on_screen(page, x, y) == pytest.approx(at, abs=0.5)  # what is pointed at stays
    before = view(page)
    page.drag(at, (at[0] + 40, at[1] - 30))
    assert on_screen(page, x, y) == pytest.approx((at[0] + 40, at[1] - 30), abs=0.5)
    assert view(page)[2] == before[2]
    page.press("+")
    assert view(page)[2] == pytest.approx(1.5 * before[2])
    page.press("-")
    assert view(page)[2] == pytest.approx(before[2])
    page.run("viewer.canvas.focus()")
    before = view(page)
    page.press("ArrowRight")
    assert (view(page) - before)[0] == pytest.approx(60 / before[2])
    page.press("0")
    assert view(page) == pytest.approx(whole)
    page.click(".buttons .in")
    assert view(page)[2] == pytest.approx(1.5 * whole[2])


def test_brackets_go_from_tile_to_tile_and_are_read_aloud(page, cohort):
    bag, _ = bag_of(cohort, "a.svs")
    open_card(page, "a.svs")
    for key, tile in (("]", 1), ("]", 2), ("[", 1), ("[", len(bag))):
        page.press(key)
        said = page.run("card.querySelector('.said[role=status]').textContent")
        assert said.startswith(f"tile {tile} of {len(bag)}, at ")


def test_top_tiles_are_those_with_most_attention_and_lead_to_their_place(page, cohort):
    bag, scores = bag_of(cohort, "a.svs")
    open_card(page, "a.svs")
    page.until("[...card.querySelectorAll('.tiles img')].every(i => i.complete && i.naturalWidth)")
    titles = page.run("[...card.querySelectorAll('.tiles button')].map(b => b.title)")
    chosen = [int(re.search(r"tile (\d+)", title)[1]) - 1 for title in titles]
    assert scores[chosen].tolist() == sorted(scores.tolist(), reverse=True)[:12]
    page.run("card.querySelector('.tiles button').click()")
    corner = bag.coords[chosen[0]]
    middle = page.run("[viewer.x + viewer.canvas.clientWidth / 2 / viewer.scale,"
                      " viewer.y + viewer.canvas.clientHeight / 2 / viewer.scale]")  # fmt: skip
    assert middle == pytest.approx((corner + SIDE / 2).tolist(), abs=1)


def test_an_empty_and_a_failed_slide_say_why(page, cohort):
    names = {row.slide: row for row in cohort[2]}
    page.run("[...document.querySelectorAll('tbody button')].find("
             "b => b.textContent === 'small.svs').click()")  # fmt: skip
    assert "No tissue was found" in page.run("card.querySelector('.notes').textContent")
    page.press("Escape")
    page.run("[...document.querySelectorAll('tbody button')].find("
             "b => b.textContent === 'broken.svs').click()")  # fmt: skip
    assert names["broken.svs"].error in page.run("card.querySelector('.notes').textContent")
    assert page.run("card.querySelector('.viewer').hidden")


def test_a_thousand_slides_are_built_when_they_are_looked_at(browser, cohort, tmp_path):
    _, out, report, _ = cohort
    row = report[1]
    rows = (row,) * 20 + (replace(row, output=""),) * 979 + (row,)
    CohortReport(rows, out).to_html(tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 41e6
    browser.open(tmp_path / "report.html")
    assert browser.run("body.rows.length") == 1000
    assert browser.run("document.querySelectorAll('canvas').length") == 0
    browser.run("open(body.rows[999])")
    assert browser.run("viewer.tiles.length") == row.tiles
    assert browser.run("document.querySelectorAll('canvas').length") <= 2
    browser.click("thead th:nth-child(3) button")
    assert len(order(browser)) == 1000


# ---- an evaluation ----


def test_an_evaluation_is_a_page_of_its_own(browser, tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    from sklearn.linear_model import LogisticRegression
    from support.cohorts import cohort

    from xmag.evaluate import external

    evil = "site <img src=x onerror=window.hacked=1>"
    report = external(
        LogisticRegression(),
        {"home": tuple(cohort(1, patients=20)), evil: tuple(cohort(2, patients=20, shift=0.3))},
        train="home",
        resamples=20,
    )
    report.to_html(tmp_path / "report.html")
    browser.open(tmp_path / "report.html")
    text = browser.run("document.body.innerText")
    assert evil in text
    for result in report.results:
        assert str(result.estimates["accuracy"]) in text
    assert browser.run("[...document.querySelectorAll('figure img')].every(i => i.naturalWidth)")
    assert browser.run("document.querySelectorAll('figure img').length") == 3
    head = "[...document.querySelectorAll('thead th')]"
    place = browser.run(f"{head}.findIndex(h => h.textContent === 'accuracy')") + 1
    browser.click(f"thead th:nth-child({place}) button")
    shown = browser.run(f"[...document.querySelectorAll('tbody td:nth-child({place})')]"
                        ".map(c => c.textContent)")  # fmt: skip
    values = sorted(result.estimates["accuracy"].value for result in report.results)
    assert [float(cell.split()[0]) for cell in shown] == pytest.approx(values, abs=5e-4)
    asked = [url for url in browser.requests if not url.startswith("data:")]
    assert asked == [Path(tmp_path / "report.html").as_uri()]
    assert browser.run("window.hacked === undefined")
    assert browser.faults == []
