"""The grid, and why cells are dropped, against plain loops."""

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fake_reader import FakeTileReader, noise

from xmag.errors import InputError, SlideScaleError, XmagWarning
from xmag.geometry import TileSpec
from xmag.plan import TilePlan, plan_tiles, warn_of_lost_tissue
from xmag.slide import Slide
from xmag.tiles.decoding import windows_of
from xmag.tissue import TissueMask, find_tissue


def slide_of(width, height, **options):
    return Slide.from_reader(FakeTileReader(noise(width, height), **options), name="fake")


def mask_of(array, *, slide, downsample):
    return TissueMask(
        mask=np.asarray(array, bool),
        mpp=slide.mpp * downsample,
        downsample=float(downsample),
        method={"name": "given"},
    )


def test_the_grid_begins_at_the_origin_and_its_last_tiles_move_inwards():
    plan = plan_tiles(slide_of(1000, 900, mpp=2.0), TileSpec(size_px=224))
    # 104 px are left to the right, worth a tile, and 4 below, which are not: 1/16 would be 14.
    assert plan.columns == (0, 224, 448, 672, 776)
    assert plan.rows == (0, 224, 448, 672, 676)
    assert plan.cells == ("#####",) * 4 + ("bbbbb",)
    assert len(plan.dropped["border"]) == 5


def test_with_border_drop_what_reaches_over_it_is_left_out():
    slide = slide_of(1000, 900, mpp=2.0)
    plan = plan_tiles(slide, TileSpec(size_px=224), border="drop")
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
    assert plan.coverage is None
    assert len(plan.dropped["border"]) == 3


@pytest.mark.parametrize("overlap", [0, 1, 100, 223])
def test_overlapping_tiles_are_one_stride_apart(overlap):
    slide = slide_of(500, 300, mpp=2.0)
    plan = plan_tiles(slide, TileSpec(), overlap=overlap, border="drop")
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
    assert plan.columns == (0, 1659, 3319, 4978, 8000 - 1659)
    assert plan.rows == (0, 2000 - 1659)


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
    assert plan_tiles(slide, TileSpec(), tissue=tissue, min_tissue=0.2501).cells == ("pt", "tt")
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


@pytest.mark.parametrize(
    ("key", "value"),
    [("mask", "bm90IHppcHBlZA=="), ("mask", "?"), ("size", [-8, 1]), ("size", [9, 9]), ("mpp", 0)],
)
def test_a_plan_whose_mask_is_damaged_is_refused(key, value):
    slide = slide_of(3000, 2000, mpp=0.275)
    tissue = TissueMask.from_array(np.ones((20, 30), bool), slide)
    fields = json.loads(plan_tiles(slide, TileSpec(size_px=56), tissue=tissue).to_json())
    fields["tissue"][key] = value
    with pytest.raises(InputError):
        TilePlan.from_json(json.dumps(fields))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "tile plan.* not JSON"),
        ("[]", "tile plan.* a list"),
        ("{}", "tile plan.* None"),
        ('{"schema_version": 1}', "tile plan has schema_version 1, .*make the plan again"),
        ('{"schema_version": 2}', "tile plan.*spec is missing"),
        ('{"schema_version": 9}', "tile plan has schema_version 9, .*upgrade"),
    ],
)
def test_text_that_is_no_plan_is_refused(text, message):
    with pytest.raises(InputError, match=message):
        TilePlan.from_json(text)


@pytest.mark.parametrize(
    "options",
    [
        {"overlap": 224},
        {"overlap": -1},
        {"overlap": 1.5},
        {"min_tissue": 25},
        {"border": "keep"},
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


@pytest.mark.parametrize("border", ["shift", "drop"])
@pytest.mark.parametrize(
    "of",
    [
        {"width": 1001, "height": 899, "mpp": 0.5, "factors": (1, 4), "reductions": (1,)},
        {"width": 1999, "height": 1501, "mpp": 0.25},
        {"width": 3001, "height": 2222, "mpp": 0.27},
        {"width": 203, "height": 305, "mpp": 56 / 101.5 * 2, "reductions": (1,)},
    ],
)
def test_tiles_end_at_the_last_whole_px_of_the_level_and_never_beyond(of, border):
    slide = slide_of(**of)
    plan = plan_tiles(slide, TileSpec(size_px=56), border=border)
    level = slide.reader.levels[plan.scale.level]
    windows = windows_of(plan.coords, plan.scale, plan.spec.size_px, level)
    whole = np.array(level.size) // plan.scale.reduction

    assert len(plan)
    assert (plan.coords >= 0).all()
    assert (plan.coords + plan.tiles.size_level0 <= slide.dimensions).all()
    assert (windows.start >= 0).all()
    assert (windows.end <= whole).all()
    if border == "shift":
        assert windows.end.max(axis=0).tolist() == whole.tolist()


def drawn(mask, downsample, size):
    """A mask at full size, a level-0 px a px: what it does not reach is no tissue."""
    full = np.repeat(np.repeat(mask, downsample, axis=0), downsample, axis=1)
    at_full = np.zeros(size[::-1], bool)
    part = full[: size[1], : size[0]]
    at_full[: part.shape[0], : part.shape[1]] = part
    return at_full


def pieces_of(mask):
    """The connected pieces of a mask, by flooding, as lists of (row, column)."""
    left, found = set(zip(*np.nonzero(mask), strict=True)), []
    while left:
        queue = [left.pop()]
        for y, x in queue:
            for near in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if near in left:
                    left.remove(near)
                    queue.append(near)
        found.append(queue)
    return found


@st.composite
def planned(draw):
    """A plan with whole numbers of px throughout, so that drawing it is exact; and its mask."""
    side, downsample = draw(st.integers(8, 40)), draw(st.integers(2, 12))
    size = draw(st.integers(side // 2, 150)), draw(st.integers(side // 2, 150))
    options = {
        "overlap": draw(st.sampled_from([0, 0, side // 3, side - 3])),
        "min_tissue": draw(st.sampled_from([0.25, 0.25, 0.0, 0.6, 1.0, None])),
        "border": draw(st.sampled_from(["shift", "shift", "drop"])),
    }
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = size[1] // downsample, size[0] // downsample
    mask = rng.random(shape) < draw(st.sampled_from([0.03, 0.3, 0.6]))
    least = draw(st.integers(0, 3))
    roi = None
    if draw(st.booleans()):
        x0, x1 = sorted(rng.uniform(0, size[0], 2))
        y0, y1 = sorted(rng.uniform(0, size[1], 2))
        roi = {"type": "Polygon", "coordinates": [[[x0, y0], [x1, y0], [x1, y1], [x0, y1]]]}
    slide = slide_of(*size, mpp=2.0, reductions=(1,))
    tissue = TissueMask(
        mask=mask,
        mpp=2.0 * downsample,
        downsample=float(downsample),
        method={"parameters": {"min_area_mm2": least * (2e-3 * downsample) ** 2}},
    )
    plan = plan_tiles(slide, TileSpec(size_px=side), tissue=tissue, roi=roi, **options)
    if roi is not None:
        centres = (np.indices(shape)[::-1] + 0.5) * downsample
        xs, ys = centres
        mask = mask & (xs > x0) & (xs < x1) & (ys > y0) & (ys < y1)
    box = None if roi is None else (x0, y0, x1, y1)
    return plan, slide, mask, downsample, least, box, options


@settings(deadline=None, max_examples=80)
@given(planned())
def test_coverage_is_that_of_the_tiles_painted_over_the_mask(made):
    plan, slide, mask, downsample, *_ = made
    tissue, side = drawn(mask, downsample, slide.dimensions), plan.spec.size_px
    under = np.zeros_like(tissue)
    for x, y in plan.coords:
        assert 0 <= x <= slide.dimensions[0] - side
        assert 0 <= y <= slide.dimensions[1] - side
        under[y : y + side, x : x + side] = True
    if not tissue.any():
        assert plan.coverage is None
    else:
        assert plan.coverage == pytest.approx(tissue[under].sum() / tissue.sum(), abs=1e-9)
        lost = sum(plan.uncovered_mm2.values())
        reached = under.copy()
        for x, y in np.concatenate(list(plan.dropped.values())):
            reached[y : y + side, x : x + side] = True
        assert lost == pytest.approx((tissue & reached & ~under).sum() * 4e-6, abs=1e-12)


@settings(deadline=None, max_examples=80)
@given(planned())
def test_each_cell_is_what_a_loop_over_px_says_and_each_piece_has_a_tile(made):
    plan, slide, mask, downsample, least, box, options = made
    tissue, side = drawn(mask, downsample, slide.dimensions), plan.spec.size_px
    stride, least_share = side - options["overlap"], options["min_tissue"]
    expected, starts = {}, []
    for size in slide.dimensions:  # where windows begin, and where what is new of each begins
        inside = [(at, at) for at in range(0, size, stride) if at + side <= size]
        over = [(at, at) for at in range(0, size, stride) if at + side > size]
        end = inside[-1][0] + side if inside else 0
        if options["border"] == "shift" and inside:
            over = [(size - side, end)] if end < size else []
        starts.append(inside + over)
    for y, new_y in starts[1]:
        for x, new_x in starts[0]:
            strip = tissue[new_y : y + side, new_x : x + side]
            fits = x + side <= slide.dimensions[0] and y + side <= slide.dimensions[1]
            narrow = min(x + side - new_x, y + side - new_y) <= side / 16
            centre = x + side / 2, y + side / 2
            if not fits or narrow:
                letter = "b"
            elif box and not (box[0] < centre[0] < box[2] and box[1] < centre[1] < box[3]):
                letter = "r"
            elif least_share is not None and strip.mean() < least_share - 1e-9:
                letter = "t"
            else:
                letter = "#"
            expected[x, y] = letter
    found = {
        (x, y): letter
        for y, row in zip(plan.rows, plan.cells, strict=True)
        for x, letter in zip(plan.columns, row, strict=True)
    }
    assert found.keys() == expected.keys()
    kept = {at for at, letter in found.items() if letter in "#p"}
    assert {at for at, letter in expected.items() if letter == "#"} == {
        at for at, letter in found.items() if letter == "#"
    }
    assert all(found[at] == expected[at] for at in found if found[at] != "p")

    def held(piece, at):
        return sum(
            max(0, min(at[0] + side, (x + 1) * downsample) - max(at[0], x * downsample))
            * max(0, min(at[1] + side, (y + 1) * downsample) - max(at[1], y * downsample))
            for y, x in piece
        )

    def usable(x, y):
        if x + side > slide.dimensions[0] or y + side > slide.dimensions[1]:
            return False
        x, y = x + side / 2, y + side / 2
        return box is None or (box[0] < x < box[2] and box[1] < y < box[3])

    big = [piece for piece in pieces_of(mask) if len(piece) >= least]
    for piece in big if least_share is not None else ():
        if any(held(piece, at) for at in expected if usable(*at)):
            assert any(held(piece, at) for at in kept)
    # One for a piece is the best of a piece, at least, that would have none.
    plain = {at for at, letter in found.items() if letter == "#"}
    alone = [piece for piece in big if not any(held(piece, at) for at in plain)]
    for at in kept - plain:
        assert any(
            held(piece, at) == max(held(piece, cell) for cell in expected if usable(*cell)) > 0
            for piece in alone
        )


def test_a_piece_has_the_cell_that_holds_most_of_it_and_keeps_it_in_its_letter():
    slide = slide_of(896, 448, mpp=2.0)
    mask = np.zeros((14, 28), bool)
    mask[3:6, 6:9] = True  # a third of it in the first cell of the row, the rest in the second
    mask[3, 12] = True  # alone, and smaller than 0.03 mm²
    tissue = mask_of(mask, slide=slide, downsample=32)
    plan = plan_tiles(slide, TileSpec(), tissue=tissue)
    assert plan.cells == ("tptt", "tttt")
    assert plan.for_piece.tolist() == [True]
    assert plan.coords.tolist() == [[224, 0]]
    assert plan.coverage == pytest.approx(7 / 10)
    assert TilePlan.from_json(plan.to_json()).for_piece.tolist() == [True]


def test_without_a_minimum_every_tile_is_kept_and_coverage_still_known():
    slide = slide_of(896, 448, mpp=2.0)
    tissue = mask_of(np.eye(14, 28), slide=slide, downsample=32)
    plan = plan_tiles(slide, TileSpec(), tissue=tissue, min_tissue=None)
    assert plan.cells == ("####", "####")
    assert plan.options["min_tissue"] is None
    assert plan.coverage == 1


def test_a_plan_without_damaged_tiles_covers_less_and_says_why():
    slide = slide_of(1000, 448, mpp=2.0)
    tissue = mask_of(np.ones((14, 31)), slide=slide, downsample=32)
    plan = plan_tiles(slide, TileSpec(), tissue=tissue)
    assert plan.cells == ("#####", "#####")
    left = plan.without(np.arange(10) == 9)  # the last: what the one before it covers is not lost
    assert left.cells == ("#####", "####d")
    lost = (992 - 896) * 224 / (992 * 448)  # the mask ends at 31 px of 32
    assert left.coverage == pytest.approx(1 - lost)
    assert left.uncovered_mm2["damaged"] == pytest.approx(lost * tissue.area_mm2)
    again = TilePlan.from_json(left.to_json())
    assert again.coverage == left.coverage
    assert np.array_equal(again.coords, left.coords)
    assert again.without(np.arange(9) == 0).coverage < left.coverage


def test_little_coverage_is_warned_of_with_its_reasons_and_their_remedies():
    slide = slide_of(1110, 700, mpp=2.0)
    mask, small = np.zeros((20, 34), bool), np.zeros((20, 34), bool)
    mask[:, 27:] = mask[:3, :12] = True
    small[10, 3:9] = True
    tissue = TissueMask(
        mask=mask,
        mpp=64.0,
        downsample=32.0,
        method={"parameters": {"min_area_mm2": 0.03}},
        too_small=small,
    )
    plan = plan_tiles(slide, TileSpec(), tissue=tissue, border="drop")
    with pytest.warns(XmagWarning) as seen:
        warn_of_lost_tissue(plan, "a.svs")
    (text,) = {str(warning.message) for warning in seen}
    for part in ("border='shift'", "lower min_tissue=, now 0.25", "1 pieces of less than 0.03 mm²"):
        assert part in text
    assert (
        f"cover {plan.covered_mm2:.2g} of {tissue.area_mm2 + tissue.too_small_mm2:.2g} mm²" in text
    )
    assert plan.uncovered_mm2["too_small"] == pytest.approx(6 * 0.064**2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = replace(tissue, too_small=None)
        warn_of_lost_tissue(plan_tiles(slide, TileSpec(), tissue=whole), "a.svs")


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "mpp", "least"),
    [
        ("cmu-1-small-region", None, 0.92),
        ("tcga-cr-7395-01a-01-ts1", 0.25, 0.99),
        ("tcga-cr-7395-01a-01-ts1", 0.5, 0.97),
    ],
)
def test_real_slides_lose_little_of_their_tissue(shared, name, mpp, least):
    with Slide(shared / "slides" / f"{name}.svs", mpp=mpp) as slide:
        tissue = find_tissue(slide)
        dropped = plan_tiles(slide, TileSpec(), tissue=tissue, border="drop")
        plan = plan_tiles(slide, TileSpec(), tissue=tissue)
    # By brute force: a grid of points, 8 a px of the mask each way.
    points = (np.arange(8 * max(tissue.mask.shape)) + 0.5) / 8
    ys, xs = (points[: 8 * n] for n in tissue.mask.shape)
    under = np.zeros((len(ys), len(xs)), bool)
    side = plan.tiles.size_px * plan.tiles.mpp / plan.tiles.level0_mpp
    for x, y in plan.coords:
        columns = (xs * tissue.downsample >= x) & (xs * tissue.downsample < x + side)
        rows = (ys * tissue.downsample >= y) & (ys * tissue.downsample < y + side)
        under |= rows[:, None] & columns
    full = tissue.mask[np.ix_(ys.astype(int), xs.astype(int))]
    assert plan.coverage == pytest.approx(full[under].sum() / full.sum(), abs=0.003)
    assert dropped.coverage < 0.8 < least <= plan.coverage
