"""Zoomed plans: the finer tiles under chosen ones, their places, pixels and parents."""

import json
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fake_reader import FakeTileReader, noise
from support.models import TINY, random_vit
from test_tiles import area_average, read_all

from xmag.encoder import Encoder
from xmag.errors import InputError, SlideScaleError
from xmag.extract import extract_features
from xmag.geometry import TileSpec
from xmag.hub.registry import ModelConfig
from xmag.plan import TilePlan, plan_tiles
from xmag.slide import Slide
from xmag.tissue import TissueMask, find_tissue

SPEC = TileSpec(size_px=56)
EXACT = TileSpec(size_px=56, mpp_tolerance=0)
NATIVE = {"factors": (1, 2, 8), "reductions": (1,)}
ODD = {"factors": (1, 3, 9), "reductions": (1,)}
SLIDES = [
    (0.2425, SPEC, {}),
    (0.25, SPEC, {}),
    (0.25, SPEC, NATIVE),
    (0.2525, SPEC, {}),
    (0.2525, EXACT, {}),
    (0.275, SPEC, {}),
    (0.275, SPEC, NATIVE),
    (0.5, SPEC, {}),
    (0.2525, SPEC, {"factors": (1, 2), "reductions": (1,)}),
    (2 / 9, SPEC, ODD),
    (0.23, SPEC, ODD),
]
"""µm/px of level 0, the tiles of the plan, and the levels."""


NOISE = noise(2003, 1510)


def slide_of(pixels=NOISE, **options):
    return Slide.from_reader(FakeTileReader(pixels, **options), name="fake")


def exact_corners(plan, slide):
    """The corners of the tiles before any rounding, from what plan_tiles promises."""
    level = slide.reader.levels[plan.scale.level]
    px = plan.scale.mpp / slide.mpp
    side, stride = plan.spec.size_px * px, (plan.spec.size_px - plan.tiles.overlap_px) * px
    corners = []
    for corner in plan.coords:
        exact = []
        for at, size, size_px in zip(corner, slide.dimensions, level.size, strict=True):
            whole = size_px // plan.scale.reduction * plan.scale.reduction * level.downsample
            last = min(size, whole) - side  # where a shifted column or row begins
            place = round(at / stride) * stride
            fits = place <= last + 1e-6 and abs(place - at) <= 0.5 + 1e-6
            exact.append(place if fits else last)
            assert abs(exact[-1] - at) <= 0.5 + 1e-6
        corners.append(exact)
    return np.array(corners).reshape(-1, 2), side


def assert_nested(closer, plan, slide, k):
    """The k x k tiles of each parent fill it exactly, but for the rounding of their corners."""
    exact, side = exact_corners(plan, slide)
    assert closer.tiles.mpp == pytest.approx(plan.tiles.mpp / k, rel=1e-9)
    assert closer.tiles.side_level0 == pytest.approx(side / k, rel=1e-9)
    assert abs(closer.tiles.size_level0 - side / k) <= 0.5 + 1e-6
    cells = [(i, j) for j in range(k) for i in range(k)]
    for parent in np.unique(closer.parent):
        found = closer.coords[closer.parent == parent]
        expected = exact[parent] + np.array(cells) * side / k
        assert len(found) == k * k
        assert np.abs(found - expected).max() <= 0.5 + 1e-6
    assert (closer.coords >= 0).all()
    assert (closer.coords + closer.tiles.size_level0 <= slide.dimensions).all()


@pytest.mark.parametrize("options", [{}, {"overlap": 13}, {"overlap": 28}, {"border": "drop"}])
@pytest.mark.parametrize(("mpp", "spec", "levels"), SLIDES)
def test_finer_tiles_nest_exactly_in_their_parents(mpp, spec, levels, options):
    slide = slide_of(mpp=mpp, **levels)
    plan = plan_tiles(slide, spec, **options)
    closer = plan.zoom(np.arange(len(plan)), mpp=0.5)
    assert len(closer) == 16 * len(plan)
    assert closer.spec == TileSpec(mpp=0.5, size_px=56, mpp_tolerance=spec.mpp_tolerance)
    assert_nested(closer, plan, slide, 4)


def test_halves_of_a_px_do_not_add_up_over_the_border():
    slide = slide_of(NOISE[:460, :460], mpp=112 / 230)  # tiles of 57.5 px
    plan = plan_tiles(slide, EXACT)
    closer = plan.zoom(np.arange(4), mpp=0.5)
    assert closer.tiles.size_level0 == 58
    assert closer.coords.max() == 460 - 58
    assert_nested(closer, plan, slide, 4)


def test_a_shifted_row_is_told_from_the_one_that_would_end_half_a_px_outside():
    slide = slide_of(np.zeros((654, 200, 3), np.uint8), mpp=0.275)
    plan = plan_tiles(slide, TileSpec(size_px=27), overlap=6)
    assert plan.rows[-1] == round(654 - 27 * 2 / 0.275)
    assert plan.unrounded[1][-1] == pytest.approx(
        654 - 27 * 2 / 0.275
    )  # and not 3 * 21 * 2 / 0.275
    assert_nested(plan.zoom(np.arange(len(plan)), mpp=2 / 3), plan, slide, 3)


@settings(deadline=None, max_examples=60)
@given(
    mpp=st.sampled_from([0.11, 0.2425, 0.25, 0.2525, 0.263, 0.275]),
    size=st.tuples(st.integers(200, 900), st.integers(200, 900)),
    tile_px=st.integers(7, 30),
    overlap=st.integers(0, 6),
    border=st.sampled_from(["shift", "drop"]),
    factors=st.sampled_from([(1,), (1, 3), (1, 4), (1, 5, 7)]),
    k=st.integers(2, 7),
    data=st.data(),
)
def test_any_plan_nests_exactly(mpp, size, tile_px, overlap, border, factors, k, data):
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    slide = slide_of(pixels, mpp=mpp, factors=factors)
    plan = plan_tiles(slide, TileSpec(size_px=tile_px), overlap=overlap, border=border)
    chosen = data.draw(st.sets(st.integers(0, max(len(plan) - 1, 0)), max_size=5))
    if not len(plan):
        chosen = set()
    closer = plan.zoom(sorted(chosen), mpp=plan.tiles.mpp / k)
    assert set(closer.parent.tolist()) == chosen
    assert_nested(closer, plan, slide, k)
    again = TilePlan.from_json(closer.to_json())
    assert again == closer
    assert again.parent.tolist() == closer.parent.tolist()


@pytest.mark.parametrize(("mpp", "spec", "levels"), SLIDES)
def test_finer_tiles_are_the_region_at_their_place_and_scale(mpp, spec, levels):
    slide = slide_of(mpp=mpp, **levels)
    plan = plan_tiles(slide, spec, overlap=13)
    closer = plan.zoom(np.arange(len(plan))[::6], mpp=0.5)
    coords, tiles = read_all(slide, closer, batch_size=50)
    assert np.array_equal(coords, closer.coords)
    compared = 0
    for corner, tile in zip(coords, tiles, strict=True):
        if (corner + closer.tiles.side_level0 > slide.dimensions).any():
            continue  # its corner is rounded over the border, where no region can be read
        region = slide.read_region(tuple(corner.tolist()), (56, 56), mpp=closer.tiles.mpp)
        assert np.array_equal(tile, region)
        compared += 1
    assert compared >= 0.7 * len(tiles)


@pytest.mark.parametrize(("mpp", "spec", "levels"), [SLIDES[n] for n in (0, 4, 6, 10)])
def test_finer_tiles_are_the_area_of_level_0_under_them(mpp, spec, levels):
    """Those at the border too; of smooth pixels, as a level in between rounds and blurs noise."""
    y, x = np.mgrid[:1510, :2003]
    image = np.stack([x / 8, y / 6, (x + y) / 14], -1).astype(np.uint8)
    slide = slide_of(image, mpp=mpp, **levels)
    closer = plan_tiles(slide, spec).zoom([-1, 0], mpp=0.5)
    coords, tiles = read_all(slide, closer)
    side = closer.tiles.side_level0
    for corner, tile in list(zip(coords, tiles, strict=True))[::10]:
        left, top = np.minimum(corner, np.array(slide.dimensions) - side)
        expected = area_average(image, (left, top, left + side, top + side), 56)
        assert np.abs(tile - expected).max() < 1.1


@pytest.mark.parametrize("border", ["shift", "drop"])
@pytest.mark.parametrize("mpp", [0.2425, 0.25, 0.2525])
def test_the_mean_of_the_finer_tiles_is_the_tile(mpp, border):
    slide = slide_of(mpp=mpp)
    plan = plan_tiles(slide, SPEC, border=border, overlap=9)
    closer = plan.zoom(np.arange(len(plan)), mpp=0.5)
    _, tiles = read_all(slide, plan)
    _, finer = read_all(slide, closer)
    for row, tile in enumerate(tiles):
        own = finer[closer.parent == row].reshape(4, 4, 56, 56, 3)  # row by row
        whole = own.swapaxes(1, 2).reshape(56, 4, 56, 4, 3)
        assert np.abs(tile - whole.mean(axis=(1, 3))).max() <= 1


def test_rows_are_numbers_in_any_order_or_a_choice_for_each():
    plan = plan_tiles(slide_of(), SPEC)
    closer = plan.zoom([5, 2, 2], mpp=1.0)
    assert plan.coords[[2, 5]].tolist() == [[896, 0], [0, 448]]
    assert closer.parent.tolist() == [2, 2, 2, 2, 5, 5, 5, 5]
    assert closer.coords[:4].tolist() == [[896, 0], [1120, 0], [896, 224], [1120, 224]]
    assert closer.coords[4:].tolist() == [[0, 448], [224, 448], [0, 672], [224, 672]]
    assert plan.zoom(np.isin(np.arange(len(plan)), [2, 5]), mpp=1.0) == closer
    assert plan.zoom(2, mpp=1.0) == plan.zoom([2 - len(plan)], mpp=1.0)
    assert len(plan.zoom([], mpp=1.0)) == 0
    assert plan.parent is None
    with pytest.raises(ValueError, match="read-only"):
        closer.parent[0] = 1


def test_what_two_tiles_share_is_there_once_for_each():
    plan = plan_tiles(slide_of(), SPEC, overlap=28)
    closer = plan.zoom([0, 1], mpp=1.0)
    assert plan.coords[:2].tolist() == [[0, 0], [224, 0]]
    assert closer.coords[closer.parent == 0].tolist() == [[0, 0], [224, 0], [0, 224], [224, 224]]
    moved = closer.coords[closer.parent == 1] - closer.coords[closer.parent == 0]
    assert moved.tolist() == [[224, 0]] * 4
    assert len(np.unique(closer.coords, axis=0)) == 6
    coords, tiles = read_all(slide_of(), closer)
    same = [np.flatnonzero((coords == [224, 0]).all(axis=1))]
    assert np.array_equal(*tiles[same[0]])


@pytest.mark.parametrize("mpp", [0.2425, 0.275])
def test_a_closer_look_at_a_closer_look(mpp):
    slide = slide_of(mpp=mpp)
    plan = plan_tiles(slide, SPEC, overlap=5)
    middle = plan.zoom([1, 7], mpp=1.0)
    closer = middle.zoom(np.arange(len(middle)), mpp=0.5)
    once = plan.zoom([1, 7], mpp=0.5)
    assert closer.coords.tolist() == once.coords.tolist()
    assert middle.parent[closer.parent].tolist() == once.parent.tolist()
    assert closer.options["zoomed_from_mpp"] == 1.0


def test_a_zoomed_plan_without_damaged_tiles_keeps_its_parents():
    plan = plan_tiles(slide_of(), SPEC)
    closer = plan.zoom([1, 4], mpp=1.0)
    left = closer.without(np.array([1, 0, 0, 0, 0, 0, 1, 0], bool))
    assert closer.parent.tolist() == [1, 1, 4, 4, 1, 1, 4, 4]
    assert left.parent.tolist() == [1, 4, 4, 1, 1, 4]
    assert left.coords.tolist() == closer.coords[[1, 2, 3, 4, 5, 7]].tolist()
    assert len(left.dropped["damaged"]) == 2
    again = TilePlan.from_json(left.to_json())
    assert again.parent.tolist() == left.parent.tolist()


def test_coverage_counts_what_is_under_the_chosen_tiles():
    slide = slide_of(NOISE[:1344, :1792], mpp=0.25)
    tissue = TissueMask.from_array(np.ones((42, 56), bool), slide)
    plan = plan_tiles(slide, SPEC, tissue=tissue)
    assert plan.coverage == pytest.approx(1)
    closer = plan.zoom([0, 5, 7], mpp=0.5)
    assert closer.coverage == pytest.approx(3 / 12)
    assert TilePlan.from_json(closer.to_json()).coverage == closer.coverage
    assert not any(len(corners) for corners in closer.dropped.values())


@pytest.mark.parametrize("mpp", [2.0, 4.0, 1.6, 0.6, 0, -0.5, np.nan, np.inf, 1e-320])
def test_a_scale_that_no_whole_number_gives_is_refused(mpp):
    plan = plan_tiles(slide_of(), SPEC)
    with pytest.raises(InputError, match=r"mpp is .*whole number.*5%: 1, 0.6667, 0.5"):
        plan.zoom([0], mpp=mpp)


def test_the_tolerance_is_that_of_the_spec():
    slide = slide_of(mpp=0.2425)
    near, exact = plan_tiles(slide, SPEC), plan_tiles(slide, EXACT)
    assert near.tiles.mpp == pytest.approx(1.94)
    assert near.zoom([0], mpp=0.5).tiles.mpp == pytest.approx(0.485)
    assert exact.zoom([0], mpp=0.5).tiles.mpp == 0.5
    with pytest.raises(InputError, match="within 0%"):
        exact.zoom([0], mpp=0.485)


@pytest.mark.parametrize(("slide_mpp", "mpp"), [(0.5, 0.25), (0.25, 0.125), (0.275, 0.25)])
def test_finer_than_the_slide_is_refused(slide_mpp, mpp):
    plan = plan_tiles(slide_of(mpp=slide_mpp), SPEC)
    with pytest.raises(SlideScaleError, match="never upsampled"):
        plan.zoom([0], mpp=mpp)


@pytest.mark.parametrize("rows", [[99], [-99], [0.5], ["a"], [True, False], None])
def test_rows_that_are_no_tiles_are_refused(rows):
    plan = plan_tiles(slide_of(), SPEC)
    with pytest.raises(InputError, match=r"rows are .*expected numbers of tiles of the plan"):
        plan.zoom(rows, mpp=0.5)


def test_a_plan_of_an_earlier_version_is_read_but_not_zoomed():
    slide = slide_of()
    plan = plan_tiles(slide, SPEC)
    fields = json.loads(plan.to_json())
    for name in ("levels", "unrounded", "parent"):
        del fields[name]
    old = TilePlan.from_json(json.dumps({**fields, "schema_version": 2}))
    assert old.coords.tolist() == plan.coords.tolist()
    for found, expected in zip(read_all(slide, old), read_all(slide, plan), strict=True):
        assert np.array_equal(found, expected)
    with pytest.raises(InputError, match="make it again with plan_tiles"):
        old.zoom([0], mpp=0.5)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("parent", [0]),
        ("parent", "0"),
        ("parent", [[0] * 16]),
        ("parent", {}),
        ("levels", [{"size": [1, 1]}]),
        ("unrounded", [[0.0], [0.0]]),
        ("unrounded", [["a"], [0.0]]),
    ],
)
def test_a_damaged_zoomed_plan_is_refused(key, value):
    fields = json.loads(plan_tiles(slide_of(), SPEC).zoom([0], mpp=0.5).to_json())
    with pytest.raises(InputError, match="the tile plan"):
        TilePlan.from_json(json.dumps({**fields, key: value}))


def test_features_of_the_finer_tiles_are_those_of_a_second_encoder():
    slide = slide_of(NOISE[:1344, :1792], mpp=0.25)
    tissue = TissueMask.from_array(np.ones((42, 56), bool), slide)
    plan = plan_tiles(slide, SPEC, tissue=tissue)
    closer = plan.zoom([3, 0], mpp=0.5)
    second = Encoder(
        random_vit(TINY),
        ModelConfig(vit=TINY, tile_spec=TileSpec(mpp=0.5, size_px=56)),
        provenance={"name": "random", "weights_sha256": "0", "trained": True},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # most of the tissue is left out on purpose
        bag = extract_features(slide, model=second, plan=closer)
    assert bag.coords.tolist() == closer.coords.tolist()
    for row in (0, 17, 31):
        x, y = bag.coords[row].tolist()
        tile = slide.read_region((x, y), (56, 56), mpp=0.5)
        expected = second.embed(tile[None])[0].numpy()
        np.testing.assert_allclose(bag.features[row], expected, atol=1e-4)
    assert bag.provenance.fingerprint["plan"]["zoomed_from_mpp"] == 2.0
    assert bag.provenance.record["scale"]["effective_mpp"] == 0.5
    with pytest.raises(InputError, match="the plan is for"):
        extract_features(slide, model=second, plan=plan)


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "mpp"), [("cmu-1-small-region", None), ("tcga-cr-7395-01a-01-ts1", 0.25)]
)
def test_finer_tiles_of_real_slides_are_their_regions_and_average_to_the_tile(shared, name, mpp):
    with Slide(shared / "slides" / f"{name}.svs", mpp=mpp) as slide:
        plan = plan_tiles(slide, TileSpec(), tissue=find_tissue(slide))
        closer = plan.zoom(np.arange(len(plan)), mpp=0.5)
        (_, tiles), (coords, finer) = read_all(slide, plan), read_all(slide, closer)
        for corner, tile in list(zip(coords, finer, strict=True))[::7]:
            region = slide.read_region(tuple(corner.tolist()), (224, 224), mpp=closer.tiles.mpp)
            assert np.array_equal(tile, region)
    for row, tile in enumerate(tiles):
        own = finer[closer.parent == row].reshape(4, 4, 224, 224, 3).swapaxes(1, 2)
        mean = own.reshape(224, 4, 224, 4, 3).mean(axis=(1, 3))
        assert np.abs(tile - mean).mean() < 1  # decoded at 1/4: rounded in between
