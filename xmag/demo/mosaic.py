"""A picture of real tissue on glass: 24 fields of osteosarcoma, blended into three pieces.

The fields are from Osteosarcoma-Tumor-Assessment (Leavey et al. 2019, The Cancer Imaging Archive,
doi 10.7937/tcia.2019.bvhjhdas), CC BY 3.0; changed: turned, stains made alike at the seams, cut
along the outlines. `fields.avif` has a row of 8 for each class: viable tumour, necrotic tumour, no
tumour. `benchmarks/demo_fields.py` makes it.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from xmag.progress import ProgressOption, progress_bar
from xmag.slide.reader import Pixels
from xmag.tiles.stream import default_threads

Field = NDArray[np.float32]

MPP = 0.5
GLASS = (245, 244, 245)
_INK = (30, 92, 176)
_FIELD, _PITCH = 1024, 840
"""Px of a field's side, and from one field to the next."""
_COARSE = 8
"""Px of the picture for each px of the maps of outlines and ink."""
_CELL, _HALF = _FIELD // _COARSE, _FIELD // 2
_PIECES = ((0.249, 0.465, 0.2, 0.52), (0.68, 0.209, 0.4, 0.26), (0.67, 0.73, 0.4, 0.26))
"""x and y of the middle, width and height, as fractions of the picture's."""


def make_picture(
    size: tuple[int, int], seed: int, *, tumour: bool = True, progress: ProgressOption = False
) -> Pixels:
    """The (h, w, 3) picture of `size` (width, height) px at 0.5 µm/px, the same for the same seed.

    Its pieces are viable tumour, necrotic tumour and tissue without tumour; all three are the last
    without `tumour`.
    """
    rng = np.random.default_rng(seed)
    padded = [-(-(n + _FIELD) // _COARSE) * _COARSE for n in size]  # no field has to be cut
    corners = [(x, y) for y in range(0, padded[1], _FIELD) for x in range(0, padded[0], _FIELD)]
    steps = len(_PIECES) + len(corners)
    with (
        progress_bar(progress, total=steps, desc="making a slide", unit="step") as bar,
        ThreadPoolExecutor(default_threads()) as pool,
    ):
        atlas = imagecodecs.avif_decode(Path(__file__).with_name("fields.avif").read_bytes())
        picture = Image.new("RGB", (padded[0], padded[1]), GLASS)
        shape = padded[1] // _COARSE, padded[0] // _COARSE
        depth, reach = (np.full(shape, -1e4, np.float32) for _ in range(2))
        for kind, piece in enumerate(_PIECES):
            top = (kind if tumour else 2) * _FIELD
            fields = [atlas[top : top + _FIELD, n * _FIELD : (n + 1) * _FIELD] for n in range(8)]
            _lay_piece(picture, (depth, reach), _places(size, piece, rng), fields, rng)
            bar.update()
        depth += sum(a * _noise(shape, s, rng) for a, s in ((48, 75), (24, 18), (8, 5)))
        depth = np.minimum(depth, reach)
        ink = _pen(size, shape, rng)
        finished = pool.map(lambda xy: _finish(picture, xy, depth, ink), corners)
        for xy, block in zip(corners, finished, strict=True):
            if block is not None:
                picture.paste(block, xy)
            bar.update()
    return np.asarray(picture.crop((_HALF, _HALF, _HALF + size[0], _HALF + size[1])))


def _noise(shape: tuple[int, ...], scale: int, rng: np.random.Generator) -> Field:
    """Smooth noise of mean 0 and variance about 1, with bumps of about `scale` px."""
    nodes = rng.standard_normal((shape[0] // scale + 4, shape[1] // scale + 4), np.float32)
    noise = _resized(1.4 * nodes, (nodes.shape[1] * scale, nodes.shape[0] * scale))
    return noise[scale : scale + shape[0], scale : scale + shape[1]]


def _resized(field: Field, size: tuple[int, int]) -> Field:
    return np.asarray(Image.fromarray(field).resize(size, Image.Resampling.BICUBIC))


def _places(
    size: tuple[int, int], piece: tuple[float, float, float, float], rng: np.random.Generator
) -> list[tuple[int, int]]:
    """Top-left corners of a piece's fields, row by row, there and back, multiples of _COARSE px."""
    columns, rows = (max(1, round(n * of / _PITCH)) for n, of in zip(size, piece[2:], strict=True))
    places = []
    for row in range(rows):
        shift = rng.uniform(-0.2, 0.2)
        for column in range(columns)[:: -1 if row % 2 else 1]:
            x = piece[0] * size[0] + (column - (columns - 1) / 2 + shift) * _PITCH
            y = piece[1] * size[1] + (row - (rows - 1) / 2) * _PITCH
            inside = (max(0, min(n, round(v))) for n, v in zip(size, (x, y), strict=True))
            left, top = (v // _COARSE * _COARSE for v in inside)
            places.append((left, top))
    return places


def _lay_piece(
    picture: Image.Image,
    maps: tuple[Field, Field],
    places: list[tuple[int, int]],
    fields: list[Pixels],
    rng: np.random.Generator,
) -> None:
    """Lay fields on the picture, each over those before it.

    Raises the two maps: px to the piece's outline, and px to where its fields end.
    """
    depth, reach = maps
    y, x = (np.mgrid[:_CELL, :_CELL].astype(np.float32) + 0.5 - _CELL / 2) * _COARSE
    to_middle = (x**4 + y**4) ** 0.25
    towards_seams = np.clip(to_middle / _HALF * 1.5 - 0.3, 0, 1)
    to_side = np.maximum(abs(x), abs(y))
    grid = [(np.arange(n, dtype=np.float32) + 0.5) * _COARSE for n in depth.shape]
    first = rng.integers(len(fields))
    for number, (left, top) in enumerate(places):
        field = np.rot90(fields[(first + number) % len(fields)], int(rng.integers(4)))
        field = np.ascontiguousarray(field[:, :: rng.choice((-1, 1))])
        at = (slice(top // _COARSE, top // _COARSE + _CELL),
              slice(left // _COARSE, left // _COARSE + _CELL))  # fmt: skip
        there = np.clip(reach[at] / 12 + 0.5, 0, 1)
        window = picture.crop((left, top, left + _FIELD, top + _FIELD))
        edge = _PITCH / 2 - to_middle + 16
        edge += 22 * _noise(edge.shape, 40, rng) + 22 * _noise(edge.shape, 12, rng)
        ragged = 18 * _noise(edge.shape, 12, rng) + 9 * _noise(edge.shape, 4, rng)
        opaque = 255 * np.maximum(1 - there, np.clip(edge / 12 + 0.5, 0, 1))
        mask = Image.fromarray(_resized(opaque, (_FIELD, _FIELD)).clip(0, 255).astype(np.uint8))
        alike = _stained_alike(field, window, towards_seams * there)
        picture.paste(Image.composite(Image.fromarray(alike), window, mask), (left, top))
        reach[at] = np.maximum(reach[at], 452 + ragged.clip(-24, 20) - to_side)
        away = ((grid[0][:, None] - top - _HALF) ** 4 + (grid[1] - left - _HALF) ** 4) ** 0.25
        depth[:] = 150 * np.logaddexp(depth / 150, (_PITCH / 2 - away) / 150)


def _stained_alike(field: Pixels, below: Image.Image, share: Field) -> Pixels:
    """The field, its stains as dense as those below it where `share` is 1: white remains white."""
    if not share.any():
        return field
    density = -np.log((np.arange(256, dtype=np.float32) + 0.5) / 245.5).clip(None, 0)
    blocks = [np.asarray(image.reduce(64)) for image in (below, Image.fromarray(field))]
    ratio = (density[blocks[0]] + 0.03) / (density[blocks[1]] + 0.03)
    weight = _resized(share, (_FIELD // 64, _FIELD // 64)).clip(0, 1)
    gains = np.exp(np.log(ratio.clip(0.45, 2.2)) * weight[..., None])
    alike = np.empty_like(field)
    for channel in range(3):
        gain = _resized(np.ascontiguousarray(gains[..., channel]), (_FIELD, _FIELD))
        light = 245.5 * np.exp(-density[field[..., channel]] * gain)
        alike[..., channel] = light
    return alike


def _pen(size: tuple[int, int], shape: tuple[int, ...], rng: np.random.Generator) -> Field:
    """The amount of ink at each px of the coarse map: one stroke between the pieces."""
    image = Image.new("L", (shape[1], shape[0]))
    y = np.linspace(0.05, 0.44, 80)
    x = 0.415 + 0.016 * np.sin(9 * y + 1) + 0.003 * np.sin(41 * y)
    radius = 0.012 * min(size) / _COARSE
    draw = ImageDraw.Draw(image)
    middles = (n * v / _COARSE + _CELL / 2 for n, v in zip(size, (x, y), strict=True))
    for px, py in zip(*middles, strict=True):
        draw.ellipse((px - radius, py - 1.6 * radius, px + radius, py + 1.6 * radius), 255)
    ink = np.asarray(image.filter(ImageFilter.GaussianBlur(0.8)), np.float32)
    return np.asarray(ink * (0.84 + 0.04 * _noise(shape, 14, rng)).clip(0, 1))


def _finish(
    picture: Image.Image, xy: tuple[int, int], depth: Field, ink: Field
) -> Image.Image | None:
    """A block, its tissue cut along the outline, with ink; None where nothing has to be done.

    The outline gives way to what is dark, so that it runs along cells and fibres, not through.
    """
    at = tuple(slice(v // _COARSE, (v + _FIELD) // _COARSE) for v in reversed(xy))
    if ink[at].max() < 1 and (depth[at].max() < -60 or depth[at].min() > 12):
        return None if depth[at].min() > 12 else Image.new("RGB", (_FIELD, _FIELD), GLASS)
    block = picture.crop((xy[0], xy[1], xy[0] + _FIELD, xy[1] + _FIELD))
    dark = block.convert("L").reduce(4).resize(block.size)
    shape = _CELL, _CELL
    maps = [np.pad(m[at], [(0, n - k) for n, k in zip(shape, m[at].shape, strict=True)], "edge")
            for m in (depth.clip(-200, 200), ink)]  # fmt: skip
    deep, inked = (_resized(m, block.size) for m in maps)
    inside = (deep + 0.22 * (225 - np.asarray(dark, np.float32))) * (255 / 12)
    masks = [Image.fromarray(m.clip(0, 255).astype(np.uint8)) for m in (inside, inked)]
    tissue = Image.composite(block, Image.new("RGB", block.size, GLASS), masks[0])
    through = ImageChops.multiply(tissue, Image.new("RGB", block.size, _INK))
    return Image.composite(through, tissue, masks[1])
