import json
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont
from scipy.stats import rankdata
from shapely.geometry import box, shape
from support.fake_reader import FakeTileReader

from xmag import draw
from xmag.draw.attention import _legend, colours, percentiles
from xmag.draw.frame import plain, write
from xmag.errors import BagError, InputError, SlideScaleError
from xmag.geometry import TileGeometry, TileSpec, polygons_from_geojson
from xmag.mil import Attention
from xmag.plan import plan_tiles
from xmag.slide import Slide
from xmag.tissue import TissueMask

SIDE = 200


def noise_slide(width=1600, height=1200, *, seed=0):
    """Blocks of 8 px, each of one colour, at 1 µm/px."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    pixels = blocks.repeat(8, 0).repeat(8, 1)
    return Slide.from_reader(FakeTileReader(pixels, mpp=1.0), name="noise.svs")


def attention_of(scores, coords, *, overlap_px=0, size=(1600, 1200)):
    tiles = TileGeometry(
        size_px=SIDE // 2, mpp=2.0, size_level0=SIDE, overlap_px=overlap_px, level0_mpp=1.0,
        level0_size=size,
    )  # fmt: skip
    return Attention(
        scores=np.asarray(scores, np.float32), coords=np.asarray(coords, np.int64).reshape(-1, 2),
        kind="softmax", tiles=tiles,
    )  # fmt: skip


def some_attention(count=12, seed=3):
    rng = np.random.default_rng(seed)
    cells = rng.permutation(8 * 6)[:count]
    coords = np.stack([cells % 8, cells // 8], 1) * SIDE
    weights = rng.dirichlet(np.ones(count))
    return attention_of(weights, coords)


def test_percentiles_are_mean_ranks_like_those_of_scipy():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 9, 50).astype(np.float32)
    expected = 100 * (rankdata(scores) - 1) / 49
    np.testing.assert_allclose(percentiles(scores), expected)
    assert percentiles(np.array([0.3], np.float32)).tolist() == [50]
    assert percentiles(np.full(4, 0.25, np.float32)).tolist() == [50] * 4
    assert percentiles(np.empty(0, np.float32)).shape == (0,)


def test_the_colours_are_viridis():
    viridis = matplotlib.colormaps["viridis"](np.linspace(0, 1, 101))[:, :3] * 255
    assert np.abs(colours(np.linspace(0, 100, 101)) - viridis).max() < 5


def test_each_tile_has_the_colour_of_its_rank_and_the_rest_is_grey():
    slide, attention = noise_slide(), some_attention()
    picture = np.asarray(draw.heatmap(slide, attention, max_px=800), float)[:600, :800]
    grey = np.asarray(slide.thumbnail(max_px=800).convert("L"), float)
    grey = np.repeat((0.8 * grey + 0.2 * 255)[..., None], 3, 2)
    expected = grey.copy()
    ranks = 100 * (rankdata(attention.scores) - 1) / 11
    for (x, y), colour in zip(attention.coords // 2, colours(ranks), strict=True):
        window = slice(y, y + 100), slice(x, x + 100)
        expected[window] = 0.4 * grey[window] + 0.6 * colour
    assert np.abs(picture - expected).max() <= 1.5


def test_where_tiles_overlap_the_mean_of_their_ranks_is_shown():
    slide = Slide.from_reader(FakeTileReader(np.full((400, 800, 3), 200, np.uint8)), name="a.svs")
    attention = attention_of(
        [0.1, 0.2, 0.7], [(0, 0), (100, 0), (400, 0)], overlap_px=50, size=(800, 400)
    )
    picture = np.asarray(draw.heatmap(slide, attention, max_px=800), float)
    grey = 0.8 * 200 + 0.2 * 255
    for x, rank in ((50, 0), (150, 25), (250, 50), (450, 100)):
        expected = 0.4 * grey + 0.6 * colours(np.array(rank))
        assert np.abs(picture[100, x] - expected).max() <= 1.5


def test_a_heatmap_without_tiles_is_the_slide_in_grey():
    slide = noise_slide()
    picture = np.asarray(draw.heatmap(slide, attention_of([], []), max_px=400))[:300, :400]
    assert (picture == picture[..., :1]).all()


def test_the_legend_tells_unequal_weights_from_equal_ones():
    coords = [(x * SIDE, 0) for x in range(8)]
    slide = noise_slide()
    flat = draw.heatmap(slide, attention_of(np.arange(8) + 100, coords))
    sharp = draw.heatmap(slide, attention_of(2.0 ** np.arange(8), coords))
    flat, sharp = np.asarray(flat), np.asarray(sharp)
    assert (flat[:1200] == sharp[:1200]).all()  # the ranks are the same
    assert (flat[1200:] != sharp[1200:]).any()


def case_of_two(seed=5):
    """Attention of two slides of one case: weights that sum to 1 together."""
    one, other = some_attention(seed=seed), some_attention(20, seed=seed + 1)
    weights = np.random.default_rng(seed).dirichlet(np.ones(32)).astype(np.float32)
    return [replace(one, scores=weights[:12]), replace(other, scores=weights[12:])]


def test_the_slides_of_a_case_have_one_scale():
    case = case_of_two()
    every = np.concatenate([each.scores for each in case])
    ranks = 100 * (rankdata(every) - 1) / 31
    for attention, own in zip(case, (ranks[:12], ranks[12:]), strict=True):
        found = draw.attention_geojson(attention, case=case)["features"]
        shown = [feature["properties"]["measurements"]["Attention rank"] for feature in found]
        np.testing.assert_allclose(shown, own, atol=0.01)
        slide = noise_slide()
        picture = np.asarray(draw.heatmap(slide, attention, case=case, max_px=800), float)
        grey = 0.8 * np.asarray(slide.thumbnail(max_px=800).convert("L"), float) + 0.2 * 255
        for (x, y), colour in zip(attention.coords // 2, colours(own), strict=True):
            window = slice(y, y + 100), slice(x, x + 100)
            expected = 0.4 * grey[window][..., None] + 0.6 * colour
            assert np.abs(picture[window] - expected).max() <= 1.5
        edge = np.asarray(draw.gallery(slide, attention, case=case, count=1, tile_px=64))[70, 10]
        assert edge.tolist() == colours(own.max()).tolist()


def test_a_case_of_one_slide_is_drawn_as_the_slide():
    slide, attention = noise_slide(), some_attention()
    for function in (draw.heatmap, draw.gallery):
        alone, case = function(slide, attention), function(slide, attention, case=[attention])
        np.testing.assert_array_equal(np.asarray(alone), np.asarray(case))
    assert draw.attention_geojson(attention, case=[attention]) == draw.attention_geojson(attention)


def test_attention_of_another_case_is_refused():
    for function in (
        lambda a, c: draw.heatmap(noise_slide(), a, case=c),
        lambda a, c: draw.gallery(noise_slide(), a, case=c),
        lambda a, c: draw.attention_geojson(a, case=c),
    ):
        with pytest.raises(InputError, match="none of the 2 of case="):
            function(some_attention(), case_of_two())
        one, other = case_of_two()
        broken = replace(other, scores=np.full(20, np.nan, np.float32))
        with pytest.raises(InputError, match="one finite number for each tile"):
            function(one, [one, broken])


def test_a_caption_has_a_line_of_its_own():
    slide, attention = noise_slide(), some_attention()
    without = draw.heatmap(slide, attention, max_px=600)
    with_one = draw.heatmap(slide, attention, caption="predicted µ: 3.2 " * 40, max_px=600)
    assert with_one.width == without.width
    added = with_one.height - without.height
    assert 15 <= added <= 40
    tall, short = np.asarray(with_one), np.asarray(without)
    text = tall[450 + 30 : 450 + 30 + added]  # below the slide's name
    assert (text < 128).any()
    np.testing.assert_array_equal(tall[-60:], short[-60:])


def test_the_gallery_shows_the_tiles_with_most_attention_first():
    slide, attention = noise_slide(), some_attention()
    picture = np.asarray(draw.gallery(slide, attention, count=4, tile_px=100), int)
    order = np.argsort(-attention.scores)[:4]
    shown = _places(picture, slide, attention)
    first_row = sorted(shown, key=lambda place: (place[1], place[0]))
    assert [tile for *_, tile in first_row] == order.tolist()


def _places(picture, slide, attention):
    """(x, y, tile) of every tile that is shown, found by looking for its pixels."""
    found = []
    for tile, (x, y) in enumerate(attention.coords):
        pixels = slide.read_region((int(x), int(y)), (100, 100), mpp=2.0).astype(int)[4:-4, 4:-4]
        windows = np.lib.stride_tricks.sliding_window_view(picture[..., 0], (1, 92))[:, :, 0]
        same = np.argwhere((windows == pixels[0, :, 0]).all(-1))
        found += [
            (int(col), int(row), tile) for row, col in same
            if (picture[row : row + 92, col : col + 92] == pixels).all()
        ]  # fmt: skip
    return found


def test_a_gallery_of_more_tiles_than_there_are_shows_all():
    slide, attention = noise_slide(), some_attention(count=3)
    picture = np.asarray(draw.gallery(slide, attention, count=50, tile_px=100), int)
    assert sorted(tile for *_, tile in _places(picture, slide, attention)) == [0, 1, 2]


def test_a_gallery_without_tiles_is_a_title():
    picture = draw.gallery(noise_slide(), attention_of([], []))
    assert isinstance(picture, Image.Image)
    assert picture.height < 100


@pytest.mark.parametrize("tile_px", [None, 160])
def test_a_gallery_at_a_finer_scale_shows_the_same_fields_with_all_their_px(tile_px):
    slide, attention = noise_slide(), some_attention()
    page = draw.gallery(slide, attention, count=4, tile_px=tile_px, mpp=1.0)
    side = tile_px or 200  # of 100 px at 2 µm/px
    finest = slide.read_region((0, 0), slide.dimensions)
    best = np.argsort(-attention.scores)[:3]
    for place, row in enumerate(best):
        x, y = attention.coords[row]
        expected = Image.fromarray(finest[y : y + SIDE, x : x + SIDE])
        expected = expected.resize((side, side), Image.Resampling.LANCZOS)
        left = 10 + place % 3 * (side + 10)  # three a row, with a gap of 10 px
        top = round(1.5 * max(12, side // 14)) * 2
        shown = np.asarray(page)[top : top + side, left : left + side]
        assert np.array_equal(shown[3:-3, 3:-3], np.asarray(expected)[3:-3, 3:-3])
    plain = draw.gallery(slide, attention, count=4, tile_px=side)
    assert plain.size == page.size
    assert (np.asarray(plain)[:36] != np.asarray(page)[:36]).any()  # the title says the scale


@pytest.mark.parametrize(
    ("mpp", "error"), [(2.0, InputError), (1.3, InputError), (0.5, SlideScaleError)]
)
def test_a_gallery_at_a_scale_that_cannot_be_had_is_refused(mpp, error):
    with pytest.raises(error):
        draw.gallery(noise_slide(), some_attention(), mpp=mpp)


def test_tiles_whose_corners_are_rounded_over_the_border_are_shown():
    pixels = np.random.default_rng(0).integers(0, 256, (2222, 500, 3), np.uint8)
    slide = Slide.from_reader(FakeTileReader(pixels, mpp=0.275), name="a.svs")
    plan = plan_tiles(slide, TileSpec(size_px=56))
    scores = np.arange(len(plan), dtype=np.float32)
    attention = Attention(scores=scores, coords=plan.coords, kind="custom", tiles=plan.tiles)
    assert (plan.coords + plan.tiles.side_level0 > slide.dimensions).any()
    for mpp in (None, 0.5):
        assert draw.gallery(slide, attention, count=len(plan), mpp=mpp).height > 600


def test_geojson_has_the_tiles_as_detections_in_level_0_px():
    attention = some_attention()
    found = json.loads(json.dumps(draw.attention_geojson(attention)))
    assert found["type"] == "FeatureCollection"
    assert len(found["features"]) == len(attention)
    ranks = 100 * (rankdata(attention.scores) - 1) / 11
    for feature, (x, y), score, rank in zip(
        found["features"], attention.coords, attention.scores, ranks, strict=True
    ):
        assert feature["type"] == "Feature"
        assert shape(feature["geometry"]).equals(box(x, y, x + SIDE, y + SIDE))
        ring = feature["geometry"]["coordinates"][0]
        assert ring[0] == ring[-1]
        properties = feature["properties"]
        assert properties["objectType"] == "detection"
        assert properties["measurements"]["Attention"] == pytest.approx(score)
        assert properties["measurements"]["Attention rank"] == pytest.approx(rank, abs=0.01)
        low, high = map(int, properties["classification"]["name"].split()[-1].split("-"))
        assert low <= rank <= high
        assert len(properties["classification"]["color"]) == 3
    assert len(polygons_from_geojson(found)) == len(attention)


@pytest.mark.parametrize("missing", ["coords", "tiles"])
def test_attention_of_a_bag_without_places_is_refused(missing):
    attention = replace(some_attention(), **{missing: None})
    for function in (
        lambda a: draw.heatmap(noise_slide(), a),
        lambda a: draw.gallery(noise_slide(), a),
        draw.attention_geojson,
    ):
        with pytest.raises(BagError, match=f"{missing} is None"):
            function(attention)


def test_attention_of_another_slide_is_refused():
    other = noise_slide(800, 800)
    for function in (draw.heatmap, draw.gallery):
        with pytest.raises(InputError, match="give the slide that the features were made from"):
            function(other, some_attention())


def test_scores_that_are_not_one_finite_number_a_tile_are_refused():
    attention = some_attention()
    bad = np.where(np.arange(12) == 5, np.nan, attention.scores).astype(np.float32)
    for scores in (attention.scores[:-1], bad):
        with pytest.raises(InputError, match="one finite number for each tile"):
            draw.attention_geojson(replace(attention, scores=scores))


@pytest.mark.parametrize("options", [{"count": 0}, {"count": 2.5}, {"tile_px": 10}])
def test_a_gallery_of_a_senseless_size_is_refused(options):
    with pytest.raises(InputError, match="expected an int from"):
        draw.gallery(noise_slide(), some_attention(), **options)


def glass_with_tissue(width=1600, height=1216, *, tissue=(slice(320, None), slice(320, 960))):
    """White glass, and stained tissue that ends at the lower border; 1 µm/px."""
    pixels = np.full((height, width, 3), 240, np.uint8)
    pixels[tissue] = (190, 110, 160)
    return Slide.from_reader(FakeTileReader(pixels, mpp=1.0), name="a.svs")


def grey_of(slide, max_px):
    grey = np.asarray(slide.thumbnail(max_px=max_px).convert("L"), float)
    return (0.8 * grey + 0.2 * 255)[..., None].repeat(3, 2)


def test_a_heatmap_is_clipped_to_the_tissue():
    slide, size = glass_with_tissue(), (1600, 1216)
    attention = attention_of([0.1, 0.3, 0.6], [(200, 200), (400, 400), (1200, 0)], size=size)
    picture = np.asarray(draw.heatmap(slide, attention, max_px=800), float)[:608, :800]
    grey = grey_of(slide, 800)
    expected = {}
    for row, rank in enumerate((0, 50, 100)):
        expected[row] = 0.4 * grey + 0.6 * colours(np.array(rank))
    assert np.abs(picture[175:199, 175:199] - expected[0][175:199, 175:199]).max() <= 1.5
    assert np.abs(picture[100:145, 100:200] - grey[100:145, 100:200]).max() <= 1.5
    assert np.abs(picture[200:300, 200:300] - expected[1][200:300, 200:300]).max() <= 1.5
    # Without any tissue a tile is coloured whole.
    assert np.abs(picture[0:100, 600:700] - expected[2][0:100, 600:700]).max() <= 1.5
    whole = np.asarray(draw.heatmap(slide, attention, tissue=None, max_px=800), float)
    assert np.abs(whole[100:200, 100:200] - expected[0][100:200, 100:200]).max() <= 1.5
    mask = np.zeros((38, 50), bool)
    mask[:, :10] = True  # up to 320 level-0 px
    given = TissueMask(mask=mask, mpp=32.0, downsample=32.0, method={})
    own = np.asarray(draw.heatmap(slide, attention, tissue=given, max_px=800), float)
    assert np.abs(own[100:200, 100:155] - expected[0][100:200, 100:155]).max() <= 1.5
    assert np.abs(own[100:200, 165:200] - grey[100:200, 165:200]).max() <= 1.5


@pytest.mark.parametrize("height", [1200, 1216, 1231])
def test_tissue_of_the_last_row_is_coloured_to_the_border_of_the_slide(height):
    slide, size = glass_with_tissue(height=height), (1600, height)
    attention = attention_of([0.4, 0.6], [(400, height - 200), (600, height - 200)], size=size)
    picture = np.asarray(draw.heatmap(slide, attention, max_px=1600), float)[:height]
    for x, rank in ((500, 0), (700, 100)):
        expected = 0.4 * grey_of(slide, 1600)[-1, x] + 0.6 * colours(np.array(rank))
        assert np.abs(picture[-1, x] - expected).max() <= 1.5


def test_a_slide_without_a_scale_is_not_clipped():
    slide = Slide.from_reader(
        FakeTileReader(np.full((1200, 1600, 3), 240, np.uint8), mpp=None), name="a.svs"
    )
    picture = np.asarray(draw.heatmap(slide, attention_of([1.0], [(0, 0)]), max_px=800), float)
    expected = 0.4 * grey_of(slide, 800) + 0.6 * colours(np.array(50.0))
    assert np.abs(picture[:100, :100] - expected[:100, :100]).max() <= 1.5


@pytest.mark.parametrize("scores", [[0.1, 0.2, 0.7], [-2.0, 0.0, 6.0]])
def test_on_the_scale_of_weights_a_colour_is_the_score_itself(scores):
    slide = noise_slide()
    attention = attention_of(scores, [(0, 0), (400, 0), (800, 0)])
    options = {"scale": "weight", "tissue": None}
    picture = np.asarray(draw.heatmap(slide, attention, max_px=800, **options), float)
    grey = grey_of(slide, 800)
    low = min(0, *scores)
    for (x, y), score in zip(attention.coords // 2, scores, strict=True):
        colour = colours(np.array(100 * (score - low) / (max(scores) - low)))
        window = slice(y, y + 100), slice(x, x + 100)
        assert np.abs(picture[window] - 0.4 * grey[window] - 0.6 * colour).max() <= 1.5
    page = np.asarray(draw.gallery(slide, attention, scale="weight", count=3, tile_px=64))
    assert page[70, 10].tolist() == colours(np.array(100.0)).tolist()
    second = colours(np.array(100 * (scores[1] - low) / (max(scores) - low)))
    assert page[70, 10 + 74].tolist() == second.tolist()
    legend = [key.text for key in _legend(attention, [], "weight")]
    assert legend[0] == f"attention, {low:.2g} to {max(scores):.2g}"


def test_the_slides_of_a_case_have_one_scale_of_weights():
    case = [attention_of([0.1, 0.2], [(0, 0), (400, 0)]), attention_of([0.7], [(0, 0)])]
    page = np.asarray(
        draw.gallery(noise_slide(), case[0], case=case, scale="weight", count=1, tile_px=64)
    )
    assert page[70, 10].tolist() == colours(np.array(100 * 0.2 / 0.7)).tolist()


def test_an_unknown_scale_is_refused():
    for function in (draw.heatmap, draw.gallery):
        with pytest.raises(InputError, match="scale is 'log'; expected 'rank' or 'weight'"):
            function(noise_slide(), some_attention(), scale="log")


def test_attention_that_is_nearly_even_is_called_so():
    coords = [(x * SIDE, 0) for x in range(8)]
    even, sharp = (
        attention_of(np.arange(8) + 100, coords),
        attention_of(2.0 ** np.arange(8), coords),
    )
    legend = [key.text for key in _legend(even, [], "rank")]
    assert legend == [
        "rank of attention among the tiles, 0 to 100",
        "the top 1 of 8 tiles holds 13% of the weight: nearly even",
    ]
    assert draw.is_nearly_even(even)
    assert draw.is_nearly_even(even, [even, even])
    assert not draw.is_nearly_even(sharp)
    assert not any("even" in key.text for key in _legend(sharp, [], "rank"))
    for scores in ([], [1.0], [-1.0, -1.0], [0.0, 0.0]):  # of nothing, and of scores that are none
        assert not draw.is_nearly_even(attention_of(scores, coords[: len(scores)]))
    # A tenth of the tiles without any: (9/10)^2 / (9/10) of all is what it is spread over.
    at_limit = attention_of([0.0] + [1.0] * 9, [(x * 20, 0) for x in range(10)])
    assert draw.is_nearly_even(at_limit)
    assert not draw.is_nearly_even(replace(at_limit, scores=np.float32([0, 0] + [1] * 8)))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("softmax", "attention"), ("nystrom", "attention"), ("custom", "custom scores"),
        ("mitoses per mm²", "mitoses per mm2"),
    ],
)  # fmt: skip
def test_scores_are_called_by_their_name(kind, name):
    attention = replace(some_attention(), kind=kind)
    assert _legend(attention, [], "rank")[0].text == f"rank of {name} among the tiles, 0 to 100"
    assert _legend(attention, [], "weight")[0].text.startswith(f"{name}, 0 to ")


def test_a_micrometre_is_written_with_its_own_letter():
    font = ImageFont.load_default(20)
    pages = []
    for text in ("5 µm", "5 um"):
        page = Image.new("L", (80, 40), 255)
        write(ImageDraw.Draw(page), (5, 20), text, 0, font)
        pages.append(np.asarray(page))
    rows, columns = np.nonzero(pages[0] != pages[1])
    assert columns.max() - columns.min() < 4  # the stem
    below = np.nonzero((pages[1] < 255).any(axis=1))[0].max()
    assert rows.max() >= below + 4  # reaches below the line
    assert plain("0.5 µm/px, 0.5 \N{GREEK SMALL LETTER MU}m, é") == "0.5 µm/px, 0.5 µm, e"
