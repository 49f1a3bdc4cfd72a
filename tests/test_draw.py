import numpy as np
import pytest
from PIL import Image, ImageChops
from support.fake_reader import FakeTileReader

from xmag import draw
from xmag.bag import FeatureBag
from xmag.draw import overview
from xmag.draw.frame import tissue_area
from xmag.errors import BagError, InputError
from xmag.geometry import TileGeometry, TileSpec
from xmag.plan import plan_tiles
from xmag.slide import Slide
from xmag.tissue import TissueMask

ORANGE, BLUE = (230, 159, 0), (0, 90, 160)
DARK, THIN, VERMILLION = (34, 34, 34), (196, 196, 196), (213, 94, 0)


def white_slide(width, height, *, mpp=1.0, name="white.svs"):
    pixels = np.full((height, width, 3), 240, np.uint8)
    return Slide.from_reader(FakeTileReader(pixels, mpp=mpp), name=name)


def mask_of(slide, mask, mpp=16.0):
    return TissueMask(mask=mask, mpp=mpp, downsample=mpp / slide.mpp, method={})


def is_colour(image, colour, size):
    """Where an image has exactly this colour, within the part that shows the slide."""
    pixels = np.asarray(image)[: size[1], : size[0]]
    return (pixels == colour).all(axis=2)


def test_the_picture_begins_with_the_thumbnail():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (600, 1000, 3), np.uint8)
    slide = Slide.from_reader(FakeTileReader(pixels), name="noise.svs")
    image = draw.overlay(slide, max_px=700)
    thumbnail = slide.thumbnail(max_px=700).convert("RGB")
    assert image.mode == "RGB"
    assert image.width == thumbnail.width == 700
    assert image.height > thumbnail.height
    shown = image.crop((0, 0, *thumbnail.size))
    assert ImageChops.difference(shown, thumbnail).getbbox() is None


def test_tissue_is_outlined_on_the_inside_of_its_border():
    slide = white_slide(1600, 1600)
    mask = np.zeros((100, 100), bool)
    mask[20:70, 30:80] = True
    image = draw.overlay(slide, tissue=mask_of(slide, mask), max_px=800)
    drawn = is_colour(image, ORANGE, (800, 800))
    expected = np.zeros((800, 800), bool)
    expected[160:560, 240:640] = True
    expected[162:558, 242:638] = False
    corners = np.zeros_like(drawn)
    for y in (160, 560):
        for x in (240, 640):
            corners[y - 16 : y + 16, x - 16 : x + 16] = True  # rounded over two px of the mask
    assert drawn.sum() > 3000
    np.testing.assert_array_equal(drawn & ~corners, expected & ~corners)


def test_the_outline_of_a_slanted_border_has_no_steps():
    slide = white_slide(1600, 1600)
    columns = np.arange(100)
    mask = np.arange(100)[:, None] > 30 + columns // 3  # steps of 8 px on the picture
    image = draw.overlay(slide, tissue=mask_of(slide, mask), max_px=800)
    top = is_colour(image, ORANGE, (800, 800)).argmax(axis=0)[40:760]
    jumps = np.diff(top)
    assert jumps.min() >= 0
    assert jumps.max() <= 1
    assert np.abs(np.diff(top[::24]) - 8).max() <= 1
    assert np.bincount(np.diff(np.flatnonzero(jumps))).nonzero()[0].max() <= 8  # no long level


def test_tissue_of_the_last_row_and_column_is_outlined_to_the_border_of_the_slide():
    slide = white_slide(1630, 1590)  # the mask, of whole px, leaves out 30 and 22 level-0 px
    mask = np.zeros((49, 50), bool)
    mask[30:, 35:] = True
    image = draw.overlay(slide, tissue=mask_of(slide, mask, mpp=32.0), max_px=1630)
    drawn = is_colour(image, ORANGE, (1630, 1590))
    assert drawn[1589, 1120] and drawn[960, 1629]  # noqa: PT018
    assert not drawn[1000:, 1160:].any()


def test_smoothing_leaves_strands_and_the_area_of_tissue():
    mask = np.zeros((60, 80), bool)
    mask[20:50, 10:50] = True
    mask[30, 50:75] = True  # a strand of one px
    area = np.asarray(tissue_area(mask_of(white_slide(1280, 960), mask), (640, 480), 0.5)) > 0
    exact = np.kron(mask, np.ones((8, 8), bool))
    assert area[242:246, 400:590].all()
    assert (area & exact).sum() > 0.97 * (area | exact).sum()
    assert not area[:150].any()


def test_a_mask_that_ends_before_the_slide_does_is_not_stretched():
    slide = white_slide(1630, 1590)  # the mask, of whole px, leaves out 30 and 22 level-0 px
    mask = np.zeros((49, 50), bool)
    mask[20:30, 35:45] = True
    image = draw.overlay(slide, tissue=mask_of(slide, mask, mpp=32.0), max_px=1630)
    rows, cols = np.nonzero(is_colour(image, ORANGE, (1630, 1590)))
    assert (cols.min(), cols.max()) == (1120, 1439)
    assert (rows.min(), rows.max()) == (640, 959)


def test_tissue_that_reaches_the_edge_of_the_slide_has_no_line_there():
    slide = white_slide(1600, 1600)
    mask = np.zeros((100, 100), bool)
    mask[:, :50] = True
    drawn = is_colour(
        draw.overlay(slide, tissue=mask_of(slide, mask), max_px=800), ORANGE, (800, 800)
    )
    assert drawn[:, 398:400].all()
    drawn[:, 398:400] = False
    assert not drawn.any()


def test_tiles_lie_where_the_plan_has_them():
    slide = white_slide(1600, 1200)
    mask = np.zeros((75, 100), bool)
    mask[0:10, 0:12] = True
    mask[40:60, 60:90] = True
    tissue = mask_of(slide, mask)
    plan = plan_tiles(slide, TileSpec(size_px=100), tissue=tissue)  # 200 level-0 px
    image = draw.overlay(slide, plan=plan, max_px=800)
    drawn = is_colour(image, BLUE, (800, 600))
    expected = np.zeros_like(drawn)
    for x, y in plan.coords // 2:
        expected[y : y + 100, x : x + 100] = True
        expected[y + 2 : y + 98, x + 2 : x + 98] = False
    for x, y in plan.coords // 2:
        inner = (slice(y + 2, y + 98), slice(x + 2, x + 98))
        assert not expected[inner].any()
    assert 0 < len(plan) < 48
    np.testing.assert_array_equal(drawn, expected)


def test_kept_tiles_are_tinted_and_dropped_ones_are_not():
    slide = white_slide(1600, 1300)
    mask = np.zeros((81, 100), bool)
    mask[:30, :30] = True
    tissue = mask_of(slide, mask)
    plan = plan_tiles(slide, TileSpec(size_px=100), tissue=tissue, border="drop")
    pixels = np.asarray(draw.overlay(slide, plan=plan, max_px=800), int)
    for x, y in plan.coords // 2 + 50:
        red, green, blue = pixels[y, x]
        assert red < green < blue < 240
    for x, y in plan.dropped["tissue"] // 2 + 50:
        assert tuple(pixels[y, x]) == (240, 240, 240)


def test_dropped_cells_have_a_thin_line_by_reason_under_the_kept_ones():
    slide = white_slide(1600, 1300)
    mask = np.zeros((81, 100), bool)
    mask[:12, :12] = True
    tissue = mask_of(slide, mask)
    plan = plan_tiles(slide, TileSpec(size_px=100), tissue=tissue, border="drop")
    image = draw.overlay(slide, plan=plan, max_px=800)
    assert plan.coords.tolist() == [[0, 0]]
    assert image.getpixel((750, 599)) == THIN
    assert image.getpixel((750, 600)) == VERMILLION  # the cell below reaches over the border
    assert image.getpixel((99, 50)) == BLUE
    assert image.getpixel((100, 50)) == THIN


@pytest.mark.parametrize(
    ("width", "mpp", "length_um"),
    [(1600, 1.0, 200), (1600, 0.25, 50), (1600, 20.0, 5_000), (1125, 0.5, 100), (600, 0.7, 50)],
)
def test_the_scale_bar_is_as_long_as_it_says(width, mpp, length_um):
    slide = white_slide(width, 700, mpp=mpp)
    image = draw.overlay(slide, max_px=1000)
    shown = min(width, 1000)
    below = np.asarray(image)[slide.thumbnail(max_px=1000).height :]
    dark = (below == DARK).all(axis=2)
    bar = max(range(len(dark)), key=lambda row: _longest_run(dark[row]))
    assert _longest_run(dark[bar]) == round(length_um / (mpp * width / shown))


def _longest_run(row):
    edges = np.flatnonzero(np.diff(np.concatenate([[0], row.astype(np.int8), [0]])))
    return max((edges[1::2] - edges[::2]).tolist(), default=0)


def test_without_a_scale_there_is_no_scale_bar():
    slide = white_slide(1600, 700, mpp=None)
    image = draw.overlay(slide, max_px=1000)
    below = np.asarray(image)[438:]
    assert max(_longest_run(row) for row in (below == DARK).all(axis=2)) < 30


def test_thousands_of_tiles_remain_distinct_and_a_single_one_is_drawn():
    slide = white_slide(3000, 2000)
    # 32 level-0 px, 12.8 on the picture
    plan = plan_tiles(slide, TileSpec(size_px=16), border="drop")
    drawn = is_colour(draw.overlay(slide, plan=plan, max_px=1200), BLUE, (1200, 800))
    assert len(plan) == 93 * 62
    assert 0.1 < drawn.mean() < 0.35
    tiny = white_slide(40, 40)
    image = draw.overlay(tiny, plan=plan_tiles(tiny, TileSpec(size_px=20)))
    assert is_colour(image, BLUE, (40, 40)).sum() == 40**2 - 36**2
    assert image.width >= 500


def test_tiles_too_small_to_outline_are_tinted():
    slide = white_slide(3000, 2000)
    plan = plan_tiles(slide, TileSpec(size_px=4))
    pixels = np.asarray(draw.overlay(slide, plan=plan, max_px=600))[:400]
    assert not (pixels == BLUE).all(axis=2).any()
    red, _, blue = pixels[200, 300].astype(int)
    assert blue > red


def test_names_that_the_font_lacks_are_written_in_ascii():
    plain, accents = (
        np.asarray(draw.overlay(white_slide(1000, 500, name=name))) for name in ("e.svs", "é.svs")
    )
    np.testing.assert_array_equal(plain, accents)
    long = draw.overlay(white_slide(1000, 500, name="x" * 300 + ".svs"))
    assert long.size == (1000, len(plain))


def bag_of(slide, features, coords, size=200):
    tiles = TileGeometry(
        size_px=size // 2, mpp=2.0, size_level0=size, overlap_px=0, level0_mpp=1.0,
        level0_size=slide.dimensions,
    )  # fmt: skip
    return FeatureBag(np.asarray(features, np.float32), np.asarray(coords, np.int64), tiles=tiles)


def test_tiles_with_similar_embeddings_have_similar_colours():
    slide = white_slide(1600, 800)
    rng = np.random.default_rng(0)
    centre = rng.normal(size=(3, 32)) * 5
    group = np.arange(24) % 3
    coords = np.stack([np.arange(24) % 8 * 200, np.arange(24) // 8 * 200], 1)
    features = centre[group] + rng.normal(size=(24, 32)) * 0.05
    pixels = np.asarray(draw.feature_map(slide, bag_of(slide, features, coords), max_px=800), int)
    colours = np.array([pixels[y // 2 + 50, x // 2 + 50] for x, y in coords])
    means = np.stack([colours[group == g].mean(0) for g in range(3)])
    between = min(np.abs(means[a] - means[b]).sum() for a, b in ((0, 1), (0, 2), (1, 2)))
    within = max(np.abs(colours[group == g] - means[g]).sum(1).max() for g in range(3))
    # The third component is noise here, scaled up: it may colour, but less than the groups do.
    assert between > 60
    assert np.abs(means - colours.mean(0)).max() > 30
    assert within < 4 * between
    assert tuple(pixels[380, 400]) == tuple(pixels[350, 20])  # nothing where no tile is


def test_components_are_those_of_a_singular_value_decomposition():
    rng = np.random.default_rng(1)
    features = rng.normal(size=(50, 12)) * np.linspace(3, 0.1, 12) + 7
    scores, shares = overview.principal_components(features)
    u, s, _ = np.linalg.svd(features - features.mean(0), full_matrices=False)
    np.testing.assert_allclose(shares, (s**2 / (s**2).sum())[:3], rtol=1e-9)
    for component in range(3):
        inner = np.abs(scores[:, component]) < 1
        correlation = np.corrcoef(scores[inner, component], u[inner, component])[0, 1]
        assert abs(correlation) > 1 - 1e-9
    np.testing.assert_allclose(overview.principal_components(features[::-1])[0], scores[::-1])


def test_a_component_grows_with_the_feature_that_it_rests_on_most():
    rng = np.random.default_rng(2)
    for _ in range(8):
        direction = rng.normal(size=6)
        scores, _ = overview.principal_components(rng.normal(size=(30, 1)) * direction)
        assert np.abs(scores[:, 1:]).max() == 0  # no variance there, and no noise scaled up
        features = rng.normal(size=(30, 6)) * 0.01 + rng.normal(size=(30, 1)) * direction
        scores, _ = overview.principal_components(features)
        heaviest = features[:, np.abs(direction).argmax()]
        assert np.corrcoef(scores[:, 0], heaviest)[0, 1] > 0.9


def test_component_colours_are_the_lab_colours_that_pillow_has():
    """Pillow's colour management, another implementation (ICC), within its 8-bit rounding."""
    from PIL import ImageCms

    scores = np.array([[0, 0, 0], [0.5, 0.3, 0.2], [-0.6, 0.4, 0.1], [0.2, -0.5, -0.4]])
    mine = overview.component_colours(scores)
    to_lab = ImageCms.buildTransform(
        ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB", 6504), "RGB", "LAB",
        renderingIntent=ImageCms.Intent.ABSOLUTE_COLORIMETRIC,
    )  # fmt: skip
    lab = np.asarray(ImageCms.applyTransform(Image.fromarray(mine[None]), to_lab)).astype(int)[0]
    a, b = (((lab[:, n] + 128) % 256) - 128 for n in (1, 2))
    np.testing.assert_allclose(lab[:, 0] * 100 / 255, 65 + 20 * scores[:, 1], atol=3)
    np.testing.assert_allclose(a, 45 * scores[:, 2], atol=6)
    np.testing.assert_allclose(b, 55 * scores[:, 0], atol=6)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_bag_with_hardly_a_tile_is_drawn_too(count):
    slide = white_slide(1000, 800)
    features = np.arange(count * 2).reshape(count, 2)
    coords = [[0, 0], [200, 0]][:count] if count else np.empty((0, 2))
    image = draw.feature_map(slide, bag_of(slide, features, coords))
    assert image.width == 1000


def test_a_bag_that_does_not_belong_to_the_slide_is_refused():
    slide = white_slide(1000, 800)
    foreign = FeatureBag(np.zeros((1, 4), np.float32), np.zeros((1, 2), np.int64))
    with pytest.raises(BagError, match="size of its tiles"):
        draw.feature_map(slide, foreign)
    other = bag_of(white_slide(1000, 900), np.zeros((1, 4)), [[0, 0]])
    with pytest.raises(InputError, match="give the slide that the bag was made from"):
        draw.feature_map(slide, other)


def test_where_tiles_overlap_the_map_shows_the_mean_of_their_colours():
    slide = white_slide(1600, 1200)
    coords = [(0, 0), (800, 0), (400, 400), (800, 400)]  # the third moved inwards over the fourth
    features = np.random.default_rng(5).normal(size=(4, 5)).astype(np.float32)
    pixels = np.asarray(draw.feature_map(slide, bag_of(slide, features, coords, size=800)), int)
    third, both, fourth = (pixels[1000, x] for x in (600, 1000, 1400))
    assert np.abs(third - fourth).max() > 10
    np.testing.assert_allclose(both, (third + fourth) / 2, atol=1.5)


def test_the_map_is_coloured_where_tissue_is_if_that_is_known():
    slide = white_slide(1600, 800)
    coords = [(0, 0), (800, 0)]
    bag = bag_of(slide, [[1.0, 0], [-1, 3]], coords, size=800)
    mask = np.zeros((50, 100), bool)  # 16 px each
    mask[:, 10:40] = True  # of the first tile; the second one holds none
    whole, clipped = (
        np.asarray(draw.feature_map(slide, bag, tissue=tissue, max_px=800), int)
        for tissue in (None, mask_of(slide, mask))
    )
    empty = bag_of(slide, np.empty((0, 2)), np.empty((0, 2)), size=800)
    grey = np.asarray(draw.feature_map(slide, empty, max_px=800), int)
    columns = np.arange(800) // 8
    inside = (columns >= 10) & (columns < 40) | (columns >= 50)
    apart = np.abs(np.subtract.outer(np.array([80, 320, 400]), np.arange(800))).min(0) > 8
    expected = np.where(inside[:, None], whole[:400], grey[:400])
    assert (whole[:400] != grey[:400]).any(2).all()
    np.testing.assert_array_equal(clipped[:400, apart], expected[:, apart])


def test_a_tile_for_a_piece_of_tissue_is_green_and_the_legend_tells_of_coverage():
    slide = white_slide(1600, 1200)
    mask = np.zeros((75, 100), bool)
    mask[:25, :25] = mask[60:71, 50:62] = True
    plan = plan_tiles(slide, TileSpec(size_px=200), tissue=mask_of(slide, mask))
    assert plan.cells == ("#ttt", "tttt", "ttpt")
    image = draw.overlay(slide, plan=plan, max_px=800)
    assert image.getpixel((400, 500)) == image.getpixel((599, 500)) == (0, 158, 115)
    assert image.getpixel((0, 100)) == BLUE
    texts = [key.text for key in overview._draw_plan(image, plan, 0.5)]
    assert texts == [
        f"2 tiles, {plan.coverage:.0%} of the tissue",
        "1 of them for a small piece of tissue",
        "10 too little tissue",
    ]
