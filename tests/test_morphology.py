import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from xmag.morphology import (
    closed,
    dilated,
    filled,
    holding,
    labelled,
    outlines,
    over_square,
    without_small,
)

masks = st.tuples(st.integers(1, 12), st.integers(1, 12)).flatmap(
    lambda shape: arrays(np.bool_, shape)
)
EDGES, CORNERS = ndimage.generate_binary_structure(2, 1), np.ones((3, 3))


def spiral(size):
    """One piece a px wide, whose ends are as far apart as they can be."""
    mask = np.zeros((size, size), bool)
    y = x = 0
    dy, dx = 0, 1
    mask[0, 0] = True
    while True:
        ahead, beyond = (y + dy, x + dx), (y + 2 * dy, x + 2 * dx)
        blocked = not all(0 <= c < size for c in ahead)
        blocked |= all(0 <= c < size for c in beyond) and bool(mask[beyond])
        if blocked:
            dy, dx = dx, -dy
            ahead, beyond = (y + dy, x + dx), (y + 2 * dy, x + 2 * dx)
            if not all(0 <= c < size for c in ahead) or mask[ahead]:
                return mask
            if all(0 <= c < size for c in beyond) and mask[beyond]:
                return mask
        y, x = ahead
        mask[y, x] = True


def assert_same_pieces(mask, structure, *, diagonal):
    ours, count = labelled(mask, diagonal=diagonal)
    expected, expected_count = ndimage.label(mask, structure)
    assert count == expected_count
    assert (ours > 0).tolist() == mask.tolist()
    pairs = set(zip(ours[mask].tolist(), expected[mask].tolist(), strict=True))
    assert len(pairs) == count


@given(masks)
def test_pieces_are_those_of_scipy(mask):
    assert_same_pieces(mask, EDGES, diagonal=False)
    assert_same_pieces(mask, CORNERS, diagonal=True)


@pytest.mark.parametrize("density", [0.1, 0.4, 0.59, 0.9])
def test_pieces_of_large_masks_are_those_of_scipy(density):
    mask = np.random.default_rng(0).random((300, 400)) < density
    assert_same_pieces(mask, EDGES, diagonal=False)
    assert_same_pieces(mask, CORNERS, diagonal=True)


def test_a_long_spiral_is_one_piece():
    mask = spiral(101)
    assert mask.sum() > 4000
    assert labelled(mask)[1] == ndimage.label(mask)[1] == 1


@given(masks, st.integers(0, 3))
def test_growing_and_closing_are_those_of_scipy(mask, px):
    square = np.ones((2 * px + 1, 2 * px + 1))
    assert (dilated(mask, px) == ndimage.binary_dilation(mask, square)).all()
    wide = np.pad(mask, 2 * px + 1)
    expected = ndimage.binary_closing(wide, square)
    inner = np.s_[2 * px + 1 : -2 * px - 1, 2 * px + 1 : -2 * px - 1]
    assert (closed(mask, px) == expected[inner]).all()


@given(masks)
def test_all_holes_filled_are_those_of_scipy(mask):
    assert (filled(mask, np.inf) == ndimage.binary_fill_holes(mask, CORNERS)).all()


def test_only_holes_up_to_the_limit_are_filled():
    mask = np.ones((9, 12), bool)
    mask[2:4, 2:4] = mask[2:5, 6:9] = mask[0, 5] = False
    expected = mask.copy()
    expected[2:4, 2:4] = True
    assert (filled(mask, 4) == expected).all()


def test_pieces_are_kept_by_size_and_by_seed():
    mask = np.zeros((6, 10), bool)
    mask[1:3, 1:3] = mask[4, 5:8] = True
    assert without_small(mask, 4).sum() == 4
    assert without_small(mask, 3).sum() == 7
    seeds = np.zeros_like(mask)
    seeds[4, 6] = seeds[0, 9] = True
    assert holding(mask, seeds).nonzero()[0].tolist() == [4, 4, 4]


def test_neighbourhoods_go_on_beyond_the_edges():
    values = np.random.default_rng(0).random((7, 9)).astype(np.float32)
    expected = ndimage.maximum_filter(values, 5, mode="nearest")
    assert (over_square(np.maximum, values, 2) == expected).all()
    mean = over_square(np.add, values, 1) / 9
    assert np.allclose(mean, ndimage.uniform_filter(values, 3, mode="nearest"), atol=1e-6)


@given(masks)
def test_outlines_make_valid_polygons_that_give_the_mask_back(mask):
    labels, count = labelled(mask)
    rings = {}
    for piece, ring in outlines(mask):
        assert ring[0] == ring[-1]
        polygon = shapely.Polygon(ring)
        assert polygon.is_valid
        rings.setdefault(piece, []).append((shapely.is_ccw(shapely.LinearRing(ring)), polygon))
    assert sorted(rings) == list(range(1, count + 1))
    y, x = np.mgrid[: mask.shape[0], : mask.shape[1]] + 0.5
    for piece, found in rings.items():
        (outer,) = [polygon for is_outer, polygon in found if is_outer]
        holes = [polygon.exterior for is_outer, polygon in found if not is_outer]
        area = shapely.Polygon(outer.exterior, holes)
        assert area.is_valid
        assert (shapely.contains_xy(area, x, y) == (labels == piece)).all()


def test_outlines_have_no_corner_on_a_straight_line():
    mask = np.zeros((5, 8), bool)
    mask[1:4, 2:7] = True
    ((_, ring),) = outlines(mask)
    assert ring == [(2, 1), (7, 1), (7, 4), (2, 4), (2, 1)]
