"""Many slides at once: decoded by child processes, embedded in full batches, saved by threads.

The next slides are opened, masked and decoded while earlier ones are embedded and saved, so that
neither the cores nor the GPU wait for each other.
"""

import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from xmag.cohort.jobs import Job
from xmag.cohort.report import CohortRow
from xmag.cohort.resume import Found
from xmag.cohort.settings import Settings
from xmag.cohort.single import draw_overlay, failed_row, save, skipped_row
from xmag.encoder import Encoder, TileStream, pinned
from xmag.extract import bag_of, default_batch_size, embedded, transformed
from xmag.plan import TilePlan
from xmag.slide import SlideFacts
from xmag.tiles import (
    DecodeJob,
    DecodingPool,
    Event,
    Failed,
    Filled,
    Finished,
    Planned,
    Tiles,
    reason_of,
)

logger = logging.getLogger(__name__)

_SLOT_TILES = 64
"""Tiles that travel together from a decoding process: 10 MB, a hundred messages a second."""

_SAVING_THREADS = 8
"""Saving a bag is mostly waiting for the disk to have it, and a disk takes several at once."""


def in_processes(
    jobs: Iterable[Job],
    found: Mapping[Job, Found | None],
    settings: Settings,
    processes: int,
) -> Iterator[tuple[Job, CohortRow]]:
    """The rows of jobs, each as soon as it is done."""
    size_px = settings.encoder.tile_spec.size_px
    with (
        ThreadPoolExecutor(_SAVING_THREADS, "xmag-save") as saving,
        DecodingPool(processes, slot_tiles=_SLOT_TILES, size_px=size_px) as pool,
        ExitStack() as stack,
    ):
        pipeline = _Pipeline(settings, pool, saving, stack)
        for event in pool.run(pipeline.to_decode(jobs, found)):
            pipeline.take(event)
            yield from pipeline.rows(wait=False)
        pipeline.finish()
        yield from pipeline.rows(wait=True)


@dataclass(slots=True)
class _UnderWay:
    """A slide whose tiles are on their way."""

    job: Job
    start: float
    slide: SlideFacts
    plan: TilePlan
    features: NDArray[np.float32]
    landed: int = 0
    all_sent: bool = False


class _Pipeline:
    """Where each slide stands, from its first event to its row."""

    def __init__(
        self, settings: Settings, pool: DecodingPool, saving: ThreadPoolExecutor, stack: ExitStack
    ) -> None:
        self._settings, self._pool, self._saving = settings, pool, saving
        self._jobs: dict[int, Job] = {}
        self._under_way: dict[int, _UnderWay] = {}
        self._saves: deque[tuple[Job, float, Future[CohortRow]]] = deque()
        self._rows: deque[tuple[Job, CohortRow]] = deque()
        self._stream: TileStream[int] | None = None  # others than ours are given tiles as they come
        self._is_pinned = False
        encoder = settings.encoder
        if isinstance(encoder, Encoder) and encoder.device.type == "cuda":
            batch_size = settings.batch_size or default_batch_size(encoder)
            self._stream = TileStream(encoder, batch_size=batch_size)
            self._is_pinned = stack.enter_context(pinned(pool.arena.whole))

    def to_decode(
        self, jobs: Iterable[Job], found: Mapping[Job, Found | None]
    ) -> Iterator[DecodeJob]:
        """What the decoding processes are to do; slides that need nothing become rows."""
        settings = self._settings
        for number, job in enumerate(jobs):
            start = time.monotonic()
            try:
                row = skipped_row(job, found[job], settings)
            # Whatever is wrong with one slide is the error of its row, not the end of the others.
            except Exception as error:
                logger.debug("%s failed", job.name, exc_info=True)
                row = failed_row(job, reason_of(error), start)
            if row is not None:
                self._rows.append((job, row))
                continue
            self._jobs[number] = job
            yield DecodeJob(
                number=number,
                path=job.path,
                mpp=job.mpp,
                spec=settings.encoder.tile_spec,
                tissue=settings.tissue,
                overlap=settings.overlap,
                min_tissue=settings.min_tissue,
            )

    def take(self, event: Event) -> None:
        """Do what an event of the decoding processes calls for."""
        if isinstance(event, Planned):
            features = np.empty((len(event.plan), self._settings.encoder.embed_dim), np.float32)
            self._under_way[event.number] = _UnderWay(
                self._jobs[event.number], time.monotonic(), event.slide, event.plan, features
            )
        elif isinstance(event, Filled):
            self._embed(event)
        elif isinstance(event, Finished) and event.number in self._under_way:
            self._under_way[event.number].all_sent = True
            self._save_if_complete(event.number)
        elif isinstance(event, Failed):
            self._fail(event.number, event.reason)
        if self._stream is not None:
            self._collect(self._stream.landed())

    def finish(self) -> None:
        """Wait for the embeddings that are still on their way."""
        if self._stream is not None:
            self._collect(self._stream.finish())

    def rows(self, *, wait: bool) -> Iterator[tuple[Job, CohortRow]]:
        """The rows that are ready, or with `wait` all that are left."""
        while self._rows:
            yield self._rows.popleft()
        while self._saves and (wait or self._saves[0][2].done()):
            job, start, save_of = self._saves.popleft()
            try:
                yield job, save_of.result()
            # As above: a bag that cannot be made or written costs one row.
            except Exception as error:
                logger.debug("%s failed", job.name, exc_info=True)
                yield job, failed_row(job, reason_of(error), start)

    def _fail(self, number: int, reason: str) -> None:
        under_way = self._under_way.pop(number, None)
        start = under_way.start if under_way else time.monotonic()
        job = self._jobs.pop(number, None)
        if job is None:
            return  # its tiles failed here, and now the rest of them there
        self._rows.append((job, failed_row(job, reason, start)))

    def _embed(self, event: Filled) -> None:
        """Embed the tiles in a slot, at once or in a batch with others, and let go of the slot."""
        transform, release = self._settings.transform, partial(self._pool.release, event.slot)
        if event.number not in self._under_way:  # it failed with earlier tiles
            release()
            return
        tiles: Tiles = self._pool.tiles(event)
        try:
            if transform is not None:
                # What comes back may be a view of some kind, which torch does not take.
                tiles = np.require(transformed(tiles.copy(), transform), requirements=["C", "W"])
            if self._stream is None:
                self._collect([(event.number, embedded(self._settings.encoder, tiles))])
        # As above: what the user's code makes of one slide's tiles costs one row.
        except Exception as error:
            logger.debug("%s failed", self._jobs[event.number].name, exc_info=True)
            self._fail(event.number, reason_of(error))
            release()
            return
        if self._stream is not None and self._is_pinned and transform is None:
            self._stream.put(event.number, torch.from_numpy(tiles), on_copied=release)
            return
        if self._stream is not None:
            self._stream.put(event.number, torch.from_numpy(tiles))
        release()

    def _collect(self, landed: Iterable[tuple[int, NDArray[np.float32]]]) -> None:
        for number, features in landed:
            under_way = self._under_way.get(number)
            if under_way is None:
                continue  # the slide failed after these tiles were sent
            at = under_way.landed
            under_way.features[at : at + len(features)] = features
            under_way.landed += len(features)
            self._save_if_complete(number)

    def _save_if_complete(self, number: int) -> None:
        under_way = self._under_way[number]
        if not under_way.all_sent or under_way.landed < len(under_way.plan):
            return
        del self._under_way[number]
        future = self._saving.submit(self._save, under_way)
        self._saves.append((under_way.job, under_way.start, future))

    def _save(self, done: _UnderWay) -> CohortRow:
        settings = self._settings
        bag = bag_of(
            done.features,
            done.plan,
            done.slide,
            settings.encoder,
            transform=settings.transform,
        )
        draw_overlay(done.job, settings)
        return save(bag, done.job, settings, done.start)
