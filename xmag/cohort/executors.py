"""Cohort on an executor: shards of slides go to its workers, and one report comes back.

An executor is anything whose `submit` returns something with `done()` and `result()`: a
ProcessPoolExecutor, Dask's ``client.get_executor()``, submitit's, mpi4py's. A worker gets a Shard,
does its slides as a cohort of their own, and writes what became of each to a status file in the
folder of the run. So whoever waits for it sees it advance, and a worker that is lost takes nothing
finished with it.
"""

import importlib
import json
import logging
import os
import secrets
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from xmag import files
from xmag.cohort.claims import open_lock, try_lock
from xmag.cohort.jobs import Job, Settings
from xmag.cohort.loop import rows_of
from xmag.cohort.report import CohortRow
from xmag.cores import usable_cores
from xmag.encoder import Encoder, TileEncoder, load_model
from xmag.errors import (
    HubError,
    InputError,
    MismatchError,
    ModelError,
    OutputError,
    WeightsError,
    XmagError,
)
from xmag.extract import Transform
from xmag.hub.fetch import locate_model
from xmag.hub.mini import MINI_SHA256
from xmag.hub.registry import DEFAULT_MODEL, MINI, ModelConfig
from xmag.hub.weights import file_sha256
from xmag.provenance import dtype_class
from xmag.urls import Place, Url, retold

logger = logging.getLogger(__name__)

_lock = threading.Lock()
_loaded: dict[tuple["ModelName", str], Encoder] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelName:
    """Name of a model for `load_model` on another machine, with the hash of its weights.

    `path_or_name` is an absolute path or a Hub name, `recorded` the name that the provenance has.
    `dtype` is None where each machine chooses its own.
    """

    path_or_name: str
    recorded: str
    revision: str | None
    weights_sha256: str
    config_json: str
    is_config_given: bool
    dtype: str | None

    def load(self, device: str) -> Encoder:
        """The Encoder, loaded once a process.

        Raises WeightsError where this machine has other weights under that name.
        """
        key = (self, device)
        with _lock:
            if key not in _loaded:
                _loaded.clear()  # the memory of a GPU is there for one
                _loaded[key] = self._load(device)
            return _loaded[key]

    def _load(self, device: str) -> Encoder:
        config = ModelConfig.from_dict(json.loads(self.config_json))
        encoder = load_model(
            self.path_or_name,
            revision=self.revision,
            config=config if self.is_config_given else None,
            device=device,
            dtype=self.dtype or "auto",
        )
        found = encoder.provenance["weights_sha256"]
        if found != self.weights_sha256 or encoder.config != config:
            what = "weights" if found != self.weights_sha256 else "config"
            raise WeightsError(
                f"{self.recorded!r} has another {what} on this machine (weights sha256"
                f" {found[:12]}) than where the cohort was started"
                f" ({self.weights_sha256[:12]}); copy the model here again, or name one by its Hub"
                " revision"
            )
        return encoder.named(self.recorded)


def by_name(model: TileEncoder | str | os.PathLike[str] | None) -> tuple[ModelName, Encoder]:
    """The name under which other machines load `model`, and the model itself.

    Given by name it is loaded on the CPU, to see that it is whole. Raises ModelError for one that
    no machine can load by name: weights do not travel.
    """
    if model is None or isinstance(model, str | os.PathLike):
        encoder = load_model(DEFAULT_MODEL if model is None else model, device="cpu")
        return _name_of(encoder, dtype=None), encoder
    if not isinstance(model, TileEncoder):
        raise InputError(
            f"model is a {type(model).__name__}; expected a name, a path, or an Encoder that"
            " load_model made"
        )
    if not isinstance(model, Encoder):
        raise ModelError(
            f"model is a {type(model).__name__}, which workers cannot load: models travel by name."
            " Give an Encoder that load_model made, or a name, or leave executor= out"
        )
    return _name_of(model, dtype=str(model.dtype).removeprefix("torch.")), model


def _name_of(encoder: Encoder, *, dtype: str | None) -> ModelName:
    about = encoder.provenance
    recorded, sha256 = str(about.get("name")), about.get("weights_sha256")
    revision = about.get("revision")
    path = Path(recorded).expanduser()
    is_path = recorded != MINI and path.exists()
    if not _is_loadable(recorded, revision, str(sha256), is_path=is_path):
        raise ModelError(
            f"the encoder {recorded!r} cannot be loaded by its name with the same weights, and"
            " weights do not travel to workers: encoder.save(folder) writes them to a folder that"
            " the workers see; then give model=folder"
        )
    return ModelName(
        path_or_name=str(path.absolute()) if is_path else recorded,
        recorded=recorded,
        revision=revision,
        weights_sha256=str(sha256),
        config_json=json.dumps(encoder.config.to_dict(), sort_keys=True),
        is_config_given=about.get("config_source") == "given",
        dtype=dtype,
    )


def _is_loadable(name: str, revision: str | None, sha256: str, *, is_path: bool) -> bool:
    """Whether `load_model` would give these weights, as far as that can be seen from here."""
    if name == MINI:
        return sha256 == MINI_SHA256
    if not is_path and revision is None:
        return False
    try:
        files = locate_model(name, revision=revision, local_files_only=True)
        return file_sha256(files.weights) == sha256
    except HubError:
        return True  # not cached under this revision here: each worker compares the hash
    except XmagError:
        return False


_choosing = threading.Lock()
_held: dict[str, int] = {}
"""The device this process has claimed, and the open lock file that says so to the others."""


def claimed_device() -> str:
    """The device that this process computes on, its own as far as there are enough.

    Of several CUDA devices that it may see (CUDA_VISIBLE_DEVICES) it takes the one that the fewest
    other workers of this host have taken, for as long as it lives: "cuda:1". With one or none
    there is nothing to choose: "auto". Raises ModelError in a process that cannot use CUDA.
    """
    count = torch.cuda.device_count()
    if count:
        _require_cuda()
    if count < 2:
        return "auto"
    with _choosing:
        if not _held:
            index, file = claim(_names(count), Path(tempfile.gettempdir()))
            _held[f"cuda:{index}"] = file
        return next(iter(_held))


def claim(devices: Sequence[str], folder: Path) -> tuple[int, int]:
    """The index of the device that the fewest processes hold, and the file that holds it.

    A claim is a lock on an empty file in `folder`, which the system lets go of when the process
    ends, however it ends. `devices` are names that mean the same device in every process. Raises
    ModelError where no file can be made there.
    """
    user = os.getuid() if hasattr(os, "getuid") else 0
    taken = 0
    while True:
        for index, device in enumerate(devices):
            name = "".join(c if c.isalnum() or c == "-" else "_" for c in device)
            path = folder / f"xmag-{user}-{name}-{taken}.lock"
            try:
                file = open_lock(path, shared=False)
            except OSError as error:
                raise ModelError(
                    f"no lock can be made in {folder} ({error.strerror or error}), by which workers"
                    " share the GPUs; set TMPDIR to a folder of your own"
                ) from error
            try:
                if hasattr(os, "getuid") and os.fstat(file).st_uid != user:
                    os.close(file)
                    raise ModelError(
                        f"{path} is another user's, and has the name of a lock of this one; set"
                        " TMPDIR to a folder of your own"
                    )
                if try_lock(file):
                    return index, file
            except OSError as error:
                # Without locks nobody knows what the others take: chance has to do.
                logger.warning("no files can be locked in %s (%s)", folder, error.strerror)
                return os.getpid() % len(devices), file
            os.close(file)
        taken += 1


def _names(count: int) -> list[str]:
    """Names of the visible devices: what CUDA_VISIBLE_DEVICES calls them, else their numbers."""
    visible = [part.strip() for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    named = visible if len(visible) >= count and all(visible[:count]) else map(str, range(count))
    return [f"gpu-{name}" for name, _ in zip(named, range(count), strict=False)]


def _require_cuda() -> None:
    try:
        torch.cuda.current_device()
    except RuntimeError as error:
        raise ModelError(
            f"this worker cannot use its GPU ({str(error).splitlines()[0]}); if the executor forks,"
            ' give it another start method: ProcessPoolExecutor(2, mp_context=get_context("spawn"))'
        ) from error


MARKER = "run.json"
"""Marker file of a run, there for as long as somebody waits for its shards."""

_LOOK_EVERY_S = 1.0
"""Seconds between looks whether anybody still waits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """Slides for one worker, and everything that it needs to know. All of it pickles."""

    number: int
    run: Place
    jobs: tuple[Job, ...]
    model: ModelName
    options: Mapping[str, Any]
    transform: str | None

    @classmethod
    def of(
        cls,
        jobs: Sequence[Job],
        settings: Settings,
        model: ModelName,
        *,
        number: int,
        run: Place,
    ) -> "Shard":
        """The shard of some jobs of a cohort with these settings."""
        plain = {field.name for field in fields(Settings)} - {"encoder", "transform"}
        return cls(
            number=number,
            run=run,
            jobs=tuple(jobs),
            model=model,
            options={name: getattr(settings, name) for name in sorted(plain)},
            transform=transform_name(settings.transform),
        )

    @property
    def status(self) -> Place:
        """Path of the status file."""
        return self.run / f"{self.number}.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardStatus:
    """Status of a shard: the rows of its jobs, by their index in it.

    `dtype_class` is what its model computes in. `error` is what stopped all of it, and `is_fatal`
    whether that would stop every other shard too, as a full disk does.
    """

    rows: tuple[tuple[int, CohortRow], ...] = ()
    dtype_class: str | None = None
    error: XmagError | None = None
    is_fatal: bool = False

    def to_json(self) -> str:
        """The status as JSON text, without `error`, which goes another way."""
        rows = [[index, asdict(row)] for index, row in self.rows]
        return json.dumps({"rows": rows, "dtype_class": self.dtype_class})

    @classmethod
    def from_json(cls, text: str) -> "ShardStatus":
        """The status in text that `to_json` wrote."""
        fields = json.loads(text)
        rows = tuple((index, CohortRow(**row)) for index, row in fields["rows"])
        return cls(rows=rows, dtype_class=fields["dtype_class"])

    @classmethod
    def read(cls, place: Place) -> "ShardStatus":
        """The status in a file; an empty one where there is none yet."""
        if not place.exists():
            return cls()
        with files.local_copy(place, OutputError) as path:
            return cls.from_json(path.read_text(encoding="utf-8"))


def read_status(shard: Shard) -> ShardStatus:
    """Status of a shard by its file; an empty one where that cannot be read just now."""
    try:
        return ShardStatus.read(shard.status)
    except (OutputError, OSError, ValueError) as error:
        logger.warning("a status cannot be read: %s", error)
        return ShardStatus()


def run_shard(shard: Shard) -> ShardStatus:
    """Extract the slides of a shard; returns its status. The function that workers are given.

    What stops all of them comes back as `error`, as not every engine brings an exception back.
    """
    status = ShardStatus()
    try:
        for status in _run(shard):
            _tell(shard, status)
    except XmagError as error:
        # A pickle loses what an error comes from, which says how far it reaches.
        return replace(status, error=error, is_fatal=files.is_of_the_place(error))
    return status


def _tell(shard: Shard, status: ShardStatus) -> None:
    """Write the status; work does not depend on that, as what is done is in its files."""
    try:
        files.write_text(shard.status, status.to_json())
    except OutputError as error:
        logger.warning("a status cannot be written: %s", error)


def _run(shard: Shard) -> Iterator[ShardStatus]:
    """Status of the shard, each time that a slide of it is done."""
    if not _is_awaited(shard):
        raise OutputError(
            f"this worker does not see the output folder {shard.run.parent} of the program that"
            " started it, or that program has ended; write to a folder that all machines share,"
            " under the same path, or to a store such as s3://"
        )
    # An engine may have started the same shard before, and lost that worker.
    before = read_status(shard)
    indices = {job: index for index, job in enumerate(shard.jobs)}
    rows = [(index, row) for index, row in before.rows]
    known = {index for index, _ in rows}
    left = [job for index, job in enumerate(shard.jobs) if index not in known]
    settings = _settings_of(shard)
    kind = dtype_class(str(getattr(settings.encoder, "dtype", "float32")))
    yield ShardStatus(rows=tuple(rows), dtype_class=kind)
    looked_at = time.monotonic()
    with closing(rows_of(left, settings)) as done:
        for job, row in done:
            rows.append((indices[job], row))
            yield ShardStatus(rows=tuple(rows), dtype_class=kind)
            if time.monotonic() - looked_at > _LOOK_EVERY_S:
                if not _is_awaited_still(shard):
                    return
                looked_at = time.monotonic()


def _is_awaited(shard: Shard) -> bool:
    with retold(OutputError, shard.run):
        return (shard.run / MARKER).exists()


def _is_awaited_still(shard: Shard) -> bool:
    try:
        return _is_awaited(shard)
    except OutputError as error:
        logger.warning("whether this shard is still wanted cannot be seen just now: %s", error)
        return True


def _settings_of(shard: Shard) -> Settings:
    options = dict(shard.options)
    if options["processes"] is None and torch.cuda.device_count() > 1:
        # The other GPUs of this host have workers of their own, and the cores are for all.
        options["processes"] = max(1, usable_cores() // torch.cuda.device_count())
    return Settings(
        encoder=shard.model.load(claimed_device()),
        transform=None if shard.transform is None else _imported(shard.transform),
        **options,
    )


def transform_name(transform: Transform | None) -> str | None:
    """The name under which a worker can import a transform, "module:function"; None for none.

    Raises InputError for one that no other process can import.
    """
    if transform is None:
        return None
    module = getattr(transform, "__module__", None)
    name = getattr(transform, "__qualname__", None)
    found: Any = None
    if module and module != "__main__" and name:
        found = sys.modules.get(module)
        for part in name.split("."):
            found = getattr(found, part, None)
    if found is not transform:
        raise InputError(
            f"transform {name or type(transform).__name__!r} cannot be imported by workers:"
            " expected a function at the top of a module that they can import (a .py file beside"
            " the program, or a package), not one of __main__, a lambda, or an object"
        )
    return f"{module}:{name}"


def _imported(name: str) -> Transform:
    module, _, path = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"this worker cannot import the transform {name} ({error}); install its module there,"
            " or put its folder on PYTHONPATH"
        ) from error
    transform: Callable[[Any], Any] = found
    return transform


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
