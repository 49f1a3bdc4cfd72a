"""Classical tissue detection on a coarse overview: `find_tissue` -> `TissueMask`.

Stain gives tissue a colour; glass, shading, dust, scanner borders and padding are neutral. So the
decision rests on two logarithms of light, r = ln(R/G) and b = ln(B/G), relative to the glass.
Between channels any shading of the lamp cancels, and stains add up (Beer-Lambert law). Eosin and
DAB have r > 0; haematoxylin has b > 0 with r about 0. Blue and green ink take more red light than
green (r < 0), by more than any haematoxylin.
"""

import base64
import functools
import itertools
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from xmag import records
from xmag.errors import InputError
from xmag.geometry import Polygon
from xmag.morphology import (
    Bools,
    closed,
    dilated,
    filled,
    holding,
    labelled,
    outlines,
    over_square,
    without_small,
)
from xmag.notebook import Shown, canvas_picture
from xmag.slide import Slide
from xmag.slide.reader import Pixels

if TYPE_CHECKING:
    from PIL.Image import Image

_Field = NDArray[np.float32]

_MPP = 32.0
"""µm/px at which everything here was calibrated: nuclei average out, a 0.5 mm biopsy is 16 px."""
_CLOSE_UM = 64.0
"""Gaps up to twice this are bridged: the clear inside of most fat cells, 50 to 120 µm wide."""
_MIN_AREA_MM2 = 0.03
"""Smaller pieces, under 0.2 mm across, are debris; the smallest biopsy fragments are 0.5 mm."""
_MAX_HOLE_MM2 = 0.05
"""Larger holes are glass. Smaller ones are a quarter of a 448 µm tile at most."""

_DARKEST = 16
"""Grey level below which a camera sees mostly noise; logarithms are taken of no less."""
_PADDING = 254
"""Grey level from which white is not glass but what the scanner filled in."""
_GLASS_TINT = 0.08
"""-r and -b of glass, at most: lamps give up to 8% less light in one channel than in green."""
_GLASS_STAINED = 0.06
"""r and b of glass, at most: a tint towards stain is more likely to be pale tissue."""
_GLASS_SHADE = 0.75
"""Light of shaded glass, at least, as a fraction of that of the brightest px."""
_GLASS_CONTRAST = 6
"""Grey levels by which neighbouring px of glass differ, at most; tissue varies more."""
_GLASS_MIN_FRACTION = 0.02
"""Least share of glass px; with less glass than this there is nothing to calibrate on."""
_GLASS_LEVEL = 243.0
"""Grey level taken for glass, and neutral, where a field shows none."""
_GLASS_SAMPLES = 2048
"""Px of glass that the fit looks at, about: six coefficients need no more."""
_BAND_ROWS = 128
"""Rows of an overview that are computed at once: fresh memory costs more than the arithmetic."""
_REACH_PX = 2
"""Reach of a square around a px of a smoothed image."""
_GLASS_BRIGHTEST_PERCENT = 20
"""Brightest percent of apparent glass, whose colour is taken before the surface is fitted."""
_GLASS_STIFFNESS = 1e-3
"""Ridge of the fit, a fraction of the px: where glass spans little, the surface stays level."""
_GLASS_RESIDUAL = 0.02
"""Distance from the fitted glass, in r or b, beyond which a px is no glass but pale tissue."""

_STAIN_WEAK = 0.02
"""r or b of the palest tissue, 2% of the light, as averaged over 96 µm."""
_STAIN_STRONG = 0.05
"""r or b that a piece of tissue reaches somewhere; smears on the glass do not."""
_BLUE_RED_LIMIT = 0.55
"""-r/b that haematoxylin stays below, however blue; blue ink has about 0.75 and more."""
_EDGE = 0.45
"""Stain of an edge px, at least, as a fraction of its strongest neighbour's: about half covered."""
_NEUTRAL = 0.25
"""Chroma over density, below which a dark px is ink, border or dust; stained tissue has > 0.5."""
_NEUTRAL_DENSITY = 0.4
"""Density (natural logarithm) from which that ratio is looked at; paler px are too noisy."""

_INK_BLUE_GREEN = 0.05
"""Distance in r beyond the limit of haematoxylin from which px are blue or green ink."""
_INK_BLUE = 1.1
"""b of dark blue and violet ink, at least; haematoxylin averaged over 32 µm reaches 0.93."""
_INK_RED = 0.68
"""r - 2|b| of red ink, at least: it takes blue light nearly as much as green (b about 0.2 r), eosin
far less (b about 0.4 r), DAB more (b about -0.7 r). 0.1% of the px of tissue lie beyond,
scattered."""
_INK_BLACK, _INK_BLACK_CHROMA = 1.2, 0.4
"""Density of black ink, over tissue too, at least, and its chroma over density at most. Tissue so
dark has a ratio above 0.6, and DAB one of 0.9."""
_INK_MIN_AREA_MM2 = 0.1
"""Smallest stroke; smaller spots are pigment, blood or marking dye, and left to the tissue."""
_INK_EDGE_UM = 64.0
"""Reach of the blurred edge of a stroke beyond what is clearly ink; gaps twice as wide
are bridged."""


def _method(**parameters: float) -> dict[str, Any]:
    # The version goes up whenever the same pixels may give another mask.
    return {"name": "stain-colour", "version": 1, "parameters": parameters}


TISSUE_METHOD: Mapping[str, Any] = _method(
    mpp=_MPP, min_area_mm2=_MIN_AREA_MM2, max_hole_mm2=_MAX_HOLE_MM2, close_um=_CLOSE_UM
)
"""Default `TissueMask.method`, which `find_tissue` without options records."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class TissueMask(Shown):
    """Tissue mask of a slide, on a coarse overview.

    `mask` is bool (height, width), copied and read-only; its px are `mpp` µm and `downsample`
    level-0 px wide, the first begins at level-0 (0, 0), and beyond the last there is no tissue.
    `method` says what made it, in JSON values: it goes into the provenance of all that rests on it.
    `too_small`, of the same shape, is stained tissue that the mask leaves out because its pieces
    are too small (None: there is none). Raises InputError for a mask that is not boolean, shapes
    that differ, or a scale that is not positive.
    """

    mask: Bools
    mpp: float
    downsample: float
    method: Mapping[str, Any]
    too_small: Bools | None = None

    def __post_init__(self) -> None:
        mask = np.array(self.mask)
        too_small = np.array(np.zeros_like(mask) if self.too_small is None else self.too_small)
        for array in (mask, too_small):
            if array.ndim != 2 or array.dtype != np.bool_ or array.shape != mask.shape:
                raise InputError(
                    f"the mask is an array of {array.dtype} with shape {array.shape}; expected bool"
                    " (height, width), such as labels > 0, and the same for too_small"
                )
            array.setflags(write=False)
        _check_positive(mpp=self.mpp, downsample=self.downsample)
        object.__setattr__(self, "mask", mask)
        object.__setattr__(self, "too_small", too_small if too_small.any() else None)

    @classmethod
    def from_array(cls, mask: ArrayLike, slide: Slide, *, name: str = "given") -> Self:
        """The TissueMask of a mask of your own that spans the whole canvas of `slide`.

        `mask` is bool (height, width) at any scale, `name` what `method` will call it. Raises
        InputError where its proportions are not those of the slide, to within a px, and
        SlideScaleError where the slide does not know its µm/px.
        """
        array = np.asarray(mask)
        if array.ndim != 2 or not array.size:
            raise InputError(f"the mask has shape {array.shape}; expected (height, width)")
        (long, mask_long), (short, mask_short) = sorted(
            zip(slide.dimensions, array.shape[::-1], strict=True), reverse=True
        )
        downsample = long / mask_long
        if abs(short / downsample - mask_short) > 1:
            raise InputError(
                f"the mask has {array.shape[1]}x{array.shape[0]} px and the slide"
                f" {slide.dimensions[0]}x{slide.dimensions[1]}; expected a mask of the whole"
                " canvas, in the same proportions. For another frame use TissueMask(mask=, mpp=,"
                " downsample=, method=)"
            )
        method = {"name": name, "parameters": {}}
        mpp = slide.known_mpp() * downsample
        return cls(mask=array, mpp=mpp, downsample=downsample, method=method)

    def __reduce__(self) -> tuple[Any, ...]:
        # Made anew, because arrays come out of a pickle writable.
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return functools.partial(type(self), **values | {"method": dict(self.method)}), ()

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values, masks packed to bits, compressed, and in base 64."""
        return {
            "mask": _packed(self.mask),
            "too_small": None if self.too_small is None else _packed(self.too_small),
            "size": list(self.mask.shape[::-1]),
            "mpp": self.mpp,
            "downsample": self.downsample,
            "method": dict(self.method),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The TissueMask that `to_dict` gave; a ValueError or the like where there is none."""
        values = dict(values)
        size, small = values.pop("size"), values["too_small"]
        values["mask"] = _unpacked(values["mask"], size)
        values["too_small"] = None if small is None else _unpacked(small, size)
        return records.from_dict(cls, values, "tissue")

    def within(self, polygons: Sequence[Polygon]) -> Self:
        """The mask without the px whose centres lie outside of all polygons, in level-0 px."""
        inside = px_inside(polygons, self.mask.shape, self.downsample)
        small = None if self.too_small is None else self.too_small & inside
        return replace(self, mask=self.mask & inside, too_small=small)

    @property
    def area_mm2(self) -> float:
        """The area of the tissue."""
        return float(np.count_nonzero(self.mask)) * (self.mpp / 1000) ** 2

    @property
    def too_small_mm2(self) -> float:
        """The area of the pieces that the mask leaves out as too small."""
        small = 0 if self.too_small is None else np.count_nonzero(self.too_small)
        return float(small) * (self.mpp / 1000) ** 2

    @property
    def too_small_pieces(self) -> int:
        """Number of pieces that the mask leaves out as too small."""
        return 0 if self.too_small is None else labelled(self.too_small)[1]

    @property
    def min_area_mm2(self) -> float:
        """Area below which a piece counts as debris: that of the method, or of `find_tissue`."""
        parameters = self.method.get("parameters") or {}
        return float(parameters.get("min_area_mm2", _MIN_AREA_MM2))

    @property
    def fraction(self) -> float:
        """Share of the mask that is tissue, 0 to 1."""
        return float(self.mask.mean()) if self.mask.size else 0.0

    def __repr__(self) -> str:
        share = f"{self.fraction:.0%} of the slide, {self.area_mm2:.3g} mm²"
        return f"<TissueMask of {share}, at {self.mpp:g} µm/px>"

    def _picture(self) -> "Image | None":
        height, width = self.mask.shape
        return canvas_picture((width, height), tissue=(self.mask, 1.0)) if self.mask.size else None

    def to_geojson(self) -> dict[str, Any]:
        """The tissue as a GeoJSON FeatureCollection in level-0 px, which QuPath opens.

        Each connected piece is a Feature: a Polygon with its holes, along the edges of the mask's
        px (to 0.001 level-0 px), so that filling it gives the mask back.
        """
        pieces: dict[int, list[list[list[float]]]] = {}
        for piece, corners in outlines(self.mask):
            ring = [[round(c * self.downsample, 3) for c in corner] for corner in corners]
            rings = pieces.setdefault(piece, [])
            # The signed area of a ring (shoelace formula) is positive where it runs around tissue.
            edges = itertools.pairwise(corners)
            is_outer = sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in edges) > 0
            rings.insert(0 if is_outer else len(rings), ring)
        tissue = {"name": "Tissue", "color": [0, 160, 60]}
        features = [
            {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": rings},
                "properties": {"objectType": "annotation", "classification": tissue},
            }
            for rings in pieces.values()
        ]
        return {"type": "FeatureCollection", "features": features}


def _packed(mask: Bools) -> str:
    return base64.b64encode(zlib.compress(np.packbits(mask).tobytes(), 9)).decode("ascii")


def _unpacked(text: str, size: Sequence[int]) -> Bools:
    width, height = size
    count = width * height
    expected = max(-(-count // 8), 0)
    unpacker = zlib.decompressobj()
    try:
        # One more than the size says, and not all: a few bytes may unpack to any amount.
        data = unpacker.decompress(base64.b64decode(text, validate=True), expected + 1)
    except zlib.error as error:  # which is no ValueError
        raise ValueError(f"its mask is damaged: {error}") from error
    if len(data) != expected or not unpacker.eof:
        raise ValueError(f"a mask of {width}x{height} px takes {expected} bytes, not these")
    bits = np.unpackbits(np.frombuffer(data, np.uint8), count=count)
    return bits.reshape(height, width).astype(np.bool_)


def find_tissue(
    slide: Slide,
    *,
    mpp: float = _MPP,
    min_area_mm2: float = _MIN_AREA_MM2,
    max_hole_mm2: float = _MAX_HOLE_MM2,
    close_um: float = _CLOSE_UM,
) -> TissueMask:
    """Stained tissue of a slide: a TissueMask with px of `mpp` µm.

    Glass, shading, dust, scanner borders, padding and strokes of a pen are left out. The same
    pixels give the same mask. A canvas smaller than one px of the mask gives an empty one.

    Args:
        slide: the slide.
        mpp: µm/px of the overview and of the mask; the method is calibrated at 32.
        min_area_mm2: pieces smaller than this are left out; `TissueMask.too_small` has them.
        max_hole_mm2: holes up to this are filled, unless they reach the edge of the slide.
        close_um: gaps up to twice this are bridged.

    Raises:
        SlideScaleError: the slide's µm/px are unknown, or coarser than `mpp`.
        InputError: an option makes no sense.
    """
    sizes = {"min_area_mm2": min_area_mm2, "max_hole_mm2": max_hole_mm2, "close_um": close_um}
    _check_positive(mpp=mpp)
    _check_positive(or_zero=True, **sizes)
    downsample = mpp / slide.known_mpp()
    width, height = size_at(slide, downsample)
    if width and height:
        pixels = slide.read_region((0, 0), (width, height), mpp=mpp)
        mask, too_small = _segment(pixels, mpp, **sizes)
    else:
        mask = too_small = np.zeros((height, width), np.bool_)
    method = _method(mpp=float(mpp), **{name: float(size) for name, size in sizes.items()})
    return TissueMask(
        mask=mask, mpp=float(mpp), downsample=downsample, method=method, too_small=too_small
    )


def size_at(slide: Slide, downsample: float) -> tuple[int, int]:
    """(width, height) of the mask of a slide: the px that lie in it as a whole."""
    width, height = (math.floor(side / downsample * (1 + 1e-9)) for side in slide.dimensions)
    return width, height


def px_inside(polygons: Sequence[Polygon], shape: tuple[int, ...], downsample: float) -> Bools:
    """The px of a mask, bool (height, width), whose centres lie in a polygon in level-0 px."""
    inside = np.zeros(shape, np.bool_)
    for polygon in polygons:
        left, top, right, bottom = (side / downsample for side in polygon.bounds)
        rows = np.arange(max(math.floor(top), 0), min(math.ceil(bottom), shape[0]))
        columns = np.arange(max(math.floor(left), 0), min(math.ceil(right), shape[1]))
        if not len(rows) or not len(columns):
            continue
        y, x = np.meshgrid(rows, columns, indexing="ij")
        centres = (np.stack([x.ravel(), y.ravel()], axis=1) + 0.5) * downsample
        inside[y, x] |= polygon.contains(centres).reshape(y.shape)
    return inside


def _check_positive(*, or_zero: bool = False, **values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and (value > 0 or (or_zero and value == 0))):
            wanted = "at least 0" if or_zero else "above 0"
            raise InputError(f"{name} is {value!r}; expected a finite number {wanted}")


def _segment(
    pixels: Pixels, mpp: float, *, min_area_mm2: float, max_hole_mm2: float, close_um: float
) -> tuple[Bools, Bools]:
    """The px of an overview that are tissue, and those that would be if their piece were larger."""
    px_per_mm2 = (1000 / mpp) ** 2
    red, blue, density = _light(pixels)
    height = len(pixels)
    parts = []
    for band in _bands(height):
        # With the rows that their squares reach.
        first, last = max(0, band.start - _REACH_PX), min(height, band.stop + _REACH_PX)
        found = _candidates(red[first:last], blue[first:last], density[first:last])
        parts.append([part[band.start - first : band.stop - first] for part in found])
    tissue, strong, ink = map(np.concatenate, zip(*parts, strict=True))
    ink = _strokes(ink, mpp)
    tissue &= ~ink
    tissue = closed(tissue, round(close_um / mpp))
    tissue = holding(tissue, strong)
    tissue = filled(tissue, max_hole_mm2 * px_per_mm2)
    tissue &= ~ink
    large = without_small(tissue, min_area_mm2 * px_per_mm2)
    return large, tissue & ~large


def _light(pixels: Pixels) -> tuple[_Field, _Field, _Field]:
    """r, b and the density (mean of the channels), relative to the glass."""
    channels = [np.ascontiguousarray(pixels[..., i]) for i in range(3)]
    logs = np.log(np.maximum(np.arange(256), _DARKEST)).astype(np.float32)
    red, blue, light = fields = np.empty((3, *pixels.shape[:2]), np.float32)
    for band in _bands(len(pixels)):
        reds, greens, blues = (logs.take(channel[band]) for channel in channels)
        np.subtract(reds, greens, out=red[band])
        np.subtract(blues, greens, out=blue[band])
        np.divide(reds + greens + blues, np.float32(3), out=light[band])
    glass = _glass(channels, red, blue)
    if np.count_nonzero(glass) < _GLASS_MIN_FRACTION * glass.size:
        return red, blue, np.float32(math.log(_GLASS_LEVEL)) - light
    _flatten(fields, glass)
    return red, blue, np.negative(light, out=light)


def _bands(height: int) -> Iterator[slice]:
    """The rows of an image, in bands."""
    return (slice(at, min(at + _BAND_ROWS, height)) for at in range(0, height, _BAND_ROWS))


def _glass(channels: Sequence[NDArray[np.uint8]], red: _Field, blue: _Field) -> Bools:
    """Mask of px that look like glass: bright, nearly neutral, smooth, and not padding."""
    darkest, green = functools.reduce(np.minimum, channels), channels[1]
    contrast = over_square(np.maximum, green, 1) - over_square(np.minimum, green, 1)
    return np.asarray(
        (darkest < _PADDING)
        & (darkest > _GLASS_SHADE * np.percentile(darkest, 99))
        & (np.minimum(red, blue) > -_GLASS_TINT)
        & (np.maximum(red, blue) < _GLASS_STAINED)
        & (contrast <= _GLASS_CONTRAST)
    )


def _flatten(fields: NDArray[np.float32], glass: Bools) -> None:
    """Take a quadratic surface through glass from r, b and light: lamps and lenses are uneven."""
    x, y = (np.linspace(-1, 1, size, dtype=np.float32) for size in glass.shape[::-1])
    places = np.flatnonzero(glass)
    rows, columns = np.divmod(places[:: 1 + len(places) // _GLASS_SAMPLES], glass.shape[1])
    at_x, at_y = x[columns], y[rows]
    terms = [np.ones_like(at_x), at_x, at_y, at_x * at_y, at_x * at_x, at_y * at_y]
    design = np.stack(terms).astype(np.float64)
    seen = np.stack([f[rows, columns] for f in fields]).astype(np.float64)
    # Where smooth pale tissue outnumbers it, glass is still the brightest.
    brightest = seen[2] >= np.percentile(seen[2], 100 - _GLASS_BRIGHTEST_PERCENT)
    levels = np.median(seen[:, brightest], 1)
    seen -= levels[:, None]
    near = np.abs(seen[:2]).max(0) < 2 * _GLASS_RESIDUAL
    for _ in range(3):
        # Not lstsq and matmul: BLAS threads cost 50 ms on a busy machine, and their sums vary.
        normal = np.einsum("in,jn->ij", design * near, design)
        normal += _GLASS_STIFFNESS * len(rows) * np.eye(len(design))
        fit = np.linalg.solve(normal, np.einsum("in,fn->if", design * near, seen))
        near = np.abs(seen - np.einsum("if,in->fn", fit, design))[:2].max(0) < _GLASS_RESIDUAL
    fit[0] += levels
    xx = x * x
    for band in _bands(len(y)):
        down = y[band, None]
        product = x * down
        for values, (one, cx, cy, cxy, cxx, cyy) in zip(fields, fit.T.astype("f4"), strict=True):
            surface = (one + x * cx) + down * cy
            surface += product * cxy
            surface += xx * cxx  # a row
            surface += down * down * cyy  # a column
            values[band] -= surface


def _candidates(red: _Field, blue: _Field, density: _Field) -> tuple[Bools, Bools, Bools]:
    """The px that look like tissue, those whose stain is beyond doubt, and those like ink."""
    # The largest difference between two channels; green is 0 here.
    chroma = np.maximum(np.maximum(red, blue), np.float32(0))
    chroma -= np.minimum(np.minimum(red, blue), np.float32(0))
    neutral = (density > _NEUTRAL_DENSITY) & (chroma < _NEUTRAL * density)
    ink = (density > _INK_BLACK) & (chroma < _INK_BLACK_CHROMA * density)
    ink |= (red - 2 * np.abs(blue) > _INK_RED) | (blue > _INK_BLUE)
    ink |= red + _BLUE_RED_LIMIT * blue < -_INK_BLUE_GREEN
    stain, even = _stain(red, blue), _stain(_smoothed(red), _smoothed(blue))
    tissue = (even > _STAIN_WEAK) & ~neutral
    tissue &= stain > _EDGE * over_square(np.maximum, even, 1)
    # Density too, because JPEG keeps brightness at twice the resolution of colour.
    tissue &= density > _EDGE * over_square(np.maximum, _smoothed(density), 1)
    return tissue, even > _STAIN_STRONG, ink


def _stain(red: _Field, blue: _Field) -> _Field:
    """Strength of stain: r or b, the larger; 0 in the hues that only ink has."""
    return np.where(red > -_BLUE_RED_LIMIT * blue, np.maximum(red, blue), np.float32(0))


def _strokes(ink: Bools, mpp: float) -> Bools:
    """Pen strokes among px that look like ink, with their blurred edges."""
    if not ink.any():
        return ink
    edge_px = round(_INK_EDGE_UM / mpp)
    ink = without_small(closed(ink, edge_px), _INK_MIN_AREA_MM2 * (1000 / mpp) ** 2)
    return dilated(ink, edge_px)


def _smoothed(values: _Field) -> _Field:
    return np.asarray(over_square(np.add, values, 1) / np.float32(9))
