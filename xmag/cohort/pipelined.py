"""Many slides at once: decoded by child processes, embedded in full batches, saved by threads.

The next slides are opened, masked and decoded while earlier ones are embedded and saved, so that
neither the cores nor the GPU wait for each other. This process opens no slide itself.
"""

import time
import warnings
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from xmag.cohort.failures import costs_a_row, failed_row
from xmag.cohort.jobs import Job
from xmag.cohort.pictures import THUMBNAIL_PX, Kept, is_picture_missing, write_picture
from xmag.cohort.report import CohortRow
from xmag.cohort.resume import Found, earlier_of
from xmag.cohort.settings import Settings
from xmag.cohort.sharing import Share
from xmag.cohort.single import save, skipped_row
from xmag.encoder import Encoder, TileStream, pinned
from xmag.errors import XmagWarning
from xmag.extract import bag_of, default_batch_size, embedded, transformed, without_damaged
from xmag.plan import TilePlan
from xmag.slide import SlideFacts
from xmag.tiles import (
    Begun,
    DecodeJob,
    DecodingPool,
    Event,
    Failed,
    Filled,
    Finished,
    Opened,
    Planned,
    Reading,
    Thumbnail,
    Tiles,
    Warned,
    default_threads,
)

_SLOT_TILES = 64
"""Tiles that travel together from a decoding process: 10 MB, a hundred messages a second."""

_SAVING_THREADS = 8
"""Saving a bag is mostly waiting for the disk to have it, and a disk takes several at once."""

_MOST_SAVES = 2 * _SAVING_THREADS
"""Bags that may wait to be saved: where the disk is what is slow, all else waits for it."""


def in_processes(
    share: Share, settings: Settings, processes: int
) -> Generator[tuple[Job, CohortRow], None, None]:
    """The rows of jobs, each as soon as it is done."""
    with (
        _threads() as saving,
        DecodingPool(
            processes,
            slot_tiles=_slot_tiles(settings),
            size_px=settings.encoder.tile_spec.size_px,
            threads=max(1, default_threads() // processes),
            limits=settings.limits,
        ) as pool,
        ExitStack() as stack,
    ):
        pipeline = _Pipeline(share, settings, pool, saving, stack)
        try:
            for jobs in share.rounds():
                for event in pool.run(pipeline.to_decode(jobs)):
                    pipeline.take(event)
                    yield from pipeline.rows()
                pipeline.finish()
                yield from pipeline.rows(most_saves=0)
        except KeyboardInterrupt:
            yield from pipeline.rows_of_begun_saves()
            raise


@contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """Threads that save; on an error those that are at it finish, and the rest is left."""
    pool = ThreadPoolExecutor(_SAVING_THREADS, "xmag-save")
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=True, cancel_futures=True)
        raise
    pool.shutdown(wait=True)


def _has_stream(encoder: object) -> bool:
    """Whether batches are made of tiles of several slides, on a GPU."""
    return isinstance(encoder, Encoder) and encoder.device.type == "cuda"


def _slot_tiles(settings: Settings) -> int:
    """Tiles a slot: what is embedded at once, where batches are not put together here."""
    if _has_stream(settings.encoder):
        return _SLOT_TILES
    return settings.batch_size or min(default_batch_size(settings.encoder), _SLOT_TILES)


@dataclass(slots=True)
class _UnderWay:
    """A slide that a decoding process has, and what has come of it."""

    number: int
    job: Job
    found: Found | None
    start: float
    slide: SlideFacts | None = None
    plan: TilePlan | None = None
    thumbnail: Thumbnail | None = None
    features: NDArray[np.float32] | None = None
    reading: Reading | None = None
    landed: int = 0
    all_sent: bool = False


class _Pipeline:
    """Where each slide stands, from its first event to its row."""

    def __init__(
        self,
        share: Share,
        settings: Settings,
        pool: DecodingPool,
        saving: ThreadPoolExecutor,
        stack: ExitStack,
    ) -> None:
        self._share, self._settings = share, settings
        self._pool, self._saving = pool, saving
        self._under_way: dict[int, _UnderWay] = {}
        self._numbers = 0
        self._saves: deque[tuple[_UnderWay, Future[CohortRow]]] = deque()
        self._rows: deque[tuple[Job, CohortRow]] = deque()
        self._stream: TileStream[int] | None = None  # others than ours are given tiles as they come
        self._is_pinned = False
        encoder = settings.encoder
        if isinstance(encoder, Encoder) and _has_stream(encoder):
            batch_size = settings.batch_size or default_batch_size(encoder)
            self._stream = TileStream(encoder, batch_size=batch_size)
            self._is_pinned = stack.enter_context(pinned(pool.arena.whole))

    def to_decode(self, jobs: Iterable[Job]) -> Iterator[DecodeJob]:
        """What the decoding processes are to do."""
        settings = self._settings
        for job in jobs:
            self._numbers += 1
            slide = _UnderWay(self._numbers, job, None, time.monotonic())
            self._under_way[slide.number] = slide
            earlier = None
            with self._costs_a_row(slide):
                slide.found = self._share.earlier(job)
                if slide.found is not None:
                    thumbnail = is_picture_missing(job, settings)
                    seen = self._share.seen
                    earlier = earlier_of(slide.found, job, settings, seen, thumbnail=thumbnail)
            if slide.number not in self._under_way:
                continue
            yield DecodeJob(
                number=slide.number,
                path=job.path,
                mpp=job.mpp,
                spec=settings.encoder.tile_spec,
                tissue=settings.tissue,
                overlap=settings.overlap,
                min_tissue=settings.min_tissue,
                border=settings.border,
                thumbnail_px=THUMBNAIL_PX if settings.overlay else None,
                earlier=earlier,
                damaged=settings.damaged,
            )

    def take(self, event: Event) -> None:
        """Do what an event of the decoding processes calls for."""
        if isinstance(event, Filled):
            self._embed(event)
        elif (slide := self._slide_of(event)) is not None:
            with self._costs_a_row(slide):
                self._note(slide, event)
        if self._stream is not None:
            self._collect(self._stream.landed())

    def finish(self) -> None:
        """Wait for the embeddings that are still on their way."""
        if self._stream is not None:
            self._collect(self._stream.finish())

    def rows(self, *, most_saves: int = _MOST_SAVES) -> Iterator[tuple[Job, CohortRow]]:
        """The rows that are ready; waits until at most so many bags are still to be saved."""
        while self._saves and (len(self._saves) > most_saves or self._saves[0][1].done()):
            slide, save_of = self._saves.popleft()
            with self._costs_a_row(slide):
                self._rows.append((slide.job, save_of.result()))
        while self._rows:
            yield self._rows.popleft()

    def rows_of_begun_saves(self) -> Iterator[tuple[Job, CohortRow]]:
        """The rows of what is saved, or nearly; no other bag is begun."""
        begun = [(slide.job, save_of) for slide, save_of in self._saves if not save_of.cancel()]
        for job, save_of in begun:
            if save_of.exception() is None:
                yield job, save_of.result()

    def _slide_of(self, event: Event) -> _UnderWay | None:
        """The slide of an event; None where it has failed on this side already."""
        return self._under_way.get(getattr(event, "number", 0))

    def _costs_a_row(self, slide: _UnderWay) -> AbstractContextManager[None]:
        return costs_a_row(slide.job, slide.start, partial(self._end, slide))

    def _end(self, slide: _UnderWay, row: CohortRow) -> None:
        self._under_way.pop(slide.number, None)
        self._rows.append((slide.job, row))

    def _note(self, slide: _UnderWay, event: Event) -> None:
        if isinstance(event, Begun):
            slide.start = time.monotonic()
        elif isinstance(event, Warned):
            warnings.warn(event.text, XmagWarning, stacklevel=2)
        elif isinstance(event, Opened):
            slide.slide = event.slide
        elif isinstance(event, Planned):
            slide.plan, slide.thumbnail = event.plan, event.thumbnail
            slide.features = np.empty((len(event.plan), self._settings.encoder.embed_dim), "f4")
        elif isinstance(event, Finished):
            slide.reading = event.reading
            self._note_all_sent(slide, event.lost)
        elif isinstance(event, Failed):
            self._end(slide, failed_row(slide.job, event.reason, slide.start))

    def _note_all_sent(self, slide: _UnderWay, lost: NDArray[np.bool_] | None) -> None:
        assert slide.slide is not None
        if lost is not None:
            assert slide.plan is not None
            slide.plan = without_damaged(slide.plan, lost, slide.slide.name)
        found = slide.found
        sha256 = None if slide.reading is None else slide.reading.sha256
        if found is None or not found.is_of(slide.slide, sha256, slide.job, self._settings):
            slide.all_sent = True
            self._save_if_complete(slide)
            return
        self._share.seen.add(slide.job, found.sha256, slide.slide.version)
        if slide.thumbnail is None:
            self._end(slide, skipped_row(slide.job, found))
        else:
            del self._under_way[slide.number]
            self._saves.append((slide, self._saving.submit(self._make_up, slide, found)))

    def _embed(self, event: Filled) -> None:
        """Embed the tiles in a slot, at once or in a batch with others, and let go of the slot."""
        transform, release = self._settings.transform, partial(self._pool.release, event.slot)
        slide = self._slide_of(event)
        if slide is None:
            release()
            return
        tiles: Tiles = self._pool.tiles(event)
        with self._costs_a_row(slide):
            if transform is not None:
                # What comes back may be a view of some kind, which torch does not take.
                tiles = np.require(transformed(tiles.copy(), transform), requirements=["C", "W"])
            if self._stream is None:
                self._collect([(slide.number, embedded(self._settings.encoder, tiles))])
        if self._stream is not None and slide.number in self._under_way:
            if self._is_pinned and transform is None:
                self._stream.put(slide.number, torch.from_numpy(tiles), on_copied=release)
                return
            self._stream.put(slide.number, torch.from_numpy(tiles))
        release()

    def _collect(self, landed: Iterable[tuple[int, NDArray[np.float32]]]) -> None:
        for number, features in landed:
            slide = self._under_way.get(number)
            if slide is None:
                continue  # the slide failed after these tiles were sent
            assert slide.features is not None
            slide.features[slide.landed : slide.landed + len(features)] = features
            slide.landed += len(features)
            self._save_if_complete(slide)

    def _save_if_complete(self, slide: _UnderWay) -> None:
        assert slide.plan is not None
        if slide.all_sent and slide.landed == len(slide.plan):
            del self._under_way[slide.number]
            self._saves.append((slide, self._saving.submit(self._save, slide)))

    def _save(self, done: _UnderWay) -> CohortRow:
        assert done.features is not None
        assert done.plan is not None
        assert done.slide is not None
        settings = self._settings
        bag = bag_of(
            done.features[: done.landed],
            done.plan,
            done.slide,
            settings.encoder,
            transform=settings.transform,
            damaged=settings.damaged,
            reading=done.reading,
        )
        self._draw(done)
        return save(
            bag, done.slide, done.job, share=self._share, settings=settings, start=done.start
        )

    def _make_up(self, slide: _UnderWay, found: Found) -> CohortRow:
        """Draw the picture that was not asked for when the bag was made."""
        self._draw(slide)
        return skipped_row(slide.job, found)

    def _draw(self, slide: _UnderWay) -> None:
        if slide.thumbnail is not None:
            assert slide.slide is not None
            assert slide.plan is not None
            kept = Kept.of(slide.slide, slide.thumbnail)
            tissue = slide.thumbnail.tissue
            write_picture(kept, slide.job, self._settings, tissue, slide.plan)
