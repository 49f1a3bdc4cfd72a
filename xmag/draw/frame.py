"""Frame of pictures of a slide: places of tiles, name, scale bar and legend."""

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

from xmag.bag import Canvas, Pictured
from xmag.errors import InputError
from xmag.geometry import TileGeometry
from xmag.tissue import TissueMask

Rgb = tuple[int, int, int]

INK: Rgb = (34, 34, 34)
FAINT: Rgb = (105, 105, 105)

_LEAST_WIDTH_PX = 560
"""Least width of a picture: narrower ones are padded, so that the text below them fits."""

_SMOOTH, _SMOOTH_STRANDS = 1.0, 0.6
"""Reach in px of a mask by which its outline is smoothed, and that of strands of one or two px,
which would be lost by as much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """Entry of a legend: a swatch, and its meaning; without a `line`, text alone.

    The swatch shows its fills side by side: one, two halves, or the many of a ramp, which is wider.
    """

    text: str
    line: Rgb | None = None
    fills: tuple[Rgb, ...] = ()
    weight: int = 1


def box_of(corner: NDArray[np.int64], side: int, per_level0: float) -> tuple[int, int, int, int]:
    """The first and last px (left, top, right, bottom) of a tile on the picture."""
    x, y = (int(v) for v in corner)
    left, top = round(x * per_level0), round(y * per_level0)
    right, bottom = round((x + side) * per_level0) - 1, round((y + side) * per_level0) - 1
    return left, top, max(left, right), max(top, bottom)


def mean_on_grey(
    slide: Pictured,
    values: NDArray[np.float64],
    coords: NDArray[np.int64],
    tiles: TileGeometry,
    max_px: int,
) -> tuple[Image.Image, NDArray[np.float64], NDArray[np.bool_]]:
    """The slide in grey, the mean value of the tiles on each px, and where there are any.

    `values` are (N, K) and `coords` the corners of the tiles in level-0 px; the mean is (h, w, K),
    and where it is known (h, w, 1).
    """
    thumbnail = slide.thumbnail(max_px=max_px).convert("L").convert("RGB")
    total = np.zeros((thumbnail.height, thumbnail.width, values.shape[1]))
    count = np.zeros((*total.shape[:2], 1), np.int64)
    per_level0 = thumbnail.width / slide.dimensions[0]
    for corner, value in zip(coords, values, strict=True):
        left, top, right, bottom = box_of(corner, tiles.size_level0, per_level0)
        window = slice(top, bottom + 1), slice(left, right + 1)
        total[window] += value
        count[window] += 1
    grey = Image.blend(thumbnail, Image.new("RGB", thumbnail.size, "white"), 0.2)
    return grey, total / np.maximum(count, 1), count > 0


def tissue_area(tissue: TissueMask, size: tuple[int, int], per_level0: float) -> Image.Image:
    """The tissue on a picture of this size, 255 where it is, with smooth borders.

    The mask is of whole px, and leaves out what there is of one at the right and lower border of
    the slide: tissue that ends there goes on to the slide's own border.
    """
    mask, per_mask = np.asarray(tissue.mask, np.uint8) * 255, tissue.downsample * per_level0
    if not mask.size:
        return Image.new("L", size)
    height, width = mask.shape
    missing = size[0] - round(width * per_mask), size[1] - round(height * per_mask)
    right, lower = (int(0 < gap < per_mask + 1) for gap in missing)
    mask = np.pad(mask, ((0, lower), (0, right)), "edge")
    whole = Image.fromarray(mask)
    opened = whole.filter(ImageFilter.MinFilter(3)).filter(ImageFilter.MaxFilter(3))
    strands = ImageChops.subtract(whole, opened)
    shown = max(1, round(mask.shape[1] * per_mask)), max(1, round(mask.shape[0] * per_mask))
    smooth, kept = (
        image.resize(shown, Image.Resampling.NEAREST).filter(
            ImageFilter.GaussianBlur(reach * per_mask)
        )
        for image, reach in ((whole, _SMOOTH), (strands, _SMOOTH_STRANDS))
    )
    smooth = ImageChops.lighter(smooth, kept)
    area = Image.new("L", size)
    area.paste(smooth.point(lambda v: 255 * (v > 127)))
    return area


def overlap_key(coords: NDArray[np.int64], tiles: TileGeometry, value: str) -> list[Key]:
    """The entry on tiles that overlap: columns or rows of them do, by more than rounding does."""
    gaps = np.concatenate([np.diff(np.unique(axis)) for axis in coords.T])
    overlaps = bool((gaps < tiles.size_level0 - 1).any())
    return [Key(text=f"where tiles overlap, their mean {value}")] if overlaps else []


def require_canvas(slide: Canvas, tiles: TileGeometry, whose: str) -> None:
    """Raise InputError for tiles of another canvas than the slide's; `whose` is "the bag was"."""
    if tuple(tiles.level0_size) != tuple(slide.dimensions):
        raise InputError(
            f"{whose} made on a canvas of {tiles.level0_size} px, but {slide.name!r} has"
            f" {slide.dimensions} px; give the slide that {whose} made from"
        )


def framed(
    picture: Image.Image, slide: Pictured, keys: Sequence[Key], *, caption: str = ""
) -> Image.Image:
    """The picture above a strip with the slide's name and scale, a scale bar and the legend.

    A `caption` has a line of its own below the name.
    """
    width = max(picture.width, _LEAST_WIDTH_PX)
    text_px = max(13, round(width / 80))
    font = ImageFont.load_default(text_px)
    margin, line_px = text_px, round(1.9 * text_px)
    page = Image.new("RGB", (width, picture.height + margin + line_px * (3 + len(keys))), "white")
    page.paste(picture)
    draw = ImageDraw.Draw(page)
    y = picture.height + margin // 2 + line_px // 2
    scale = "µm/px unknown" if slide.mpp is None else f"{slide.mpp:.4g} µm/px"
    title = f"{slide.dimensions[0]:,} x {slide.dimensions[1]:,} px, {scale}"
    name = _fitted(slide.name, font, width - 3 * margin - text_width(title, font))
    write(draw, (margin, y), name, INK, font)
    write(draw, (width - margin - text_width(title, font), y), title, FAINT, font)
    if caption:
        y += line_px
        write(draw, (margin, y), _fitted(caption, font, width - 2 * margin), INK, font)

    x, y = margin + 5 * text_px, y + line_px
    if slide.mpp is not None:
        bar_um, bar_px = _scale_bar(slide.mpp * slide.dimensions[0], picture.width)
        draw.rectangle((margin, y - 2, margin + bar_px - 1, y + 1), fill=INK)
        for end in (margin, margin + bar_px - 2):
            draw.rectangle((end, y - 6, end + 1, y + 5), fill=INK)
        text = f"{bar_um / 1000:g} mm" if bar_um >= 1000 else f"{bar_um:g} µm"
        write(draw, (margin + bar_px + 8, y), text, INK, font)
        x += bar_px

    em, blank = font.getlength("m"), font.getlength(" ")
    half = round(em * 0.45)
    for key in keys:
        swatch_px, text_at = 2 * half, round(em * 0.9 + blank * 1.5) if key.line else 0
        if len(key.fills) > 2:
            swatch_px, text_at = round(em * 9) - half, round(em * 9)
        length = text_at + round(text_width(f"{key.text}   ", font))
        if x + length > width - margin and x > margin:
            x, y = margin, y + line_px
        for at in range(swatch_px if key.fills else 0):
            fill = key.fills[at * len(key.fills) // swatch_px]
            draw.line((x + at, y - half, x + at, y + half), fill)
        if key.line is not None:
            box = (x, y - half, x + swatch_px, y + half)
            draw.rectangle(box, outline=key.line, width=key.weight)
        write(draw, (x + text_at, y), plain(key.text), INK, font)
        x += length
    return page.crop((0, 0, width, y - line_px // 2 + line_px + margin - margin // 2))


def _fitted(text: str, font: Any, room: float) -> str:
    """The text as the font has it, its middle left out where it is longer than `room` px."""
    whole = fitted = plain(text)
    kept = len(whole)
    while kept > 8 and text_width(fitted, font) > room:
        kept -= 1
        fitted = f"{whole[: kept // 2]}...{whole[-(kept - kept // 2) :]}"
    return fitted


def _scale_bar(width_um: float, width_px: int) -> tuple[float, int]:
    """The round length in µm that fills up to a fifth of the picture, and its px."""
    longest = width_um / 5
    decade = 10.0 ** math.floor(math.log10(longest))
    length_um = max(step * decade for step in (1, 2, 5) if step * decade <= longest)
    return length_um, round(length_um / (width_um / width_px))


def plain(text: str) -> str:
    """The text in ASCII and µ: the font that comes with Pillow has no letters with accents."""
    kept = (c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    mu = "\N{GREEK SMALL LETTER MU}"  # as that makes of µ
    return "".join("µ" if c == mu else c if c.isascii() else "?" for c in kept)


def text_width(text: str, font: Any) -> float:
    """The width of what `write` writes, in px."""
    return float(font.getlength(text.replace("µ", "u")))


def write(
    draw: ImageDraw.ImageDraw, xy: tuple[float, float], text: str, ink: Rgb, font: Any
) -> None:
    """Write text whose middle left is `xy`; its µ, which the font lacks, is a u with a stem."""
    x, y = xy
    draw.text(xy, text.replace("µ", "u"), ink, font, anchor="lm")
    if "µ" not in text:
        return
    ascent, descent = font.getmetrics()
    base = round(y + (ascent - descent) / 2)
    mask = font.getmask("u")
    columns = np.array(mask, np.float64).reshape(mask.size[::-1]).sum(axis=0)
    stem = np.flatnonzero(columns[: len(columns) // 2] > columns.max() / 2)
    for place in (number for number, letter in enumerate(text) if letter == "µ"):
        at = round(x + text_width(text[:place], font))
        draw.rectangle((at + stem[0], base - 1, at + stem[-1], base + 0.22 * font.size), fill=ink)
