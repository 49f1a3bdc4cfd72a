"""Which tiles of a slide are read, from which level, and why the others are not."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xmag.errors import InputError
from xmag.geometry import (
    Polygon,
    ReadScale,
    TileGeometry,
    TileSpec,
    inside_any,
    polygons_from_geojson,
)
from xmag.slide import Slide
from xmag.slide.reader import Level
from xmag.tissue import TissueMask

Coords = NDArray[np.int64]
"""Top-left corners (x, y) of tiles in level-0 px, shape (N, 2)."""

KEPT = "#"
REASONS = {"b": "border", "r": "roi", "t": "tissue", "d": "damaged"}
"""Why a grid cell is no tile, by the character that stands for it in a plan's `cells`."""

_SCHEMA_VERSION = 1

_SLACK_PX = 1e-6
"""What floating-point arithmetic may be off by where a window ends exactly at an edge."""


@dataclass(frozen=True, kw_only=True)
class TilePlan:
    """The tiles of one slide, row by row, on a grid whose origin is level-0 (0, 0).

    `cells` draws the grid, a string a row and a character a cell: ``#`` is a tile, ``b`` reaches
    over the border of the slide, ``r`` has its centre outside the region of interest, ``t`` holds
    too little tissue (the first reason that applies, in this order), ``d`` was a tile until its
    bytes turned out to be damaged. `scale` says which level is
    read at which reduction, `tiles` where the tiles lie, `options` what the plan was made with, and
    `slide` which content it belongs to (None: any).
    """

    spec: TileSpec
    scale: ReadScale
    tiles: TileGeometry
    cells: tuple[str, ...]
    options: Mapping[str, Any]
    slide: Mapping[str, Any] | None = None

    @cached_property
    def coords(self) -> Coords:
        """int64 (N, 2): the top-left corner of each tile in level-0 px, row by row."""
        return self._corners(KEPT)

    @cached_property
    def dropped(self) -> dict[str, Coords]:
        """For each reason, "border", "roi", "tissue" and "damaged", the corners of its cells."""
        return {reason: self._corners(letter) for letter, reason in REASONS.items()}

    def __len__(self) -> int:
        """The number of tiles."""
        return len(self.coords)

    def _corners(self, letter: str) -> Coords:
        rows = [np.frombuffer(row.encode("ascii"), np.uint8) for row in self.cells]
        grid = np.stack(rows) if rows else np.empty((0, 0), np.uint8)
        cells = np.argwhere(grid == ord(letter))[:, ::-1]
        corners = _corner_of(cells, self.tiles)
        corners.setflags(write=False)
        return corners

    def without(self, damaged: NDArray[np.bool_]) -> "TilePlan":
        """The plan less the tiles where `damaged`, bool (N,), is true: they count as dropped."""
        grid = np.array([list(row) for row in self.cells])
        tiles = np.argwhere(grid == KEPT)[damaged]
        grid[tiles[:, 0], tiles[:, 1]] = "d"
        return replace(self, cells=tuple("".join(row) for row in grid))

    def to_json(self) -> str:
        """The plan as JSON text, the same for the same plan."""
        fields = {
            "schema_version": _SCHEMA_VERSION,
            "spec": self.spec.to_dict(),
            "scale": asdict(self.scale),
            "tiles": self.tiles.to_dict(),
            "options": dict(self.options),
            "slide": None if self.slide is None else dict(self.slide),
            "cells": list(self.cells),
        }
        return json.dumps(fields, indent=1, sort_keys=True, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "TilePlan":
        """The plan that `to_json` wrote. Raises InputError where the text holds none."""
        try:
            fields = json.loads(text)
            version = fields.pop("schema_version")
            if version != _SCHEMA_VERSION:
                raise InputError(
                    f"the tile plan has schema version {version!r}, this xmag reads"
                    f" {_SCHEMA_VERSION}; upgrade xmag or make the plan again"
                )
            return cls(
                spec=TileSpec.from_dict(fields["spec"]),
                scale=ReadScale(**fields["scale"]),
                tiles=TileGeometry.from_dict(fields["tiles"]),
                cells=tuple(fields["cells"]),
                options=fields["options"],
                slide=fields["slide"],
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"this is not a tile plan ({error!r}); expected the text that"
                " TilePlan.to_json() returned"
            ) from error


def plan_tiles(
    slide: Slide,
    spec: TileSpec,
    *,
    tissue: TissueMask | None = None,
    overlap: int = 0,
    min_tissue: float = 0.25,
    roi: Any = None,
) -> TilePlan:
    """The tiles to read from `slide` for a model that sees `spec`.

    Args:
        slide: An open slide with a known scale.
        spec: What the model wants to see.
        tissue: Where tissue is; None keeps every tile inside the slide.
        overlap: Output px that neighbouring tiles share, from 0 to ``spec.size_px - 1``.
        min_tissue: Smallest fraction of a tile's area that `tissue` must cover.
        roi: Region of interest, polygons in level-0 px: GeoJSON as a dict, as text or as the path
            of a file, or what `polygons_from_geojson` returns. A tile whose centre lies in it
            belongs to it.

    Raises:
        SlideScaleError: The slide has no µm/px, or is coarser than `spec` tolerates.
        InputError: An argument is out of its range, or `roi` holds no polygon.
    """
    check_grid(spec, overlap=overlap, min_tissue=min_tissue)
    if not isinstance(tissue, TissueMask | None):
        raise InputError(
            f"tissue is a {type(tissue).__name__}; expected a TissueMask or None:"
            " TissueMask.from_array(mask, slide) makes one of a mask of your own"
        )
    scale = slide.scale_for(spec)
    assert slide.mpp is not None  # scale_for raises otherwise
    level = slide.reader.levels[scale.level]
    pitch = level.downsample * scale.reduction * scale.factor
    tiles = TileGeometry(
        size_px=spec.size_px,
        mpp=scale.mpp,
        size_level0=round(spec.size_px * pitch),
        overlap_px=overlap,
        level0_mpp=slide.mpp,
        level0_size=slide.dimensions,
    )
    polygons = None if roi is None else _polygons(roi)
    options = plan_options(
        overlap=overlap,
        min_tissue=min_tissue,
        tissue_method=None if tissue is None else tissue.method,
        roi=polygons,
    )
    cells = _draw_grid(tiles, scale, level, tissue=tissue, min_tissue=min_tissue, polygons=polygons)
    return TilePlan(
        spec=spec, scale=scale, tiles=tiles, cells=cells, options=options, slide=slide.fingerprint
    )


def check_grid(spec: TileSpec, *, overlap: int, min_tissue: float) -> None:
    """Raise InputError where `overlap` or `min_tissue` is out of its range."""
    if not (isinstance(overlap, int) and 0 <= overlap < spec.size_px):
        raise InputError(f"overlap is {overlap!r}; expected an int from 0 to {spec.size_px - 1} px")
    if not 0 <= min_tissue <= 1:
        raise InputError(f"min_tissue is {min_tissue!r}; expected a fraction from 0 to 1")


def plan_options(
    *,
    overlap: int,
    min_tissue: float,
    tissue_method: Mapping[str, Any] | None,
    roi: Sequence[Polygon] | None = None,
) -> dict[str, Any]:
    """What a plan made with these says in its `options`: what may not differ between slides."""
    return {
        "overlap_px": overlap,
        "min_tissue": None if tissue_method is None else float(min_tissue),
        "tissue": None if tissue_method is None else dict(tissue_method),
        "roi_sha256": None if roi is None else _digest(roi),
    }


def _draw_grid(
    tiles: TileGeometry,
    scale: ReadScale,
    level: Level,
    *,
    tissue: TissueMask | None,
    min_tissue: float,
    polygons: Sequence[Polygon] | None,
) -> tuple[str, ...]:
    """A string a row of the grid, a character a cell, as `TilePlan.cells` has it."""
    px0 = tiles.mpp / tiles.level0_mpp
    stride = (tiles.size_px - tiles.overlap_px) * px0
    # A cell belongs to the grid if it begins inside the slide.
    columns, rows = (int(np.ceil(side / stride - _SLACK_PX)) for side in tiles.level0_size)
    index = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), axis=-1).reshape(-1, 2)
    corners = _corner_of(index, tiles)
    letters = np.full(len(index), KEPT, "U1")
    if tissue is not None:
        covered = _coverage(tissue, corners, tiles.size_px * px0)
        letters[covered < min_tissue - 1e-9] = "t"
    if polygons is not None:
        centres = corners + tiles.size_px * px0 / 2
        letters[~inside_any(polygons, centres)] = "r"
    letters[~_inside(index * stride, tiles, scale, level)] = "b"
    return tuple("".join(row) for row in letters.reshape(rows, columns))


def _corner_of(cells: NDArray[Any], tiles: TileGeometry) -> Coords:
    """The level-0 corners, to the nearest px, of grid cells given as (column, row)."""
    stride = (tiles.size_px - tiles.overlap_px) * tiles.mpp / tiles.level0_mpp
    return np.floor(cells * stride + 0.5).astype(np.int64)


def _inside(
    corners: NDArray[np.floating[Any]], tiles: TileGeometry, scale: ReadScale, level: Level
) -> NDArray[np.bool_]:
    """Which windows, given by unrounded corners, lie wholly on the canvas and on the level.

    A level may cover a little less than the canvas, as its size is rounded down.
    """
    end = corners + tiles.size_px * tiles.mpp / tiles.level0_mpp
    decoded_end = end / (level.downsample * scale.reduction)
    decoded_size = np.floor_divide(level.size, scale.reduction)
    inside = (end <= np.asarray(tiles.level0_size) + _SLACK_PX).all(axis=1)
    return np.asarray(inside & (decoded_end <= decoded_size + _SLACK_PX).all(axis=1))


def _coverage(tissue: TissueMask, corners: Coords, side_level0: float) -> NDArray[np.float64]:
    """The fraction of each square that the mask covers, exact to parts of mask pixels.

    The mask is constant on each of its pixels, so its integral from the origin is bilinear in
    between: four look-ups in a summed-area table give a window (Crow, SIGGRAPH 1984).
    """
    height, width = tissue.mask.shape
    table = np.zeros((height + 1, width + 1))
    table[1:, 1:] = tissue.mask.cumsum(0, dtype=np.float64).cumsum(1)
    low = corners / tissue.downsample
    high = (corners + side_level0) / tissue.downsample

    def integral(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
        x, y = np.clip(x, 0, width), np.clip(y, 0, height)
        column = np.minimum(x.astype(int), max(width - 1, 0))
        row = np.minimum(y.astype(int), max(height - 1, 0))
        right, below = np.minimum(column + 1, width), np.minimum(row + 1, height)
        u, v = x - column, y - row
        top = table[row, column] * (1 - u) + table[row, right] * u
        bottom = table[below, column] * (1 - u) + table[below, right] * u
        return np.asarray(top * (1 - v) + bottom * v)

    (x0, y0), (x1, y1) = low.T, high.T
    area = integral(x1, y1) - integral(x0, y1) - integral(x1, y0) + integral(x0, y0)
    return np.asarray(area / (side_level0 / tissue.downsample) ** 2)


def _polygons(roi: Any) -> tuple[Polygon, ...]:
    if isinstance(roi, tuple) and all(isinstance(part, Polygon) for part in roi):
        return roi
    return polygons_from_geojson(roi)


def _digest(polygons: Sequence[Polygon]) -> str:
    """A sha256 of the vertices: the same region, however it was given."""
    rings = [[ring.tolist() for ring in polygon.rings] for polygon in polygons]
    return hashlib.sha256(json.dumps(rings).encode()).hexdigest()
