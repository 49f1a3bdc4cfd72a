"""Where everything in the demo slide lies: tissue, glands, fat, nests of tumour, nuclei, pen.

Places are drawn once, from one seed, on a coarse map of 4 µm/px; `picture` then paints any window
of the slide from it. Fields that end in `_um` are signed distances: positive inside.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.floating]

MAP_MPP = 4.0
SLIDE_MPP = 0.25
_FAR_UM = -60.0
"""Where nothing is near; a finite floor, so that enlarging a map does not ring."""

SPINDLE, LYMPHOCYTE, TUMOUR, COLUMNAR = range(4)


class _Fragment(NamedTuple):
    """An ellipse, in fractions of the slide's width and height."""

    x: float
    y: float
    radius_x: float
    radius_y: float


_FRAGMENTS = (
    _Fragment(0.275, 0.500, 0.185, 0.365),
    _Fragment(0.745, 0.270, 0.155, 0.165),
    _Fragment(0.720, 0.745, 0.195, 0.150),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Nuclei:
    """N nuclei, sorted by y: centres in µm, kind, and orientation in radians."""

    x_um: Field
    y_um: Field
    kind: NDArray[np.int64]
    angle: Field


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The coarse maps, all of one shape, and the nuclei."""

    tissue_um: Field
    fat_um: Field
    nest_um: Field
    gland_um: Field
    lumen_um: Field
    lymph_um: Field
    pen_um: Field
    warp_um: Field
    stain: Field
    nuclei: Nuclei


def smooth_noise(
    rng: np.random.Generator, shape: tuple[int, int], sigma: tuple[float, float]
) -> Field:
    """Noise of mean 0 and variance 1, Gaussian-smoothed by `sigma` px in y and x, periodic."""
    spectrum = np.fft.rfft2(rng.standard_normal(shape, dtype=np.float32))
    fy = np.fft.fftfreq(shape[0])[:, None] * sigma[0]
    fx = np.fft.rfftfreq(shape[1])[None, :] * sigma[1]
    spectrum *= np.exp(-2 * math.pi**2 * (fy**2 + fx**2))
    spectrum[0, 0] = 0
    noise = np.fft.irfft2(spectrum, shape)
    return np.asarray(noise / max(noise.std(), 1e-12), np.float32)


def make_layout(size: tuple[int, int], seed: int, *, tumour: bool = True) -> Layout:
    """The layout of a slide of `size` (width, height) level-0 px, with nests of tumour or none."""
    rng = np.random.default_rng(seed)
    width_um, height_um = size[0] * SLIDE_MPP, size[1] * SLIDE_MPP
    shape = math.ceil(height_um / MAP_MPP) + 1, math.ceil(width_um / MAP_MPP) + 1
    extent = min(width_um, height_um)

    def noise(scale_um: float) -> Field:
        sigma = scale_um / MAP_MPP
        return smooth_noise(rng, shape, (sigma, sigma))

    y_um, x_um = np.mgrid[: shape[0], : shape[1]].astype(np.float32) * np.float32(MAP_MPP)
    outline = 0.022 * extent * noise(0.06 * extent) + 14 * noise(50) + 4 * noise(12)
    fragments = np.stack([_ellipse_um(x_um / width_um, y_um / height_um, f, extent)
                          for f in _FRAGMENTS])  # fmt: skip
    tissue = fragments.max(0) + outline
    which = fragments.argmax(0)
    region = noise(0.045 * extent) * 90
    fat = np.where(
        which == 2, 1.2 * region + 0.07 * extent - 0.8 * (x_um - 0.62 * width_um), _FAR_UM
    )
    core = fragments[0] - 0.09 * extent + 0.8 * region
    nest = np.minimum(np.where(which == 0, core, _FAR_UM), 16 * (noise(38) + 0.45))
    if not tumour:
        nest = np.full_like(nest, _FAR_UM)
    gland, lumen, columnar = _glands(
        rng, x_um, y_um, np.where((fat > -40) | (nest > -30), _FAR_UM, tissue)
    )
    lymph = np.minimum(60 * (noise(70) - 1.75), tissue - 60)
    warp = 120 * noise(180) + 22 * noise(45)
    maps = {
        "tissue_um": tissue, "fat_um": np.clip(fat, _FAR_UM, 60), "nest_um": nest,
        "gland_um": gland, "lumen_um": lumen, "lymph_um": lymph,
        "pen_um": _pen_um(x_um, y_um, width_um, height_um), "warp_um": warp,
        "stain": noise(0.05 * extent),
    }  # fmt: skip
    floors = {k: np.asarray(v, np.float32) for k, v in maps.items()}
    nuclei = _scatter_nuclei(rng, floors, (width_um, height_um), columnar)
    return Layout(**floors, nuclei=nuclei)


def _ellipse_um(x: Field, y: Field, fragment: _Fragment, extent_um: float) -> Field:
    """About how far inside of the ellipse each place lies."""
    r = np.hypot((x - fragment.x) / fragment.radius_x, (y - fragment.y) / fragment.radius_y)
    return np.asarray((1 - r) * min(fragment.radius_x, fragment.radius_y) * extent_um, np.float32)


def _pen_um(x_um: Field, y_um: Field, width_um: float, height_um: float) -> Field:
    """How far inside of the pen's stroke each place lies."""
    y, first, last = y_um / height_um, 0.06, 0.44
    middle_um = width_um * (0.553 + 0.022 * np.sin(9 * y) + 0.006 * np.sin(31 * y))
    slope = width_um / height_um * (0.198 * np.cos(9 * y) + 0.186 * np.cos(31 * y))
    past_end_um = height_um * np.maximum(np.maximum(first - y, y - last), 0)
    distance_um = np.hypot((x_um - middle_um) / np.hypot(1, slope), past_end_um)
    half_width_um = 0.017 * min(width_um, height_um)
    return np.asarray(np.maximum(half_width_um - distance_um, _FAR_UM), np.float32)


def _glands(
    rng: np.random.Generator, x_um: Field, y_um: Field, room_um: Field
) -> tuple[Field, Field, NDArray[np.float64]]:
    """Maps of the outline and lumen of glands where there is room; x, y, angle of their nuclei."""
    outer = np.full(x_um.shape, _FAR_UM, np.float32)
    lumen = np.full(x_um.shape, _FAR_UM, np.float32)
    nuclei: list[NDArray[np.float64]] = [np.empty((0, 3))]
    for x0, y0 in _jittered_grid(rng, float(x_um[0, -1]), float(y_um[-1, 0]), 185, 0.22):
        radius = rng.uniform(48, 82)
        wobble = rng.normal(0, (0.0, 0.13, 0.06, 0.035), 4), rng.uniform(0, 2 * math.pi, 4)
        keep = rng.random() < 0.82
        row, col = round(y0 / MAP_MPP), round(x0 / MAP_MPP)
        inside = 0 <= row < x_um.shape[0] and 0 <= col < x_um.shape[1]
        if not (keep and inside and room_um[row, col] > radius + 25):
            continue
        reach = math.ceil(1.6 * radius / MAP_MPP)
        window = (
            slice(max(0, row - reach), row + reach + 1),
            slice(max(0, col - reach), col + reach + 1),
        )
        dx, dy = x_um[window] - x0, y_um[window] - y0
        edge = radius * _outline(np.arctan2(dy, dx), *wobble)
        depth = (edge - np.hypot(dx, dy)).astype(np.float32)
        outer[window] = np.maximum(outer[window], np.maximum(depth, _FAR_UM))
        lumen[window] = np.maximum(lumen[window], np.maximum(depth - 24, _FAR_UM))
        nuclei.append(_columnar_nuclei(rng, x0, y0, radius, wobble))
    return outer, lumen, np.concatenate(nuclei)


def _outline(
    theta: NDArray[np.floating], amplitude: NDArray[np.float64], phase: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The relative radius of a gland in each direction."""
    waves = [
        a * np.cos(n * theta + p) for n, (a, p) in enumerate(zip(amplitude, phase, strict=True), 1)
    ]
    return np.asarray(1 + sum(waves), np.float64)


def _columnar_nuclei(
    rng: np.random.Generator,
    x0: float,
    y0: float,
    radius: float,
    wobble: tuple[NDArray[np.float64], NDArray[np.float64]],
) -> NDArray[np.float64]:
    """(K, 3) x, y and angle of the nuclei near the base of a gland's epithelium."""
    rows = []
    for depth_um in (7.0, 11.5):
        count = int(2 * math.pi * radius / 6.2)
        theta = (np.arange(count) + rng.uniform(-0.3, 0.3, count)) * (2 * math.pi / count)
        r = radius * _outline(theta, *wobble) - depth_um + rng.normal(0, 1.2, count)
        angle = theta + rng.normal(0, 0.15, count)
        nuclei = np.stack([x0 + r * np.cos(theta), y0 + r * np.sin(theta), angle], 1)
        rows.append(nuclei[rng.random(count) < (0.95 if depth_um < 10 else 0.45)])
    return np.concatenate(rows)


def _jittered_grid(
    rng: np.random.Generator, width: float, height: float, pitch: float, jitter: float
) -> NDArray[np.float64]:
    """(K, 2) places of a staggered grid, each moved at random by about `jitter` pitches."""
    rows, cols = math.ceil(height / pitch / 0.87) + 1, math.ceil(width / pitch) + 1
    row, col = np.divmod(np.arange(rows * cols), cols)
    places = np.stack([(col + 0.5 * (row % 2)) * pitch, row * 0.87 * pitch], 1)
    return np.asarray(places + rng.normal(0, jitter * pitch, places.shape))


def _scatter_nuclei(
    rng: np.random.Generator,
    maps: dict[str, Field],
    size_um: tuple[float, float],
    columnar: NDArray[np.float64],
) -> Nuclei:
    """All nuclei: those of the glands, and the other kinds where the maps have them."""
    found = [(columnar[:, :2], np.full(len(columnar), COLUMNAR), columnar[:, 2])]
    for kind, pitch_um, share in ((SPINDLE, 15, 0.6), (LYMPHOCYTE, 7.5, 0.9), (TUMOUR, 11.5, 0.93)):
        places = _jittered_grid(rng, *size_um, pitch_um, 0.2 if kind != SPINDLE else 0.35)
        angle = rng.uniform(0, math.pi, len(places))
        places, angle = _thin(rng, places, angle, share)
        at = {name: _look_up(field, places) for name, field in maps.items()}
        stroma = (at["tissue_um"] > 6) & (at["fat_um"] < 0) & (at["nest_um"] < -3)
        stroma &= at["gland_um"] < -5
        if kind == SPINDLE:
            stroma &= at["lymph_um"] < 0
            angle = _along_fibres(maps["warp_um"], places) + rng.normal(0, 0.25, len(places))
        elif kind == LYMPHOCYTE:
            stray = rng.random(len(places)) < 0.02
            stroma &= (at["lymph_um"] > rng.uniform(-12, 6, len(places))) | stray
        else:
            stroma = (at["nest_um"] > 2.5) & (at["tissue_um"] > 8)
        found.append((places[stroma], np.full(int(stroma.sum()), kind), angle[stroma]))
    places = np.concatenate([f[0] for f in found])
    order = np.argsort(places[:, 1], kind="stable")
    return Nuclei(
        x_um=places[order, 0].astype(np.float32),
        y_um=places[order, 1].astype(np.float32),
        kind=np.concatenate([f[1] for f in found])[order].astype(np.int64),
        angle=np.concatenate([f[2] for f in found])[order].astype(np.float32),
    )


def _thin(
    rng: np.random.Generator,
    places: NDArray[np.float64],
    angle: NDArray[np.float64],
    share: float,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A random `share` of the places."""
    keep = rng.random(len(places)) < share
    return places[keep], angle[keep]


def _look_up(field: Field, places_um: NDArray[np.float64]) -> Field:
    """The field's value at the map px nearest to each place."""
    index = np.rint(places_um / MAP_MPP).astype(np.int64)
    rows = index[:, 1].clip(0, field.shape[0] - 1)
    cols = index[:, 0].clip(0, field.shape[1] - 1)
    return np.asarray(field[rows, cols], np.float32)


def _along_fibres(warp_um: Field, places_um: NDArray[np.float64]) -> NDArray[np.float64]:
    """The direction of the stroma's fibres, which follow the lines y + warp = constant."""
    down, across = (_look_up(np.asarray(g, np.float32), places_um) for g in np.gradient(warp_um))
    return np.asarray(np.arctan2(-across / MAP_MPP, 1 + down / MAP_MPP), np.float64)
