"""The grid, and why cells are dropped, against plain loops."""

import json

import numpy as np
import pytest
from support.fake_reader import FakeTileReader, noise

from xmag.errors import InputError, SlideScaleError
from xmag.geometry import TileSpec
from xmag.plan import TilePlan, plan_tiles
from xmag.slide import Slide
from xmag.tissue import TissueMask


def slide_of(width, height, **options):
    return Slide.from_reader(FakeTileReader(noise(width, height), **options), name="fake")


def mask_of(array, *, slide, downsample):
    return TissueMask(
        mask=np.asarray(array, bool),
        mpp=slide.mpp * downsample,
        downsample=float(downsample),
        method={"name": "given"},
    )


def test_the_grid_begins_at_the_origin_and_drops_what_reaches_over_the_border():
    slide = slide_of(1000, 900, mpp=2.0)
    plan = plan_tiles(slide, TileSpec(size_px=224))
    assert plan.coords.tolist() == [[x, y] for y in (0, 224, 448, 672) for x in (0, 224, 448, 672)]
    assert plan.cells == ("####b",) * 4 + ("bbbbb",)
    assert len(plan.dropped["border"]) == 9
    assert plan.coords.dtype == np.int64


def test_a_slide_that_is_a_whole_number_of_tiles_loses_nothing():
    assert plan_tiles(slide_of(672, 448, mpp=2.0), TileSpec()).cells == ("###", "##" + "#")


def test_a_slide_smaller_than_a_tile_has_none():
    plan = plan_tiles(slide_of(223, 500, mpp=2.0), TileSpec())
    assert len(plan) == 0
    assert plan.coords.shape == (0, 2)
    assert len(plan.dropped["border"]) == 3


@pytest.mark.parametrize("overlap", [0, 1, 100, 223])
def test_overlapping_tiles_are_one_stride_apart(overlap):
    plan = plan_tiles(slide_of(500, 300, mpp=2.0), TileSpec(), overlap=overlap)
    stride = 224 - overlap
    xs, ys = range(0, 500 - 224 + 1, stride), range(0, 300 - 224 + 1, stride)
    assert plan.coords.tolist() == [[x, y] for y in ys for x in xs]


def test_what_is_read_as_it_is_sets_footprint_and_pitch():
    slide = slide_of(8000, 2000, mpp=0.2425)
    plan = plan_tiles(slide, TileSpec())
    assert plan.scale.reduction == 8
    assert plan.tiles.mpp == pytest.approx(1.94)
    assert plan.tiles.size_level0 == 1792
    assert plan.coords[:3].tolist() == [[0, 0], [1792, 0], [3584, 0]]


def test_what_is_resampled_has_the_footprint_of_the_wanted_scale():
    slide = slide_of(8000, 2000, mpp=0.27)
    plan = plan_tiles(slide, TileSpec())  # 224 * 2.0 / 0.27 = 1659.26 level-0 px
    assert plan.tiles.size_level0 == 1659
    assert plan.coords[:, 0].tolist() == [0, 1659, 3319, 4978]


def test_a_scale_that_does_not_divide_keeps_tiles_inside_the_level():
    """A level rounded down must not be read past its end."""
    slide = slide_of(899, 899, mpp=0.5, factors=(1, 4), reductions=(1,))
    assert slide.level_dimensions[1] == (224, 224)
    assert len(plan_tiles(slide, TileSpec())) == 1
    assert len(plan_tiles(slide_of(895, 899, mpp=0.5, factors=(1, 4)), TileSpec())) == 0


@pytest.mark.parametrize("downsample", [16, 13.7, 100])
def test_tissue_is_counted_by_area(downsample):
    slide = slide_of(3000, 2000, mpp=0.25)
    spec = TileSpec(size_px=56)
    shape = int(2000 // downsample), int(3000 // downsample)
    mask = np.random.default_rng(1).random(shape) < 0.5
    mask[:, : shape[1] // 3] = False
    tissue = mask_of(mask, slide=slide, downsample=downsample)
    # Brute force: draw the mask at full size, and average it under each tile.
    full = np.zeros((2000, 3000), bool)
    ys, xs = (np.arange(n) / downsample for n in full.shape)
    inside = np.ix_(ys < shape[0], xs < shape[1])
    full[inside] = mask[np.ix_(ys[ys < shape[0]].astype(int), xs[xs < shape[1]].astype(int))]
    everything = plan_tiles(slide, spec)
    share = np.array([full[y : y + 448, x : x + 448].mean() for x, y in everything.coords])
    clear = np.abs(share - 0.4) > 0.01  # the drawing is only exact to a pixel

    kept = {tuple(c) for c in plan_tiles(slide, spec, tissue=tissue, min_tissue=0.4).coords}

    assert clear.any()
    for corner, fraction in zip(everything.coords[clear], share[clear], strict=True):
        assert (tuple(corner) in kept) == (fraction >= 0.4)


def test_tissue_that_just_reaches_the_minimum_is_kept():
    slide = slide_of(448, 448, mpp=2.0)
    tissue = mask_of([[1, 0], [0, 0]], slide=slide, downsample=112)
    assert plan_tiles(slide, TileSpec(), tissue=tissue, min_tissue=0.25).cells == ("#t", "tt")
    assert plan_tiles(slide, TileSpec(), tissue=tissue, min_tissue=0.2501).cells == ("tt", "tt")
    assert plan_tiles(slide, TileSpec(), tissue=tissue, min_tissue=0).cells == ("##", "##")


def test_a_region_of_interest_takes_the_tiles_whose_centres_it_holds():
    slide = slide_of(1200, 1200, mpp=2.0)
    triangle = [[100, 100], [1100, 100], [100, 1100], [100, 100]]
    hole = [[300, 300], [400, 300], [400, 400], [300, 400], [300, 300]]
    roi = {"type": "Polygon", "coordinates": [triangle, hole]}
    plan = plan_tiles(slide, TileSpec(), roi=roi)
    centres = [(112 + 224 * i, 112 + 224 * j) for j in range(5) for i in range(5)]
    expected = [
        [x - 112, y - 112]
        for x, y in centres
        if x + y < 1200 and not (300 < x < 400 and 300 < y < 400)
    ]
    assert plan.coords.tolist() == expected
    assert plan_tiles(slide, TileSpec(), roi=json.dumps(roi)).to_json() == plan.to_json()


def test_the_first_reason_counts_border_then_region_then_tissue():
    slide = slide_of(900, 224, mpp=2.0)
    tissue = mask_of([[0, 0, 1, 1]], slide=slide, downsample=224)
    ring = [[0, 0], [10, 0], [10, 10], [0, 10]]
    roi = {"type": "Polygon", "coordinates": [[*ring, ring[0]]]}
    assert plan_tiles(slide, TileSpec(), tissue=tissue).cells == ("tt##b",)
    assert plan_tiles(slide, TileSpec(), tissue=tissue, roi=roi).cells == ("rrrrb",)


def test_every_cell_is_a_tile_or_has_a_reason():
    slide = slide_of(3000, 2000, mpp=0.25)
    mask = np.eye(12, 18)
    tissue = mask_of(mask, slide=slide, downsample=166)
    plan = plan_tiles(slide, TileSpec(size_px=56), tissue=tissue, min_tissue=0.1)
    together = [tuple(c) for part in (plan.coords, *plan.dropped.values()) for c in part]
    assert len(set(together)) == len(together) == sum(map(len, plan.cells))


def test_plans_are_the_same_each_time_and_survive_json():
    slide = slide_of(3000, 2000, mpp=0.275)
    plan = plan_tiles(slide, TileSpec(size_px=56), overlap=7)
    again = TilePlan.from_json(plan.to_json())
    assert again.to_json() == plan.to_json()
    assert again.to_json() == plan_tiles(slide, TileSpec(size_px=56), overlap=7).to_json()
    assert np.array_equal(again.coords, plan.coords)
    assert (again.spec, again.scale, again.tiles) == (plan.spec, plan.scale, plan.tiles)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema_version": 1}', '{"schema_version": 9}'])
def test_text_that_is_no_plan_is_refused(text):
    with pytest.raises(InputError, match="tile plan"):
        TilePlan.from_json(text)


@pytest.mark.parametrize(
    "options",
    [
        {"overlap": 224},
        {"overlap": -1},
        {"overlap": 1.5},
        {"min_tissue": 25},
        {"tissue": np.ones((9, 9), bool)},
    ],
)
def test_impossible_options_are_refused(options):
    with pytest.raises(InputError, match=f"{next(iter(options))} is .*expected"):
        plan_tiles(slide_of(500, 500), TileSpec(), **options)


def test_a_slide_without_a_scale_is_refused_and_the_remedy_named():
    with pytest.raises(SlideScaleError, match="mpp="):
        plan_tiles(slide_of(500, 500, mpp=None), TileSpec())


def test_a_slide_coarser_than_the_model_is_refused():
    with pytest.raises(SlideScaleError, match="never upsampled"):
        plan_tiles(slide_of(500, 500, mpp=2.2), TileSpec())
