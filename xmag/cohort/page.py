"""Page of a cohort: one HTML file with its table and a card for each slide."""

import os
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from statistics import median
from typing import Any

from xmag.cohort.cards import Card, cards_of
from xmag.cohort.report import STAGES, CohortReport, CohortRow
from xmag.cores import usable_cores
from xmag.draw.page import Cell, Html, block, escaped, page, part, table
from xmag.errors import InputError, XmagWarning
from xmag.mil import load_estimator
from xmag.progress import progress_bar

_MARKS = {"done": "●", "skipped": "○", "empty": "∅", "failed": "✕", "lost": "?"}
_SLOW = 3  # times the median
_BAR_PX = 70
_STAGES = {name.removesuffix("_seconds"): name for name in STAGES}


def cohort_page(
    report: CohortReport,
    *,
    title: str | None,
    classifier: Any,
    max_mb: float,
    progress: bool | None,
) -> bytes:
    """The page of a cohort; see `CohortReport.to_html`."""
    if not 0 < max_mb < float("inf"):
        raise InputError(f"max_mb is {max_mb!r}; expected a positive number of megabytes")
    is_path = isinstance(classifier, str | os.PathLike)
    estimator = load_estimator(classifier) if is_path else classifier
    jobs = {job.name: job for job in report.jobs}
    slides: dict[str, list[int]] = {}
    for number, row in enumerate(report.rows):
        slides.setdefault(row.slide, []).append(number)
    room = max_mb * 1e6 / max(len(report), 1)

    def work(numbers: Sequence[int]) -> tuple[list[Card], dict[str, Any] | None]:
        rows = [report.rows[number] for number in numbers]
        job = jobs.get(rows[0].slide)
        return cards_of(rows, folder=report.folder, job=job, estimator=estimator, room=room)

    cards: dict[int, Card] = {}
    pictures: list[dict[str, Any] | None] = []
    with (
        ThreadPoolExecutor(min(8, usable_cores()), "xmag-page") as pool,
        progress_bar(progress, total=len(slides), desc="page", unit="slide") as bar,
    ):
        for numbers, (found, picture) in zip(
            slides.values(), pool.map(work, slides.values()), strict=True
        ):
            for number, card in zip(numbers, found, strict=True):
                card.content["picture"] = len(pictures)
                cards[number] = card
            pictures.append(picture)
            bar.update()
    ordered = [cards[number] for number in range(len(report))]
    _note_slow(ordered)
    if without := [card for card in ordered if card.missing]:
        warnings.warn(
            f"{len(without)} of {len(ordered)} cards have no attention, first"
            f" {without[0].row.slide}: {without[0].missing}",
            XmagWarning,
            stacklevel=3,
        )
    return _whole(report, ordered, pictures, title=title, max_mb=max_mb)


def _timed(cards: Iterable[Card]) -> list[float]:
    return [card.row.seconds for card in cards if card.row.status in ("done", "empty")]


def _note_slow(cards: Sequence[Card]) -> None:
    """Say of a slow slide that it is one, and at which stage it spent its time."""
    times = _timed(cards)
    usual = median(times) if times else 0.0
    for card in cards:
        row = card.row
        if row.seconds < _SLOW * usual or not usual:
            continue
        seconds = {stage: getattr(row, field) for stage, field in _STAGES.items()}
        longest = max(seconds, key=seconds.__getitem__)
        where = f": {seconds[longest]:.1f} s of it {longest}" if seconds[longest] else ""
        card.content["notes"].append(
            f"Slow: {row.seconds:.1f} s, {row.seconds / usual:.1f} times the median{where}"
        )


def _whole(
    report: CohortReport,
    cards: Sequence[Card],
    pictures: Sequence[dict[str, Any] | None],
    *,
    title: str | None,
    max_mb: float,
) -> bytes:
    counts = report.counts()
    # With a blank after the mark, which the script knows.
    statuses = "".join(
        f'<label><input type="checkbox" checked value="{escaped(status)}">'
        f' <span class="status {escaped(status)}">{_MARKS[status]} {escaped(status)}</span>'
        f" {counts[status]:,}</label>"
        for status in _MARKS
        if status in counts
    )
    named = ", ".join(dict.fromkeys(card.model for card in cards if card.model))
    blocks = [block(f"card-{n}", card.content) for n, card in enumerate(cards)]
    blocks += [block(f"picture-{n}", found) for n, found in enumerate(pictures) if found]
    slides = len(pictures)
    title = title or f"Cohort of {slides:,} slide{'' if slides == 1 else 's'}"
    body = part(
        "cohort.html",
        title=title,
        lead=f"Features of {named}" if named else "Features",
        summary=_summary(report, cards),
        statuses=Html(statuses),
        table=_table(cards),
        footer=_footer(pictures, max_mb),
        blocks=Html("".join(blocks)),
    )
    return page(title=title, body=[body], script="cohort.js")


def _summary(report: CohortReport, cards: Sequence[Card]) -> Html:
    """Sums of the cohort, and where its time went."""
    figures = [(f"{len(report):,}", "slide" if len(report) == 1 else "slides")]
    figures.append((f"{sum(row.tiles for row in report):,}", "tiles"))
    if shares := [row.coverage for row in report if row.coverage is not None]:
        figures.append((f"{median(shares):.0%}", "of the tissue covered (median)"))
    if times := _timed(cards):
        figures.append((f"{median(times):.2g} s", f"a slide (median), {max(times):.2g} s at most"))
    items = "".join(f"<li><b>{escaped(a)}</b> {escaped(b)}</li>" for a, b in figures)
    spent = {name: sum(getattr(row, field) for row in report) for name, field in _STAGES.items()}
    if not (total := sum(spent.values())):
        return Html(f'<ul class="totals">{items}</ul>')
    keys = "".join(
        f'<li><svg class="stages"><rect class="{name}" width="10" height="10"/></svg>'
        f"{name} {seconds / total:.0%}</li>"
        for name, seconds in spent.items()
    )
    hint = '<li class="hint">of the time of all slides</li>'
    return Html(f'<ul class="totals">{items}</ul><ul class="keys">{keys}{hint}</ul>')


def _table(cards: Sequence[Card]) -> Html:
    """The rows; those columns that are `more` make place for a card."""
    several = any(card.row.model for card in cards)
    predicted = any(card.prediction for card in cards)
    heads = {"slide": ""} | ({"model": ""} if several else {}) | {"status": ""}
    heads |= {"tiles": "number", "coverage": "number"}
    heads |= {"prediction": "more"} if predicted else {}
    heads |= dict.fromkeys(["seconds", *_STAGES], "number more") | {"notes": "more"}
    longest = max((card.row.seconds for card in cards), default=0.0)
    rows = []
    for card in cards:
        row, share = card.row, card.row.coverage
        name = f'<div class="slide" data-picture="{card.content["picture"]}">{escaped(row.slide)}'
        mark = f'<span class="status {row.status}">{_MARKS[row.status]} {row.status}</span>'
        notes = "; ".join(card.content["notes"])
        cells = {
            "slide": Cell(shown=Html(f"{name}</div>"), value=row.slide),
            "model": Cell(shown=row.model),
            "status": Cell(shown=Html(mark), value=row.status),
            "tiles": Cell(shown=f"{row.tiles:,}", value=row.tiles),
            "coverage": Cell(shown="–" if share is None else f"{share:.0%}", value=share),
            "prediction": Cell(shown=card.prediction.split(",")[0], title=card.prediction),
            "seconds": _seconds(row.seconds, _bar(row, longest) if row.seconds else ""),
            "notes": Cell(shown=Html(f"<div>{escaped(notes)}</div>"), value=notes, title=notes),
        }
        cells |= {stage: _seconds(getattr(row, field)) for stage, field in _STAGES.items()}
        rows.append([replace(cells[head], kind=kind) for head, kind in heads.items()])
    caption = "A column's head sorts by it, a row opens its slide."
    return table([*heads], rows, caption=caption, kinds=[*heads.values()], opens="card")


def _seconds(value: float, bar: str = "") -> Cell:
    shown = Html(bar + (f"{value:.2f}" if value else "–"))
    return Cell(shown=shown, value=round(value, 3) if value else None)


def _bar(row: CohortRow, longest: float) -> Html:
    """The stages of a row as bars side by side, as long as their seconds."""
    at, parts = 0.0, []
    for kind, field in _STAGES.items():
        width = _BAR_PX * getattr(row, field) / max(longest, 1e-9)
        if width >= 0.05:
            parts.append(f'<rect class="{kind}" x="{at:.1f}" width="{width:.1f}" height="10"/>')
        at += width
    return Html(f'<svg class="stages" width="{_BAR_PX}" height="10">{"".join(parts)}</svg>')


def _footer(pictures: Sequence[dict[str, Any] | None], max_mb: float) -> str:
    sizes = [found["px"] for found in pictures if found]
    text = "The whole report is this file: it asks for nothing from anywhere."
    if sizes:
        px = f"{min(sizes)} to {max(sizes)}" if min(sizes) < max(sizes) else f"{sizes[0]}"
        text += (
            f" Thumbnails of {len(sizes):,} slides have {px} px on their longer side, so that cards"
            f" and pictures stay within {max_mb:g} MB."
        )
    if len(sizes) < len(pictures):
        text += (
            f" Of {len(pictures) - len(sizes):,} slides there is no picture: their cards say why,"
            " or the slides were not given."
        )
    return text
