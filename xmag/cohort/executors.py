"""Cohort on an executor: its workers do the slides, and one report comes back.

An executor is anything whose `submit` returns something with `done()` and `result()`: a
ProcessPoolExecutor, Dask's ``client.get_executor()``, submitit's, mpi4py's.
"""

import logging
import multiprocessing
import os
import pickle
import secrets
import signal
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from functools import partial
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch

from xmag import files
from xmag.cohort.jobs import Job, Settings, by_model
from xmag.cohort.report import CohortRow, Status
from xmag.cohort.resume import JsonLines
from xmag.cohort.workers import MARKER, Piece, PieceStatus, by_name, run_piece, transform_name
from xmag.cores import usable_cores
from xmag.encoder import TileEncoder
from xmag.errors import InputError, MismatchError, XmagError
from xmag.tiles.children import PROCESSES_SUPPORTED
from xmag.urls import Place, Url

logger = logging.getLogger(__name__)

_BUILDS = 4
"""Most times that a factory makes an executor: once, and again after it broke."""

_POLL_S = 0.1
_STATUS_EVERY_S = 1.0
_REMOTE_STATUS_EVERY_S = 10.0
"""Seconds between looks at the rows of workers, on a file system and in a store."""

_LEAST_PIECES = 16
_MOST_SLIDES = 64
"""Slides a piece where nobody says how many: more pieces than most executors have workers."""


@runtime_checkable
class Executor(Protocol):
    """Protocol of an executor, such as a process pool, Dask's or submitit's."""

    def submit(self, function: Callable[..., Any], /, *args: Any) -> Any:
        """Submit a call; returns an object with `done()` and `result()`."""


def gpu_workers(
    gpus: int | Literal["all"], processes: int | None
) -> tuple[Callable[[], Executor] | None, int | None]:
    """A function that starts a worker on each of so many GPUs, and the decoding processes of each.

    None for one GPU, which needs no other process. `processes` is what the caller wants. Raises
    InputError where this host does not have as many GPUs.
    """
    there = torch.cuda.device_count()
    wanted = there if gpus == "all" else gpus
    if isinstance(wanted, bool) or not isinstance(wanted, int) or not 1 <= wanted <= there:
        raise InputError(
            f"gpus is {gpus!r}, and this host has {there} CUDA devices that can be seen; expected"
            " 'all', a number from 1 to that, or None"
        )
    if wanted == 1:
        return None, processes
    if processes is None and PROCESSES_SUPPORTED:
        processes = max(1, usable_cores() // wanted)
    context = multiprocessing.get_context("spawn")  # CUDA does not work in a fork
    workers = partial(ProcessPoolExecutor, wanted, mp_context=context, initializer=_serve_caller)
    return workers, processes


def _serve_caller() -> None:
    """Let this worker end when its caller does, however that ends, and leave Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_caller, daemon=True).start()


def _end_with_caller() -> None:
    caller = multiprocessing.parent_process()
    assert caller is not None
    caller.join()
    os._exit(1)


_Row = tuple[Job, CohortRow]


class Engine:
    """A cohort on an executor: the slides that are left, by number, and what its workers told.

    `model` is what `extract_cohort` was given; `encoders` are it on this machine. Raises InputError
    for what is no executor, ModelError for a model that workers cannot load.
    """

    def __init__(
        self,
        executor: Executor | Callable[[], Executor],
        *,
        shards: int | None,
        model: TileEncoder | str | Sequence[TileEncoder | str] | None,
    ) -> None:
        # A class of executors makes them, too.
        self._is_factory = isinstance(executor, type) or not isinstance(executor, Executor)
        if self._is_factory and not callable(executor):
            raise InputError(
                f"executor is a {type(executor).__name__}; expected an object with submit(), such"
                " as a ProcessPoolExecutor, or a function that makes one"
            )
        if shards is not None and not (isinstance(shards, int) and shards >= 1):
            raise InputError(f"shards is {shards!r}; expected at least 1, or None")
        self._executor, self._shards = executor, shards
        loaded = by_model(model, by_name, itemgetter(1))
        self._models = {name: one for name, (one, _) in loaded.items()}
        self.encoders = {name: encoder for name, (_, encoder) in loaded.items()}
        self._jobs: Sequence[Job] = ()
        self._left: set[int] = set()
        self._suspects: Counter[int] = Counter()
        """Number of workers lost while they were at a slide."""
        self._lost_to = ""
        """The kind of error by which a worker was lost, the last time that one was."""
        self._errors: list[XmagError] = []
        self._dtype_class: str | None = None
        self._has_rows = False

    def rows(self, jobs: Sequence[Job], settings: Settings) -> Generator[_Row, None, None]:
        """The rows of jobs, each soon after its worker has done it.

        Those of a slide follow each other, one of each model.
        Raises MismatchError where workers find outputs that were made with something else, or
        compute in different dtypes, and what stopped every worker if none did anything.
        """
        self._jobs, self._left = jobs, set(range(len(jobs)))
        settings = replace(settings, out=_absolute(settings.out))
        options = {field.name: getattr(settings, field.name) for field in fields(Settings)}
        transform = transform_name(options.pop("transform"))
        del options["encoders"]
        with _run_folder(settings.out) as run:
            form = Piece(run=run, models=self._models, options=options, transform=transform)
            for attempt in range(_BUILDS):
                with self._opened() as executor:
                    numbers = sorted(self._left - self._suspects.keys())
                    slides = -(-len(numbers) // len(self._models))
                    count = self._shards or max(_LEAST_PIECES, -(-slides // _MOST_SLIDES))
                    yield from self._done(executor, self._pieces(form, numbers, count))
                    if attempt:  # last: if one takes its worker down again, the others are done
                        numbers = sorted(self._left & self._suspects.keys(), key=self._risk)
                        careful = replace(form, is_careful=True)
                        yield from self._done(executor, self._pieces(careful, numbers, 1))
                if not (self._left and self._lost_to and self._is_factory):
                    break
                logger.warning("%d slides are left after a worker was lost", len(self._left))
            yield from self._rest()

    @contextmanager
    def _opened(self) -> Iterator[Executor]:
        """The executor that was given, or one of the factory's, which is shut down again."""
        executor: Any = self._executor
        if not self._is_factory:
            yield executor
            return
        executor = executor()
        if not isinstance(executor, Executor):
            raise InputError(
                f"executor made a {type(executor).__name__}; expected a function that returns an"
                " object with submit()"
            )
        is_wanted = False
        try:
            yield executor
            is_wanted = True
        finally:
            if hasattr(executor, "shutdown"):  # the workers notice that nobody waits any more
                executor.shutdown(wait=is_wanted)

    def _pieces(self, form: Piece, numbers: Sequence[int], count: int) -> list[Piece]:
        """So many pieces with slides, each with all of them, or in a store with its share."""
        slides = form.by_slide(numbers)
        count = min(count, len(slides))
        if isinstance(form.run, Url):
            parts = [self._packed(chain.from_iterable(slides[i::count])) for i in range(count)]
        else:
            parts = [self._packed(numbers)] * count
        share = -(-len(slides) // max(1, count))
        form = replace(form, round=secrets.token_hex(4), share=share)
        return [replace(form, number=i, jobs=part) for i, part in enumerate(parts)]

    def _packed(self, numbers: Iterable[int]) -> bytes:
        jobs = ((number, self._jobs[number]) for number in numbers)
        found = {number: replace(job, path=_absolute(job.path)) for number, job in jobs}
        return zlib.compress(pickle.dumps(found))

    def _done(self, executor: Executor, pieces: Sequence[Piece]) -> Iterator[_Row]:
        """Submit pieces of work, and give the row of each slide soon after it is done."""
        futures: dict[Piece, Any] = {}
        told = {piece: piece.lines for piece in pieces}
        every_s = _STATUS_EVERY_S
        if pieces and isinstance(pieces[0].run, Url):
            every_s = _REMOTE_STATUS_EVERY_S
        try:
            for piece in pieces:
                try:
                    futures[piece] = executor.submit(run_piece, piece)
                # An engine may raise anything where it is broken: its slides are left.
                except Exception as error:  # noqa: BLE001
                    self._lose(error)
            looked_at = time.monotonic()
            while futures:
                ended = [piece for piece, future in futures.items() if future.done()]
                for piece in ended:
                    yield from self._ended(futures.pop(piece), piece, told[piece])
                if time.monotonic() - looked_at > every_s:
                    for piece in list(futures):
                        yield from self._taken(PieceStatus.news(told[piece]))
                    looked_at = time.monotonic()
                if futures and not ended:
                    time.sleep(_POLL_S)
        finally:
            for future in futures.values():
                with suppress(AttributeError):  # not every engine takes work back
                    future.cancel()

    def _ended(self, future: Any, piece: Piece, told: JsonLines) -> Iterator[_Row]:
        """The last rows of a piece; what its file says where its worker was lost."""
        try:
            status: PieceStatus = future.result()
        # Each engine has its own way to say that a worker is gone.
        except Exception as error:  # noqa: BLE001
            self._lose(error)
            yield from self._taken(PieceStatus.news(told))
            self._suspects.update(piece.under_way(self._left))
            return
        yield from self._taken(status)
        if status.error is not None:
            if status.is_fatal or isinstance(status.error, MismatchError):
                raise status.error
            logger.warning("a worker stopped: %s", status.error)
            self._errors.append(status.error)

    def _taken(self, status: PieceStatus) -> Iterator[_Row]:
        """The rows that were not known yet; MismatchError where a worker has another dtype."""
        kind = status.dtype_class or self._dtype_class
        if self._dtype_class not in (None, kind):
            raise MismatchError(
                f"some workers compute in {self._dtype_class}, others in {kind}: their features may"
                " not be mixed. Give model=load_model(..., dtype='bfloat16') or 'float32' for all,"
                " and on_mismatch='redo'"
            )
        self._dtype_class = kind
        for number, row in status.rows:
            if number in self._left:
                self._left.remove(number)
                self._has_rows = self._has_rows or row.status != "failed"
                yield self._jobs[number], row

    def _risk(self, number: int) -> tuple[int, int]:
        return self._suspects[number], number

    def _lose(self, error: BaseException) -> None:
        self._lost_to = type(error).__name__
        logger.warning("a worker was lost (%s)", self._lost_to, exc_info=error)

    def _rest(self) -> Iterator[_Row]:
        """The rows of slides that no worker did. Raises what stopped all workers at their start."""
        error = None if self._lost_to or not self._errors else self._errors[0]
        if error is not None and self._left and not self._has_rows:
            raise error
        how = self._lost_to or "it was stopped"
        reason = f"its worker was lost ({how}); run the same again" if error is None else str(error)
        status: Status = "lost" if error is None else "failed"
        for job in (self._jobs[number] for number in sorted(self._left)):
            yield job, CohortRow(slide=job.name, status=status, error=reason, model=job.model)


def share_of(jobs: list[Job], shard: tuple[int, int]) -> list[Job]:
    """The jobs that fall to share i of n, for ``shard=(i, n)``.

    Every n-th of them, by place in the list alone, so that machines that do not talk to each other
    agree. Raises InputError where there is no such share.
    """
    try:
        index, total = shard
        valid = isinstance(index, int) and isinstance(total, int) and 0 <= index < total
    except (TypeError, ValueError):
        valid = False
    if not valid:
        raise InputError(f"shard is {shard!r}; expected (i, n) with i from 0 to n - 1")
    return jobs[index::total]


def _absolute(place: Place) -> Place:
    """The same place for a process with another current folder."""
    return place.absolute() if isinstance(place, Path) else place


@contextmanager
def _run_folder(out: Place) -> Iterator[Place]:
    """A folder for what workers tell, which tells them that somebody waits for it."""
    run = out / f".xmag-run-{secrets.token_hex(8)}"
    run.mkdir(parents=True, exist_ok=True)
    files.write_text(run / MARKER, "{}\n")
    try:
        yield run
    finally:
        files.remove_folder(run)
