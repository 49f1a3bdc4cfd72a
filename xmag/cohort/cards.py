"""Cards of a slide for the page of a cohort: pictures, grid, values of tiles, and reasons."""

import base64
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from xmag import records
from xmag.bag import FeatureBag
from xmag.cohort.jobs import Job
from xmag.cohort.report import STAGES, CohortRow
from xmag.colours import component_colours, principal_components
from xmag.draw.attention import colours, corners_inside, percentiles, weight_of_top
from xmag.draw.page import data_url
from xmag.errors import XmagError
from xmag.geometry import TileSpec
from xmag.masks import read_mask
from xmag.notebook import TISSUE
from xmag.plan import TilePlan, plan_tiles
from xmag.slide import Slide
from xmag.tiles.decoder import reason_of
from xmag.tissue import TISSUE_METHOD, TissueMask, find_tissue
from xmag.urls import Place, without_folder

_MOST_PX = 1600
"""Longer side of a thumbnail where there is room for it."""
_BYTES_PER_PX = 0.15
"""Bytes of a thumbnail by px, about: most of a slide is glass."""
_TOP_TILES = 12
_TILE_PX, _TILE_BYTES = 160, 12_000
"""Side of a top tile where there is room for tiles of about so many bytes; else 3/5 of it."""
_QUALITY = 80
_SMALLEST_TILE_PX = 64
_MOST_CELLS = 250_000
"""Most cells of a grid: a slide of 100,000 px a side has 50,000 of 0.1 mm."""


@dataclass(slots=True, kw_only=True)
class Card:
    """Card of a row: JSON for the page's script, and for the table model and prediction."""

    row: CohortRow
    content: dict[str, Any]
    model: str = ""
    prediction: str = ""
    missing: str = ""
    """Why there is no attention, where a classifier was given."""
    bag: FeatureBag | None = None
    values: dict[str, Any] = field(default_factory=dict)

    def has_room(self, more: int, room: float) -> bool:
        """Whether so many bytes more fit as well."""
        return len(json.dumps(self.content)) + more <= room


def cards_of(
    rows: Sequence[CohortRow], *, folder: Place | None, job: Job | None, estimator: Any, room: float
) -> tuple[list[Card], dict[str, Any] | None]:
    """The cards of the rows of one slide, and what they show of it; None where it is not opened.

    Cards and picture together have at most `room` bytes a row, but for their text. A slide that
    failed is not opened: what is wrong with it may crash this process.
    """
    cards = [_card(row, folder, estimator, room) for row in rows]
    picture = None
    if job is not None and any(row.status not in ("failed", "lost") for row in rows):
        try:
            picture = _look(job, cards, room)
        # Libraries raise anything at damaged files, and the other cards are there all the same.
        except Exception as error:  # noqa: BLE001
            _note(cards, f"The slide cannot be shown: {_without(reason_of(error), job.path)}")
    for card in cards:
        card.bag, card.values = None, {}  # a thousand of them would fill the memory
    return cards, picture


def _without(text: str, place: Place) -> str:
    """The text of an error without the folder of a local file."""
    return without_folder(text, place) if isinstance(place, Path) else text


def _card(row: CohortRow, folder: Place | None, estimator: Any, room: float) -> Card:
    content: dict[str, Any] = {
        "name": f"{row.slide} ({row.model})" if row.model else row.slide,
        "status": row.status, "notes": [row.error] if row.error else [], "facts": [],
        "seconds": row.seconds, "stages": [round(getattr(row, name), 3) for name in STAGES],
        "summary": f"{row.tiles:,} tiles", "size": None, "top": [], "topTitle": "",
    }  # fmt: skip
    card = Card(row=row, content=content)
    if row.status == "lost":
        content["notes"].append("Its worker was lost; the same command again does the slide")
    if not row.output or folder is None:
        return card
    try:
        card.bag = bag = FeatureBag.load(folder / row.output)
    except XmagError as error:
        _note([card], f"Its features cannot be read: {_without(str(error), folder / 'x')}")
        return card
    record = {} if bag.provenance is None else records.plain(bag.provenance.record)
    content["notes"] += why_so_few(record, len(bag))
    content["facts"] = [*_facts(record, bag)]
    card.model = str((record.get("model") or {}).get("name") or "")
    if bag.tiles is None or bag.coords is None:
        return card
    content |= {
        "size": list(bag.tiles.level0_size), "mpp": bag.tiles.level0_mpp,
        "side": bag.tiles.size_level0, "columns": [], "rows": [], "cells": [],
    }  # fmt: skip
    # None of a grid where tiles lie anywhere, as a file of other software may have them.
    (columns, x), (rows, y) = (np.unique(axis, return_inverse=True) for axis in bag.coords.T)
    if len(columns) * len(rows) <= _MOST_CELLS:
        grid = np.full((len(rows), len(columns)), ".")
        grid[y, x] = "#"
        cells = ["".join(row) for row in grid.tolist()]
        found = {"columns": columns.tolist(), "rows": rows.tolist(), "cells": cells}
        _add_grid(card, found, room)
    if len(bag):
        _add_values(card, bag, estimator, room)
    return card


def _add_values(card: Card, bag: FeatureBag, estimator: Any, room: float) -> None:
    """Add what is known of each tile: attention before the feature map, as far as there is room."""
    content = card.content
    if estimator is not None:
        try:
            attention = estimator.attention(bag)
            scores = np.asarray(attention.scores, np.float32)
            card.prediction = _prediction(estimator, bag)
        except XmagError as error:
            card.missing = str(error)
            content["notes"].append(f"No attention: {error}")
        else:
            card.values["scores"] = scores
            content["facts"].insert(0, ("prediction", card.prediction))
            held = weight_of_top(attention)
            if content["cells"] and card.has_room(7 * len(bag), room):
                content |= {
                    "scores": _text(scores), "ranks": _text(np.rint(percentiles(scores)), np.uint8),
                    "ramp": colours(np.linspace(0, 100, 33)).tolist(),
                    "attention": f"{held[:1].upper()}{held[1:]}." if held else "",
                }  # fmt: skip
    components, shares = principal_components(np.asarray(bag.features, np.float64))
    card.values["component"] = components[:, 0]
    if content["cells"] and card.has_room(8 * len(bag), room):
        axes = ("blue to yellow", "dark to light", "green to magenta")
        each = enumerate(zip(axes, shares, strict=True), 1)
        told = [f"{n}, {axis} ({share:.0%} of the variance)" for n, (axis, share) in each]
        content |= {
            "colours": _text(component_colours(components), np.uint8),
            "components": _text(np.rint(100 * components + 100), np.uint8),
            "featureLegend": "Tiles of like colour have like features; principal components: "
            + "; ".join(told) + ".",
        }  # fmt: skip


def _text(values: NDArray[Any], kind: type[np.generic] = np.float32) -> str:
    return base64.b64encode(np.ascontiguousarray(values.astype(kind)).data).decode()


def _prediction(estimator: Any, bag: FeatureBag) -> str:
    """The prediction of one bag in words."""
    if not hasattr(estimator, "predict_proba"):
        return ", ".join(f"{value:.4g}" for value in np.ravel(estimator.predict([bag])))
    shares = np.ravel(estimator.predict_proba([bag]))
    names = [str(label) for label in np.ravel(estimator.classes_).tolist()]
    if len(names) != len(shares):  # labels by number
        names = [str(number) for number in range(1, len(shares) + 1)]
    told = sorted(zip(shares.tolist(), names, strict=True), key=lambda pair: -pair[0])
    return ", ".join(f"{name} {share:.2f}" for share, name in told)


# ---- what is read from the slide ----


def _look(job: Job, cards: Sequence[Card], room: float) -> dict[str, Any] | None:
    """The thumbnail of the slide and its tissue; adds dropped cells and top tiles to the cards."""
    bag = next((card.bag for card in cards if card.bag is not None), None)
    mpp = bag.tiles.level0_mpp if bag is not None and bag.tiles is not None else job.mpp
    with Slide(job.path, mpp=mpp, region=job.region) as slide:
        made = None if bag is None else bag.provenance
        if made is not None and made.record.get("slide") not in (None, slide.fingerprint):
            _note(cards, "The slide was changed since, or is another file; it is not shown")
            return None
        for card in cards:
            card.content["size"] = list(slide.dimensions)
            if "cells" not in card.content:
                card.content |= {"cells": [], "side": 0, "mpp": slide.mpp}
        tissue, plan = (None, None) if bag is None else _planned(slide, bag, cards, job)
        for card in cards:
            coords = None if card.bag is None else card.bag.coords
            if plan is not None and coords is not None and np.array_equal(plan.coords, coords):
                grid = {name: list(getattr(plan, name)) for name in ("columns", "rows", "cells")}
                _add_grid(card, grid | {"side": plan.tiles.size_level0}, room)
        used = max(len(json.dumps(card.content)) for card in cards)
        picture = _picture(slide, tissue, 0.6 * max(room - used, 0))
        left = room - used - (len(json.dumps(picture)) if picture else 0)
        for card in cards:
            _add_top(card, slide, left)
    return picture


def _note(cards: Sequence[Card], text: str) -> None:
    for card in cards:
        card.content["notes"].append(text)


def _planned(
    slide: Slide, bag: FeatureBag, cards: Sequence[Card], job: Job
) -> tuple[TissueMask | None, TilePlan | None]:
    """Tissue and plan of the bag, made again: the bag says how, and which tiles came of it."""
    if bag.provenance is None:
        return None, None
    record, fingerprint = bag.provenance.record, records.plain(bag.provenance.fingerprint)
    options = records.plain(record["plan"])
    tissue = None
    if options["tissue"] is not None:
        is_found = options["tissue"] == TISSUE_METHOD
        tissue = find_tissue(slide) if is_found else _same_mask(slide, job, options["tissue"])
        if tissue is None:
            _note(cards, "Its tissue mask was given, and is not here: dropped cells are not shown")
            return None, None
    roi = job.roi if job.roi_sha256 == options["roi_sha256"] else None
    plan = plan_tiles(
        slide, TileSpec.from_dict(fingerprint["tile_spec"]), tissue=tissue, roi=roi,
        overlap=options["overlap_px"], min_tissue=options["min_tissue"], border=options["border"],
    )  # fmt: skip
    tissue = plan.tissue  # in the region of interest
    assert bag.coords is not None  # as in each bag with provenance
    kept = {tuple(corner) for corner in bag.coords.tolist()}
    lost = np.array([tuple(corner) not in kept for corner in plan.coords.tolist()], np.bool_)
    plan = plan.without(lost) if lost.any() else plan
    if not np.array_equal(plan.coords, bag.coords):
        _note(cards, "Its tiles are others than this version plans: dropped cells are not shown")
        return tissue, None
    if options["roi_sha256"] is not None and roi is None:
        plan = replace(plan, cells=tuple(row.replace("d", "r") for row in plan.cells))
    return tissue, plan


def _same_mask(slide: Slide, job: Job, method: Mapping[str, Any]) -> TissueMask | None:
    """The mask that was given for the slide; None where the one that is there now is not it."""
    try:
        found = None if job.tissue is None else read_mask(job.tissue, slide)
    except XmagError:
        return None
    return found if found is not None and found.method == method else None


def _add_grid(card: Card, grid: dict[str, Any], room: float) -> None:
    """Add columns and rows of tiles and a letter a cell, as in a TilePlan, if there is room."""
    if card.has_room(len(json.dumps(grid)), room):
        card.content |= grid
    elif not card.content["cells"]:
        card.content["notes"].append("Its tiles are not shown, for the size of the page")


def _picture(slide: Slide, tissue: TissueMask | None, room: float) -> dict[str, Any] | None:
    """Thumbnail and tissue mask as data URLs; None where there is no room for a legible one."""
    long, short = max(slide.dimensions), min(slide.dimensions)
    px = round(min(_MOST_PX, math.sqrt(0.7 * room / _BYTES_PER_PX * long / short)))
    if px < _SMALLEST_TILE_PX:
        return None
    image = slide.thumbnail(max_px=px).convert("RGB")
    thumbnail = _jpeg(image)
    while len(thumbnail) > room and max(image.size) > _SMALLEST_TILE_PX:
        image = image.resize((max(1, image.width * 3 // 4), max(1, image.height * 3 // 4)))
        thumbnail = _jpeg(image)
    found: dict[str, Any] = {"thumbnail": thumbnail, "px": max(image.size), "mask": None}
    if tissue is not None and tissue.mask.any():
        out = io.BytesIO()
        step = -(-max(tissue.mask.shape) // _MOST_PX)  # a given one may be as fine as it likes
        cells = tissue.mask[step // 2 :: step, step // 2 :: step]
        mask = Image.fromarray(cells.astype(np.uint8), "P")
        mask.putpalette((0, 0, 0, *TISSUE))
        mask.save(out, "PNG", optimize=True, bits=1, transparency=0)
        found |= {"mask": data_url(out.getvalue(), "png"), "downsample": tissue.downsample * step}
    return found


def _jpeg(image: Image.Image) -> str:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=_QUALITY, optimize=True)
    return data_url(out.getvalue(), "jpeg")


def _add_top(card: Card, slide: Slide, room: float) -> None:
    """Add the tiles with the most attention, or those from one end of the features to the other."""
    bag, scores = card.bag, card.values.get("scores")
    if bag is None or bag.coords is None or bag.tiles is None or not len(bag):
        return
    count = min(_TOP_TILES, len(bag))
    if scores is not None:
        chosen = np.argsort(-scores, kind="stable")[:count]
        mean = max(float(scores.mean()), 1e-30)
        texts = [f"{n}. {v:.2g} ({v / mean:.2g}×)" for n, v in enumerate(scores[chosen], 1)]
        title = "Tiles with the most attention (and how many times the mean it is)"
    else:
        component = card.values["component"]
        chosen = np.argsort(component, kind="stable")[
            np.unique(np.linspace(0, len(bag) - 1, count).round().astype(int))
        ]
        texts = [f"component 1: {component[i]:.2f}" for i in chosen]
        title = "Tiles from one end of the features' first component to the other"
    few = room < _TOP_TILES * _TILE_BYTES
    tiles, size_px = bag.tiles, min(_TILE_PX * (3 if few else 5) // 5, bag.tiles.size_px)
    mpp = tiles.size_px * tiles.mpp / size_px
    corners = np.maximum(corners_inside(slide, bag.coords, tiles), 0)
    for row, text in zip(chosen.tolist(), texts, strict=True):
        pixels = slide.read_region(tuple(corners[row].tolist()), (size_px, size_px), mpp=mpp)
        source = _jpeg(Image.fromarray(pixels))
        room -= len(source)
        if room < 0:
            break
        card.content["top"].append({"tile": row, "source": source, "text": text})
    card.content["topTitle"] = title


# ---- reasons and facts ----

_REASONS = {
    "tissue": "with little tissue",
    "border": "over the border of the slide, or adding next to nothing there",
    "roi": "outside of the region of interest",
    "damaged": "damaged, and left out",
}


def why_so_few(record: Mapping[str, Any], count: int) -> Iterator[str]:
    """Why a bag has few tiles, or none, by its record: a sentence for each reason."""
    tiles, tissue = record.get("tiles") or {}, record.get("tissue") or {}
    if not count and tissue and not tissue["mm2"]:
        yield "No tissue was found on it"
    elif not count:
        dropped = _dropped(record)
        said = f"No cell of the grid is a tile: {dropped}"
        yield said if dropped else "It is smaller than a tile"
    elif tiles.get("damaged"):
        yield f"{_counted(tiles['damaged'], 'tile')} damaged, and left out"
    if tiles.get("for_piece"):
        kept = _counted(tiles["for_piece"], "tile")
        yield f"{kept} with little tissue kept, as a small piece would have none"
    covered = tissue.get("coverage") or 0
    if tissue and tissue["mm2"] and covered < 0.9:
        lost = {k: v for k, v in tissue["uncovered_mm2"].items() if v >= 0.005 and k != "too_small"}
        where = ", ".join(f"{area:.2g} mm² in cells {_REASONS[k]}" for k, area in lost.items())
        share = f"Tiles cover {covered:.0%} of {tissue['mm2']:.2g} mm² of tissue"
        yield f"{share}: {where}" if where else share
    if tissue.get("too_small_pieces"):
        pieces = _counted(tissue["too_small_pieces"], "stained piece")
        yield f"{pieces} too small to count as tissue"
    if empty := (record.get("source_tiles") or {}).get("empty", 0):
        yield f"{_counted(empty, 'source tile')} declared empty by the file, and read white"


def _dropped(record: Mapping[str, Any]) -> str:
    """The cells of the grid that are no tiles, by reason."""
    tiles, least = record.get("tiles") or {}, (record.get("plan") or {}).get("min_tissue")
    told = dict(_REASONS)
    if least is not None:
        told["tissue"] = f"with less than {least:.0%} tissue"
    return ", ".join(f"{tiles[name]:,} {text}" for name, text in told.items() if tiles.get(name))


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _facts(record: Mapping[str, Any], bag: FeatureBag) -> Iterator[tuple[str, str]]:
    """Facts about slide, tiles and model, as (name, value)."""
    scale, tissue, model = (record.get(name) or {} for name in ("scale", "tissue", "model"))
    if tiles := bag.tiles:
        width, height = tiles.level0_size
        wide, high = (side * tiles.level0_mpp / 1000 for side in tiles.level0_size)
        yield "size", f"{width:,} × {height:,} px, {wide:.3g} × {high:.3g} mm"
        source = f" ({scale['mpp_source']})" if scale.get("mpp_source") else ""
        yield "scale", f"{tiles.level0_mpp:.4g} µm/px{source}"
        each = f"{tiles.size_px} px at {tiles.mpp:.4g} µm/px"
        yield "tiles", f"{len(bag):,} of {each} ({tiles.size_px * tiles.mpp:.0f} µm a side)"
    if "level" in scale:
        reduced = f" at 1/{scale['reduction']}" if scale["reduction"] > 1 else ""
        resampled = ", resampled" if scale["resampled"] else ""
        yield "read from", f"level {scale['level']}{reduced}{resampled}"
        yield "format", scale["format"]
    if tissue:
        share = tissue.get("coverage")
        covered = "" if share is None else f", {share:.0%} of it under tiles"
        plan = record.get("plan") or {}
        given = "" if (plan.get("tissue") or {}).get("name") != "given" else ", by a given mask"
        inside = ", in a region of interest" if plan.get("roi_sha256") else ""
        yield "tissue", f"{tissue['mm2']:.3g} mm²{given}{inside}{covered}"
    if dropped := _dropped(record):
        yield "dropped cells", dropped
    if model.get("name"):
        device = record.get("device") or "its own device"
        yield "model", f"{model['name']} on {device}, {record.get('dtype')}"
    if record.get("created"):
        yield "made", f"{record['created'].replace('T', ' ')} by xmag {record['xmag']}"
