"""Attention of a MIL model: a heatmap over the slide, the tiles with the most, and GeoJSON.

Of a case of several slides each has a picture of its own: ``case=`` is the attention of all of
them, so that a colour means the same on each.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from xmag.draw import frame
from xmag.draw.frame import FAINT, INK, Key, plain
from xmag.errors import BagError, InputError, SlideScaleError
from xmag.geometry import TileGeometry, TileSpec
from xmag.plan import divisor
from xmag.slide import Slide
from xmag.tissue import TissueMask, find_tissue

if TYPE_CHECKING:  # pictures are drawn without torch
    from xmag.mil import Attention

Scale = Literal["rank", "weight"]
"""Scale of the colours: the rank of a tile, or its score itself."""

_TOP_SHARE = 0.1
_EVEN = 0.9
"""Least share of the tiles that attention is spread over, in effect, to be called nearly even."""
_OPACITY = 0.6
_GAP_PX = 10
_LEAST_TILE_PX = 64
_GALLERY_TILE_PX = 192
_WHOSE = "the features were"
_RANKS = ((0, 50), (50, 75), (75, 90), (90, 100))
"""Classes of tiles in GeoJSON by the rank of their attention, in percent: from, up to."""
_VIRIDIS = np.array(
    [
        (68, 1, 84), (72, 24, 106), (71, 45, 123), (66, 64, 134), (59, 82, 139), (51, 99, 141),
        (44, 114, 142), (38, 130, 142), (33, 145, 140), (31, 160, 136), (40, 174, 128),
        (63, 188, 115), (94, 201, 98), (132, 212, 75), (173, 220, 48), (216, 226, 25),
        (253, 231, 37),
    ],
    np.float64,
)  # fmt: skip
"""Every sixteenth colour of matplotlib's viridis (CC0), whose lightness rises evenly."""


def heatmap(
    slide: Slide,
    attention: "Attention",
    *,
    case: Sequence["Attention"] = (),
    tissue: TissueMask | Literal["auto"] | None = "auto",
    scale: Scale = "rank",
    caption: str = "",
    max_px: int = 1600,
) -> Image.Image:
    """The slide in grey with the tissue of each tile coloured by its attention, as an RGB image.

    Colour is the rank of a tile among those of the slide, from 0 (least) to 100 (most), along
    viridis: it shows which tiles got more than others on this slide, and the colours of two slides
    cannot be compared, unless they are of one `case`: then the rank is that among the tiles of all
    its slides. How unequal the weights are stands in the legend, as the share that the top tenth of
    the tiles holds, and whether that is nearly even: then tiles of any rank got about as much.
    With scale="weight" colour is the score itself, from 0 (or the lowest, below it) to the highest.
    Where tiles overlap, the mean of their ranks or weights is shown.

    Args:
        slide: The slide that the bag was made from.
        attention: Of a model of any task: ``attention(bag)``, or one of ``attention([bags])``.
            Other scores are drawn as
            ``Attention(scores=..., coords=bag.coords, tiles=bag.tiles, kind="mitoses")``, with a
            name of them as `kind`.
        case: All that ``attention([bags])`` gave; `attention` is one of them.
        tissue: What is coloured of the tiles: "auto" finds the tissue, None is all of each. A tile
            without any of it is coloured whole.
        scale: "rank" or "weight".
        caption: A line below the slide's name, such as what was predicted.
        max_px: The longer side of the picture.

    Raises BagError where the attention does not say where its tiles lie, and InputError where it
    belongs to another canvas or is not one of the `case`.
    """
    coords, tiles = _placed(attention)
    frame.require_canvas(slide, tiles, _WHOSE)
    ranks = _percents(attention, case, scale)[:, None]
    image, mean, covered = frame.mean_on_grey(slide, ranks, coords, tiles, max_px)
    if (mask := _tissue(slide) if isinstance(tissue, str) else tissue) is not None:
        covered &= tissue_inside(mask, image, coords, tiles)[..., None]
    grey = np.asarray(image)
    tinted = (1 - _OPACITY) * grey + _OPACITY * colours(mean[..., 0])
    picture = Image.fromarray(np.where(covered, np.rint(tinted), grey).astype(np.uint8))
    keys = [*_legend(attention, case, scale), *frame.overlap_key(coords, tiles, scale)]
    return frame.framed(picture, slide, keys, caption=caption)


def gallery(
    slide: Slide,
    attention: "Attention",
    *,
    case: Sequence["Attention"] = (),
    scale: Scale = "rank",
    count: int = 12,
    tile_px: int | None = None,
    mpp: float | None = None,
) -> Image.Image:
    """The `count` tiles with the most attention, the first at the top left, as an RGB image.

    Each is read from the slide as it was for the encoder: `attention.tiles.size_px` px at
    `attention.tiles.mpp` µm/px; then it is shown with `tile_px` px a side, by default 192. With
    `mpp` it is the same field, read at that finer scale, as `TilePlan.zoom` has it: the tile's own
    µm/px divided by a whole number; and by default it is shown with all px that this gives, 896 for
    a tile of 224 px at 2.0 µm/px that is read at 0.5. Below it stand its rank, its score, how many
    times the mean of all tiles (of all slides of the `case`) that is, and its place in level-0 px.
    The border has the colour that the tile has in `heatmap` of that `scale`. Fewer tiles than
    `count` are all shown. Raises what `heatmap` raises, InputError for a `count`, `tile_px` or
    `mpp` that makes no sense, and what `Slide.read_region` raises: SlideScaleError where the slide
    is not that fine.
    """
    coords, tiles = _placed(attention)
    frame.require_canvas(slide, tiles, _WHOSE)
    finer = 1 if mpp is None else divisor(tiles.mpp, mpp, TileSpec().mpp_tolerance)
    size_px = finer * tiles.size_px
    if tile_px is None:
        tile_px = _GALLERY_TILE_PX if mpp is None else max(size_px, _LEAST_TILE_PX)
    for name, value, least in (("count", count, 1), ("tile_px", tile_px, _LEAST_TILE_PX)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise InputError(f"{name} is {value!r}; expected an int from {least} on")
    order = np.argsort(-attention.scores, kind="stable")[:count]
    text_px = max(12, tile_px // 14)
    font = ImageFont.load_default(text_px)
    line_px = round(1.5 * text_px)
    columns = max(1, min(len(order), math.ceil(math.sqrt(1.5 * count))))
    rows = math.ceil(len(order) / columns)
    across, down = tile_px + _GAP_PX, tile_px + 2 * line_px + _GAP_PX
    page = Image.new("RGB", (columns * across + _GAP_PX, rows * down + 2 * line_px), "white")
    draw = ImageDraw.Draw(page)
    top, side_um = _top(len(order), len(coords)), tiles.size_px * tiles.mpp
    title = f"{plain(slide.name)}: {top} of {side_um:.0f} µm a side"
    if mpp is not None:
        title += f", at {tiles.mpp / finer:.3g} µm/px"
    frame.write(draw, (_GAP_PX, line_px), title, INK, font)
    borders = colours(_percents(attention, case, scale))
    every = _scores(attention, case)
    mean = float(every.mean()) if len(every) else 0.0
    read_mpp = tiles.mpp / finer * (slide.mpp or tiles.level0_mpp) / tiles.level0_mpp
    inside = corners_inside(slide, coords, tiles)
    for place, row in enumerate(order):
        x, y = _GAP_PX + place % columns * across, 2 * line_px + place // columns * down
        corner_x, corner_y = coords[row].tolist()
        pixels = slide.read_region(tuple(inside[row]), (size_px, size_px), mpp=read_mpp)
        tile = Image.fromarray(pixels).resize((tile_px, tile_px), Image.Resampling.LANCZOS)
        page.paste(tile, (x, y))
        edge = tuple(borders[row].tolist())
        draw.rectangle((x, y, x + tile_px - 1, y + tile_px - 1), outline=edge, width=3)
        score = float(attention.scores[row])
        more = f", {score / mean:.2g}x mean" if mean > 0 else ""
        y += tile_px + line_px // 2 + 2
        draw.text((x, y), f"{place + 1}.  {score:.2g}{more}", INK, font, anchor="lm")
        draw.text((x, y + line_px), f"at {corner_x:,}, {corner_y:,}", FAINT, font, anchor="lm")
    return page


def attention_geojson(
    attention: "Attention", *, case: Sequence["Attention"] = ()
) -> dict[str, Any]:
    """The tiles with their attention as a GeoJSON FeatureCollection in level-0 px, for QuPath.

    Each tile is a detection, in the order of the bag, with the measurements "Attention" (its score)
    and "Attention rank" (0 to 100 among the tiles of the slide, or of its `case`), by which
    QuPath's measurement maps colour it. It is classified by its rank: "Attention rank 90-100" and
    so on, in the colours of `heatmap`. Raises BagError where the attention does not say where its
    tiles lie, and InputError where it is not one of the `case`.
    """
    coords, tiles = _placed(attention)
    ranks = _ranks(attention, case)
    middles = colours(np.mean(_RANKS, axis=1)).tolist()
    kinds = [
        {"name": f"Attention rank {low}-{high}", "color": colour}
        for (low, high), colour in zip(_RANKS, middles, strict=True)
    ]
    bins = np.searchsorted([high for _, high in _RANKS[:-1]], ranks, side="right")
    square = np.array([(0, 0), (1, 0), (1, 1), (0, 1), (0, 0)]) * tiles.size_level0
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [(corner + square).tolist()]},
            "properties": {
                "objectType": "detection",
                "classification": kinds[kind],
                "measurements": {"Attention": score, "Attention rank": round(rank, 2)},
            },
        }
        for corner, score, rank, kind in zip(
            coords, attention.scores.tolist(), ranks.tolist(), bins.tolist(), strict=True
        )
    ]
    return {"type": "FeatureCollection", "features": features}


def percentiles(scores: NDArray[np.float32]) -> NDArray[np.float64]:
    """Rank of each score among all, from 0 (least) to 100 (most); equal scores rank equal.

    It is the mean rank of equal scores, from 0, by N - 1. One score alone stands at 50.
    """
    if len(scores) < 2:
        return np.full(len(scores), 50.0)
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts + 1) / 2
    return np.asarray(100 * ranks[inverse] / (len(scores) - 1), np.float64)


def colours(percent: NDArray[np.float64]) -> NDArray[np.uint8]:
    """The colours, uint8 (..., 3), of percentiles: from dark violet over green to yellow."""
    places = np.linspace(0, 100, len(_VIRIDIS))
    channels = [np.interp(percent, places, channel) for channel in _VIRIDIS.T]
    return np.asarray(np.rint(np.stack(channels, axis=-1)), np.uint8)


def _placed(attention: "Attention") -> tuple[NDArray[np.int64], TileGeometry]:
    """The corners of the tiles and their geometry; an error without, or without their scores."""
    coords, tiles = attention.coords, attention.tiles
    if coords is None or tiles is None:
        missing = "coords" if coords is None else "tiles"
        raise BagError(
            f"the attention does not say where its tiles lie ({missing} is None); use that of a"
            " bag that extract_features made, or of the path of its file. Of a file of other"
            " software give what it lacks: FeatureBag(bag.features, coords, tiles=), or for STAMP's"
            " FeatureBag.load(path).on(slide)"
        )
    _require_scores(attention.scores, len(coords))
    return coords, tiles


def _require_scores(scores: NDArray[np.float32], count: int) -> None:
    if scores.shape != (count,) or not np.isfinite(scores).all():
        raise InputError(
            f"the attention has scores of shape {scores.shape} for {count} tiles; expected one"
            " finite number for each tile"
        )


def _scores(attention: "Attention", case: Sequence["Attention"]) -> NDArray[np.float32]:
    """The scores of all tiles of the case, or of the slide alone where none is given."""
    return np.concatenate([each.scores for each in case or (attention,)])


def _ranks(attention: "Attention", case: Sequence["Attention"]) -> NDArray[np.float64]:
    """Percentiles of the slide's tiles among those of the case, or of the slide alone."""
    slides = list(case or (attention,))
    for each in slides:
        _require_scores(each.scores, len(each))
    if attention not in slides:  # compared by identity
        raise InputError(
            f"the attention is none of the {len(slides)} of case=; expected those that one call of"
            " attention([bags]) gave, of which the attention is one"
        )
    first = sum(len(each) for each in slides[: slides.index(attention)])
    return percentiles(_scores(attention, case))[first : first + len(attention)]


def _percents(
    attention: "Attention", case: Sequence["Attention"], scale: Scale
) -> NDArray[np.float64]:
    """The places of the slide's tiles on the scale of colours, 0 to 100."""
    if scale not in ("rank", "weight"):
        raise InputError(f"scale is {scale!r}; expected 'rank' or 'weight'")
    ranks = _ranks(attention, case)
    if scale == "rank":
        return ranks
    low, high = _ends(_scores(attention, case))
    return 100 * (attention.scores.astype(np.float64) - low) / max(high - low, 1e-300)


def _ends(scores: NDArray[np.float32]) -> tuple[float, float]:
    """The lowest and the highest end of a scale of these scores: from 0, if none is below it."""
    return (min(0.0, float(scores.min())), float(scores.max())) if len(scores) else (0.0, 0.0)


def _tissue(slide: Slide) -> TissueMask | None:
    """The tissue of a slide; None where it is not known at which scale to look for it."""
    try:
        return find_tissue(slide)
    except SlideScaleError:
        return None


def tissue_inside(
    tissue: TissueMask, image: Image.Image, coords: NDArray[np.int64], tiles: TileGeometry
) -> NDArray[np.bool_]:
    """The px of a picture that are tissue, or lie in a tile that has none."""
    per_level0 = image.width / tiles.level0_size[0]
    found = np.asarray(frame.tissue_area(tissue, image.size, per_level0)) > 0
    inside = found.copy()
    for corner in coords:
        left, top, right, bottom = frame.box_of(corner, tiles.size_level0, per_level0)
        window = slice(top, bottom + 1), slice(left, right + 1)
        inside[window] |= not found[window].any()
    return inside


def is_nearly_even(attention: "Attention", case: Sequence["Attention"] = ()) -> bool:
    """Whether attention is spread nearly evenly, so that ranks tell of small differences only.

    In effect it is spread over (sum of w)² / sum of w² tiles (Kish's effective size), which here
    are nine tenths of all or more.
    """
    scores = _scores(attention, case).astype(np.float64)
    if len(scores) < 2 or scores.min() < 0 or not scores.any():
        return False
    return bool(scores.sum() ** 2 / (scores**2).sum() >= _EVEN * len(scores))


def weight_of_top(attention: "Attention", case: Sequence["Attention"] = ()) -> str:
    """Share of the weight that the top tenth of the tiles holds, in words; empty without weights.

    Scores are no weights where one is negative, or all are 0.
    """
    scores = _scores(attention, case)
    top, total = math.ceil(_TOP_SHARE * len(scores)), float(scores.sum(dtype=np.float64))
    if not total > 0 or scores.min() < 0:
        return ""
    share = float(np.sort(scores)[-top:].sum(dtype=np.float64)) / total
    held = f"{_top(top, len(scores))} {'hold' if top > 1 else 'holds'} {share:.0%} of the weight"
    return f"{held}: nearly even" if is_nearly_even(attention, case) else held


def corners_inside(
    slide: Slide, coords: NDArray[np.int64], tiles: TileGeometry
) -> NDArray[np.int64]:
    """Corners of tiles (N, 2) so that all of each lies on the slide.

    Those of tiles at the border may be rounded over it, by half a px.
    """
    last = np.floor(np.array(slide.dimensions) - tiles.side_level0 + 1e-6).astype(np.int64)
    return np.minimum(coords, last)


def _name(attention: "Attention") -> str:
    """The name of the scores: attention of a model, or the kind of others."""
    if attention.kind in ("softmax", "nystrom"):
        return "attention"
    return "custom scores" if attention.kind == "custom" else plain(attention.kind)


def _legend(attention: "Attention", case: Sequence["Attention"], scale: Scale) -> list[Key]:
    scores = _scores(attention, case)
    if not len(attention):
        return [Key(text="no tiles")]
    ramp = tuple(tuple(c) for c in colours(np.linspace(0, 100, 64)).tolist())
    among = f"the tiles of the {len(case)} slides" if len(case) > 1 else "the tiles"
    low, high = _ends(scores)
    text = f"{_name(attention)}, {low:.2g} to {high:.2g}"
    if scale == "rank":
        text = f"rank of {_name(attention)} among {among}, 0 to 100"
    keys = [Key(text=text, line=FAINT, fills=ramp)]
    if held := weight_of_top(attention, case):
        keys.append(Key(text=held))
        if len(case) > 1:
            own = attention.scores.sum(dtype=np.float64) / scores.sum(dtype=np.float64)
            tiles = len(attention) / len(scores)
            text = f"this slide has {tiles:.0%} of the tiles, {own:.0%} of the weight"
            keys.append(Key(text=text))
    return keys


def _top(count: int, total: int) -> str:
    return f"the top {count:,} of {total:,} tiles" if total > 1 else f"{total} tile"
