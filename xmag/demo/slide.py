"""Writes the demo slide: a small file laid out as Aperio's scanners write theirs (.svs).

Base, thumbnail, levels at 1/4 and 1/16, label and macro are the pages of one TIFF. Pixels lie in
JPEG tiles of 240 px, YCbCr 4:2:0, whose tables are stored once for each level.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import tifffile
from PIL import Image, ImageDraw, ImageFont

from xmag.demo.layout import SLIDE_MPP
from xmag.demo.picture import Picture, make_picture
from xmag.errors import InputError
from xmag.files import atomic_path
from xmag.slide.reader import Pixels
from xmag.tiles import default_threads

DEMO_SIZE = (18_000, 13_500)
"""(width, height) of the demo slide in level-0 px: 4.5 by 3.4 mm."""

_TILE = 240
_STEP = 4
"""Downsample from each level to the next: 1, 4, 16."""
_BLOCK = _TILE * _STEP
"""Level-0 px painted at once: what one tile of the second level covers."""
_JPEG_QUALITY = 75
_VENDOR = "Aperio Image Library v11.2.1 \r\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    """A painted block: its base tiles by row, its one tile of level 1, its pixels of level 2."""

    base: list[list[bytes]]
    level1: bytes
    level2: Pixels


def write_demo_slide(
    path: str | os.PathLike[str],
    *,
    size: tuple[int, int] = DEMO_SIZE,
    seed: int = 0,
    tumour: bool = True,
) -> Path:
    """The path of a synthetic slide, written there: 40x, 0.25 µm/px, Aperio layout, H&E-like.

    `size` is (width, height) in level-0 px. The same arguments give the same file. Without
    `tumour`, glands and stroma lie where its nests would. Raises InputError for a size that a slide
    cannot have, OutputError where `path` cannot be written.
    """
    if min(size) < 1024 or max(size) > 60_000:
        raise InputError(
            f"the demo slide cannot be {size[0]}x{size[1]} px; expected 1,024 to 60,000 px a side"
        )
    with atomic_path(path) as temporary:
        rows = _make_blocks(make_picture(size, seed, tumour=tumour), size)
        with tifffile.TiffWriter(temporary) as tiff:
            _write_pages(tiff, size, rows)
    return Path(path)


def _make_blocks(picture: Picture, size: tuple[int, int]) -> list[list[_Block]]:
    """All blocks, row by row, made in threads."""
    rows, cols = -(-size[1] // _BLOCK), -(-size[0] // _BLOCK)
    corners = [(col * _BLOCK, row * _BLOCK) for row in range(rows) for col in range(cols)]
    with ThreadPoolExecutor(default_threads()) as pool:
        blocks = list(pool.map(lambda xy: _make_block(picture, xy), corners))
    return [blocks[row * cols : (row + 1) * cols] for row in range(rows)]


def _make_block(picture: Picture, xy: tuple[int, int]) -> _Block:
    """One block, painted and encoded."""
    pixels = picture.paint(xy, (_BLOCK, _BLOCK))
    half = Image.fromarray(pixels).reduce(_STEP)
    starts = range(0, _BLOCK, _TILE)
    return _Block(
        base=[[_encode(pixels[y : y + _TILE, x : x + _TILE]) for x in starts] for y in starts],
        level1=_encode(np.asarray(half)),
        level2=np.asarray(half.reduce(_STEP)),
    )


def _encode(tile: Pixels) -> bytes:
    """The tile's JPEG stream."""
    jpeg: bytes = simplejpeg.encode_jpeg(
        np.ascontiguousarray(tile), quality=_JPEG_QUALITY, colorspace="RGB", colorsubsampling="420"
    )
    return jpeg


def _split_tables(jpeg: bytes) -> tuple[bytes, bytes]:
    """A JPEG stream's tables as a stream of their own, and what is left (TIFF TechNote 2)."""
    tables, rest, at = [], [], 2
    while jpeg[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
        marker, segment = jpeg[at + 1], jpeg[at:end]
        if marker in (0xDB, 0xC4):
            tables.append(segment)
        elif not 0xE0 <= marker <= 0xEF:
            rest.append(segment)
        at = end
    start, stop = b"\xff\xd8", b"\xff\xd9"
    return start + b"".join(tables) + stop, start + b"".join(rest) + jpeg[at:]


def _write_pages(
    tiff: tifffile.TiffWriter, size: tuple[int, int], rows: list[list[_Block]]
) -> None:
    """All pages, in Aperio's order."""
    sizes = [(size[0] // _STEP**n, size[1] // _STEP**n) for n in range(3)]
    width2, height2 = sizes[2]
    level2 = np.concatenate([np.concatenate([b.level2 for b in row], 1) for row in rows])
    level2 = level2[:height2, :width2]
    across, down = (-(-n // _TILE) for n in size)
    base = [
        tile
        for row in rows
        for y in range(_STEP)
        for tile in [t for block in row for t in block.base[y]][:across]
    ][: across * down]
    thumbnail = Image.fromarray(level2)
    thumbnail.thumbnail((1024, 768))
    scan = f"{_VENDOR}{size[0]}x{size[1]} [0,0 {size[0]}x{size[1]}] ({_TILE}x{_TILE})"
    scale = f"|AppMag = 40|MPP = {SLIDE_MPP:.4f}"
    _write_level(tiff, sizes[0], base, f"{scan} JPEG/RGB Q={_JPEG_QUALITY}{scale}")
    _write_image(
        tiff, thumbnail,
        f"{_VENDOR}{size[0]}x{size[1]} -> {thumbnail.width}x{thumbnail.height} - {scale}",
    )  # fmt: skip
    tiles_of_level2 = [
        _encode(_padded(level2[y : y + _TILE, x : x + _TILE]))
        for y in range(0, height2, _TILE)
        for x in range(0, width2, _TILE)
    ]
    for (width, height), tiles in (
        (sizes[1], _level1_tiles(rows, sizes[1])),
        (sizes[2], tiles_of_level2),
    ):
        _write_level(
            tiff, (width, height), tiles, f"{scan} -> {width}x{height} JPEG/RGB Q={_JPEG_QUALITY}"
        )
    label = _label()
    macro = _macro(label, thumbnail)
    _write_image(
        tiff, label, f"{_VENDOR}label {label.width}x{label.height}",
        compression="lzw", subfiletype=1,
    )  # fmt: skip
    _write_image(tiff, macro, f"{_VENDOR}macro {macro.width}x{macro.height}", subfiletype=9)


def _level1_tiles(rows: list[list[_Block]], size: tuple[int, int]) -> list[bytes]:
    """The tiles of level 1, row-major."""
    across, down = (-(-n // _TILE) for n in size)
    return [block.level1 for row in rows[:down] for block in row[:across]]


def _write_level(
    tiff: tifffile.TiffWriter, size: tuple[int, int], tiles: list[bytes], description: str
) -> None:
    """A page of encoded tiles."""
    split = [_split_tables(tile) for tile in tiles]
    tiff.write(
        iter([stream for _, stream in split]), shape=(size[1], size[0], 3), dtype=np.uint8,
        tile=(_TILE, _TILE), photometric="ycbcr", subsampling=(2, 2), compression="jpeg",
        jpegtables=split[0][0], description=description, subfiletype=0, metadata=None,
        software=False,
    )  # fmt: skip


def _write_image(
    tiff: tifffile.TiffWriter, image: Image.Image, description: str, **options: Any
) -> None:
    """A page in strips: one of the associated images."""
    options = {"compression": "jpeg", **options}
    tiff.write(
        np.asarray(image), photometric="rgb", rowsperstrip=16, description=description,
        metadata=None, software=False, **options,
    )  # fmt: skip


def _padded(tile: Pixels) -> Pixels:
    """The tile in full size, its last row and column repeated."""
    rows, cols = _TILE - tile.shape[0], _TILE - tile.shape[1]
    return np.pad(tile, ((0, rows), (0, cols), (0, 0)), mode="edge")


def _label() -> Image.Image:
    """The paper label."""
    label = Image.new("RGB", (320, 360), (250, 250, 246))
    draw = ImageDraw.Draw(label)
    draw.text((24, 40), "XMAG", fill=(30, 30, 40), font=ImageFont.load_default(72))
    text = "demo slide\nsynthetic, no patient\nH&E, 40x"
    draw.multiline_text((24, 150), text, fill=(60, 60, 70), font=ImageFont.load_default(26))
    return label


def _macro(label: Image.Image, thumbnail: Image.Image) -> Image.Image:
    """The whole glass, label at the left."""
    glass = Image.new("RGB", (1280, 430), (228, 229, 230))
    glass.paste(label.resize((360, 400)), (14, 15))
    tissue = thumbnail.copy()
    tissue.thumbnail((780, 380))
    glass.paste(tissue, (440 + (780 - tissue.width) // 2, (430 - tissue.height) // 2))
    return glass
