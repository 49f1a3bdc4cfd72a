"""Attention of a classifier: a heatmap over the slide, and a gallery of the tiles with the most."""

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from xmag.draw.frame import (
    FAINT,
    INK,
    Font,
    Key,
    framed,
    mean_on_picture,
    overlaps,
    plain,
)
from xmag.draw.scale import colours, percentiles, placed
from xmag.errors import InputError
from xmag.geometry import TileGeometry
from xmag.slide import Slide

if TYPE_CHECKING:  # pictures are drawn without torch
    from xmag.mil import Attention

_TOP_SHARE = 0.1
_OPACITY = 0.6
_GAP_PX = 10


def heatmap(slide: Slide, attention: "Attention", *, max_px: int = 1600) -> Image.Image:
    """The slide in grey with each tile coloured by its attention, as an RGB image.

    Colour is the rank of a tile among those of the slide, from 0 (least) to 100 (most), along
    viridis: it shows which tiles got more than others on this slide, and the colours of two slides
    cannot be compared. How unequal the weights are stands in the legend, as the share that the top
    tenth of the tiles holds. Where tiles overlap, the mean of their ranks is shown. Raises BagError
    where the attention does not say where its tiles lie, and InputError where it belongs to another
    canvas. Other scores are drawn as
    ``Attention(scores=..., coords=bag.coords, tiles=bag.tiles, kind="custom")``.
    """
    coords, tiles = placed(attention)
    _require_canvas(slide, tiles)
    thumbnail = slide.thumbnail(max_px=max_px).convert("L").convert("RGB")
    grey = np.asarray(Image.blend(thumbnail, Image.new("RGB", thumbnail.size, "white"), 0.2))
    per_level0 = thumbnail.width / slide.dimensions[0]
    ranks = percentiles(attention.scores)[:, None]
    mean, covered = mean_on_picture(ranks, coords, tiles.size_level0, thumbnail.size, per_level0)
    tinted = (1 - _OPACITY) * grey + _OPACITY * colours(mean[..., 0])
    picture = Image.fromarray(np.where(covered[..., None], np.rint(tinted), grey).astype(np.uint8))
    keys = _legend(attention.scores)
    if overlaps(coords, tiles.size_level0):
        keys.append(Key(text="where tiles overlap, their mean rank"))
    return framed(picture, slide, keys)


def gallery(
    slide: Slide, attention: "Attention", *, count: int = 12, tile_px: int = 192
) -> Image.Image:
    """The `count` tiles with the most attention, the first at the top left, as an RGB image.

    Each is read from the slide as it was for the encoder: `attention.tiles.size_px` px at
    `attention.tiles.mpp` µm/px; then it is shown with `tile_px` px a side. Below it stand its rank,
    its score, how many times the mean of all tiles that is, and its place in level-0 px. The border
    has the colour that the tile has in `heatmap`. Fewer tiles than `count` are all shown. Raises
    what `heatmap` raises, InputError for a `count` or `tile_px` that makes no sense, and what
    `Slide.read_region` raises.
    """
    coords, tiles = placed(attention)
    _require_canvas(slide, tiles)
    for name, value, least in (("count", count, 1), ("tile_px", tile_px, 64)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise InputError(f"{name} is {value!r}; expected an int from {least} on")
    order = np.argsort(-attention.scores, kind="stable")[:count]
    font = ImageFont.load_default(max(12, tile_px // 14))
    line_px = round(1.5 * font.size) if isinstance(font, ImageFont.FreeTypeFont) else 18
    columns = max(1, min(len(order), math.ceil(math.sqrt(1.5 * count))))
    rows = math.ceil(len(order) / columns)
    across, down = tile_px + _GAP_PX, tile_px + 2 * line_px + _GAP_PX
    page = Image.new("RGB", (columns * across + _GAP_PX, rows * down + 2 * line_px), "white")
    draw = ImageDraw.Draw(page)
    title = f"{plain(slide.name)}: {_top(len(order), len(coords))} of {tile_um(tiles)}"
    draw.text((_GAP_PX, line_px), title, INK, font, anchor="lm")
    borders = colours(percentiles(attention.scores))
    mean = float(attention.scores.mean()) if len(coords) else 0.0
    for place, row in enumerate(order):
        x, y = _GAP_PX + place % columns * across, 2 * line_px + place // columns * down
        page.paste(_tile(slide, coords[row], tiles, tile_px), (x, y))
        edge = tuple(borders[row].tolist())
        draw.rectangle((x, y, x + tile_px - 1, y + tile_px - 1), outline=edge, width=3)
        score = float(attention.scores[row])
        more = f", {score / mean:.2g}x mean" if mean > 0 else ""
        _write_lines(
            draw, (x, y + tile_px + line_px // 2 + 2), line_px, font,
            (f"{place + 1}.  {score:.2g}{more}", f"at {coords[row][0]:,}, {coords[row][1]:,}"),
        )  # fmt: skip
    return page


def tile_um(tiles: TileGeometry) -> str:
    """Side of a tile in µm, in words."""
    return f"{tiles.size_px * tiles.mpp:.0f} um a side"


def _require_canvas(slide: Slide, tiles: TileGeometry) -> None:
    if tuple(tiles.level0_size) != tuple(slide.dimensions):
        raise InputError(
            f"the attention is of tiles on a canvas of {tiles.level0_size} px, but {slide.name!r}"
            f" has {slide.dimensions} px; give the slide that the features were made from"
        )


def _legend(scores: NDArray[np.float32]) -> list[Key]:
    if not len(scores):
        return [Key(text="no tiles")]
    ramp = tuple(tuple(c) for c in colours(np.linspace(0, 100, 64)).tolist())
    keys = [Key(text="rank of attention among the tiles, 0 to 100", line=FAINT, ramp=ramp)]
    top = math.ceil(_TOP_SHARE * len(scores))
    total = float(scores.sum(dtype=np.float64))
    held = f"{_top(top, len(scores))}"
    if total > 0 and scores.min() >= 0:
        share = float(np.sort(scores)[-top:].sum(dtype=np.float64)) / total
        held += f" {'hold' if top > 1 else 'holds'} {share:.0%} of the weight"
        keys.append(Key(text=held))
    return keys


def _top(count: int, total: int) -> str:
    return f"the top {count:,} of {total:,} tiles" if total > 1 else f"{total} tile"


def _tile(
    slide: Slide, corner: NDArray[np.int64], tiles: TileGeometry, tile_px: int
) -> Image.Image:
    x, y = corner.tolist()
    mpp = tiles.mpp * (slide.mpp or tiles.level0_mpp) / tiles.level0_mpp
    pixels = slide.read_region((x, y), (tiles.size_px, tiles.size_px), mpp=mpp)
    return Image.fromarray(pixels).resize((tile_px, tile_px), Image.Resampling.LANCZOS)


def _write_lines(
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int],
    line_px: int,
    font: Font,
    lines: tuple[str, str],
) -> None:
    """Two lines, the first in ink, the second fainter."""
    for number, (text, colour) in enumerate(zip(lines, (INK, FAINT), strict=True)):
        draw.text((place[0], place[1] + number * line_px), text, colour, font, anchor="lm")
