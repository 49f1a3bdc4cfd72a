"""Small operations on images, without any I/O: neighbourhoods, connected pieces, outlines.

Masks are bool (height, width). Px of a piece touch along their edges; those of a hole, which is a
piece of what lies between, at corners too.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Bools = NDArray[np.bool_]
"""A boolean image, shape (height, width)."""

Corner = tuple[int, int]
"""A corner of a px, (x, y), counted from the top-left corner of the image."""

_Ints = NDArray[np.intp]


def over_square(combine: np.ufunc, values: NDArray[Any], reach_px: int) -> NDArray[Any]:
    """`combine` over the square around each px; the outermost px go on beyond the edges."""
    for axis in (0, 1):
        size = values.shape[axis]
        first, last = (values.take([at] * reach_px, axis) for at in (0, -1))
        padded = np.concatenate([first, values, last], axis)  # np.pad takes three times as long
        steps = range(2 * reach_px + 1)
        shifted = [padded[i : i + size] if axis == 0 else padded[:, i : i + size] for i in steps]
        values = combine(shifted[0], shifted[1]) if reach_px else shifted[0]
        for other in shifted[2:]:
            combine(values, other, out=values)
    return values


def dilated(mask: Bools, px: int) -> Bools:
    """The mask grown by `px` to all sides, corners included."""
    return over_square(np.logical_or, mask, px)


def closed(mask: Bools, px: int) -> Bools:
    """The mask with gaps up to twice `px` wide bridged; beyond its edges there is nothing."""
    bridged = ~dilated(~dilated(np.pad(mask, px), px), px)
    return bridged[px : px + mask.shape[0], px : px + mask.shape[1]]


def filled(mask: Bools, max_px: float) -> Bools:
    """The mask with holes of up to `max_px` px filled; what reaches an edge is no hole."""
    (height, width), gaps = mask.shape, ~mask
    runs = _runs(gaps, diagonal=True)
    row, start = np.divmod(runs.starts, width + 2)
    at_edge = (row == 0) | (row == height - 1) | (start == 1) | (start + runs.lengths > width)
    inside = runs.sums(runs.lengths) <= max_px
    inside[runs.pieces[at_edge]] = False
    return mask | runs.painted(gaps, inside)


def holding(mask: Bools, seeds: Bools) -> Bools:
    """The connected pieces of `mask` that hold a px of `seeds`."""
    runs = _runs(mask)
    if not len(runs.pieces):
        return mask
    first = np.cumsum(runs.lengths) - runs.lengths
    held = np.logical_or.reduceat(seeds[mask], first)
    return runs.painted(mask, runs.sums(held) > 0)


def without_small(mask: Bools, min_px: float) -> Bools:
    """The mask without connected pieces of fewer than `min_px` px."""
    runs = _runs(mask)
    return runs.painted(mask, runs.sums(runs.lengths) >= min_px)


def labelled(mask: Bools, *, diagonal: bool = False) -> tuple[_Ints, int]:
    """The number of the connected piece each px belongs to (0: none), and how many there are.

    Px touch along edges, with `diagonal` at corners too.
    """
    runs = _runs(mask, diagonal=diagonal)
    labels = np.zeros(mask.shape, np.intp)
    labels[mask] = np.repeat(runs.pieces + 1, runs.lengths)
    return labels, runs.total


class _Runs(NamedTuple):
    """Px of a mask in a row, in the order of the mask: the first, how many, and their piece.

    `starts` count the px of an image with a px more on the left and right; `total` is the number of
    connected pieces.
    """

    starts: _Ints
    lengths: _Ints
    pieces: _Ints
    total: int

    def sums(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """The sum over the runs of each piece."""
        return np.bincount(self.pieces, values, self.total).astype(np.float64)

    def painted(self, mask: Bools, kept: Bools) -> Bools:
        """Those pieces of their mask that are kept."""
        image = mask.copy()
        image[mask] = np.repeat(kept[self.pieces], self.lengths)
        return image


def _runs(mask: Bools, *, diagonal: bool = False) -> _Runs:
    """The runs of a mask, with the pieces that `labelled` counts."""
    row = mask.shape[1] + 2
    padded = np.zeros((mask.shape[0], row), np.int8)
    padded[:, 1:-1] = mask
    change = np.diff(padded.ravel(), append=np.int8(0))
    # The change stands before the px.
    starts, stops = np.flatnonzero(change == 1) + 1, np.flatnonzero(change == -1) + 1
    # Each horizontal run touches those of the next row from `first` up to before `last`.
    first = np.searchsorted(stops, starts + row, "left" if diagonal else "right")
    last = np.searchsorted(starts, stops + row, "right" if diagonal else "left")
    below = last - first
    upper = np.repeat(np.arange(len(starts)), below)
    lower = np.arange(len(upper)) + np.repeat(first - (np.cumsum(below) - below), below)
    lowest = _lowest_connected(len(starts), upper, lower)
    numbers = np.cumsum(lowest == np.arange(len(starts)))
    count = int(numbers[-1]) if len(numbers) else 0
    return _Runs(starts, stops - starts, numbers[lowest] - 1, count)


def _lowest_connected(count: int, a: _Ints, b: _Ints) -> _Ints:
    """For each of `count` nodes, the lowest that edges (a[i], b[i]) connect it to."""
    lowest = np.arange(count)
    while True:
        low = np.minimum(lowest[a], lowest[b])
        joined = lowest.copy()
        np.minimum.at(joined, lowest[a], low)
        np.minimum.at(joined, lowest[b], low)
        joined = joined[joined]
        if np.array_equal(joined, lowest):
            return lowest
        lowest = joined


def outlines(mask: Bools) -> Iterator[tuple[int, list[Corner]]]:
    """Each ring of the mask's outline: the number of its piece, and its corners (x, y), closed.

    Walked with tissue on the right, along px edges. A ring that comes back to one of its corners
    is cut in two there, which is what makes the polygons valid (OGC simple features).
    """
    labels, _ = labelled(mask)
    around, stride = np.pad(mask, 1), mask.shape[1] + 1
    beyond = (around[:-2, 1:-1], around[1:-1, 2:], around[2:, 1:-1], around[1:-1, :-2])
    # For edges going right, down, left and up: first corner -> piece.
    edges: list[dict[int, int]] = []
    for other, (dx, dy) in zip(beyond, ((0, 0), (1, 0), (1, 1), (0, 1)), strict=True):
        rows, columns = np.nonzero(mask & ~other)
        corners = (rows + dy) * stride + columns + dx
        edges.append(dict(zip(corners.tolist(), labels[rows, columns].tolist(), strict=True)))
    steps = (1, stride, -1, -stride)
    while edges[0]:
        corner, direction = next(iter(edges[0])), 0
        path = {corner: None}
        while direction >= 0:
            piece = edges[direction].pop(corner)
            corner += steps[direction]
            # Right first: where two px touch at a corner only, stay with this one.
            ways = ((direction + turn) % 4 for turn in (1, 0, 3))
            onward = next((way for way in ways if corner in edges[way]), -1)
            if onward != direction and corner in path:
                ring = [corner]
                while (last := path.popitem()[0]) != corner:
                    ring.append(last)
                yield piece, [(c % stride, c // stride) for c in [corner, *reversed(ring)]]
            if onward != direction:
                path[corner] = None
            direction = onward
