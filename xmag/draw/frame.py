"""The frame of every picture: below it the slide's name, its scale, and a legend."""

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from xmag.bag import Canvas

Rgb = tuple[int, int, int]
Box = tuple[int, int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

INK: Rgb = (34, 34, 34)
FAINT: Rgb = (105, 105, 105)

_LEAST_WIDTH_PX = 560
"""Least width of a picture: narrower ones are padded, so that the text below them fits."""


class Pictured(Canvas, Protocol):
    """Protocol of a slide to draw: a Slide, or the facts kept of one that is not open here."""

    def thumbnail(self, *, max_px: int) -> Image.Image:
        """The whole slide, with at most `max_px` px on its longer side."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """Entry of a legend: a square of this look, and its meaning.

    With a `second_fill`, that is the look of its right half. With a `ramp`, it is a bar of these
    colours; without a `line` there is text alone.
    """

    text: str
    line: Rgb | None = None
    ramp: tuple[Rgb, ...] = ()
    fill: Rgb | None = None
    second_fill: Rgb | None = None
    thick: bool = True


def framed(picture: Image.Image, slide: Pictured, keys: Sequence[Key]) -> Image.Image:
    """The picture above a strip with the slide's name and scale, a scale bar and the legend."""
    width = max(picture.width, _LEAST_WIDTH_PX)
    text_px = max(13, round(width / 80))
    font = ImageFont.load_default(text_px)
    margin, line_px = text_px, round(1.9 * text_px)
    scale = "um/px unknown" if slide.mpp is None else f"{slide.mpp:.4g} um/px"
    title = f"{slide.dimensions[0]:,} x {slide.dimensions[1]:,} px, {scale}"
    bar_um, bar_px = _scale_bar(slide, picture.width)
    places, lines = _place_keys(keys, font, width - 2 * margin, first=bar_px + 5 * text_px)
    height = picture.height + margin + line_px * (1 + lines)
    page = Image.new("RGB", (width, height), "white")
    page.paste(picture)
    draw = ImageDraw.Draw(page)
    y = picture.height + margin // 2 + line_px // 2
    room = width - 3 * margin - font.getlength(title)
    draw.text((margin, y), _shortened(plain(slide.name), font, room), INK, font, anchor="lm")
    draw.text((width - margin, y), title, FAINT, font, anchor="rm")
    y += line_px
    if bar_px:
        _draw_bar(draw, (margin, y), bar_px, f"{bar_um / 1000:g} mm" if bar_um >= 1000
                  else f"{bar_um:g} um", font)  # fmt: skip
    for key, (x, line) in zip(keys, places, strict=True):
        _draw_key(draw, key, (margin + x, y + line * line_px), font)
    return page


def box_of(corner: NDArray[np.int64], side: int, per_level0: float) -> Box:
    """The first and last px (left, top, right, bottom) of a tile on the picture."""
    x, y = (int(v) for v in corner)
    left, top = round(x * per_level0), round(y * per_level0)
    right, bottom = round((x + side) * per_level0) - 1, round((y + side) * per_level0) - 1
    return left, top, max(left, right), max(top, bottom)


def mean_on_picture(
    values: NDArray[np.float64],
    coords: NDArray[np.int64],
    side: int,
    size: tuple[int, int],
    per_level0: float,
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """The mean of the values (N, K) of the tiles on each px of a picture, and where there are any.

    `coords` and `side` are those of the tiles in level-0 px, `size` is (width, height).
    """
    total = np.zeros((size[1], size[0], values.shape[1]))
    count = np.zeros((size[1], size[0], 1), np.int64)
    for corner, value in zip(coords, values, strict=True):
        left, top, right, bottom = box_of(corner, side, per_level0)
        window = slice(top, bottom + 1), slice(left, right + 1)
        total[window] += value
        count[window] += 1
    return total / np.maximum(count, 1), count[..., 0] > 0


def overlaps(coords: NDArray[np.int64], side: int) -> bool:
    """Whether columns or rows of tiles with these corners overlap, by more than rounding does."""
    gaps = (np.diff(np.unique(axis)) for axis in coords.T)
    return any(bool((gap < side - 1).any()) for gap in gaps)


def _scale_bar(slide: Pictured, width_px: int) -> tuple[float, int]:
    """The round length in µm that fills up to a fifth of the picture, and its px; 0 without mpp."""
    if slide.mpp is None:
        return 0.0, 0
    um_per_px = slide.mpp * slide.dimensions[0] / width_px
    longest = um_per_px * width_px / 5
    decade = 10.0 ** math.floor(math.log10(longest))
    length_um = max(step * decade for step in (1, 2, 5) if step * decade <= longest)
    return length_um, round(length_um / um_per_px)


def _draw_bar(
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int],
    length_px: int,
    text: str,
    font: Font,
) -> None:
    """A bar of `length_px`, centred on the line, with its length written behind it."""
    x, y = place
    draw.rectangle((x, y - 2, x + length_px - 1, y + 1), fill=INK)
    for end in (x, x + length_px - 2):
        draw.rectangle((end, y - 6, end + 1, y + 5), fill=INK)
    draw.text((x + length_px + 8, y), text, INK, font, anchor="lm")


def _place_keys(
    keys: Sequence[Key],
    font: Font,
    room_px: int,
    *,
    first: int,
) -> tuple[list[tuple[int, int]], int]:
    """Positions of the entries, as px from the left and line, and the number of lines."""
    places, x, line = [], first, 0
    for key in keys:
        length = _look_px(key, font) + round(font.getlength(f"{key.text}   "))
        if x + length > room_px and x > 0:
            x, line = 0, line + 1
        places.append((x, line))
        x += length
    return places, line + 1


def _draw_key(
    draw: ImageDraw.ImageDraw,
    key: Key,
    place: tuple[int, int],
    font: Font,
) -> None:
    """Draw the entry's square or ramp, and its text."""
    x, y = place
    half = round(font.getlength("m") * 0.45)
    if key.ramp:
        length = _look_px(key, font) - half
        for at in range(length):
            colour = key.ramp[at * len(key.ramp) // length]
            draw.line((x + at, y - half, x + at, y + half), fill=colour)
        draw.rectangle((x, y - half, x + length, y + half), outline=key.line)
    elif key.line is not None:
        square = (x, y - half, x + 2 * half, y + half)
        draw.rectangle(square, fill=key.fill)
        if key.second_fill is not None:
            draw.rectangle((x + half, y - half, x + 2 * half, y + half), fill=key.second_fill)
        draw.rectangle(square, outline=key.line, width=2 if key.thick else 1)
    draw.text((x + _look_px(key, font), y), key.text, INK, font, anchor="lm")


def _look_px(key: Key, font: Font) -> int:
    """Px from the left end of an entry to its text."""
    if key.ramp:
        return round(font.getlength("m") * 9)
    return round(font.getlength("m") * 0.9 + font.getlength(" ") * 1.5) if key.line else 0


def _shortened(name: str, font: Font, room_px: float) -> str:
    """The name, its middle left out as far as it has to be to fit."""
    keep = len(name)
    short = name
    while keep > 8 and font.getlength(short) > room_px:
        keep -= 1
        short = f"{name[: keep // 2]}...{name[-(keep - keep // 2) :]}"
    return short


def plain(text: str) -> str:
    """The text in ASCII: the font that comes with Pillow has neither µ nor letters with accents."""
    decomposed = unicodedata.normalize("NFKD", text)
    kept = "".join(c for c in decomposed if not unicodedata.combining(c))
    return kept.encode("ascii", "replace").decode("ascii")
