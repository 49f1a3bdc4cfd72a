"""Tile plan of a slide: the tiles to read, their level, and the reasons for dropping the others."""

import hashlib
import json
import math
import reprlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from xmag import records
from xmag.errors import InputError, XmagWarning
from xmag.geometry import (
    Polygon,
    ReadScale,
    TileGeometry,
    TileSpec,
    choose_scale,
    polygons_from_geojson,
)
from xmag.grid import (
    BORDER,
    PIECE,
    ROI,
    TILE,
    TISSUE,
    Border,
    axes_of,
    letters_of,
    rounded,
    tissue_under,
)
from xmag.notebook import FOR_PIECE, KEPT, Shown, canvas_picture
from xmag.slide import Slide
from xmag.slide.reader import Level
from xmag.tissue import TissueMask

if TYPE_CHECKING:
    from PIL.Image import Image

Coords = NDArray[np.int64]
"""Top-left corners (x, y) of tiles in level-0 px, shape (N, 2)."""

_KEPT = TILE + PIECE
_DAMAGED = "d"
_ELSEWHERE = "."
"""A cell of a zoomed plan that lies under none of the chosen tiles."""
REASONS = {BORDER: "border", ROI: "roi", TISSUE: "tissue", _DAMAGED: "damaged"}
"""Reasons that a grid cell is no tile, by the character that stands for it in `cells`."""

_FORMAT = records.Format(
    version=3,
    writer="TilePlan.to_json",
    remedy="make the plan again with plan_tiles",
    migrations={2: dict},  # it lacked what `zoom` needs
)

_ENOUGH = 0.9
"""Least share of tissue under tiles; where they cover less, there is a warning."""


@dataclass(frozen=True, kw_only=True, repr=False)
class TilePlan(Shown):
    """The tiles of one slide, row by row, on a grid whose origin is level-0 (0, 0).

    `cells` draws the grid, a string a row and a character a cell: ``#`` is a tile, ``p`` a tile
    with less tissue than `min_tissue` asks for, kept as the best one of a piece of tissue that
    would have none; ``b`` reaches over the border of the slide or adds next to nothing there, ``r``
    has its centre outside the region of interest, ``t`` holds too little tissue (the first reason
    that applies, in this order), ``d`` was a tile until its bytes turned out to be damaged.
    `columns` and `rows` say where the cells begin, in level-0 px: one stride apart, but for the
    last, which may be moved inwards and overlap with the one before it. `scale` says which level is
    read at which reduction, `tiles` where the tiles lie, `options` what the plan was made with,
    `tissue` the tissue it is to cover, in the region of interest (None: not known), and `slide`
    which content it belongs to (None: any).

    A plan that `zoom` made has a ``#`` for each cell under the chosen tiles of another plan, and a
    ``.`` everywhere else. `parent`, int64 (N,), is the number in that plan of the tile under which
    each tile lies; None in a plan of `plan_tiles`. `unrounded` holds the exact `columns` and
    `rows`, and `levels` those of the slide: tiles of another scale may be read from another one.
    """

    spec: TileSpec
    scale: ReadScale
    tiles: TileGeometry
    columns: tuple[int, ...]
    rows: tuple[int, ...]
    cells: tuple[str, ...]
    options: Mapping[str, Any]
    tissue: TissueMask | None = field(default=None, compare=False)
    slide: Mapping[str, Any] | None = None
    levels: tuple[Level, ...] = ()
    unrounded: tuple[tuple[float, ...], tuple[float, ...]] = ((), ())
    parent: NDArray[np.int64] | None = field(default=None, compare=False)

    @cached_property
    def coords(self) -> Coords:
        """int64 (N, 2): the top-left corner of each tile in level-0 px, row by row."""
        return self._corners(_KEPT)

    @cached_property
    def dropped(self) -> dict[str, Coords]:
        """For each reason, "border", "roi", "tissue" and "damaged", the corners of its cells."""
        return {reason: self._corners(letter) for letter, reason in REASONS.items()}

    @cached_property
    def for_piece(self) -> NDArray[np.bool_]:
        """The tiles, bool (N,), that are there only as the best one of a piece of tissue."""
        return np.array(
            [letter == PIECE for row in self.cells for letter in row if letter in _KEPT], np.bool_
        )

    @property
    def coverage(self) -> float | None:
        """The share of the tissue that lies under tiles, 0 to 1; None where no tissue is known."""
        if self.tissue is None or not self.tissue.mask.any():
            return None
        return min(self.covered_mm2 / self.tissue.area_mm2, 1.0)

    @property
    def covered_mm2(self) -> float:
        """The area of the tissue that lies under tiles, counted once where they overlap."""
        return self._areas_mm2[0]

    @property
    def uncovered_mm2(self) -> dict[str, float]:
        """The area of the tissue that lies under no tile, for each reason.

        For those in `dropped` it is that under their cells, and counts for the first where there
        are several. "too_small" is stained tissue that the mask leaves out, as its pieces are too
        small; it is no part of `coverage`.
        """
        return dict(zip((*self.dropped, "too_small"), self._areas_mm2[1:], strict=True))

    @cached_property
    def _areas_mm2(self) -> list[float]:
        parts = [self.coords, *self.dropped.values()]
        tissue = self.tissue
        if tissue is None:
            return [0.0] * (len(parts) + 1)
        side, small = self.tiles.side_level0, 0.0
        if tissue.too_small is not None:
            under = tissue_under(replace(tissue, mask=tissue.too_small), parts[:1], side)
            small = tissue.too_small_mm2 - under[0]
        return [*tissue_under(tissue, parts, side), small]

    def __len__(self) -> int:
        """The number of tiles."""
        return len(self.coords)

    def __repr__(self) -> str:
        dropped = ", ".join(f"{len(v):,} {k}" for k, v in self.dropped.items() if len(v))
        share = "" if self.coverage is None else f", {self.coverage:.0%} of the tissue"
        size = f"{self.tiles.size_px} px at {self.tiles.mpp:.4g} µm/px"
        tiles = "tile" if len(self) == 1 else "tiles"
        return f"<TilePlan of {len(self):,} {tiles} of {size}{share}; dropped {dropped or 'none'}>"

    def _picture(self) -> "Image":
        found = self.tissue
        tissue = None if found is None else (found.mask, found.downsample)
        colours = np.where(self.for_piece[:, None], FOR_PIECE, KEPT).astype(np.uint8)
        tiles = self.coords, self.tiles.size_level0, colours
        return canvas_picture(self.tiles.level0_size, tissue=tissue, tiles=tiles, outlined=True)

    def _corners(self, letters: str) -> Coords:
        rows, columns = self._places(letters).T
        x, y = np.array(self.columns, np.int64)[columns], np.array(self.rows, np.int64)[rows]
        return _frozen(np.stack([x, y], axis=1))

    def _places(self, letters: str) -> NDArray[np.intp]:
        """(row, column) of the cells with one of these letters, row by row."""
        grid = np.frombuffer("".join(self.cells).encode("utf-32-le"), "<U1")
        grid = grid.reshape(len(self.rows), len(self.columns))
        return np.argwhere(np.isin(grid, list(letters)))

    def without(self, damaged: NDArray[np.bool_]) -> "TilePlan":
        """The plan less the tiles where `damaged`, bool (N,), is true: they count as dropped."""
        grid = [list(row) for row in self.cells]
        for row, column in self._places(_KEPT)[damaged].tolist():
            grid[row][column] = _DAMAGED
        parent = None if self.parent is None else _frozen(self.parent[~damaged])
        return replace(self, cells=tuple("".join(row) for row in grid), parent=parent)

    def zoom(self, rows: ArrayLike, *, mpp: float) -> "TilePlan":
        """The plan of the finer tiles under chosen ones: a closer look at these.

        The µm/px of the finer tiles is the exact one of these, `tiles.mpp`, divided by the whole
        number k that comes nearest to `mpp`, so that k x k of them fill each chosen tile, and
        corners are rounded from its unrounded one. All k x k are there, whatever tissue they hold.
        They come row by row as in any plan, and `parent` says where each belongs:
        ``closer.parent == row`` are those under one tile, ``attention.scores[closer.parent]``
        gives each the score of its tile. Where chosen tiles overlap, as at the border or with
        `overlap`, so do the finer ones, and those at the same place are all there, once for each
        tile they are under. A zoomed plan can be zoomed again.

        Args:
            rows: The chosen tiles: their numbers in the plan, in any order and once each however
                often they are given, or bool (N,).
            mpp: µm/px of the finer tiles, which are as many px wide as these and read with the same
                tolerance and kernel: ``plan.spec`` with another `mpp` is the spec of the result.

        Raises:
            InputError: `rows` are no tiles of the plan; `mpp` is not finer, or none of the scales
                that a whole number gives is within the tolerance of the spec; or the plan comes
                from a file of an earlier version.
            SlideScaleError: The slide has no level that fine; none is ever upsampled.
        """
        if not self.levels:
            raise InputError(
                "the plan was written by an earlier version and does not say which levels its slide"
                " has; make it again with plan_tiles"
            )
        k = divisor(self.tiles.mpp, mpp, self.spec.mpp_tolerance)
        # Exact, as a level within the tolerance would not fill the tile.
        exact = replace(self.spec, mpp=self.tiles.mpp / k, mpp_tolerance=0)
        mpps = [self.tiles.level0_mpp * level.downsample for level in self.levels]
        scale = choose_scale(mpps, [level.reductions for level in self.levels], exact)
        side = self.tiles.side_level0 / k
        tiles = replace(self.tiles, mpp=scale.mpp, size_level0=round(side), overlap_px=0)
        x, y = (np.add.outer(axis, np.arange(k) * side).ravel() for axis in self.unrounded)
        # The rounding of a corner and that of the side may add up to a px.
        last = np.subtract(tiles.level0_size, tiles.size_level0)
        chosen = _chosen(rows, len(self))
        parent = np.full((len(self.rows), len(self.columns)), -1)
        parent[tuple(self._places(_KEPT)[chosen].T)] = chosen
        parent = parent.repeat(k, axis=0).repeat(k, axis=1)
        return replace(
            self,
            spec=replace(self.spec, mpp=mpp),
            scale=scale,
            tiles=tiles,
            columns=tuple(np.minimum(rounded(x), last[0]).tolist()),
            rows=tuple(np.minimum(rounded(y), last[1]).tolist()),
            cells=tuple("".join(row) for row in np.where(parent < 0, _ELSEWHERE, TILE)),
            options={**self.options, "zoomed_from_mpp": self.spec.mpp},
            unrounded=(tuple(x.tolist()), tuple(y.tolist())),
            parent=_frozen(parent[parent >= 0]),
        )

    def to_json(self) -> str:
        """The plan as JSON text, the same for the same plan."""
        fields = records.plain(replace(self, tissue=None))
        fields["tissue"] = None if self.tissue is None else self.tissue.to_dict()
        fields["parent"] = None if self.parent is None else self.parent.tolist()
        return _FORMAT.dumps(fields, indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "TilePlan":
        """The plan that `to_json` wrote. Raises InputError where the text holds none.

        Plans of version 1 do not say which tissue they are to cover, and have to be made again;
        those of version 2 can be read, but not zoomed.
        """
        fields = _FORMAT.loads(text, "the tile plan")
        with _FORMAT.reading("the tile plan"):
            tissue = fields.get("tissue")
            fields["tissue"] = None if tissue is None else TissueMask.from_dict(tissue)
            if (parent := fields.get("parent")) is not None:
                fields["parent"] = _frozen(np.array(parent, np.int64))
            plan = records.from_dict(cls, fields)
            columns, rows = len(plan.columns), len(plan.rows)
            if [len(row) for row in plan.cells] != [columns] * rows:
                raise ValueError("its cells are not as many as its columns and rows")
            if plan.parent is not None and plan.parent.shape != (len(plan),):
                raise ValueError("its parents are not as many as its tiles")
            if plan.levels and tuple(map(len, plan.unrounded)) != (columns, rows):
                raise ValueError("its unrounded columns and rows are not as many as the others")
        return plan


def plan_tiles(
    slide: Slide,
    spec: TileSpec,
    *,
    tissue: TissueMask | None = None,
    overlap: int = 0,
    min_tissue: float | None = 0.25,
    border: Border = "shift",
    roi: Any = None,
) -> TilePlan:
    """The tiles to read from `slide` for a model that sees `spec`.

    Args:
        slide: An open slide with a known scale.
        spec: What the model wants to see.
        tissue: Where tissue is; None keeps every tile inside the slide.
        overlap: Output px that neighbouring tiles share, from 0 to ``spec.size_px - 1``.
        min_tissue: Smallest fraction of a tile's area that `tissue` must cover. A piece of tissue
            that would have no tile so gets the one that holds most of it, if the piece is not
            smaller than the mask's own minimum. None keeps every tile inside the slide.
        border: Where the last column and row would reach over the border of the slide, "shift"
            moves them inwards, so that they overlap with those before them, and asks for
            `min_tissue` in the strip that they add, which must be wider than 1/16 of a tile. "drop"
            leaves them out, and the tissue in them.
        roi: Region of interest, polygons in level-0 px: GeoJSON as a dict, as text or as the path
            of a file, or what `polygons_from_geojson` returns. A tile whose centre lies in it
            belongs to it.

    Raises:
        SlideScaleError: The slide has no µm/px, or is coarser than `spec` tolerates.
        InputError: An argument is out of its range, or `roi` holds no polygon.
    """
    check_grid(spec, overlap=overlap, min_tissue=min_tissue, border=border)
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
    polygons = None if roi is None else polygons_from_geojson(roi)
    options = plan_options(
        overlap=overlap,
        min_tissue=min_tissue,
        border=border,
        tissue_method=None if tissue is None else tissue.method,
        roi=polygons,
    )
    if tissue is not None and polygons is not None:
        tissue = tissue.within(polygons)
    columns, rows = axes = axes_of(tiles, scale, level, border)
    cells = letters_of(axes, tiles, tissue=tissue, min_tissue=min_tissue, polygons=polygons)
    return TilePlan(
        spec=spec,
        scale=scale,
        tiles=tiles,
        columns=tuple(columns.corners.tolist()),
        rows=tuple(rows.corners.tolist()),
        cells=cells,
        options=options,
        tissue=tissue,
        slide=slide.fingerprint,
        levels=slide.reader.levels,
        unrounded=(tuple(columns.exact.tolist()), tuple(rows.exact.tolist())),
    )


def check_grid(spec: TileSpec, *, overlap: int, min_tissue: float | None, border: Border) -> None:
    """Raise InputError where one of the options of a plan is out of its range."""
    if not (isinstance(overlap, int) and 0 <= overlap < spec.size_px):
        raise InputError(f"overlap is {overlap!r}; expected an int from 0 to {spec.size_px - 1} px")
    if min_tissue is not None and not 0 <= min_tissue <= 1:
        raise InputError(f"min_tissue is {min_tissue!r}; expected a fraction from 0 to 1, or None")
    if border not in ("shift", "drop"):
        raise InputError(f"border is {border!r}; expected 'shift' or 'drop'")


def plan_options(
    *,
    overlap: int,
    min_tissue: float | None,
    border: Border,
    tissue_method: Mapping[str, Any] | None,
    roi: Sequence[Polygon] | None = None,
) -> dict[str, Any]:
    """The `options` of a plan made with these, which may not differ between slides."""
    asked = None if tissue_method is None or min_tissue is None else float(min_tissue)
    return {
        "overlap_px": overlap,
        "min_tissue": asked,
        "border": border,
        "tissue": None if tissue_method is None else dict(tissue_method),
        "roi_sha256": None if roi is None else _digest(roi),
    }


def warn_of_lost_tissue(plan: TilePlan, name: str) -> None:
    """Warn where the tiles of the slide `name` cover less than 0.9 of its tissue, and say why.

    Those of a zoomed plan were chosen, and are not to cover it.
    """
    tissue = plan.tissue
    if plan.parent is not None or tissue is None:
        return
    lost = plan.uncovered_mm2
    whole = tissue.area_mm2 + lost["too_small"]
    if plan.covered_mm2 >= _ENOUGH * whole:
        return
    dropped = plan.options["border"] == "drop"
    least = f"pieces of less than {tissue.min_area_mm2:g} mm², which the mask leaves out"
    reasons = {
        "border": "in cells over the border (border='shift' moves them inwards)"
        if dropped else "in strips at the border that are too narrow for a tile",
        "roi": "in cells whose centre is outside the region of interest (draw it wider)",
        "tissue": "in cells with little tissue (a lower min_tissue=, now"
        f" {plan.options['min_tissue']}, takes them)",
        "damaged": "in damaged tiles (copy the file again)",
        "too_small": f"in {tissue.too_small_pieces} {least} (a mask of find_tissue(slide,"
        " min_area_mm2=...) with a lower minimum takes them)",
    }  # fmt: skip
    told = [
        f"{area:.2g} mm² {reasons[reason]}"
        for reason, area in sorted(lost.items(), key=lambda item: -item[1])
        if area > whole / 1000
    ]
    warnings.warn(
        f"the {len(plan)} tiles of {name!r} cover {plan.covered_mm2:.2g} of {whole:.2g} mm² of"
        f" its tissue ({plan.covered_mm2 / whole:.0%}); not covered: {', '.join(told)}",
        XmagWarning,
        stacklevel=3,
    )


def divisor(tiles_mpp: float, mpp: float, tolerance: float) -> int:
    """The whole number, 2 or more, by which tiles of `tiles_mpp` µm/px become such of `mpp`.

    Raises InputError where none makes it, within the relative `tolerance`.
    """
    ratio = tiles_mpp / mpp if mpp > 0 else math.inf
    number = round(ratio) if math.isfinite(ratio) else 0
    if number < 2 or abs(ratio / number - 1) > max(tolerance, 1e-6) + 1e-12:
        raise InputError(
            f"mpp is {mpp!r}; expected the {tiles_mpp:.4g} µm/px of the tiles divided by a whole"
            f" number from 2 on, within {tolerance:.0%}: {tiles_mpp / 2:.4g}, {tiles_mpp / 3:.4g},"
            f" {tiles_mpp / 4:.4g} and so on"
        )
    return number


def _chosen(rows: ArrayLike, count: int) -> NDArray[np.int64]:
    """The numbers of the tiles that `rows` choose of so many, in order; InputError for others."""
    index = np.asarray(rows)
    try:
        return np.unique(np.arange(count)[index if index.size else index.astype(np.int64)])
    except IndexError as error:
        raise InputError(
            f"rows are {reprlib.repr(rows)}; expected numbers of tiles of the plan, which has"
            f" {count}, or True or False for each"
        ) from error


def _frozen(array: NDArray[np.int64]) -> NDArray[np.int64]:
    array.setflags(write=False)
    return array


def _digest(polygons: Sequence[Polygon]) -> str:
    """A sha256 of the vertices: the same region, however it was given."""
    rings = [[ring.tolist() for ring in polygon.rings] for polygon in polygons]
    return hashlib.sha256(json.dumps(rings).encode()).hexdigest()
