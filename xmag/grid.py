"""Grid of tiles over a slide: its columns and rows, and the cells that are tiles.

Pure arithmetic on rectangles and masks; `xmag.plan` puts it together.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from xmag.geometry import Polygon, ReadScale, TileGeometry, inside_any
from xmag.morphology import Bools, labelled
from xmag.slide.reader import Level
from xmag.tissue import TissueMask

Border = Literal["shift", "drop"]
"""Treatment of tiles that would reach over the border of the slide."""

TILE, PIECE, BORDER, ROI, TISSUE = "#", "p", "b", "r", "t"

_Floats = NDArray[np.float64]
_Letters = NDArray[np.str_]
_Area = Callable[[_Floats, _Floats], _Floats]

_SLACK_PX = 1e-6
"""Tolerance for floating-point arithmetic where a window ends exactly at an edge."""
_NARROWEST = 1 / 16
"""Widest strip that is not worth a tile of its own, as a fraction of a tile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """The columns of a grid, or its rows, in level-0 px.

    `corners` are the first edges of the windows, to the nearest px, and `fits` says which windows
    lie wholly on the slide. `begins` is where that part of each window begins which no column (row)
    before the last covers, if the last is shifted; elsewhere it is `corners`. `is_narrow` says that
    this part is too narrow for a tile. `exact` are the corners before they were rounded.
    """

    corners: NDArray[np.int64]
    exact: _Floats
    fits: NDArray[np.bool_]
    begins: _Floats
    is_narrow: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.corners)


def axes_of(
    tiles: TileGeometry, scale: ReadScale, level: Level, border: Border
) -> tuple[Axis, Axis]:
    """The columns and the rows of the grid of these tiles, as they are read at `scale`.

    A window belongs to the grid if it begins inside the slide. With `border` "shift" the first one
    that reaches over the last whole px of the level moves inwards to end there, and others like it
    are not part of the grid.
    """
    per_decoded = level.downsample * scale.reduction
    columns, rows = (
        # A level may cover a little less than the canvas, as its size is rounded down.
        _axis(tiles, size, min(size, size_px // scale.reduction * per_decoded), border)
        for size, size_px in zip(tiles.level0_size, level.size, strict=True)
    )
    return columns, rows


def _axis(tiles: TileGeometry, size: int, end: float, border: Border) -> Axis:
    px0 = tiles.mpp / tiles.level0_mpp
    side, stride = tiles.size_px * px0, (tiles.size_px - tiles.overlap_px) * px0
    exact = stride * np.arange(np.ceil(size / stride - _SLACK_PX), dtype=np.float64)
    fits = exact + side <= end + _SLACK_PX
    corners = rounded(exact)
    # The rounding of a corner and that of the side may add up to a px.
    corners[fits] = np.minimum(corners[fits], size - tiles.size_level0)
    inside = int(np.count_nonzero(fits))
    is_narrow = np.zeros(len(corners), np.bool_)
    begins = corners.astype(np.float64)
    if border == "shift" and 0 < inside < len(begins):
        last = min(int(rounded(end - side)), size - tiles.size_level0)
        covered = corners[inside - 1] + side
        kept = inside + (last > corners[inside - 1])
        corners, exact, begins = corners[:kept], exact[:kept], begins[:kept]
        fits, is_narrow = np.ones(kept, np.bool_), is_narrow[:kept]
        corners[inside:], exact[inside:], begins[inside:] = last, end - side, covered
        is_narrow[inside:] = last + side - covered <= side * _NARROWEST + _SLACK_PX
    return Axis(corners=corners, exact=exact, fits=fits, begins=begins, is_narrow=is_narrow)


def rounded(exact: Any) -> NDArray[np.int64]:
    """Places in level-0 px, rounded to the nearest whole one, halves up."""
    return np.asarray(np.floor(exact + 0.5), np.int64)


def letters_of(
    axes: tuple[Axis, Axis],
    tiles: TileGeometry,
    *,
    tissue: TissueMask | None,
    min_tissue: float | None,
    polygons: Sequence[Polygon] | None,
) -> tuple[str, ...]:
    """Letters of the cells, a string a row of the grid, as `TilePlan.cells` has them.

    `tissue` is that in the polygons.
    """
    columns, rows = axes
    side = tiles.side_level0
    letters = np.full((len(rows), len(columns)), TILE, "U1")
    if tissue is not None and min_tissue is not None:
        x, y = ((axis.begins, axis.corners + side) for axis in axes)
        area = _windows(_area(tissue.mask), tissue.downsample, x, y)
        share = area * tissue.downsample**2 / np.outer(y[1] - y[0], x[1] - x[0])
        letters[share < min_tissue - 1e-9] = TISSUE
    usable = fits = rows.fits[:, None] & columns.fits
    if polygons is not None:
        grid = np.stack(np.meshgrid(columns.corners, rows.corners), axis=-1)
        outside = ~inside_any(polygons, grid.reshape(-1, 2) + side / 2).reshape(letters.shape)
        letters[outside] = ROI
        usable = fits & ~outside
    letters[~fits | rows.is_narrow[:, None] | columns.is_narrow] = BORDER
    if tissue is not None and min_tissue is not None:
        _keep_pieces(letters, axes, side, tissue, usable)
    return tuple("".join(row) for row in letters)


def _keep_pieces(
    letters: _Letters,
    axes: tuple[Axis, Axis],
    side: float,
    tissue: TissueMask,
    usable: NDArray[np.bool_],
) -> None:
    """Keep, for each piece of tissue without any tile, the `usable` cell that holds most of it."""
    labels, count = labelled(tissue.mask)
    columns, rows = axes
    kept = np.argwhere(letters == TILE)[:, ::-1]
    corners = np.stack([columns.corners[kept[:, 0]], rows.corners[kept[:, 1]]], axis=1)
    has_tile = np.zeros(count + 1, np.bool_)
    has_tile[labels[_touched(corners, side, tissue)]] = True
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    large = sizes >= tissue.min_area_mm2 / (tissue.mpp / 1000) ** 2 - _SLACK_PX
    pieces = np.flatnonzero(large[1:] & ~has_tile[1:]) + 1
    for piece in pieces[np.argsort(-sizes[pieces], kind="stable")].tolist():
        if has_tile[piece]:
            continue
        ys, xs = np.nonzero(labels == piece)
        window = slice(ys.min(), ys.max() + 1), slice(xs.min(), xs.max() + 1)
        part = labels[window] == piece
        near, edges = [], []
        for axis, across in zip(axes, window[::-1], strict=True):
            low, high = (v * tissue.downsample for v in (across.start, across.stop))
            near.append(np.flatnonzero((axis.corners < high) & (axis.corners + side > low)))
            edges.append(axis.corners[near[-1]] - low)
        area = _windows(_area(part), tissue.downsample, *((edge, edge + side) for edge in edges))
        area[~usable[np.ix_(near[1], near[0])]] = 0
        if area.size and area.max() > _SLACK_PX:
            y, x = np.unravel_index(area.argmax(), area.shape)
            row, column = near[1][y], near[0][x]
            letters[row, column] = PIECE
            corner = np.array([[columns.corners[column], rows.corners[row]]])
            has_tile[labels[_touched(corner, side, tissue)]] = True


def _touched(corners: NDArray[np.int64], side: float, tissue: TissueMask) -> Bools:
    """The px of the mask that lie under one of the squares, with a part of them at least."""
    most = np.array(tissue.mask.shape[::-1])
    first = np.floor(corners / tissue.downsample + _SLACK_PX).astype(np.int64)
    last = np.ceil((corners + side) / tissue.downsample - _SLACK_PX).astype(np.int64)
    return painted(np.clip(first, 0, most), np.clip(last, 0, most), tissue.mask.shape)


def painted(
    first: NDArray[np.int64], last: NDArray[np.int64], shape: tuple[int, int]
) -> NDArray[np.bool_]:
    """The places, bool (height, width), in one of the boxes from `first` up to `last`, (N, 2)."""
    change = np.zeros((shape[0] + 1, shape[1] + 1), np.int32)
    for x, y, by in ((first, first, 1), (last, first, -1), (first, last, -1), (last, last, 1)):
        np.add.at(change, (y[:, 1], x[:, 0]), by)
    _add_up(change)
    return np.asarray(change[:-1, :-1] > 0)


def _add_up(table: NDArray[np.int32]) -> None:
    """Turn each number of a table into the sum of those above and to the left of it, and itself."""
    table.cumsum(1, out=table)
    for above, row in itertools.pairwise(table):
        np.add(row, above, out=row)  # cumsum(0) goes down the columns: four times as long


def tissue_under(
    tissue: TissueMask, parts: Sequence[NDArray[np.int64]], side: float
) -> list[float]:
    """The mm² of tissue under the squares of each part, less what lies under parts before it.

    A part is the corners of its squares in level-0 px, int64 (N, 2). The edges of all squares cut
    the slide into rectangles, each of which is covered wholly or not at all.
    """
    corners = np.concatenate(parts)
    edges = [np.unique(np.concatenate([c, c + side])) for c in corners.T]
    marks = [edge / tissue.downsample for edge in edges]
    corner_areas = _area(tissue.mask)(marks[0][None, :], marks[1][:, None])
    areas = np.diff(np.diff(corner_areas, axis=0), axis=1)
    found = []
    for part in parts:
        first, last = (
            np.stack([np.searchsorted(e, c) for e, c in zip(edges, at.T, strict=True)], axis=1)
            for at in (part, part + side)
        )
        under = painted(first, last, areas.shape) if len(part) else np.zeros(areas.shape, np.bool_)
        found.append(float(areas[under].sum()) * (tissue.mpp / 1000) ** 2)
        areas[under] = 0
    return found


def _windows(area: _Area, downsample: float, x: tuple[Any, Any], y: tuple[Any, Any]) -> _Floats:
    """The area of the mask, in its px, in each window of a grid: (rows, columns)."""
    (x0, x1), (y0, y1) = (tuple(edge / downsample for edge in edges) for edges in (x, y))
    y0, y1 = y0[:, None], y1[:, None]
    return area(x1, y1) - area(x0, y1) - area(x1, y0) + area(x0, y0)


def _area(mask: Bools) -> _Area:
    """The area of the mask from its origin up to (x, y), in its px, exact to parts of them.

    The mask is constant on each of its px, so this integral is bilinear in between: four look-ups
    in a summed-area table give a window (Crow, SIGGRAPH 1984).
    """
    height, width = mask.shape
    table = np.zeros((height + 1, width + 1), np.int32)
    table[1:, 1:] = mask
    _add_up(table)

    def integral(x: _Floats, y: _Floats) -> _Floats:
        x, y = np.clip(x, 0, width), np.clip(y, 0, height)
        column = np.minimum(x.astype(int), max(width - 1, 0))
        row = np.minimum(y.astype(int), max(height - 1, 0))
        right, below = np.minimum(column + 1, width), np.minimum(row + 1, height)
        u, v = x - column, y - row
        top = table[row, column] * (1 - u) + table[row, right] * u
        bottom = table[below, column] * (1 - u) + table[below, right] * u
        return np.asarray(top * (1 - v) + bottom * v)

    return integral
