"""A shard: some slides of a cohort as one piece of work, on this machine or another.

A worker gets a Shard, does its slides as a cohort of their own, and writes what became of each to a
status file in the folder of the run. So whoever waits for it sees it advance, and a worker that is
lost takes nothing finished with it.
"""

import importlib
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from xmag import files
from xmag.cohort.gpus import claimed_device
from xmag.cohort.jobs import Job
from xmag.cohort.loop import rows_of
from xmag.cohort.models import ModelName
from xmag.cohort.report import CohortRow
from xmag.cohort.settings import Settings
from xmag.cores import usable_cores
from xmag.errors import InputError, OutputError, XmagError
from xmag.extract import Transform
from xmag.provenance import dtype_class
from xmag.urls import Place, retold

logger = logging.getLogger(__name__)

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
