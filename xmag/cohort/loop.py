"""The loop of a cohort: slides decoded ahead, embedded in full batches, saved by threads.

Each slide is decoded once, whatever the number of models, and has a bag and a row for each.

The next slides are opened, masked and decoded, by child processes or by this one, while earlier
ones are embedded and saved, so that neither the cores nor the GPU wait for each other. All that
touches the stream of the encoder, claims and rows happens in the one thread that runs the loop.
"""

import logging
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from xmag import files
from xmag.bag import save_bag
from xmag.cohort.claims import Share
from xmag.cohort.jobs import Job, Settings
from xmag.cohort.pictures import KeptSlide, picture_of, require_own_picture, write_picture
from xmag.cohort.report import CohortRow, Status
from xmag.cohort.resume import Found, changed_slide, earlier_of
from xmag.draw.overview import OVERLAY_PX
from xmag.encoder import Encoder, TileStream, pinned
from xmag.errors import XmagWarning
from xmag.extract import bag_of, default_batch_size, embedded, transformed, without_damaged
from xmag.plan import TilePlan
from xmag.slide import SlideFacts
from xmag.tiles.children import DecodingPool
from xmag.tiles.decoder import (
    Begun,
    Decoded,
    DecodeJob,
    Earlier,
    Event,
    Failed,
    Finished,
    Opened,
    Planned,
    Thumbnail,
    Warned,
    decode_here,
    reason_of,
)
from xmag.tiles.decoding import Reading
from xmag.tiles.stream import default_threads
from xmag.urls import readable, without_folder

logger = logging.getLogger(__name__)

_SLOT_TILES = 64
"""Tiles that travel together from a decoding process: 10 MB, a hundred messages a second."""

_SAVING_THREADS = 8
"""Saving a bag is mostly waiting for the disk to have it, and a disk takes several at once."""

_MOST_SAVES = 2 * _SAVING_THREADS
"""Bags that may wait to be saved: where the disk is what is slow, all else waits for it."""

_Row = tuple[Job, CohortRow]


def rows_of(
    slides: Iterable[Sequence[Job]],
    settings: Settings,
    *,
    processes: int,
    pool: Callable[..., AbstractContextManager[DecodingPool]] = DecodingPool,
    note: Callable[[int | None, int], object] = lambda *_: None,
) -> Generator[_Row, None, None]:
    """The rows of slides' jobs, each as soon as it is done.

    The jobs of a slide differ in their models alone. Slides that are no list are taken one by one.
    `pool` opens the decoding processes. `note` is told how many tiles a slide has that is planned,
    or None, and how many are embedded. Raises MismatchError, of a list before any work, see
    `find_earlier`; OutputError where nothing more can be written.
    """
    with Share(slides, settings) as share, ExitStack() as stack:
        loop = _Loop(share, settings, processes, pool=pool, stack=stack, note=note)
        # However the caller stops: all ends with this call, and not with its last trace.
        rows = stack.enter_context(closing(loop.rows()))
        for job, row in rows:
            share.release(job)
            yield job, row


@contextmanager
def _saving_threads() -> Iterator[ThreadPoolExecutor]:
    """Threads that save; on an error those that are at it finish, and the rest is left."""
    pool = ThreadPoolExecutor(_SAVING_THREADS, "xmag-save")
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=True, cancel_futures=True)
        raise
    pool.shutdown(wait=True)


@dataclass(slots=True)
class _UnderWay:
    """A slide that is being decoded, embedded or saved for a model, and what there is so far."""

    number: int
    job: Job
    start: float
    found: Found | None = None
    earlier: Earlier | None = None
    slide: SlideFacts | None = None
    plan: TilePlan | None = None
    thumbnail: Thumbnail | None = None
    features: NDArray[np.float32] | None = None
    reading: Reading | None = None
    landed: int = 0
    all_sent: bool = False
    stages: dict[str, Any] = field(default_factory=dict)
    """Seconds of each stage so far, by the field of CohortRow."""
    sent_at: float = 0.0

    def spent(self, stage: str, since: float) -> None:
        """Add the time since then to a stage."""
        self.stages[stage] = self.stages.get(stage, 0.0) + time.monotonic() - since


class _Loop:
    """The slides under way in a cohort, from their first event to their rows."""

    def __init__(
        self,
        share: Share,
        settings: Settings,
        processes: int,
        *,
        pool: Callable[..., AbstractContextManager[DecodingPool]],
        stack: ExitStack,
        note: Callable[[int | None, int], object],
    ) -> None:
        self._share, self._settings, self._tell = share, settings, note
        self._counted: deque[tuple[int | None, int]] = deque()
        self._saving = stack.enter_context(_saving_threads())
        self._streams: dict[str, TileStream[int]] = {}
        self._chunk = _SLOT_TILES
        for model, encoder in settings.encoders.items():
            batch_size = settings.batch_size or default_batch_size(encoder)
            # Batches are made of tiles of several slides on a GPU; others get them as they come.
            if isinstance(encoder, Encoder) and encoder.device.type == "cuda":
                self._streams[model] = TileStream(encoder, batch_size=batch_size)
            else:
                self._chunk = min(self._chunk, batch_size)
        self._pool: DecodingPool | None = None
        self._is_pinned = False
        if processes:
            self._pool = stack.enter_context(
                pool(
                    processes,
                    slot_tiles=self._chunk,
                    size_px=settings.spec.size_px,
                    threads=max(1, default_threads() // processes),
                    limits=settings.limits,
                )
            )
            if self._streams:
                self._is_pinned = stack.enter_context(pinned(self._pool.arena.whole))
        self._under_way: dict[int, _UnderWay] = {}
        self._decoding: dict[int, list[_UnderWay]] = {}
        """Slides that are decoded together, by the number of the decoder's job."""
        self._numbers = 0
        self._saves: deque[tuple[_UnderWay, Future[CohortRow]]] = deque()
        self._done: deque[_Row] = deque()

    def rows(self) -> Generator[_Row, None, None]:
        """The rows of the jobs of the share."""
        try:
            for slides in self._share.rounds():
                for event in self._events(self._to_decode(slides)):
                    self._take(event)
                    if self._pool is None and isinstance(event, Finished):
                        # A slide that takes this process down takes no finished one with it.
                        self._land_all()
                    yield from self._ready_rows(0 if self._pool is None else _MOST_SAVES)
                self._land_all()
                yield from self._ready_rows(0)
        except KeyboardInterrupt:
            yield from self._rows_of_begun_saves()
            raise

    def _events(self, jobs: Iterable[DecodeJob]) -> Iterator[Event]:
        if self._pool is None:
            return decode_here(jobs, batch_size=self._chunk)
        return self._pool.run(jobs)

    def _to_decode(self, slides: Iterable[Sequence[Job]]) -> Iterator[DecodeJob]:
        """The work of a decoder for each slide: once for all jobs of which it wants the same."""
        for jobs in slides:
            alike: list[list[_UnderWay]] = []
            for job in jobs:
                self._numbers += 1
                slide = _UnderWay(self._numbers, job, time.monotonic())
                self._under_way[slide.number] = slide
                with self._failing_alone(slide):
                    self._compare(slide)
                    for others in alike:
                        if others[0].earlier == slide.earlier:
                            others.append(slide)
                            break
                    else:
                        alike.append([slide])
            for each in alike:
                self._decoding[each[0].number] = each
                yield self._decode_job(each[0])

    def _decode_job(self, slide: _UnderWay) -> DecodeJob:
        settings = self._settings
        return DecodeJob(
            number=slide.number,
            path=slide.job.path,
            mpp=slide.job.mpp,
            region=slide.job.region,
            spec=settings.spec,
            tissue="auto" if settings.tissue == "auto" else slide.job.tissue,
            overlap=settings.overlap,
            min_tissue=settings.min_tissue,
            border=settings.border,
            roi=slide.job.roi,
            thumbnail_px=OVERLAY_PX if settings.overlay else None,
            earlier=slide.earlier,
            damaged=settings.damaged,
        )

    def _compare(self, slide: _UnderWay) -> None:
        """Look for the earlier bag of a slide; without one, whether there is room for its files.

        Raises OutputError where what is to be written would replace another program's file.
        """
        settings, job = self._settings, slide.job
        slide.found = self._share.earlier(job)
        if slide.found is not None:
            is_missing = settings.overlay and not picture_of(job, settings).exists()
            seen = self._share.seen
            slide.earlier = earlier_of(slide.found, job, settings, seen, thumbnail=is_missing)
            return
        if isinstance(settings.out, Path):
            files.linked_to(settings.out / job.output, settings.out)
        if settings.overlay:
            require_own_picture(job, settings)

    @contextmanager
    def _failing_alone(self, *slides: _UnderWay) -> Iterator[None]:
        """Make whatever goes wrong inside the failed rows of these slides, and go on.

        Only what would go wrong with all the others is raised: a disk that is full, or gone.
        """
        try:
            yield
        # Users' encoders and transforms, and libraries at damaged files, raise anything.
        except Exception as error:
            if files.is_of_the_place(error):
                raise
            for slide in slides:
                logger.debug("%s failed", slide.job.name, exc_info=True)
                self._fail(slide, reason_of(error))

    def _fail(self, slide: _UnderWay, reason: str) -> None:
        job, seconds = slide.job, time.monotonic() - slide.start
        if isinstance(job.path, Path):
            reason = without_folder(reason, job.path)
        error = readable(reason)
        row = CohortRow(
            slide=job.name, status="failed", seconds=seconds, error=error, model=job.model,
            **slide.stages,
        )  # fmt: skip
        self._end(slide, row)

    def _end(self, slide: _UnderWay, row: CohortRow) -> None:
        self._under_way.pop(slide.number, None)
        self._done.append((slide.job, row))

    def _take(self, event: Event) -> None:
        """Do what an event of a decoder calls for."""
        number = getattr(event, "number", 0)
        # Without those that failed on this side.
        slides = [s for s in self._decoding.get(number, ()) if s.number in self._under_way]
        if isinstance(event, Decoded):
            self._embed(slides, event)
        else:
            for slide in slides:
                with self._failing_alone(slide):
                    self._note(slide, event)
            if isinstance(event, Finished | Failed):
                self._decoding.pop(number, None)
        for stream in self._streams.values():
            self._collect(stream.landed())

    def _note(self, slide: _UnderWay, event: Event) -> None:
        if isinstance(event, Begun):
            slide.start = time.monotonic()
        elif isinstance(event, Warned):
            warnings.warn(event.text, XmagWarning, stacklevel=2)
        elif isinstance(event, Opened):
            slide.slide = event.slide
        elif isinstance(event, Planned):
            slide.plan, slide.thumbnail = event.plan, event.thumbnail
            width = self._settings.encoders[slide.job.model].embed_dim
            slide.features = np.empty((len(event.plan), width), "f4")
            self._counted.append((len(event.plan), 0))
        elif isinstance(event, Finished):
            slide.reading = event.reading
            slide.sent_at = time.monotonic()
            slide.stages["planning_seconds"] = event.planning_seconds
            slide.stages["reading_seconds"] = event.reading_seconds
            self._note_all_sent(slide, event.lost)
        elif isinstance(event, Failed):
            self._fail(slide, event.reason)

    def _note_all_sent(self, slide: _UnderWay, lost: NDArray[np.bool_] | None) -> None:
        assert slide.slide is not None
        if lost is not None:
            assert slide.plan is not None
            slide.plan = without_damaged(slide.plan, lost, slide.slide.name)
        earlier, sha256 = slide.earlier, slide.reading.sha256 if slide.reading else None
        if earlier is None or not earlier.is_of(slide.slide, sha256):
            if earlier is not None and not earlier.redo:
                raise changed_slide(earlier, slide.slide, slide.job)
            slide.all_sent = True
            self._save_if_complete(slide)
            return
        assert slide.found is not None
        self._share.seen.add(slide.job, earlier.sha256, slide.slide.version)
        row = _row_of(slide.job, "skipped", slide.found)
        if slide.thumbnail is None:
            self._end(slide, row)
        else:
            self._save(slide, partial(self._made_up, slide, row))

    def _embed(self, slides: Sequence[_UnderWay], event: Decoded) -> None:
        """Embed tiles, at once or in a batch with others, and release their memory."""
        transform, tiles = self._settings.transform, event.tiles
        with self._failing_alone(*slides):
            if transform is not None and slides:
                # What comes back may be a view of some kind, which torch does not take.
                tiles = np.require(transformed(tiles.copy(), transform), requirements=["C", "W"])
        slides = [slide for slide in slides if slide.number in self._under_way]
        on_gpu = [slide for slide in slides if slide.job.model in self._streams]
        for slide in slides:
            if slide.job.model not in self._streams:
                # A user's encoder may write to what the next one is given.
                own = tiles if len(slides) == 1 else tiles.copy()
                with self._failing_alone(slide):
                    encoder = self._settings.encoders[slide.job.model]
                    start = time.monotonic()
                    features = embedded(encoder, own)
                    slide.spent("embedding_seconds", start)
                    self._collect([(slide.number, features)])
        is_pinned = self._is_pinned and transform is None and bool(on_gpu)
        on_copied = _at_call(len(on_gpu), event.release) if is_pinned else None
        for slide in on_gpu:
            stream, start = self._streams[slide.job.model], time.monotonic()
            stream.put(slide.number, torch.from_numpy(tiles), on_copied=on_copied)
            slide.spent("embedding_seconds", start)
        if not is_pinned:
            event.release()

    def _land_all(self) -> None:
        """Wait for the embeddings that are still on their way."""
        for stream in self._streams.values():
            self._collect(stream.finish())

    def _collect(self, landed: Iterable[tuple[int, NDArray[np.float32]]]) -> None:
        for number, features in landed:
            slide = self._under_way.get(number)
            if slide is None:
                continue  # the slide failed after these tiles were sent
            assert slide.features is not None
            slide.features[slide.landed : slide.landed + len(features)] = features
            slide.landed += len(features)
            self._counted.append((None, len(features)))
            self._save_if_complete(slide)

    def _save_if_complete(self, slide: _UnderWay) -> None:
        assert slide.plan is not None
        if slide.all_sent and slide.landed == len(slide.plan):
            self._save(slide, partial(self._saved, slide))

    def _save(self, slide: _UnderWay, work: Callable[[], CohortRow]) -> None:
        """Let a thread do the work of saving a slide; its row is the result."""
        del self._under_way[slide.number]
        slide.spent("embedding_seconds", slide.sent_at)
        self._saves.append((slide, self._saving.submit(work)))

    def _ready_rows(self, most_saves: int) -> Iterator[_Row]:
        """The rows that are ready; waits until at most so many bags are still to be saved."""
        while self._counted:  # here, where what it raises is no slide's failure
            self._tell(*self._counted.popleft())
        while self._saves and (len(self._saves) > most_saves or self._saves[0][1].done()):
            slide, save = self._saves.popleft()
            with self._failing_alone(slide):
                self._done.append((slide.job, save.result()))
        while self._done:
            yield self._done.popleft()

    def _rows_of_begun_saves(self) -> Iterator[_Row]:
        """The rows of what is saved, or nearly; no other bag is begun."""
        begun = [(slide.job, save) for slide, save in self._saves if not save.cancel()]
        for job, save in begun:
            if save.exception() is None:
                yield job, save.result()

    def _saved(self, done: _UnderWay) -> CohortRow:
        """The row of a slide whose picture and bag are written now, in a thread that saves."""
        start = time.monotonic()
        assert done.features is not None
        assert done.plan is not None
        assert done.slide is not None
        settings, share, job = self._settings, self._share, done.job
        bag = bag_of(
            done.features[: done.landed],
            done.plan,
            done.slide,
            settings.encoders[job.model],
            transform=settings.transform,
            damaged=settings.damaged,
            reading=done.reading,
        )
        self._draw(done)
        share.check_folder()
        # Once more when it is written: a share may go away at any time.
        save_bag(bag, settings.out / job.output, check=share.check_folder, inside=settings.out)
        made = Found.of(bag)
        share.seen.add(job, made.sha256, done.slide.version)
        status: Status = "done" if len(bag) else "empty"
        done.spent("saving_seconds", start)
        row = _row_of(job, status, made, seconds=time.monotonic() - done.start)
        return replace(row, **done.stages)

    def _made_up(self, slide: _UnderWay, row: CohortRow) -> CohortRow:
        """The row of a slide whose bag is there, and whose picture alone is written now."""
        self._draw(slide)
        return row

    def _draw(self, slide: _UnderWay) -> None:
        """Write the picture of a slide's tissue and tiles, if one is asked for."""
        if slide.thumbnail is None:
            return
        assert slide.slide is not None
        require_own_picture(slide.job, self._settings)
        kept = KeptSlide(slide.slide.name, slide.slide.mpp, slide.thumbnail)
        write_picture(slide.job, self._settings, kept, slide.plan)


def _row_of(job: Job, status: Status, bag: Found, *, seconds: float = 0.0) -> CohortRow:
    return CohortRow(
        slide=job.name,
        status=status,
        tiles=bag.tiles,
        coverage=bag.coverage,
        seconds=seconds,
        output=str(job.output),
        empty_source_tiles=bag.empty,
        model=job.model,
    )


def _at_call(number: int, function: Callable[[], None]) -> Callable[[], None]:
    """A function that calls another when it is called for the `number`-th time."""
    calls = count(1)

    def call() -> None:
        if next(calls) == number:
            function()

    return call
