"""Small slides in the manner of each vendor, written from known pixels."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import imagecodecs
import numpy as np
import simplejpeg
from support.tiff import ASCII, LONG, RATIONAL, SHORT, UNDEFINED, Page, write_pages

JPEG, J2K_YCBCR, J2K_RGB = 7, 33003, 33005
RGB, YCBCR = 2, 6
_SUBSAMPLINGS = {"ycbcr444": (1, 1), "ycbcr422": (2, 1), "ycbcr420": (2, 2)}


def texture(width: int, height: int, *, seed: int = 0):
    """Pixels like an H&E section: pink stroma, violet nuclei, pale gaps; the same every time."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    rng = np.random.default_rng(seed)
    waves = np.zeros((height, width), np.float32)
    for period in (13, 19, 31, 53, 97, 211):
        angle, phase = rng.uniform(0, 2 * np.pi, 2)
        waves += np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / period + phase)
    nuclei = 1 / (1 + np.exp(-3 * (waves - 1.5)))
    gaps = 1 / (1 + np.exp(3 * (waves + 3)))
    stain = np.stack([nuclei, gaps, 1 - nuclei - gaps], -1) @ np.array(
        [[105, 70, 150], [242, 241, 243], [225, 150, 190]], np.float32
    )
    return np.clip(stain + rng.normal(0, 2, (height, width, 1)), 0, 255).astype(np.uint8)


def shrunk(pixels, factor: int):
    """`pixels` box-averaged; what does not fill a box is cut off, as Aperio does."""
    height, width = pixels.shape[0] // factor * factor, pixels.shape[1] // factor * factor
    blocks = pixels[:height, :width].reshape(height // factor, factor, width // factor, factor, 3)
    return (blocks.mean(axis=(1, 3)) + 0.5).astype(np.uint8)


def tiles_of(pixels, tile: tuple[int, int]) -> Iterator:
    """The tiles of `pixels`, row by row, those at the edges padded with grey."""
    width, height = tile
    for y in range(0, pixels.shape[0], height):
        for x in range(0, pixels.shape[1], width):
            part = pixels[y : y + height, x : x + width]
            whole = np.full((height, width, 3), 128, np.uint8)
            whole[: part.shape[0], : part.shape[1]] = part
            yield whole


def jpeg_segments(stream: bytes) -> Iterator[tuple[int, bytes]]:
    """(marker, segment) of each segment after SOI; the last holds the scan and all that follows."""
    at = 2
    while True:
        marker, length = stream[at + 1], int.from_bytes(stream[at + 2 : at + 4], "big")
        if marker == 0xDA:
            yield marker, stream[at:]
            return
        yield marker, stream[at : at + 2 + length]
        at += 2 + length


def encode_jpeg(pixels, color: str, quality: int = 90) -> bytes:
    """A JPEG stream without JFIF or Adobe marker, as Aperio writes them."""
    if color == "rgb444":
        stream = imagecodecs.jpeg8_encode(
            pixels, level=quality, colorspace="RGB", outcolorspace="RGB"
        )
    else:
        stream = simplejpeg.encode_jpeg(pixels, quality, colorsubsampling=color[-3:])
    kept = [part for marker, part in jpeg_segments(stream) if not 0xE0 <= marker <= 0xEF]
    return b"\xff\xd8" + b"".join(kept)


def abbreviated(stream: bytes) -> tuple[bytes, bytes]:
    """(JPEGTables, stream without them)."""
    tables, rest = b"", b""
    for marker, part in jpeg_segments(stream):
        if marker in (0xDB, 0xC4):
            tables += part
        else:
            rest += part
    return b"\xff\xd8" + tables + b"\xff\xd9", b"\xff\xd8" + rest


def encode_tile(pixels, color: str, quality: int = 90) -> bytes:
    """The bytes of a tile in any of the codings that `page` knows."""
    if color in ("j2k-rgb", "j2k-ycbcr"):
        rgb = color == "j2k-rgb"
        samples = pixels if rgb else to_ycbcr(pixels)
        stream = imagecodecs.jpeg2k_encode(samples, level=45, codecformat="j2k", mct=rgb)
        # Some versions of imagecodecs leave rubbish behind the end.
        return stream[: stream.index(b"\xff\xd9") + 2]
    if color == "lzw":
        return imagecodecs.lzw_encode(pixels.tobytes())
    if color == "deflate":
        return imagecodecs.zlib_encode(imagecodecs.delta_encode(pixels, axis=1).tobytes())
    if color == "zstd":
        return imagecodecs.zstd_encode(pixels.tobytes())
    if color == "webp":
        return imagecodecs.webp_encode(pixels, lossless=True)
    if color == "raw":
        return pixels.tobytes()
    return encode_jpeg(pixels, color, quality)


def to_ycbcr(pixels):
    """Full-range BT.601 YCbCr."""
    r, g, b = (pixels[..., i].astype(np.float64) for i in range(3))
    y = 0.299 * r + 0.587 * g + 0.114 * b
    ycbcr = np.stack([y, 128 + (b - y) / 1.772, 128 + (r - y) / 1.402], -1)
    return np.clip(np.rint(ycbcr), 0, 255).astype(np.uint8)


_COMPRESSIONS = {
    "j2k-rgb": J2K_RGB, "j2k-ycbcr": J2K_YCBCR, "lzw": 5, "deflate": 8, "zstd": 50000,
    "webp": 50001, "raw": 1,
}  # fmt: skip


def page(
    pixels,
    *,
    tile: tuple[int, int] = (240, 240),
    color: str = "ycbcr420",
    description: str = "",
    subfiletype: int = 0,
    missing: Sequence[int] = (),
    size: tuple[int, int] | None = None,
    shared_tables: bool = True,
    tags: dict[int, tuple[int, object]] | None = None,
    quality: int = 90,
) -> Page:
    """A tiled page; `size` is what it states where that is not the size of `pixels`."""
    chunks = [encode_tile(part, color, quality) for part in tiles_of(pixels, tile)]
    width, height = size or (pixels.shape[1], pixels.shape[0])
    all_tags = {
        254: (LONG, subfiletype), 256: (LONG, width), 257: (LONG, height),
        258: (SHORT, [8, 8, 8]), 259: (SHORT, _COMPRESSIONS.get(color, JPEG)),
        262: (SHORT, YCBCR if color.startswith("ycbcr") else RGB),
        277: (SHORT, 3), 284: (SHORT, 1), 322: (LONG, tile[0]), 323: (LONG, tile[1]),
    }  # fmt: skip
    if color in _SUBSAMPLINGS:
        all_tags[530] = (SHORT, list(_SUBSAMPLINGS[color]))
    if color == "deflate":
        all_tags[317] = (SHORT, 2)
    if description:
        all_tags[270] = (ASCII, description)
    if shared_tables and all_tags[259] == (SHORT, JPEG):
        tables = {abbreviated(chunk)[0] for chunk in chunks}
        assert len(tables) == 1, "tiles do not share their tables"
        all_tags[347] = (UNDEFINED, tables.pop())
        chunks = [abbreviated(chunk)[1] for chunk in chunks]
    all_tags |= tags or {}
    return Page(all_tags, [None if i in missing else chunk for i, chunk in enumerate(chunks)])


def strip_page(pixels, *, rows: int = 64, description: str = "", subfiletype: int = 0) -> Page:
    """An uncompressed page in strips, such as thumbnails and labels are."""
    height, width = pixels.shape[:2]
    tags = {
        254: (LONG, subfiletype), 256: (LONG, width), 257: (LONG, height),
        258: (SHORT, [8, 8, 8]), 259: (SHORT, 1), 262: (SHORT, RGB), 277: (SHORT, 3),
        278: (LONG, rows), 284: (SHORT, 1), 270: (ASCII, description),
    }  # fmt: skip
    strips = [pixels[y : y + rows].tobytes() for y in range(0, height, rows)]
    return Page(tags, strips, tiled=False)


def write_svs(
    path: Path,
    *,
    size: tuple[int, int] = (1500, 1100),
    mpp: float | None = 0.25,
    power: float | None = 40,
    levels: Sequence[int] = (1, 4, 16),
    tile: int = 240,
    color: str = "ycbcr420",
    pixels=None,
    missing: dict[int, Sequence[int]] | None = None,
    bigtiff: bool = False,
    quality: int = 90,
    resolution: tuple[float, int] | None = None,
):
    """An Aperio slide with a thumbnail, a label and a macro; returns the pixels of its base.

    `missing` lists, for each level, the tiles without bytes.
    """
    base = texture(*size) if pixels is None else pixels
    height, width = base.shape[:2]
    fields = "".join(
        f"|{key} = {value}"
        for key, value in (("AppMag", power), ("StripeWidth", 2040), ("MPP", mpp))
        if value is not None
    )
    head = f"Aperio Image Library v11.2.1 \r\n{width}x{height}"
    pages = []
    for number, factor in enumerate(levels):
        scaled = shrunk(base, factor)
        arrow = f" -> {scaled.shape[1]}x{scaled.shape[0]}" if number else ""
        description = f"{head} [0,0 {width}x{height}] ({tile}x{tile}){arrow} JPEG/RGB Q=90{fields}"
        pages.append(
            page(
                scaled,
                tile=(tile, tile),
                color=color,
                description=description,
                quality=quality,
                missing=(missing or {}).get(number, ()),
                tags=resolution_tags(*resolution) if resolution else None,
            )
        )
    thumbnail = shrunk(base, max(1, min(width, height) // 100))
    pages.insert(1, strip_page(thumbnail, description=f"{head} -> thumbnail"))
    label = texture(120, 90, seed=7)
    pages.append(strip_page(label, description=f"{head}\r\nlabel 120x90", subfiletype=1))
    pages.append(strip_page(label, description=f"{head}\r\nmacro 120x90", subfiletype=9))
    write_pages(path, pages, big=bigtiff)
    return base


def write_tiff(
    path: Path,
    *,
    size: tuple[int, int] = (1500, 1100),
    mpp: float | None = 0.25,
    levels: Sequence[int] = (1, 2, 4),
    tile: tuple[int, int] = (256, 256),
    color: str = "ycbcr420",
    pixels=None,
    missing: dict[int, Sequence[int]] | None = None,
    bigtiff: bool = False,
    shared_tables: bool = False,
):
    """A pyramid of pages that nobody's name is on; returns the pixels of its base."""
    base = texture(*size) if pixels is None else pixels
    tags = {} if mpp is None else resolution_tags(mpp)
    pages = [
        page(
            shrunk(base, factor),
            tile=tile,
            color=color,
            subfiletype=1 if number else 0,
            missing=(missing or {}).get(number, ()),
            shared_tables=shared_tables,
            tags=tags,
        )
        for number, factor in enumerate(levels)
    ]
    write_pages(path, pages, big=bigtiff)
    return base


def resolution_tags(mpp: float, unit: int = 3) -> dict[int, tuple[int, object]]:
    """Resolution tags of so many µm/px in a unit: 2 inch, 3 cm, 1 none, which says nothing."""
    px = {2: 25_400}.get(unit, 10_000) / mpp
    return {282: (RATIONAL, px), 283: (RATIONAL, px), 296: (SHORT, unit)}
