"""Paints the demo slide: a picture like haematoxylin and eosin, window by window.

Tissue is painted as amounts of the two stains at 0.5 µm/px, becomes light by Beer and Lambert's
law, is enlarged to 0.25 µm/px, as soft as a scanner's optics leave it, and gets the sensor's noise.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from xmag.demo.layout import (
    COLUMNAR,
    LYMPHOCYTE,
    MAP_MPP,
    SLIDE_MPP,
    SPINDLE,
    TUMOUR,
    Field,
    Layout,
    make_layout,
    smooth_noise,
)
from xmag.slide.reader import Pixels

_PAINT_MPP = 0.5
_ENLARGE = round(_PAINT_MPP / SLIDE_MPP)
_MARGIN = 16
"""Paint px around a window: half a nucleus, and more than the enlarging kernel needs."""
_SWATCH = 1024
_ANGLES = 24
_VARIANTS = 5

_GLASS = np.array([243, 242, 244], np.uint8)
_DARKEST = 16
_PEN_INK = np.array([18, 80, 176], np.float32)
# Optical densities of the stains in R, G, B, as the code to Macenko et al., ISBI 2009, has them.
_HAEMATOXYLIN = np.array([0.5626, 0.7201, 0.4062], np.float32)
_EOSIN = np.array([0.2159, 0.8012, 0.5581], np.float32)
_SEMI_AXES_UM = {
    SPINDLE: (5.6, 1.5),
    LYMPHOCYTE: (3.1, 2.9),
    TUMOUR: (5.2, 4.2),
    COLUMNAR: (5.0, 2.5),
}
_DARKNESS = {SPINDLE: 1.35, LYMPHOCYTE: 1.85, TUMOUR: 1.15, COLUMNAR: 1.45}


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """The whole slide at 0.25 µm/px, of which any window can be painted, from any thread."""

    layout: Layout
    fibres: Field
    strands: Field
    fibrils: Field
    grains: Field
    clouds: Field
    adipocytes: Field
    sprites: NDArray[np.float32]
    noise: NDArray[np.uint8]

    def paint(self, xy: tuple[int, int], size: tuple[int, int]) -> Pixels:
        """The pixels of a window of at most 1024 px a side; all numbers are even level-0 px."""
        left, top = (v // _ENLARGE - _MARGIN for v in xy)
        width, height = (v // _ENLARGE + 2 * _MARGIN for v in size)
        canvas = _Canvas(self, left, top, width, height)
        light = canvas.light()
        row, col = xy[1] % _SWATCH, xy[0] % _SWATCH
        noise = self.noise[row : row + size[1], col : col + size[0]]
        if light is None:
            return _GLASS + noise
        image = Image.fromarray(light.clip(_DARKEST, _GLASS).astype(np.uint8))
        box = (_MARGIN, _MARGIN, width - _MARGIN, height - _MARGIN)
        return np.asarray(image.resize(size, Image.Resampling.BICUBIC, box=box)) + noise


def make_picture(size: tuple[int, int], seed: int, *, tumour: bool = True) -> Picture:
    """The picture of a slide of `size` (width, height) level-0 px: the same for the same seed."""
    rng = np.random.default_rng((seed, 1))
    square = (_SWATCH, _SWATCH)
    return Picture(
        layout=make_layout(size, seed, tumour=tumour),
        fibres=smooth_noise(rng, square, (2.2, 42)),
        strands=smooth_noise(rng, square, (3.0, 60)),
        fibrils=smooth_noise(rng, square, (1.0, 30)),
        clouds=smooth_noise(rng, square, (9, 9)),
        grains=smooth_noise(rng, square, (1.3, 1.3)),
        adipocytes=_cell_walls_um(rng),
        sprites=_nucleus_sprites(rng),
        noise=_sensor_noise(rng),
    )


class _Canvas:
    """One window of paint px on its way to light."""

    def __init__(self, picture: Picture, left: int, top: int, width: int, height: int) -> None:
        self._picture = picture
        self._left, self._top, self._width, self._height = left, top, width, height

    def light(self) -> Field | None:
        """The window's RGB light, or None where there is nothing but glass."""
        tissue = self._field("tissue_um")
        pen = self._field("pen_um")
        if tissue.max() < -8 and pen.max() < -4:
            return None
        rgb: Field = np.broadcast_to(_GLASS, (self._height, self._width, 3)).astype(np.float32)
        if tissue.max() >= -8:
            haematoxylin, eosin = self._stains(tissue)
            density = haematoxylin[..., None] * _HAEMATOXYLIN + eosin[..., None] * _EOSIN
            rgb = rgb * np.exp(-density)
        if pen.max() >= -4:
            streaks = 0.06 * self._field("stain") + 0.03 * self._swatch("grains")
            ink = (_step(pen, -3, 5) * (0.8 + streaks)).clip(0, 0.95)[..., None]
            rgb = rgb * (1 - ink + ink * _PEN_INK / 255)
        return rgb

    def _stains(self, tissue_um: Field) -> tuple[Field, Field]:
        """How much haematoxylin and eosin lies on each px."""
        grains, warp, stain = self._swatch("grains"), self._field("warp_um"), self._field("stain")
        fibres = self._swatch("fibres", warp)
        haematoxylin, eosin = self._stroma(fibres, grains, warp)
        nest_um, lumen_um = self._field("nest_um"), self._field("lumen_um")
        if nest_um.max() > -6:
            nest = _step(nest_um + 0.8 * grains, -1.5, 1.5)
            mottle = self._swatch("clouds")
            eosin = _mix(eosin, 0.42 + 0.07 * mottle + 0.04 * grains, nest)
            haematoxylin = _mix(haematoxylin, 0.25 - 0.06 * mottle + 0.04 * grains, nest)
        gland_um = self._field("gland_um")
        if gland_um.max() > -6:
            gland = _step(gland_um + 0.4 * grains, -0.8, 0.8)
            eosin = _mix(eosin, 0.5 - 0.01 * gland_um + 0.04 * grains, gland)
            haematoxylin = _mix(haematoxylin, 0.27 + 0.04 * grains, gland)
            eosin += 0.25 * np.exp(-((gland_um + 1.5) ** 2) / 2.0)
        haematoxylin = np.maximum(haematoxylin, self._nuclei())
        if lumen_um.max() > -6:
            lumen = _step(lumen_um + 1.2 * grains, -1.5, 1.5)
            secretion = 0.28 * _step(stain + 0.35 * self._swatch("clouds"), 0.3, 1.0)
            eosin = _mix(eosin, secretion * (1 + 0.15 * grains), lumen)
            haematoxylin = _mix(haematoxylin, 0.15 * secretion, lumen)
        fat_um = self._field("fat_um")
        if fat_um.max() > -6:
            fat = _step(fat_um, -1, 1)
            wall = np.exp(-((self._swatch("adipocytes", warp, both=True) / 1.3) ** 2))
            eosin = _mix(eosin, 0.02 + 0.5 * wall, fat)
            haematoxylin = _mix(haematoxylin, 0.12 * wall, fat)
        edge = _step(tissue_um + 1.5 * grains + 1.5 * fibres, -1.5, 2.0)
        rim = 1 + 0.25 * np.exp(-((tissue_um / 16) ** 2))
        strength = edge * (1 + 0.12 * stain)
        return haematoxylin.clip(0) * strength, eosin.clip(0) * strength * rim

    def _stroma(self, fibres: Field, grains: Field, warp_um: Field) -> tuple[Field, Field]:
        """Haematoxylin and eosin of wavy collagen with clefts, and of lymphoid tissue."""
        strands = self._swatch("strands", warp_um)
        fibrils = self._swatch("fibrils", warp_um)
        collagen = 0.48 + 0.12 * fibres + 0.1 * strands + 0.07 * fibrils + 0.025 * grains
        clefts = _step(
            self._swatch("strands", warp_um, shift=377) + 0.3 * fibrils + 0.06 * grains, 1.75, 2.1
        )
        eosin = collagen.clip(0.12, 1.2) * (1 - 0.92 * clefts)
        haematoxylin = 0.05 + 0.03 * fibres.clip(0, 2) * (1 - clefts)
        lymph_um = self._field("lymph_um")
        if lymph_um.max() > -20:
            haematoxylin = haematoxylin + 0.12 * _step(lymph_um, -20, 15)
        return haematoxylin, eosin

    def _nuclei(self) -> Field:
        """The haematoxylin of the nuclei alone."""
        nuclei, sprites = self._picture.layout.nuclei, self._picture.sprites
        side = sprites.shape[-1]
        reach_um = side / 2 * _PAINT_MPP
        top_um = self._top * _PAINT_MPP
        first, last = np.searchsorted(
            nuclei.y_um, (top_um - reach_um, top_um + self._height * _PAINT_MPP + reach_um)
        )
        x = np.rint(nuclei.x_um[first:last] / _PAINT_MPP).astype(np.int64) - self._left + side // 2
        y = np.rint(nuclei.y_um[first:last] / _PAINT_MPP).astype(np.int64) - self._top + side // 2
        turn = np.rint(nuclei.angle[first:last] * (_ANGLES / math.pi)).astype(np.int64) % _ANGLES
        variant = np.arange(first, last) % _VARIANTS
        kind = nuclei.kind[first:last]
        stain = np.zeros((self._height + 2 * side, self._width + 2 * side), np.float32)
        for i in np.flatnonzero(
            (x >= 0) & (x < self._width + side) & (y >= 0) & (y < self._height + side)
        ):
            window = stain[y[i] : y[i] + side, x[i] : x[i] + side]
            np.maximum(window, sprites[kind[i], variant[i], turn[i]], out=window)
        return stain[side : side + self._height, side : side + self._width]

    def _field(self, name: str) -> Field:
        """A map of the layout, enlarged smoothly to the window."""
        field: Field = getattr(self._picture.layout, name)
        per_map = MAP_MPP / _PAINT_MPP
        pad = 3
        row, col = math.floor(self._top / per_map) - pad, math.floor(self._left / per_map) - pad
        rows = np.arange(row, row + math.ceil(self._height / per_map) + 2 * pad + 1)
        cols = np.arange(col, col + math.ceil(self._width / per_map) + 2 * pad + 1)
        near = field[np.ix_(rows.clip(0, field.shape[0] - 1), cols.clip(0, field.shape[1] - 1))]
        x, y = self._left / per_map - col, self._top / per_map - row
        box = (x, y, x + self._width / per_map, y + self._height / per_map)
        image = Image.fromarray(np.ascontiguousarray(near))
        enlarged = image.resize((self._width, self._height), Image.Resampling.BICUBIC, box=box)
        return np.asarray(enlarged)

    def _swatch(
        self, name: str, warp_um: Field | None = None, *, shift: int = 0, both: bool = False
    ) -> Field:
        """A periodic texture over the window, bent by `warp_um` down (and across if `both`)."""
        swatch: Field = getattr(self._picture, name)
        rows = (np.arange(self._top, self._top + self._height) + shift)[:, None]
        cols = (np.arange(self._left, self._left + self._width) + 2 * shift)[None, :]
        if warp_um is None:
            return np.asarray(swatch[rows % _SWATCH, cols % _SWATCH])
        bend = (warp_um / _PAINT_MPP).astype(np.int64)
        if both:
            return np.asarray(swatch[(rows + bend // 3) % _SWATCH, (cols - bend // 4) % _SWATCH])
        return np.asarray(swatch[(rows + bend) % _SWATCH, (cols + bend // 5) % _SWATCH])


def _step(value: Field, low: float, high: float) -> Field:
    """0 below `low`, 1 above `high`, smooth between."""
    t = ((value - low) / (high - low)).clip(0, 1)
    return np.asarray(t * t * (3 - 2 * t), np.float32)


def _mix(under: Field, over: Field, share: Field) -> Field:
    """`over` painted on `under` with the opacity `share`."""
    return under + share * (over - under)


def _sensor_noise(rng: np.random.Generator) -> NDArray[np.uint8]:
    """Two periods each way of noise of at most 10 grey levels, as two's complement.

    So it is added to uint8 light in one pass; light keeps that far away from black and white.
    """
    noise = np.rint(rng.normal(0, 1.4, (_SWATCH, _SWATCH, 3))).clip(-10, 10).astype(np.int8)
    return np.tile(noise.view(np.uint8), (2, 2, 1))


def _cell_walls_um(rng: np.random.Generator) -> Field:
    """A periodic swatch of fat cells: µm to the wall between a place's two nearest cells."""
    across = 8
    pitch = _SWATCH / across
    jitter = rng.uniform(-0.32, 0.32, (across, across, 2))
    y, x = np.mgrid[:_SWATCH, :_SWATCH].astype(np.float32)
    nearest = np.full((2, _SWATCH, _SWATCH), np.inf, np.float32)
    row, col = (y // pitch).astype(np.int64), (x // pitch).astype(np.int64)
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            cell = jitter[(row + down) % across, (col + right) % across]
            centre_x = (col + right + 0.5 + 0.5 * ((row + down) % 2) - 0.25 + cell[..., 0]) * pitch
            centre_y = (row + down + 0.5 + cell[..., 1]) * pitch
            r = np.hypot(x - centre_x, y - centre_y).astype(np.float32)
            nearest[1] = np.minimum(nearest[1], np.maximum(nearest[0], r))
            nearest[0] = np.minimum(nearest[0], r)
    return np.asarray((nearest[1] - nearest[0]) / 2 * _PAINT_MPP, np.float32)


def _nucleus_sprites(rng: np.random.Generator) -> NDArray[np.float32]:
    """(kind, variant, angle, 32, 32) haematoxylin of single nuclei."""
    side = 2 * _MARGIN
    y, x = (np.mgrid[:side, :side] + 0.5 - side / 2) * _PAINT_MPP
    sprites = np.zeros((len(_SEMI_AXES_UM), _VARIANTS, _ANGLES, side, side), np.float32)
    for kind, (long, short) in _SEMI_AXES_UM.items():
        for variant in range(_VARIANTS):
            a, b = np.array([long, short]) * rng.uniform(0.82, 1.16, 2)
            bumps, phase = rng.uniform(0.02, 0.09), rng.uniform(0, 2 * math.pi)
            chromatin = smooth_noise(rng, (side, side), (1.6, 1.6))
            tone = _DARKNESS[kind] * rng.uniform(0.85, 1.12)
            for turn in range(_ANGLES):
                angle = turn * math.pi / _ANGLES
                u = x * math.cos(angle) + y * math.sin(angle)
                v = y * math.cos(angle) - x * math.sin(angle)
                r = np.hypot(u / a, v / b)
                r /= 1 + bumps * np.cos(3 * np.arctan2(v, u) + phase)
                depth_um = (1 - r) * b
                body = _step(depth_um, -0.35, 0.45)
                rim = 0.22 * np.exp(-(((depth_um - 0.5) / 0.5) ** 2))
                texture = 1 + 0.13 * chromatin + rim
                if kind == TUMOUR:
                    nucleolus = np.hypot(u - 0.25 * a, v + 0.15 * b)
                    texture += 0.6 * np.exp(-((nucleolus / 0.9) ** 2)) - 0.1
                sprites[kind, variant, turn] = tone * body * texture
    return sprites
