"""Cohort on an executor: shards of slides go to its workers, and one report comes back.

An executor is anything whose `submit` returns something with `done()` and `result()`: a
ProcessPoolExecutor, Dask's ``client.get_executor()``, submitit's, mpi4py's.
"""

import logging
import secrets
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from xmag import files
from xmag.cohort.jobs import Job
from xmag.cohort.models import ModelName, by_name
from xmag.cohort.report import CohortRow
from xmag.cohort.settings import Settings
from xmag.cohort.shards import (
    MARKER,
    Shard,
    ShardStatus,
    read_status,
    run_shard,
    transform_name,
)
from xmag.encoder import TileEncoder
from xmag.errors import InputError, MismatchError, XmagError
from xmag.urls import Place, Url

logger = logging.getLogger(__name__)

_BUILDS = 4
"""Most times that a factory makes an executor: once, and again after it broke."""

_POLL_S = 0.1
_STATUS_EVERY_S = 1.0
_REMOTE_STATUS_EVERY_S = 10.0
"""Seconds between looks at the status files, on a file system and in a store."""

_LEAST_SHARDS = 16
_MOST_SLIDES = 64
"""Slides in a shard: few enough to share the work evenly, and enough to keep batches full."""

_ASKING_THREADS = 16
"""Asking a store for the size of an object is waiting, and stores answer many at once."""

_DONE_WEIGHT = 0.01
"""Work of a slide whose output is there already, as a part of doing it."""


@runtime_checkable
class Executor(Protocol):
    """Protocol of an executor, such as a process pool, Dask's or submitit's."""

    def submit(self, function: Callable[..., Any], /, *args: Any) -> Any:
        """Submit a call; returns an object with `done()` and `result()`."""


class Engine:
    """An executor or its factory, and the model by name for workers and as an encoder here.

    `model` is what `extract_cohort` was given; `encoder` is it on this machine. Raises InputError
    for what is no executor, ModelError for a model that workers cannot load.
    """

    def __init__(
        self,
        executor: Executor | Callable[[], Executor],
        *,
        shards: int | None,
        model: TileEncoder | str | None,
    ) -> None:
        if _is_factory(executor) and not callable(executor):
            raise InputError(
                f"executor is a {type(executor).__name__}; expected an object with submit(), such"
                " as a ProcessPoolExecutor, or a function that makes one"
            )
        if shards is not None and not (isinstance(shards, int) and shards >= 1):
            raise InputError(f"shards is {shards!r}; expected at least 1, or None")
        self._executor, self._shards = executor, shards
        self._model, self.encoder = by_name(model)

    def rows(
        self, jobs: Sequence[Job], settings: Settings
    ) -> Generator[tuple[Job, CohortRow], None, None]:
        """The rows of jobs, each soon after its worker has done it.

        Raises MismatchError where workers find outputs that were made with something else, or
        compute in different dtypes, and what stopped every shard if none did anything.
        """
        transform_name(settings.transform)  # whether it has one, before any work
        settings = replace(settings, out=_absolute(settings.out))
        with _run_folder(settings.out) as run:
            left = {n: replace(job, path=_absolute(job.path)) for n, job in enumerate(jobs)}
            cohort = _Cohort(settings, self._model, run, left)
            for attempt in range(_BUILDS):
                with _opened(self._executor) as executor:
                    pieces = cohort.pieces(self._shards, is_retry=attempt > 0)
                    for number, row in cohort.round(executor, pieces):
                        yield jobs[number], row
                if not left or not _is_factory(self._executor):
                    break
                logger.warning("%d slides are left after a worker was lost", len(left))
            cohort.raise_if_nothing_ran()
            for number, job in sorted(left.items()):
                yield jobs[number], cohort.lost_row(job)


@dataclass(slots=True)
class _Cohort:
    """State of a cohort on its executor: slides left, by number, and the workers' errors."""

    settings: Settings
    model: ModelName
    run: Place
    left: dict[int, Job]
    shards_made: int = 0
    dtype_class: str | None = None
    lost_to: str = ""
    errors: list[XmagError] = field(default_factory=list)
    has_rows: bool = False
    suspects: set[int] = field(default_factory=set)
    """Slides that a lost worker may have died of: the first that each had not done."""

    def pieces(self, shards: int | None, *, is_retry: bool) -> list[list[int]]:
        """The slides that are left, by number, as shards of about the same work."""
        suspects = sorted(self.suspects & self.left.keys()) if is_retry else []
        numbers = [number for number in self.left if number not in suspects]
        if shards is None:
            shards = max(_LEAST_SHARDS, -(-len(numbers) // _MOST_SLIDES))
        with ThreadPoolExecutor(_ASKING_THREADS, "xmag-size") as pool:
            out = self.settings.out
            work = list(pool.map(lambda number: _work_of(self.left[number], out), numbers))
        found = [[numbers[i] for i in share] for share in shares(work, shards)]
        # Alone and last: if one of them takes its worker down again, the others are done.
        return found + [[number] for number in suspects]

    def round(self, executor: Executor, pieces: list[list[int]]) -> Iterator[tuple[int, CohortRow]]:
        """Submit the pieces, and give the number and row of each slide as it is done."""
        futures: dict[int, tuple[Any, Shard, list[int]]] = {}
        try:
            for piece in pieces:
                self.shards_made += 1
                jobs = [self.left[number] for number in piece]
                shard = Shard.of(
                    jobs, self.settings, self.model, number=self.shards_made, run=self.run
                )
                future = self._submitted(executor, shard)
                if future is not None:
                    futures[shard.number] = (future, shard, piece)
            yield from self._collect(futures)
        finally:
            for future, _, _ in futures.values():
                with suppress(AttributeError):  # not every engine takes work back
                    future.cancel()

    def _submitted(self, executor: Executor, shard: Shard) -> Any | None:
        try:
            return executor.submit(run_shard, shard)
        # An engine may raise anything where it is broken: its slides are left, and so reported.
        except Exception as error:  # noqa: BLE001
            self._lose(error)
            return None

    def _collect(
        self, futures: dict[int, tuple[Any, Shard, list[int]]]
    ) -> Iterator[tuple[int, CohortRow]]:
        is_remote = isinstance(self.run, Url)
        every_s = _REMOTE_STATUS_EVERY_S if is_remote else _STATUS_EVERY_S
        looked_at = time.monotonic()
        while futures:
            ended = [number for number, (future, _, _) in futures.items() if future.done()]
            for number in ended:
                future, shard, piece = futures.pop(number)
                yield from self._take(self._end_of(future, shard, piece), piece)
            if time.monotonic() - looked_at > every_s:
                for _, shard, piece in list(futures.values()):
                    yield from self._take(read_status(shard), piece)
                looked_at = time.monotonic()
            if futures and not ended:
                time.sleep(_POLL_S)

    def _end_of(self, future: Any, shard: Shard, piece: list[int]) -> ShardStatus:
        """Final status of a shard; that in its status file where its worker was lost."""
        try:
            status: ShardStatus = future.result()
        # Each engine has its own way to say that a worker is gone.
        except Exception as error:  # noqa: BLE001
            self._lose(error)
            status = read_status(shard)
            if status.dtype_class is not None:  # it had begun
                done = {index for index, _ in status.rows}
                missing = [n for index, n in enumerate(piece) if index not in done]
                self.suspects.update(missing[:1])
            return status
        if status.error is not None and (
            status.is_fatal or isinstance(status.error, MismatchError)
        ):
            raise status.error
        if status.error is None:
            return status
        self.errors.append(status.error)
        done = {index for index, _ in status.rows}
        reason = str(status.error)
        failed = [
            (index, CohortRow(slide=job.name, status="failed", error=reason))
            for index, job in enumerate(shard.jobs)
            if index not in done
        ]
        return replace(status, rows=(*status.rows, *failed))

    def _take(self, status: ShardStatus, piece: list[int]) -> Iterator[tuple[int, CohortRow]]:
        """The rows of a shard that were not known yet."""
        self._compare(status.dtype_class)
        for index, row in status.rows:
            number = piece[index]
            if number in self.left:
                del self.left[number]
                self.has_rows = self.has_rows or row.status != "failed"
                yield number, row

    def _compare(self, kind: str | None) -> None:
        """Raise MismatchError where a worker computes in another dtype than those before."""
        if kind is None or kind == self.dtype_class:
            return
        if self.dtype_class is not None:
            raise MismatchError(
                f"some workers compute in {self.dtype_class}, others in {kind}: their features may"
                " not be mixed. Give model=load_model(..., dtype='bfloat16') or 'float32' for all,"
                " and on_mismatch='redo'"
            )
        self.dtype_class = kind

    def _lose(self, error: BaseException) -> None:
        self.lost_to = type(error).__name__
        logger.warning("a worker was lost (%s)", self.lost_to, exc_info=error)

    def lost_row(self, job: Job) -> CohortRow:
        """The row of a slide that no worker finished."""
        reason = f"its worker was lost ({self.lost_to or 'it was stopped'}); run the same again"
        return CohortRow(slide=job.name, status="lost", error=reason)

    def raise_if_nothing_ran(self) -> None:
        """Raise what stopped the shards, if that was all that came of them."""
        if self.errors and not self.has_rows and not self.left:
            raise self.errors[0]


def shares(work: Sequence[float], count: int) -> list[list[int]]:
    """The indices of `work` as at most `count` shares of about the same sum, in order; none empty.

    The largest goes first, each to the share that has the least (Graham, SIAM J. Appl. Math. 17,
    1969): the largest sum is at most 4/3 of the best one.
    """
    found: list[list[int]] = [[] for _ in range(min(count, len(work)))]
    sums = [0.0] * len(found)
    for index in sorted(range(len(work)), key=lambda i: (-work[i], i)):
        least = min(range(len(found)), key=lambda i: (sums[i], len(found[i])))
        found[least].append(index)
        sums[least] += work[index]
    return [sorted(share) for share in found]


def share_of(jobs: list[Job], shard: tuple[int, int]) -> list[Job]:
    """The jobs that fall to share i of n, for ``shard=(i, n)``.

    Every n-th of them, by place in the list alone, so that machines that do not talk to each other
    agree. Raises InputError where there is no such share.
    """
    try:
        index, count = shard
        valid = isinstance(index, int) and isinstance(count, int) and 0 <= index < count
    except (TypeError, ValueError):
        valid = False
    if not valid:
        raise InputError(f"shard is {shard!r}; expected (i, n) with i from 0 to n - 1")
    return jobs[index::count]


def _absolute(place: Place) -> Place:
    """The same place for a process with another current folder."""
    return place.absolute() if isinstance(place, Path) else place


def _work_of(job: Job, out: Place) -> float:
    """Estimated work of a job, in bytes of the slide; 1 where nobody can tell."""
    try:
        size = job.path.stat().st_size if isinstance(job.path, Path) else job.path.size()
    # Its worker will say what is wrong with it.
    except Exception:  # noqa: BLE001
        return 1.0
    is_there = isinstance(out, Path) and (out / job.output).exists()
    return size * (_DONE_WEIGHT if is_there else 1.0)


def _is_factory(engine: object) -> bool:
    """Whether `engine` makes executors; a class of them does, too."""
    return isinstance(engine, type) or not isinstance(engine, Executor)


@contextmanager
def _run_folder(out: Place) -> Iterator[Place]:
    """A folder for the status files of a run, which tells workers that somebody waits for them."""
    run = out / f".xmag-run-{secrets.token_hex(8)}"
    run.mkdir(parents=True, exist_ok=True)
    files.write_text(run / MARKER, "{}\n")
    try:
        yield run
    finally:
        files.remove_folder(run)


@contextmanager
def _opened(engine: Executor | Callable[[], Executor]) -> Iterator[Executor]:
    """The executor that was given, or one of the factory's, which is shut down again."""
    if not _is_factory(engine):
        yield engine  # type: ignore[misc]  # a factory has no submit
        return
    executor = engine()  # type: ignore[operator]
    if not isinstance(executor, Executor):
        raise InputError(
            f"executor made a {type(executor).__name__}; expected a function that returns an object"
            " with submit()"
        )
    shutdown = getattr(executor, "shutdown", None)
    try:
        yield executor
    except BaseException:
        if shutdown is not None:
            shutdown(wait=False)  # the workers notice that nobody waits any more
        raise
    if shutdown is not None:
        shutdown(wait=True)
