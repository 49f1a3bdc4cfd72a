"""Work of a cohort's workers, on this machine or others: pieces, and how one is done.

A piece has all slides that are left. Of them a worker takes the next one that no other worker has
taken, by a file in the folder of the run, until there is none. In a store, where no file can be
made by one worker only, each piece has slides of its own. What becomes of each slide goes to a file
beside: whoever waits sees the work advance, and a worker that is lost takes nothing finished with
it.
"""

import atexit
import logging
import multiprocessing
import os
import pickle
import pkgutil
import tempfile
import threading
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import chain, count, groupby
from pathlib import Path
from typing import Any

import torch

from xmag import files
from xmag.cohort.claims import open_lock, try_lock
from xmag.cohort.jobs import Job, Settings
from xmag.cohort.loop import rows_of
from xmag.cohort.report import CohortRow
from xmag.cohort.resume import JsonLines
from xmag.cores import usable_cores
from xmag.encoder import Encoder, TileEncoder, load_model
from xmag.errors import HubError, InputError, ModelError, OutputError, WeightsError, XmagError
from xmag.extract import Transform
from xmag.hub.fetch import locate_model
from xmag.hub.registry import DEFAULT_MODEL, MINI, MINI_SHA256, ModelConfig
from xmag.hub.weights import file_sha256
from xmag.provenance import dtype_class
from xmag.tiles.children import DecodingPool
from xmag.urls import Place, Url, retold

logger = logging.getLogger(__name__)

MARKER = "run.json"
"""Marker file of a run, there for as long as somebody waits for its rows."""

_LOOK_EVERY_S = 1.0
"""Seconds between looks whether anybody still waits."""

_IDLE_S = 60.0
"""Seconds that the decoding processes of a worker outlive its last piece of work."""


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
    config: ModelConfig
    is_config_given: bool
    dtype: str | None

    def load(self, device: str) -> Encoder:
        """The Encoder. Raises WeightsError where this machine has other weights under that name."""
        encoder = load_model(
            self.path_or_name,
            revision=self.revision,
            config=self.config if self.is_config_given else None,
            device=device,
            dtype=self.dtype or "auto",
        )
        found = encoder.provenance["weights_sha256"]
        if found != self.weights_sha256 or encoder.config != self.config:
            what = "weights" if found != self.weights_sha256 else "config"
            raise WeightsError(
                f"{self.recorded!r} has another {what} on this machine (weights sha256"
                f" {found[:12]}) than where the cohort was started"
                f" ({self.weights_sha256[:12]}); copy the model here again, or name one by its Hub"
                " revision"
            )
        return encoder.named(self.recorded)


_loading = threading.Lock()
_loaded: dict[tuple[ModelName, str], Encoder] = {}


def _load(models: Mapping[str, ModelName], device: str) -> dict[str, Encoder]:
    """The Encoders of one cohort, each loaded once a process."""
    keys = {name: (model, device) for name, model in models.items()}
    with _loading:
        for key in _loaded.keys() - keys.values():
            del _loaded[key]  # the memory of a GPU is there for one cohort's
        for key in keys.values():
            if key not in _loaded:
                _loaded[key] = key[0].load(device)
        return {name: _loaded[key] for name, key in keys.items()}


def by_name(model: TileEncoder | str | os.PathLike[str] | None) -> tuple[ModelName, Encoder]:
    """The name under which other machines load `model`, and the model itself.

    Given by name it is loaded on the CPU, to see that it is whole. Raises ModelError for one that
    no machine can load by name: weights do not travel.
    """
    dtype = None
    if model is None or isinstance(model, str | os.PathLike):
        encoder = load_model(DEFAULT_MODEL if model is None else model, device="cpu")
    elif isinstance(model, Encoder):
        encoder, dtype = model, str(model.dtype).removeprefix("torch.")
    elif isinstance(model, TileEncoder):
        raise ModelError(
            f"model is a {type(model).__name__}, which workers cannot load: models travel by name."
            " Give an Encoder that load_model made, or a name, or leave executor= out"
        )
    else:
        raise InputError(
            f"model is a {type(model).__name__}; expected a name, a path, or an Encoder that"
            " load_model made"
        )
    about = encoder.provenance
    recorded, sha256 = str(about.get("name")), str(about.get("weights_sha256"))
    revision, path = about.get("revision"), Path(recorded).expanduser()
    is_path = recorded != MINI and path.exists()
    if not _is_loadable(recorded, revision, sha256, is_path=is_path):
        raise ModelError(
            f"the encoder {recorded!r} cannot be loaded by its name with the same weights, and"
            " weights do not travel to workers: encoder.save(folder) writes them to a folder that"
            " the workers see; then give model=folder"
        )
    name = ModelName(
        path_or_name=str(path.absolute()) if is_path else recorded,
        recorded=recorded,
        revision=revision,
        weights_sha256=sha256,
        config=encoder.config,
        is_config_given=about.get("config_source") == "given",
        dtype=dtype,
    )
    return name, encoder


def _is_loadable(name: str, revision: str | None, sha256: str, *, is_path: bool) -> bool:
    """Whether `load_model` would give these weights, as far as that can be seen from here."""
    if name == MINI:
        return sha256 == MINI_SHA256
    if not is_path and revision is None:
        return False
    try:
        weights = locate_model(name, revision=revision, local_files_only=True).weights
        return file_sha256(weights) == sha256
    except HubError:
        return True  # not cached under this revision here: each worker compares the hash
    except XmagError:
        return False


def transform_name(transform: Transform | None) -> str | None:
    """The name under which a worker can import a transform, "module:function"; None for none.

    Raises InputError for one that no other process can import.
    """
    if transform is None:
        return None
    module, name = getattr(transform, "__module__", ""), getattr(transform, "__qualname__", "")
    found = None
    if module != "__main__":
        with suppress(ImportError, AttributeError, ValueError):
            found = pkgutil.resolve_name(f"{module}:{name}")
    if found is not transform or not name:
        raise InputError(
            f"transform {name or type(transform).__name__!r} cannot be imported by workers:"
            " expected a function at the top of a module that they can import (a .py file beside"
            " the program, or a package), not one of __main__, a lambda, or an object"
        )
    return f"{module}:{name}"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Piece:
    """Piece of work for one worker, and everything that it needs to know. All of it pickles.

    Those of one `round` have the same slides, each of which one of them does. `jobs` has them by
    number, packed: thousands go with each piece. `share` is how many slides fall to a worker,
    roughly.
    Each slide of a piece that `is_careful` is done alone, as it may kill its worker.
    """

    run: Place
    models: Mapping[str, ModelName]
    options: Mapping[str, Any]
    transform: str | None
    round: str = ""
    number: int = 0
    jobs: bytes = b""
    share: int = 1
    is_careful: bool = False

    @property
    def lines(self) -> JsonLines:
        """The file that says what becomes of each slide."""
        return JsonLines(self.run / f"{self.round}-{self.number}.jsonl")

    def is_awaited(self) -> bool:
        """Whether somebody waits for it. Raises OutputError where that cannot be seen."""
        starter = multiprocessing.parent_process()
        if starter is not None and not starter.is_alive():
            return False
        with retold(OutputError, self.run):
            return (self.run / MARKER).exists()

    def take(self, number: int) -> bool:
        """Whether a slide is this piece's to do, and no other's of this round."""
        if isinstance(self.run, Url):
            return True
        path = self._mark(number)
        try:
            with path.open("x") as mark:
                mark.write(str(self.number))
        except FileExistsError:
            return False
        except OSError as error:
            raise files.cannot_write(path, error) from error
        return True

    def taken(self) -> set[int]:
        """The slides that were taken up to now, in this round. Of a store nobody knows."""
        if isinstance(self.run, Url):
            return set()
        numbers = (mark.stem.split("-")[1] for mark in self.run.glob(f"{self.round}-*.taken"))
        return {int(number) for number in numbers if number.isdecimal()}

    def under_way(self, left: Set[int]) -> list[int]:
        """Those of the slides left that this very piece has taken.

        In a store that may be all that it has, once it has begun.
        """
        if isinstance(self.run, Url):
            if next(self.lines.news(), None) is None:
                return []
            mine = [number for number in self.unpacked() if number in left]
            return mine[:1] if self.is_careful else mine
        found = []
        for number in sorted(self.taken() & left):
            with suppress(OSError, ValueError):
                if self._mark(number).read_text() == str(self.number):
                    found.append(number)
        return found

    def unpacked(self) -> dict[int, Job]:
        """Its slides, by number."""
        # They came with all the rest, through a pickle of the engine's.
        jobs: dict[int, Job] = pickle.loads(zlib.decompress(self.jobs))
        return jobs

    def by_slide(self, numbers: Iterable[int]) -> list[list[int]]:
        """Numbers of jobs, those that follow each other and are of one slide together."""
        each = len(self.models)
        return [list(same) for _, same in groupby(numbers, lambda number: number // each)]

    def _mark(self, number: int) -> Path:
        assert isinstance(self.run, Path)
        return self.run / f"{self.round}-{number}.taken"

    def settings(self) -> Settings:
        """The settings of the cohort in this process, with the model loaded."""
        options = dict(self.options)
        if options["processes"] is None and torch.cuda.device_count() > 1:
            # The other GPUs of this host have workers of their own, and the cores are for all.
            options["processes"] = max(1, usable_cores() // torch.cuda.device_count())
        transform: Transform | None = None
        try:
            if self.transform is not None:
                transform = pkgutil.resolve_name(self.transform)
        except (ImportError, AttributeError) as error:
            raise InputError(
                f"this worker cannot import the transform {self.transform} ({error}); install its"
                " module there, or put its folder on PYTHONPATH"
            ) from error
        encoders = _load(self.models, claimed_device())
        return Settings(encoders=encoders, transform=transform, **options)


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceStatus:
    """Status of a piece of work: rows by the number of the slide, and its model's dtype class.

    `error` is what stopped it, and `is_fatal` whether that would stop every other piece, too, as
    a full disk does.
    """

    rows: Sequence[tuple[int, CohortRow]] = ()
    dtype_class: str | None = None
    error: XmagError | None = None
    is_fatal: bool = False

    @classmethod
    def news(cls, lines: JsonLines) -> "PieceStatus":
        """The news of a piece since the last call."""
        rows, kind = [], None
        for line in lines.news():
            with suppress(LookupError, TypeError, ValueError):
                kind = line.get("dtype_class", kind)
                if "row" in line:
                    rows.append((int(line["number"]), CohortRow(**line["row"])))
        return cls(rows=rows, dtype_class=kind)


def run_piece(piece: Piece) -> PieceStatus:
    """Extract slides of a cohort; returns what became of them. The function workers are given.

    What stops all of them comes back as `error`, as not every engine brings an exception back.
    """
    rows: list[tuple[int, CohortRow]] = []
    try:
        if not piece.is_awaited():
            raise OutputError(
                f"this worker does not see the output folder {piece.run.parent} of the program that"
                " started it, or that program has ended; write to a folder that all machines share,"
                " under the same path, or to a store such as s3://"
            )
        return PieceStatus(dtype_class=_do(piece, rows), rows=rows)
    except XmagError as error:
        # A pickle loses what an error comes from, which says how far it reaches.
        return PieceStatus(rows=rows, error=error, is_fatal=files.is_of_the_place(error))


def _do(piece: Piece, rows: list[tuple[int, CohortRow]]) -> str | None:
    """Do slides of a piece and add their rows; what the model computes in, None if none is left."""
    jobs, lines = piece.unpacked(), piece.lines
    # An engine may have started the same piece before, and lost that worker.
    rows += PieceStatus.news(lines).rows
    left = jobs.keys() - {number for number, _ in rows}
    taken = piece.taken()
    fresh = [number for number in jobs if number in left - taken]
    again = piece.under_way(left & taken)
    if not fresh and not again:
        return None
    settings = piece.settings()
    kinds = [str(getattr(each, "dtype", "float32")) for each in settings.encoders.values()]
    kind = " and ".join(map(dtype_class, kinds))
    lines.add([{"dtype_class": kind}])
    numbers = {job: number for number, job in jobs.items()}
    looked_at = time.monotonic()
    for slides in _runs(piece, jobs, fresh, again):
        processes = settings.processes_for(piece.share)
        with closing(rows_of(slides, settings, processes=processes, pool=_kept_pool)) as done:
            for job, row in done:
                rows.append((numbers[job], row))
                lines.add([{"number": numbers[job], "row": asdict(row)}])
                if time.monotonic() - looked_at > _LOOK_EVERY_S:
                    with suppress(OutputError):  # it is, as far as can be seen
                        if not piece.is_awaited():
                            return kind
                    looked_at = time.monotonic()
    return kind


def _runs(
    piece: Piece, jobs: Mapping[int, Job], fresh: Sequence[int], again: Sequence[int]
) -> Iterator[Iterable[Sequence[Job]]]:
    """The slides that are done together: all that can be taken, or each that may kill its worker.

    Those that this piece had taken when its worker was lost, `again`, come last.
    """
    taken = (
        # Who gets the first job of a slide decodes it, and is left the others.
        [jobs[number] for number in (first, *filter(piece.take, others))]
        for first, *others in piece.by_slide(fresh)
        if piece.take(first)
    )
    if piece.is_careful:
        yield from ([slide] for slide in taken)
    else:
        # Nothing is started for no slide at all.
        yield from (chain([first], taken) for first in taken)
    yield from ([[jobs[number] for number in same]] for same in piece.by_slide(again))


_idle: dict[DecodingPool, tuple[tuple[Any, ...], threading.Timer]] = {}
_keeping = threading.Lock()


@contextmanager
def _kept_pool(processes: int, **options: Any) -> Iterator[DecodingPool]:
    """A DecodingPool that is kept for the next piece of work, for as long as `_IDLE_S`.

    The thread of its own that starts children outlives the pieces, and ends with this process.
    """
    key = (os.getpid(), processes, sorted(options.items()))
    with _keeping:
        pool = next((pool for pool, (its, _) in _idle.items() if its == key), None)
        if pool is not None:
            _idle.pop(pool)[1].cancel()
    pool = pool or DecodingPool(processes, **options)
    try:
        yield pool
    except BaseException:
        pool.close()  # its children are still at it
        raise
    timer = threading.Timer(_IDLE_S, _close_idle, [pool])
    timer.daemon = True
    with _keeping:
        _idle[pool] = key, timer
    timer.start()


def _close_idle(pool: DecodingPool) -> None:
    with _keeping:
        found = _idle.pop(pool, None)
    if found is not None:  # else it is at work again
        pool.close()


@atexit.register
def _close_all_idle() -> None:
    for pool, ((pid, *_), timer) in list(_idle.items()):
        if pid == os.getpid():  # not those of the process that this one is a fork of
            timer.cancel()
            _close_idle(pool)


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
        try:
            torch.cuda.current_device()
        except RuntimeError as error:
            raise ModelError(
                f"this worker cannot use its GPU ({str(error).splitlines()[0]}); if the executor"
                " forks, give it another start method:"
                ' ProcessPoolExecutor(2, mp_context=get_context("spawn"))'
            ) from error
    if count < 2:
        return "auto"
    with _choosing:
        if not _held:
            # What CUDA_VISIBLE_DEVICES calls them means the same in every process.
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            names = [name.strip() for name in visible[:count]]
            if len(names) < count or not all(names):
                names = [str(index) for index in range(count)]
            devices = [f"gpu-{name}" for name in names]
            index, file = claim(devices, Path(tempfile.gettempdir()))
            _held[f"cuda:{index}"] = file
        return next(iter(_held))


def claim(devices: Sequence[str], folder: Path) -> tuple[int, int]:
    """The index of the device that the fewest processes hold, and the file that holds it.

    A claim is a lock on an empty file in `folder`, which the system lets go of when the process
    ends, however it ends. `devices` are names that mean the same device in every process. Raises
    ModelError where no file can be made there.
    """
    user = os.getuid() if hasattr(os, "getuid") else 0
    for taken in count():
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
    raise AssertionError("counting never ends")
