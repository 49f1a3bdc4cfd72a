"""Frame of pictures of a slide: places of tiles, name, scale bar and legend."""

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from xmag.bag import Canvas, Pictured
from xmag.errors import InputError
from xmag.geometry import TileGeometry

Rgb = tuple[int, int, int]

INK: Rgb = (34, 34, 34)
FAINT: Rgb = (105, 105, 105)

_LEAST_WIDTH_PX = 560
"""Least width of a picture: narrower ones are padded, so that the text below them fits."""


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
    scale = "um/px unknown" if slide.mpp is None else f"{slide.mpp:.4g} um/px"
    title = f"{slide.dimensions[0]:,} x {slide.dimensions[1]:,} px, {scale}"
    name = _fitted(slide.name, font, width - 3 * margin - font.getlength(title))
    draw.text((margin, y), name, INK, font, anchor="lm")
    draw.text((width - margin, y), title, FAINT, font, anchor="rm")
    if caption:
        y += line_px
        draw.text((margin, y), _fitted(caption, font, width - 2 * margin), INK, font, anchor="lm")

    x, y = margin + 5 * text_px, y + line_px
    if slide.mpp is not None:
        bar_um, bar_px = _scale_bar(slide.mpp * slide.dimensions[0], picture.width)
        draw.rectangle((margin, y - 2, margin + bar_px - 1, y + 1), fill=INK)
        for end in (margin, margin + bar_px - 2):
            draw.rectangle((end, y - 6, end + 1, y + 5), fill=INK)
        text = f"{bar_um / 1000:g} mm" if bar_um >= 1000 else f"{bar_um:g} um"
        draw.text((margin + bar_px + 8, y), text, INK, font, anchor="lm")
        x += bar_px

    em, blank = font.getlength("m"), font.getlength(" ")
    half = round(em * 0.45)
    for key in keys:
        swatch_px, text_at = 2 * half, round(em * 0.9 + blank * 1.5) if key.line else 0
        if len(key.fills) > 2:
            swatch_px, text_at = round(em * 9) - half, round(em * 9)
        length = text_at + round(font.getlength(f"{key.text}   "))
        if x + length > width - margin and x > margin:
            x, y = margin, y + line_px
        for at in range(swatch_px if key.fills else 0):
            fill = key.fills[at * len(key.fills) // swatch_px]
            draw.line((x + at, y - half, x + at, y + half), fill)
        if key.line is not None:
            box = (x, y - half, x + swatch_px, y + half)
            draw.rectangle(box, outline=key.line, width=key.weight)
        draw.text((x + text_at, y), key.text, INK, font, anchor="lm")
        x += length
    return page.crop((0, 0, width, y - line_px // 2 + line_px + margin - margin // 2))


def _fitted(text: str, font: Any, room: float) -> str:
    """The text in ASCII, its middle left out where it is longer than `room` px."""
    whole = fitted = plain(text)
    kept = len(whole)
    while kept > 8 and font.getlength(fitted) > room:
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
    """The text in ASCII: the font that comes with Pillow has neither µ nor letters with accents."""
    decomposed = unicodedata.normalize("NFKD", text)
    kept = "".join(c for c in decomposed if not unicodedata.combining(c))
    return kept.encode("ascii", "replace").decode("ascii")
