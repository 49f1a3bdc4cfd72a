"""Dataset of regions: their pixels, read ahead by threads, in shuffled epochs.

The epochs' shuffles, one after another, are one endless sequence; step s takes positions
s * batch to (s + 1) * batch of it. The step is thus all there is to remember of where a run was.
"""

import logging
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Protocol, Self, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xmag.distill.regions import Manifest, ManifestSource, shuffled
from xmag.errors import ClosedSlideError, DamagedSlideError, InputError, SlideError
from xmag.provenance import file_fingerprint
from xmag.slide import Slide
from xmag.tiles import PROCESSES_SUPPORTED, PlacePool, Places, default_threads, read_places

Regions = NDArray[np.uint8]
"""High views of B regions: uint8 (B, REGION_PX, REGION_PX, 3) RGB."""

_OPEN_SOURCES = 160
"""Limit of open slides: more than twice what `manifest.shuffled` mixes, and few enough for the 256
files that some systems allow."""
_OPEN_IMAGE_BYTES = 1 << 30
"""Limit of bytes of open plain images, whose px stay in memory while open."""

_IN_MEMORY = {"png", "jpeg"}
"""Formats of plain images, which are decoded whole."""
_CLOSED = "the regions are closed; use them inside their `with` block"
_TASKS_EACH = 2
"""Tasks for each thread of a call, at least: fewer would leave some idle at its end."""


@runtime_checkable
class RegionSource(Protocol):
    """Protocol of a region dataset: `SlideRegions`, or the user's own."""

    def __len__(self) -> int:
        """The number of regions."""
        ...

    def read(self, indices: Sequence[int], /) -> Regions:
        """Read high views of regions: uint8 (B, 896, 896, 3), row i for region ``indices[i]``.

        Safe to call from several threads. Raises DamagedSlideError where one cannot be decoded.
        """
        ...


def read_intact(
    source: RegionSource, indices: Sequence[int]
) -> tuple[NDArray[np.int64], Regions | None]:
    """Read the undamaged regions of any source: their rows, int64 (K,), and their views.

    Where one cannot, all are read one by one. The views are None where there is none.
    """
    if isinstance(source, SlideRegions):
        return source.read_intact(indices)
    try:
        return np.arange(len(indices)), source.read(indices)
    except DamagedSlideError:
        if len(indices) == 1:
            return np.empty(0, np.int64), None
    parts = [read_intact(source, [index])[1] for index in indices]
    good = [part for part in parts if part is not None]
    rows = np.flatnonzero([part is not None for part in parts])
    return rows, np.concatenate(good) if good else None


class SlideRegions:
    """Dataset of a manifest's regions, read from the slides below `root`; a context manager.

    Slides are opened when they are first needed, and their content is compared with the manifest's
    fingerprints then. `damaged` holds the reason for each region that could not be decoded so far.

    Args:
        manifest: The regions.
        root: The folder that the manifest's paths are relative to.
        threads: Decoding threads that a call for several regions shares; by default one a usable
            core, at most 8. A call for a single region decodes in the thread that makes it.
        processes: Child processes that decode instead of threads, which share one GIL (POSIX
            only). Each works for one call at a time: a call for several
            regions keeps them all busy, calls for one region as many as there are calls.
    """

    def __init__(
        self,
        manifest: Manifest,
        root: str | os.PathLike[str],
        *,
        threads: int | None = None,
        processes: int = 0,
    ) -> None:
        if (threads is not None and threads < 1) or processes < 0:
            raise InputError(
                f"threads is {threads!r} and processes {processes!r}; expected at least 1 thread"
                " or None, and 0 processes or more"
            )
        if processes and not PROCESSES_SUPPORTED:
            raise InputError("decoding processes need POSIX; use processes=0, which uses threads")
        self.manifest = manifest
        self._slides = _OpenSlides(manifest.sources, Path(root))
        self._threads = processes or threads or default_threads()
        self._children = (
            PlacePool(processes, slot_tiles=1, size_px=manifest.spec.size_px) if processes else None
        )
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="xmag-regions")
        self._damaged: dict[int, str] = {}

    def __len__(self) -> int:
        """The number of regions."""
        return len(self.manifest)

    @property
    def damaged(self) -> Mapping[int, str]:
        """Regions that could not be decoded so far: number -> reason."""
        return MappingProxyType(self._damaged)

    def read(self, indices: Sequence[int], /) -> Regions:
        """Read high views of regions: uint8 (B, 896, 896, 3), row i for region ``indices[i]``.

        Regions of one slide are read together, each of its source tiles once. May be called from
        several threads.

        Raises:
            DamagedSlideError: Some cannot be decoded; `damaged` says which. Nothing is made up.
            InputError: A number is none of the manifest's, or a slide is not the one it describes.
            SlideError: A slide cannot be opened.
        """
        rows, regions = self.read_intact(indices)
        if len(rows) < len(indices):
            bad = {int(index) for index in indices} & self._damaged.keys()
            first = min(bad)
            raise DamagedSlideError(
                f"{len(bad)} of {len(indices)} regions cannot be decoded: region {first}:"
                f" {self._damaged[first]}. read_intact() leaves them out, and `damaged` lists them"
            )
        return regions

    def read_intact(self, indices: Sequence[int], /) -> tuple[NDArray[np.int64], Regions]:
        """Read the undamaged regions: rows of `indices`, int64 (K,), and uint8 (K, S, S, 3).

        Each other one is added to `damaged`. Raises what `read` does otherwise.
        """
        wanted = self._checked(indices)
        size = self.manifest.spec.size_px
        regions = np.empty((len(wanted), size, size, 3), np.uint8)
        tasks = self._tasks(wanted)
        if len(tasks) == 1:
            self._read_rows(wanted, regions, *tasks[0])
        else:
            for done in [self._pool.submit(self._read_rows, wanted, regions, *t) for t in tasks]:
                done.result()
        good = np.array([int(index) not in self._damaged for index in wanted], np.bool_)
        return np.flatnonzero(good), regions if good.all() else regions[good]

    def close(self) -> None:
        """Close the slides and end the threads. Closing twice is fine."""
        self._pool.shutdown(cancel_futures=True)
        self._slides.close()
        if self._children is not None:
            self._children.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _checked(self, indices: Sequence[int]) -> NDArray[np.int64]:
        wanted = np.asarray(indices, np.int64).reshape(-1)
        if len(wanted) and not (wanted.min() >= 0 and wanted.max() < len(self)):
            raise InputError(
                f"regions {wanted.min()} to {wanted.max()} are asked for; expected numbers from 0"
                f" to {len(self) - 1}"
            )
        return wanted

    def _tasks(self, wanted: NDArray[np.int64]) -> list[tuple[int, NDArray[np.int64]]]:
        """Tasks of the threads: (source, rows of `wanted` to read from it)."""
        places = self.manifest.places[wanted]
        order = np.lexsort((places[:, 1], places[:, 2], places[:, 0]))
        most = -(-len(wanted) // (_TASKS_EACH * self._threads))
        tasks = []
        for source in np.unique(places[:, 0]).tolist():
            rows = order[places[order, 0] == source]
            tasks += [(source, rows[at : at + most]) for at in range(0, len(rows), most)]
        return tasks

    def _read_rows(
        self, wanted: NDArray[np.int64], regions: Regions, source: int, rows: NDArray[np.int64]
    ) -> None:
        """Read some rows of `regions` from one source; damaged ones are recorded."""
        coords, spec = self.manifest.places[wanted[rows], 1:], self.manifest.spec
        try:
            if self._children is not None:
                path, mpp = self._slides.verified(source), self.manifest.sources[source].mpp
                for row, place in zip(rows, coords[:, None], strict=True):
                    self._children.read(Places(str(path), mpp, spec, place), regions[row][None])
                return
            with self._slides.opened(source) as slide:
                regions[rows] = read_places(slide, spec, coords)
        except DamagedSlideError as error:
            if len(rows) == 1:
                self._damaged.setdefault(int(wanted[rows[0]]), str(error))
                return
            for row in rows:  # find out which
                self._read_rows(wanted, regions, source, np.array([row]))


@dataclass(slots=True)
class _Entry:
    """Cache entry of an open source: its slide, and the number of calls using it."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    slide: Slide | None = None
    users: int = 0
    size_bytes: int = 0


class _OpenSlides:
    """LRU cache of the open slides of a manifest."""

    def __init__(self, sources: Sequence[ManifestSource], root: Path) -> None:
        self._sources, self._root = sources, root
        self._entries: OrderedDict[int, _Entry] = OrderedDict()
        self._verified: set[int] = set()
        self._lock = threading.Lock()
        self._closed = False

    @contextmanager
    def opened(self, number: int) -> Iterator[Slide]:
        """A context with the slide of a source, open."""
        with self._lock:
            if self._closed:
                raise ClosedSlideError(_CLOSED)
            entry = self._entries.setdefault(number, _Entry())
            self._entries.move_to_end(number)
            entry.users += 1
        try:
            with entry.lock:
                if entry.slide is None:
                    entry.slide = self._open(number)
                    if entry.slide.format in _IN_MEMORY:
                        width, height = entry.slide.dimensions
                        entry.size_bytes = 3 * width * height
            yield entry.slide
        finally:
            with self._lock:
                entry.users -= 1
                if entry.slide is None and not entry.users:
                    self._entries.pop(number, None)
                self._close_some()

    def close(self) -> None:
        """Close all slides, for good."""
        with self._lock:
            self._closed = True
            for entry in self._entries.values():
                if entry.slide is not None:
                    entry.slide.close()
            self._entries.clear()

    def verified(self, number: int) -> Path:
        """The path of a source, after its content is checked against the manifest."""
        if self._closed:
            raise ClosedSlideError(_CLOSED)
        source = self._sources[number]
        path = self._root / source.path
        if number not in self._verified:
            if not path.is_file():
                raise SlideError(
                    f"there is no {source.path!r} in {os.fspath(self._root)!r}; give the folder"
                    " that the manifest's paths are relative to as root"
                )
            found = file_fingerprint(path)
            if found != dict(source.fingerprint):
                raise InputError(
                    f"{source.path!r} is not the file that the manifest was made from (content"
                    f" {found['content_sample_sha256'][:12]}, expected"
                    f" {source.fingerprint['content_sample_sha256'][:12]}); bring that one back, or"
                    " make the manifest again"
                )
            self._verified.add(number)
        return path

    def _open(self, number: int) -> Slide:
        return Slide(self.verified(number), mpp=self._sources[number].mpp)

    def _close_some(self) -> None:
        """Evict least recently used slides until the rest fits. Called under the lock."""
        for number, entry in list(self._entries.items()):
            count = len(self._entries)
            size = sum(other.size_bytes for other in self._entries.values())
            if count <= _OPEN_SOURCES and size <= _OPEN_IMAGE_BYTES:
                return
            if not entry.users and entry.slide is not None:
                entry.slide.close()
                del self._entries[number]


_logger = logging.getLogger(__name__)

_WHITE = 255


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Request of a batch: numbers of regions in the source, and the epoch of each."""

    regions: NDArray[np.int64]
    epochs: NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionBatch:
    """Batch of regions: `pixels` uint8 (B, S, S, 3), white where not `good` (damaged)."""

    group: Group
    pixels: Tensor
    good: NDArray[np.bool_]


class RegionLoader:
    """Data loader with `threads` threads, which read the regions of groups one by one.

    `ahead` groups are prefetched. Images are `side` px wide. On CUDA they lie in pinned memory,
    from which the device copies by itself. `damaged` marks the regions of the source that could not
    be read.
    """

    def __init__(
        self,
        source: RegionSource,
        *,
        side: int,
        threads: int,
        ahead: int,
        device: torch.device,
    ) -> None:
        self.damaged = np.zeros(len(source), bool)
        self._source, self._side = source, side
        self._threads, self._ahead = threads, ahead
        self._pinned = device.type == "cuda"

    def read(self, groups: Iterable[Group]) -> Generator[RegionBatch]:
        """Read groups in their order; yields batches in host memory.

        Raises what the source raises, but for DamagedSlideError; InputError for regions of another
        size or type.
        """
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="xmag-regions")
        try:
            waiting: deque[tuple[Group, Tensor, list[Future[bool]]]] = deque()
            for group in groups:
                waiting.append(self._begin(group, pool))
                if len(waiting) > self._ahead:
                    yield self._finish(*waiting.popleft())
            while waiting:
                yield self._finish(*waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _begin(
        self, group: Group, pool: ThreadPoolExecutor
    ) -> tuple[Group, Tensor, list[Future[bool]]]:
        shape = (len(group.regions), self._side, self._side, 3)
        pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=self._pinned)
        tasks = [
            pool.submit(_read_into, into, self._source, int(region))
            for region, into in zip(group.regions, pixels.numpy(), strict=True)
        ]
        return group, pixels, tasks

    def _finish(self, group: Group, pixels: Tensor, tasks: list[Future[bool]]) -> RegionBatch:
        good = np.array([task.result() for task in tasks], bool)
        for region in group.regions[~good].tolist():
            if not self.damaged[region]:
                _logger.warning("region %d is damaged and is left out of the training", region)
            self.damaged[region] = True
        return RegionBatch(group=group, pixels=pixels, good=good)


def _read_into(into: NDArray[np.uint8], source: RegionSource, region: int) -> bool:
    """Read a region into `into`; False, and white pixels, where it is damaged."""
    try:
        found = source.read([region])
    except DamagedSlideError as error:
        _logger.info("region %d: %s", region, error)
        into[...] = _WHITE
        return False
    if found.shape != (1, *into.shape) or found.dtype != np.uint8:
        raise InputError(
            f"region {region} is {found.dtype} {found.shape}; expected uint8 {(1, *into.shape)}:"
            " a region has four times the student's tile a side"
        )
    into[...] = found[0]
    return True


_PURPOSE = 0x5F1E
"""Salt of the random stream that shuffles draw from the seed."""


class Order:
    """Sampler of regions, int64 (N,), in shuffled epochs; the same for the same seed.

    `sources` (N,) is the slide of each region, where known: slides are then mixed so that only some
    of them are open at a time.
    """

    def __init__(
        self,
        regions: NDArray[np.int64],
        *,
        batch: int,
        seed: int,
        sources: NDArray[np.int64] | None = None,
    ) -> None:
        self._regions, self._batch, self._seed = regions, batch, seed
        # Without slides, any order is as good as any other.
        self._sources = np.zeros(len(regions), np.int64) if sources is None else sources
        self._epoch = lru_cache(maxsize=4)(self._shuffled)

    def step(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The batch of regions of a step, and the epoch of each: int64 (batch,) both."""
        return self.positions(number * self._batch, self._batch)

    def positions(self, first: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Regions at `count` positions of the endless sequence, and the epoch of each."""
        epochs, within = np.divmod(np.arange(first, first + count), len(self._regions))
        regions = np.empty(count, np.int64)
        for epoch in np.unique(epochs):
            taken = epochs == epoch
            regions[taken] = self._epoch(int(epoch))[within[taken]]
        return regions, epochs

    def _shuffled(self, epoch: int) -> NDArray[np.int64]:
        rng = np.random.default_rng(np.random.SeedSequence((self._seed, epoch, _PURPOSE)))
        return self._regions[shuffled(self._sources, rng)]


def share(rank: int, world: int, *, batch: int, micro_batch: int) -> Sequence[slice]:
    """Micro-batches of a rank: slices of a step's batch."""
    each = batch // world
    start = rank * each
    return [
        slice(at, min(at + micro_batch, start + each))
        for at in range(start, start + each, micro_batch)
    ]
