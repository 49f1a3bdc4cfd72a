"""Writes the demo slide: a small file laid out as Aperio's scanners write theirs (.svs).

Base, thumbnail, levels at 1/4 and 1/16, label and macro are the pages of one TIFF. Pixels lie in
JPEG tiles of 240 px, YCbCr 4:2:0, whose tables are stored once for each level.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import tifffile
from PIL import Image, ImageDraw, ImageFont

from xmag.demo.mosaic import MPP, make_picture
from xmag.errors import InputError
from xmag.files import atomic_path
from xmag.progress import ProgressOption
from xmag.slide.reader import Pixels
from xmag.tiles.stream import default_threads

DEMO_SIZE = (9_000, 6_750)
"""(width, height) of the demo slide in level-0 px: 4.5 by 3.4 mm."""

_TILE, _STEP = 240, 4
"""Px of a tile's side, and downsample from each level to the next: 1, 4, 16."""
_VENDOR = "Aperio Image Library v11.2.1 \r\n"
_CREDIT = "Osteosarcoma-Tumor-Assessment (Leavey 2019), doi 10.7937/tcia.2019.bvhjhdas, CC BY 3.0"


def write_demo_slide(
    path: str | os.PathLike[str],
    *,
    size: tuple[int, int] = DEMO_SIZE,
    seed: int = 0,
    tumour: bool = True,
    progress: ProgressOption = None,
) -> Path:
    """The path of a slide of real tissue, written there: 20x, 0.5 µm/px, Aperio layout, H&E.

    `size` is (width, height) in level-0 px. The same arguments give the same file. Its pieces are
    viable tumour, necrotic tumour and tissue without; without `tumour`, all three are the last.
    `progress` is that of `extract_features`. Raises InputError for a size that it cannot have,
    OutputError where `path` cannot be written.
    """
    if min(size) < 1024 or max(size) > 20_000:
        raise InputError(
            f"the demo slide cannot be {size[0]}x{size[1]} px; expected 1,024 to 20,000 px a side"
        )
    with atomic_path(path) as temporary:
        picture = make_picture(size, seed, tumour=tumour, progress=progress)
        with tifffile.TiffWriter(temporary) as tiff:
            _write_pages(tiff, picture)
    return Path(path)


def _write_pages(tiff: tifffile.TiffWriter, picture: Pixels) -> None:
    """All pages, in Aperio's order."""
    levels = [picture]
    while len(levels) < 3:
        height, width = (n // _STEP for n in levels[-1].shape[:2])
        whole = Image.fromarray(levels[-1][: height * _STEP, : width * _STEP])
        levels.append(np.asarray(whole.reduce(_STEP)))
    height, width = picture.shape[:2]
    thumbnail = Image.fromarray(levels[2])
    thumbnail.thumbnail((1024, 768))
    scan = f"{_VENDOR}{width}x{height} [0,0 {width}x{height}] ({_TILE}x{_TILE})"
    scale = f"|AppMag = 20|MPP = {MPP:.4f}"
    _write_level(tiff, picture, f"{scan} JPEG/RGB Q=75{scale}|Credit = {_CREDIT}")
    small = f"{width}x{height} -> {thumbnail.width}x{thumbnail.height}"
    _write_image(tiff, thumbnail, f"{_VENDOR}{small} - {scale}")
    for level in levels[1:]:
        _write_level(tiff, level, f"{scan} -> {level.shape[1]}x{level.shape[0]} JPEG/RGB Q=75")
    label = Image.new("RGB", (320, 360), (250, 250, 246))
    draw = ImageDraw.Draw(label)
    draw.text((24, 40), "XMAG", fill=(30, 30, 40), font=ImageFont.load_default(72))
    text = "demo slide\nosteosarcoma, H&E, 20x\na mosaic of fields\nTCIA, CC BY 3.0"
    draw.multiline_text((24, 150), text, fill=(60, 60, 70), font=ImageFont.load_default(26))
    macro = Image.new("RGB", (1280, 430), (228, 229, 230))
    macro.paste(label.resize((360, 400)), (14, 15))
    thumbnail.thumbnail((780, 380))
    macro.paste(thumbnail, (440 + (780 - thumbnail.width) // 2, (430 - thumbnail.height) // 2))
    _write_image(tiff, label, f"{_VENDOR}label 320x360", compression="lzw", subfiletype=1)
    _write_image(tiff, macro, f"{_VENDOR}macro 1280x430", subfiletype=9)


def _write_level(tiff: tifffile.TiffWriter, level: Pixels, description: str) -> None:
    """A page of JPEG tiles, those at the edge padded with their last row and column."""
    rows, columns = (-(-n // _TILE) for n in level.shape[:2])

    def encode(number: int) -> tuple[bytes, bytes]:
        y, x = (n * _TILE for n in divmod(number, columns))
        tile = level[y : y + _TILE, x : x + _TILE]
        short = [(0, _TILE - n) for n in tile.shape[:2]]
        tile = np.ascontiguousarray(np.pad(tile, (*short, (0, 0)), "edge"))
        return _split_tables(simplejpeg.encode_jpeg(tile, 75, "RGB", "420"))

    with ThreadPoolExecutor(default_threads()) as pool:
        split = list(pool.map(encode, range(rows * columns)))
    tiff.write(
        iter([stream for _, stream in split]), shape=level.shape, dtype=np.uint8,
        tile=(_TILE, _TILE), photometric="ycbcr", subsampling=(2, 2), compression="jpeg",
        jpegtables=split[0][0], description=description, subfiletype=0, metadata=None,
        software=False,
    )  # fmt: skip


def _split_tables(jpeg: bytes) -> tuple[bytes, bytes]:
    """A JPEG stream's tables as a stream of their own, and what is left (TIFF TechNote 2)."""
    tables, rest, at = [], [], 2
    while jpeg[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
        if jpeg[at + 1] in (0xDB, 0xC4):
            tables.append(jpeg[at:end])
        elif not 0xE0 <= jpeg[at + 1] <= 0xEF:
            rest.append(jpeg[at:end])
        at = end
    start, stop = b"\xff\xd8", b"\xff\xd9"
    return start + b"".join(tables) + stop, start + b"".join(rest) + jpeg[at:]


def _write_image(
    tiff: tifffile.TiffWriter, image: Image.Image, description: str, **options: Any
) -> None:
    """A page in strips: one of the associated images."""
    tiff.write(
        np.asarray(image), photometric="rgb", rowsperstrip=16, description=description,
        metadata=None, software=False, **{"compression": "jpeg", **options},
    )  # fmt: skip
