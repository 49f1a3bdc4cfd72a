"""Scale and place: tile specifications, the choice of a level, polygons.

Pure, but for `polygons_from_geojson`, which also takes the path of a file.

Frames of reference used throughout xmag: *level-0 px* count pixels of the finest level from the
top-left corner of the canvas; *decoded px* are pixels of a level decoded at 1/reduction; *output
px* are pixels of a finished tile.
"""

import functools
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from xmag import records
from xmag.errors import InputError, SlideScaleError

Resample = Literal["area", "lanczos"]

_MAX_TILE_PX = 1 << 14
"""Largest side of a tile: 0.8 GB of pixels."""
_SAME_MPP = 1e-6
"""Relative difference below which two scales are the same but for rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TileSpec(records.Record):
    """Tiles that a model takes: squares of `size_px` at `mpp` µm/px.

    A level, or a level decoded at 1/2, 1/4 or 1/8, whose scale is within the relative
    `mpp_tolerance` of `mpp` is read as it is (0: never, unless it is equal). Otherwise the next
    finer one is resampled to exactly `mpp`, by "area" averaging or with "lanczos", which also
    keeps decoding at full scale.
    """

    mpp: float = 2.0
    size_px: int = 224
    mpp_tolerance: float = 0.05
    resample: Resample = "area"

    def __post_init__(self) -> None:
        require = functools.partial(records.require, self)
        require("mpp", math.isfinite(self.mpp) and self.mpp > 0, "a positive number of µm/px")
        is_size = isinstance(self.size_px, int) and 0 < self.size_px <= _MAX_TILE_PX
        require("size_px", is_size, f"an int from 1 to {_MAX_TILE_PX}")
        require("mpp_tolerance", 0 <= self.mpp_tolerance < 0.5, "a fraction in [0, 0.5)")
        require("resample", self.resample in ("area", "lanczos"), "'area' or 'lanczos'")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadScale:
    """Level, reduction and resampling that make pixels of a wanted scale.

    `decoded_mpp` is the scale of the decoded pixels; `mpp` that of the result. The two are equal
    where the decoded pixels are used as they are.
    """

    level: int
    reduction: int
    decoded_mpp: float
    mpp: float

    @property
    def factor(self) -> float:
        """Decoded px per output px: 1.0 where nothing is resampled, else more."""
        return self.mpp / self.decoded_mpp


def choose_scale(
    level_mpps: Sequence[float], reductions: Sequence[Sequence[int]], spec: TileSpec
) -> ReadScale:
    """The cheapest way to read what `spec` asks for from levels of these scales.

    Cheapest is the coarsest level, as the cost of reading is that of its compressed bytes. What is
    resampled is decoded at half the wanted µm/px or finer where that level has it: box averages
    of nearly the wanted size, averaged again off their grid, would be blurred. Raises
    SlideScaleError where the finest level is coarser than `spec.mpp` by more than its tolerance:
    detail that was never scanned is not made up.
    """
    candidates = [
        (mpp * reduction, mpp, level, reduction)
        for level, mpp in enumerate(level_mpps)
        for reduction in (reductions[level] if spec.resample == "area" else (1,))
    ]
    tolerance = max(spec.mpp_tolerance, _SAME_MPP)
    fitting = [c for c in candidates if abs(c[0] / spec.mpp - 1) <= tolerance + 1e-12]
    if fitting:
        decoded, _, level, reduction = max(fitting, key=lambda c: (c[1], -abs(c[0] - spec.mpp)))
        return ReadScale(level=level, reduction=reduction, decoded_mpp=decoded, mpp=decoded)
    finer = [c for c in candidates if c[0] < spec.mpp]
    if not finer:
        raise SlideScaleError(
            f"the slide has {min(level_mpps):.4g} µm/px at its finest level, but {spec.mpp:g} µm/px"
            f" (tolerance {spec.mpp_tolerance:.0%}) is asked for; it is never upsampled. Give mpp="
            " if the slide's own scale is wrong, or a model for a coarser scale"
        )
    coarsest = max(c[1] for c in finer)
    decodings = [c for c in finer if c[1] == coarsest]
    sharp = [c for c in decodings if 2 * c[0] <= spec.mpp * (1 + _SAME_MPP)]
    decoded, _, level, reduction = max(sharp) if sharp else min(decodings)
    return ReadScale(level=level, reduction=reduction, decoded_mpp=decoded, mpp=spec.mpp)


@dataclass(frozen=True, slots=True, kw_only=True)
class TileGeometry(records.Record):
    """Geometry of a slide's tiles, which a reader of `coords` needs to know besides.

    `size_px` output px at `mpp` cover `size_level0` level-0 px (the nearest int; `mpp` and
    `level0_mpp` are exact). Neighbours share `overlap_px` output px. Raises InputError for a size
    that is no whole number of px, and a scale that is no positive number.
    """

    size_px: int
    mpp: float
    size_level0: int
    overlap_px: int
    level0_mpp: float
    level0_size: tuple[int, int]

    @property
    def side_level0(self) -> float:
        """Side of a tile in level-0 px, exact."""
        return self.size_px * self.mpp / self.level0_mpp

    def __post_init__(self) -> None:
        counts = (self.size_px, self.size_level0, self.overlap_px, *self.level0_size)
        scales = (self.mpp, self.level0_mpp)
        if min(counts) < 0 or not all(math.isfinite(mpp) and mpp > 0 for mpp in scales):
            raise InputError(
                f"a tile geometry has sizes {counts} and scales {scales}; expected whole numbers of"
                " px and positive numbers of µm/px"
            )


@dataclass(frozen=True, slots=True, eq=False)
class Polygon:
    """An area in level-0 px: a ring around it, then the rings of its holes.

    Each ring is float64 (K, 2), the corners (x, y) in order; the edge from the last one to the
    first is understood, so a closed ring loses its repeated corner. The arrays are copied and
    read-only. Raises InputError for a ring with fewer than 3 corners or one that is not finite.
    """

    rings: tuple[NDArray[np.float64], ...]

    def __post_init__(self) -> None:
        if not self.rings:
            raise InputError(
                "a polygon has no ring; expected an outer one, then those of its holes"
            )
        object.__setattr__(self, "rings", tuple(_frozen_ring(ring) for ring in self.rings))

    def __reduce__(self) -> tuple[type["Polygon"], tuple[Any]]:
        return Polygon, (self.rings,)  # arrays come out of a pickle writable

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) in level-0 px."""
        (left, top), (right, bottom) = self.rings[0].min(axis=0), self.rings[0].max(axis=0)
        return float(left), float(top), float(right), float(bottom)

    def contains(self, points: NDArray[Any]) -> NDArray[np.bool_]:
        """Whether each of the points (K, 2) lies inside, as bool (K,).

        By the even-odd rule over all rings: inside is where a ray to the right crosses an odd
        number of edges. A point on an edge that two polygons share is in exactly one of them.
        """
        points = _checked_points(points)
        order = np.argsort(points[:, 1])
        x, y = points[order].T
        odd = np.zeros(len(points), dtype=np.bool_)
        for ring in self.rings:
            ends = np.stack([ring, np.roll(ring, -1, axis=0)], axis=1)
            for edge in ends[ends[:, 0, 1] != ends[:, 1, 1]].tolist():
                # Upper end first, so that neighbours see the same edge.
                (x0, y0), (x1, y1) = edge if edge[0][1] < edge[1][1] else reversed(edge)
                beside = slice(*np.searchsorted(y, (y0, y1)))
                odd[beside] ^= x[beside] < x0 + (y[beside] - y0) / (y1 - y0) * (x1 - x0)
        inside = np.empty_like(odd)
        inside[order] = odd
        return inside


def inside_any(polygons: Iterable[Polygon], points: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether each of the points (K, 2) lies in at least one of the polygons, as bool (K,)."""
    inside = np.zeros(len(_checked_points(points)), dtype=np.bool_)
    for polygon in polygons:
        inside |= polygon.contains(points)
    return inside


def polygons_from_geojson(source: Any) -> tuple[Polygon, ...]:
    """The polygons of a GeoJSON object, in its order; coordinates are taken as level-0 px.

    `source` is the object as Python values, JSON text, or the path of a file, such as QuPath
    exports. It may be a Polygon, MultiPolygon, Feature, FeatureCollection or GeometryCollection
    (RFC 7946), or a list of them and of Polygons of this module. Rings need not be closed. Raises
    InputError where there is no polygon, and for points and lines: what they were meant to select
    is not guessed.
    """
    try:
        polygons = tuple(_find_polygons(_load_geojson(source)))
    except RecursionError:
        raise InputError("the GeoJSON is nested too deep; expected a list of areas") from None
    if not polygons:
        raise InputError(
            "the GeoJSON holds no polygon; expected at least one Polygon or MultiPolygon"
        )
    return polygons


def _load_geojson(source: Any) -> Any:
    if isinstance(source, str) and source.lstrip()[:1] in ("{", "["):
        text, origin = source, "the GeoJSON text"
    elif isinstance(source, str | os.PathLike):
        try:
            text, origin = Path(source).read_text(encoding="utf-8-sig"), os.fspath(source)
        except (OSError, ValueError) as error:
            raise InputError(
                f"cannot read GeoJSON from {os.fspath(source)!r} ({error}); expected the path of a"
                " UTF-8 file, or GeoJSON itself"
            ) from error
    else:
        return source
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{origin} is not JSON: {error}; export it again as GeoJSON") from error


def _find_polygons(item: Any) -> Iterator[Polygon]:
    """The polygons in any GeoJSON object or list of them, depth first."""
    kind = item.get("type") if isinstance(item, Mapping) else None
    if isinstance(item, Polygon):
        yield item
    elif isinstance(item, list | tuple):
        for part in item:
            yield from _find_polygons(part)
    elif kind == "Polygon":
        yield Polygon(tuple(_listed(item, "coordinates")))
    elif kind == "MultiPolygon":
        for rings in _listed(item, "coordinates"):
            yield from _find_polygons({"type": "Polygon", "coordinates": rings})
    elif kind == "Feature":
        if item.get("geometry") is not None:  # RFC 7946: null where a feature has no place
            yield from _find_polygons(item["geometry"])
    elif kind == "FeatureCollection":
        yield from _find_polygons(_listed(item, "features"))
    elif kind == "GeometryCollection":
        yield from _find_polygons(_listed(item, "geometries"))
    else:
        seen = f"a {type(item).__name__}" if kind is None else f"the type {kind!r}"
        raise InputError(
            f"GeoJSON holds {seen}; expected areas: Polygon or MultiPolygon, alone or in features"
            " and collections. Export only the areas"
        )


def _listed(item: Mapping[str, Any], key: str) -> Sequence[Any]:
    found = item.get(key)
    if not isinstance(found, list | tuple):
        raise InputError(
            f"a GeoJSON {item['type']} has {key} of type {type(found).__name__}; expected a list"
        )
    return found


def _frozen_ring(corners: Any) -> NDArray[np.float64]:
    """The corners as a read-only copy, without heights and without a repeated last one."""
    try:
        ring = np.asarray(corners)
    except ValueError as error:
        raise InputError(
            "a polygon ring has corners of different lengths; expected [[x, y], [x, y], ...]"
        ) from error
    if ring.ndim != 2 or ring.shape[1] not in (2, 3) or ring.dtype.kind not in "iuf":
        raise InputError(
            f"a polygon ring is an array of {ring.dtype} with shape {ring.shape}; expected numbers,"
            " [[x, y], [x, y], ...]"
        )
    if not np.isfinite(ring).all():
        raise InputError("a polygon ring has a corner that is NaN or infinite; expected finite px")
    ring = ring[:, :2].astype(np.float64)
    if len(ring) > 1 and (ring[0] == ring[-1]).all():
        ring = ring[:-1]
    if len(ring) < 3:
        raise InputError(f"a polygon ring has {len(ring)} corners; expected at least 3")
    ring.flags.writeable = False
    return ring


def _checked_points(points: NDArray[Any]) -> NDArray[np.float64]:
    points = np.asarray(points, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 2:
        raise InputError(f"points have shape {points.shape}; expected (K, 2), each (x, y)")
    return points
