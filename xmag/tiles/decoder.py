"""Decoding a whole slide: one generator of events, for a child process and for this one.

The events are also what a decoding process and the one that started it say to each other.
"""

import time
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from xmag.errors import XmagError
from xmag.geometry import TileSpec
from xmag.grid import Border
from xmag.masks import tissue_of
from xmag.plan import TilePlan, plan_tiles
from xmag.slide import Slide, SlideFacts
from xmag.slide.reader import Pixels
from xmag.tiles.arena import Tiles
from xmag.tiles.decoding import Damaged, Reading
from xmag.tiles.stream import default_threads, read_rows, reading_of
from xmag.tissue import TissueMask
from xmag.urls import Place


@dataclass(frozen=True, slots=True, kw_only=True)
class Earlier:
    """A slide as it was when it was done before, and what is wanted now.

    While its content and scale are those: no tiles, and its thumbnail only if `thumbnail`.
    Otherwise all that the job says if `redo`, and else nothing. `sha256` is of the bytes that were
    read then, and `versions` those of the file (see SlideFacts) that had them.
    """

    content: Mapping[str, Any] | None
    mpp: float | None
    thumbnail: bool
    redo: bool
    sha256: str | None = None
    versions: frozenset[str] = frozenset()

    def is_to_compare(self, slide: SlideFacts) -> bool:
        """Whether the bytes have to be read again: the file was written since, at the same size."""
        is_new = bool(self.versions) and slide.version not in self.versions
        return is_new and self.is_of(slide, None)

    def is_of(self, slide: SlideFacts, sha256: str | None) -> bool:
        """Whether the slide is as it was; `sha256` is None where its bytes were not read again."""
        is_same = (self.content, self.mpp) == (slide.fingerprint, slide.mpp)
        return is_same and sha256 in (None, self.sha256)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeJob:
    """A slide to plan and decode; `number` comes back with all that belongs to it.

    With `thumbnail_px`, a thumbnail of at most that size comes with the plan.
    """

    number: int
    path: str | Place
    mpp: float | None
    region: int | None = None
    spec: TileSpec
    tissue: Path | Literal["auto"] | None
    overlap: int
    min_tissue: float | None
    border: Border
    roi: Path | None = None
    thumbnail_px: int | None = None
    earlier: Earlier | None = None
    damaged: Damaged = "error"


@dataclass(frozen=True, slots=True)
class Begun:
    """The decoder is at this slide: if it dies now, of this one."""

    number: int


@dataclass(frozen=True, slots=True)
class Warned:
    """An XmagWarning about the slide."""

    number: int
    text: str


@dataclass(frozen=True, slots=True)
class Opened:
    """The slide was opened, and this is what it is."""

    number: int
    slide: SlideFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class Thumbnail:
    """All that a picture of the slide needs: pixels, level-0 px, and where tissue is."""

    pixels: Pixels
    dimensions: tuple[int, int]
    tissue: TissueMask | None


@dataclass(frozen=True, slots=True)
class Planned:
    """The slide's tiles are planned, and will follow in order."""

    number: int
    plan: TilePlan
    thumbnail: Thumbnail | None = None


@dataclass(frozen=True, slots=True)
class Decoded:
    """The next tiles of the slide, uint8 (B, S, S, 3), valid until `release` is called."""

    number: int
    tiles: Tiles
    release: Callable[[], None]


@dataclass(frozen=True, slots=True)
class Finished:
    """All that was wanted of the slide has been sent.

    `lost`, bool (N,), says which tiles of the plan were damaged and left out; None where none was.
    `reading` is None where no tile was read. The seconds are those until the tiles were planned,
    and those of decoding them; not those in which nobody took what was decoded.
    """

    number: int
    lost: NDArray[np.bool_] | None = None
    reading: Reading | None = None
    planning_seconds: float = 0.0
    reading_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Failed:
    """The slide cannot be done; no more of it will come."""

    number: int
    reason: str


@dataclass(frozen=True, slots=True)
class Idle:
    """Nothing happened for a moment: time to look whether slots can be released."""


Event = Begun | Warned | Opened | Planned | Decoded | Finished | Failed | Idle
"""An event of a decoder. Those of a job come in order, and end in Finished or Failed."""


def reason_of(error: BaseException) -> str:
    """An error as a person reads it in a report."""
    return str(error) if isinstance(error, XmagError) else f"{type(error).__name__}: {error}"


def decode_here(jobs: Iterable[DecodeJob], *, batch_size: int) -> Generator[Event]:
    """The events of jobs that are decoded in this process, one after the other."""
    for job in jobs:
        yield from decode(job, batch_size=batch_size, threads=default_threads())


def decode(
    job: DecodeJob, *, batch_size: int, threads: int, told: Callable[[Exception], str] = reason_of
) -> Generator[Event]:
    """The events of one job; whatever is wrong with its slide ends them with what `told` says."""
    yield Begun(job.number)
    try:
        yield from _events(job, batch_size, threads)
    # Libraries raise anything at damaged files, and the next slide has to be done all the same.
    except Exception as error:  # noqa: BLE001
        yield Failed(job.number, told(error))


def _events(job: DecodeJob, batch_size: int, threads: int) -> Generator[Event]:
    lost = None
    readings: list[Reading] = []
    planning = reading = 0.0
    since = time.monotonic()
    with Slide(job.path, mpp=job.mpp, region=job.region) as slide:
        yield Opened(job.number, slide.facts)
        planned, earlier = None, job.earlier
        if earlier is not None and earlier.is_to_compare(slide.facts):
            planned = _planned(job, slide)
            readings.append(reading_of(slide, planned, threads=threads))
        wants_tiles, wants_thumbnail = _wanted(job, slide.facts, readings)
        if wants_tiles or wants_thumbnail:
            plan = _planned(job, slide) if planned is None else planned
            small = None
            if wants_thumbnail and job.thumbnail_px is not None:
                pixels = np.asarray(slide.thumbnail(max_px=job.thumbnail_px))
                small = Thumbnail(pixels=pixels, dimensions=slide.dimensions, tissue=plan.tissue)
            # Computed here, where there are more of these than of the one that embeds and saves.
            _ = plan.uncovered_mm2
            planning = time.monotonic() - since
            yield Planned(job.number, plan, small)
        if wants_tiles:
            lost = np.ones(len(plan), np.bool_)
            batches = read_rows(
                slide, plan, batch_size=batch_size, threads=threads, damaged=job.damaged,
                note=readings.append,
            )  # fmt: skip
            since = time.monotonic()
            with closing(batches):
                for rows, tiles in batches:
                    lost[rows] = False
                    reading += time.monotonic() - since
                    yield Decoded(job.number, tiles, _nothing)
                    since = time.monotonic()
            reading += time.monotonic() - since
    lost = lost if lost is not None and lost.any() else None
    yield Finished(job.number, lost, readings[-1] if readings else None, planning, reading)


def _planned(job: DecodeJob, slide: Slide) -> TilePlan:
    return plan_tiles(
        slide,
        job.spec,
        tissue=tissue_of(slide, job.tissue),
        overlap=job.overlap,
        min_tissue=job.min_tissue,
        border=job.border,
        roi=job.roi,
    )


def _nothing() -> None:
    """Release tiles that are their holder's to keep."""


def _wanted(job: DecodeJob, slide: SlideFacts, readings: list[Reading]) -> tuple[bool, bool]:
    """Whether tiles, and whether a thumbnail, are wanted of a slide with these facts."""
    earlier = job.earlier
    if earlier is None:
        return True, job.thumbnail_px is not None
    if earlier.is_of(slide, readings[0].sha256 if readings else None):
        return False, earlier.thumbnail
    return earlier.redo, earlier.redo and job.thumbnail_px is not None
