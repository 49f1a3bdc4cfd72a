"""Dataset of regions: read from slides, drawn by a sampler, loaded ahead in batches by threads.

The epochs' shuffles, one after another, are one endless sequence; step s takes positions
s * batch to (s + 1) * batch of it. The step is thus all there is to remember of where a run was.
"""

import logging
import math
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Protocol, Self, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xmag.distill.regions import Manifest, ManifestSource
from xmag.errors import ClosedSlideError, DamagedSlideError, InputError, SlideError
from xmag.provenance import file_fingerprint
from xmag.slide import Slide
from xmag.tiles.children import PROCESSES_SUPPORTED, PlacePool
from xmag.tiles.stream import default_threads, read_places
from xmag.tiles.worker import Places

_logger = logging.getLogger(__name__)

Numbers = NDArray[np.int64]
"""Numbers of regions (or their epochs): int64 (B,)."""
Regions = NDArray[np.uint8]
"""High views of B regions: uint8 (B, REGION_PX, REGION_PX, 3) RGB."""

_SOURCES_MIXED = 64
"""Sources whose regions a shuffle mixes, and which a batch may thus need open."""
_OPEN_SOURCES = 160
"""Limit of open slides: more than twice what a shuffle mixes, and few enough for the 256 files that
some systems allow."""
_OPEN_IMAGE_BYTES = 1 << 30
"""Limit of bytes of open plain images, whose px stay in memory while open."""
_IN_MEMORY = {"png", "jpeg"}
"""Formats of plain images, which are decoded whole."""
_CLOSED = "the regions are closed; use them inside their `with` block"
_TASKS_EACH = 2
"""Tasks for each thread of a call, at least: fewer would leave some idle at its end."""
_SHUFFLE = 0x5F1E
"""Salt of the random stream that shuffles draw from the seed."""


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


def checked_numbers(regions: Sequence[int] | Numbers, count: int) -> Numbers:
    """Numbers of regions as an array, int64 (B,); InputError where one is none of `count`."""
    numbers = np.asarray(regions, np.int64).reshape(-1)
    if len(numbers) and not (numbers.min() >= 0 and numbers.max() < count):
        raise InputError(
            f"regions {numbers.min()} to {numbers.max()} are asked for; expected numbers from 0 to"
            f" {count - 1}"
        )
    return numbers


class SlideRegions:
    """Dataset of a manifest's regions, read from the slides below `root`; a context manager.

    Slides are opened when they are first needed, and their content is compared with the manifest's
    fingerprints then. `damaged` holds the reason for each region that could not be decoded so far;
    `threads` is how many regions are decoded at a time.

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
        self.threads = processes or threads or default_threads()
        self._children = (
            PlacePool(processes, slot_tiles=1, size_px=manifest.spec.size_px) if processes else None
        )
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="xmag-regions")
        self.damaged: dict[int, str] = {}

    def __len__(self) -> int:
        """The number of regions."""
        return len(self.manifest)

    def __repr__(self) -> str:
        return f"<SlideRegions of {len(self):,} regions, {len(self.damaged):,} damaged so far>"

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
            bad = {int(index) for index in indices} & self.damaged.keys()
            first = min(bad)
            raise DamagedSlideError(
                f"{len(bad)} of {len(indices)} regions cannot be decoded: region {first}:"
                f" {self.damaged[first]}. read_intact() leaves them out, and `damaged` lists them"
            )
        return regions

    def read_intact(self, indices: Sequence[int], /) -> tuple[Numbers, Regions]:
        """Read the undamaged regions: rows of `indices`, int64 (K,), and uint8 (K, S, S, 3).

        Each other one is added to `damaged`. Raises what `read` does otherwise.
        """
        wanted = checked_numbers(indices, len(self))
        size = self.manifest.spec.size_px
        regions = np.empty((len(wanted), size, size, 3), np.uint8)
        tasks = self._tasks(wanted)
        if len(tasks) == 1:
            self._read_rows(wanted, regions, *tasks[0])
        else:
            for done in [self._pool.submit(self._read_rows, wanted, regions, *t) for t in tasks]:
                done.result()
        whole = np.array([index not in self.damaged for index in wanted.tolist()], np.bool_)
        return np.flatnonzero(whole), regions if whole.all() else regions[whole]

    def close(self) -> None:
        """Close the slides and end the threads. Closing twice is fine."""
        self._pool.shutdown(cancel_futures=True)
        self._slides.close()
        if self._children is not None:
            self._children.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _tasks(self, wanted: Numbers) -> list[tuple[int, Numbers]]:
        """Tasks of the threads: (source, rows of `wanted` to read from it)."""
        places = self.manifest.places[wanted]
        order = np.lexsort((places[:, 1], places[:, 2], places[:, 0]))
        most = -(-len(wanted) // (_TASKS_EACH * self.threads))
        tasks = []
        for source in np.unique(places[:, 0]).tolist():
            rows = order[places[order, 0] == source]
            tasks += [(source, rows[at : at + most]) for at in range(0, len(rows), most)]
        return tasks

    def _read_rows(self, wanted: Numbers, regions: Regions, source: int, rows: Numbers) -> None:
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
                self.damaged.setdefault(int(wanted[rows[0]]), str(error))
                return
            for row in rows:  # find out which
                self._read_rows(wanted, regions, source, np.array([row]))


@dataclass(slots=True)
class _OpenSlide:
    """Slide of a source, open once it was needed, and the number of calls using it."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    slide: Slide | None = None
    users: int = 0

    @property
    def size_bytes(self) -> int:
        """Bytes of its px that stay in memory while it is open."""
        if self.slide is None or self.slide.format not in _IN_MEMORY:
            return 0
        return 3 * math.prod(self.slide.dimensions)


class _OpenSlides:
    """LRU cache of the open slides of a manifest."""

    def __init__(self, sources: Sequence[ManifestSource], root: Path) -> None:
        self._sources, self._root = sources, root
        self._entries: OrderedDict[int, _OpenSlide] = OrderedDict()
        self._verified: set[int] = set()
        self._lock = threading.Lock()
        self._closed = False

    @contextmanager
    def opened(self, number: int) -> Iterator[Slide]:
        """A context with the slide of a source, open."""
        with self._lock:
            if self._closed:
                raise ClosedSlideError(_CLOSED)
            entry = self._entries.setdefault(number, _OpenSlide())
            self._entries.move_to_end(number)
            entry.users += 1
        try:
            with entry.lock:
                if entry.slide is None:
                    mpp = self._sources[number].mpp
                    entry.slide = Slide(self.verified(number), mpp=mpp)
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

    def _close_some(self) -> None:
        """Evict least recently used slides until the rest fits. Called under the lock."""
        for number, entry in list(self._entries.items()):
            size = sum(other.size_bytes for other in self._entries.values())
            if len(self._entries) <= _OPEN_SOURCES and size <= _OPEN_IMAGE_BYTES:
                return
            if not entry.users and entry.slide is not None:
                entry.slide.close()
                del self._entries[number]


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionBatch:
    """Batch of whole regions, damaged ones left out: `regions` and `epochs`, int64 (B,).

    `pixels` is uint8 (B, S, S, 3): high views, or low views where those are cached. B may be 0.
    """

    regions: Numbers
    epochs: Numbers
    pixels: Tensor

    def where(self, whole: NDArray[np.bool_]) -> "RegionBatch":
        """The batch of the regions that a mask, bool (B,), marks."""
        if whole.all():
            return self
        pixels = self.pixels[torch.from_numpy(whole)]
        return RegionBatch(regions=self.regions[whole], epochs=self.epochs[whole], pixels=pixels)


class RegionLoader:
    """Data loader with `threads` threads, which read the regions of batches one by one.

    `ahead` batches are prefetched. Images are `side` px wide. On CUDA they lie in pinned memory,
    from which the device copies by itself. Damaged regions are left out: `damaged`, bool (regions,)
    marks those seen so far, and a warning names each once, with its slide where the manifest is
    known.
    """

    def __init__(
        self,
        source: RegionSource,
        *,
        side: int,
        threads: int,
        ahead: int,
        device: torch.device,
        manifest: Manifest | None = None,
    ) -> None:
        self.damaged = np.zeros(len(source), bool)
        self._source, self._side = source, side
        self._threads, self._ahead = threads, ahead
        self._pinned = device.type == "cuda"
        self._manifest = source.manifest if isinstance(source, SlideRegions) else manifest

    def read(self, wanted: Iterable[tuple[Numbers, Numbers]]) -> Generator[RegionBatch]:
        """Read batches of (regions, epochs) in their order, into host memory.

        Raises what the source raises, but for DamagedSlideError; InputError for regions of another
        size or type.
        """
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="xmag-regions")
        try:
            waiting: deque[tuple[RegionBatch, list[Future[str | None]]]] = deque()
            for regions, epochs in wanted:
                shape = (len(regions), self._side, self._side, 3)
                pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=self._pinned)
                reading = [
                    pool.submit(self._read_into, into, region)
                    for into, region in zip(pixels.numpy(), regions.tolist(), strict=True)
                ]
                batch = RegionBatch(regions=regions, epochs=epochs, pixels=pixels)
                waiting.append((batch, reading))
                if len(waiting) > self._ahead:
                    yield self._whole(*waiting.popleft())
            while waiting:
                yield self._whole(*waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _read_into(self, into: NDArray[np.uint8], region: int) -> str | None:
        """Read a region into `into`; the reason where it is damaged."""
        try:
            found = self._source.read([region])
        except DamagedSlideError as error:
            known = self._source.damaged if isinstance(self._source, SlideRegions) else {}
            return known.get(region, str(error))
        if found.shape != (1, *into.shape) or found.dtype != np.uint8:
            raise InputError(
                f"region {region} is {found.dtype} {found.shape}; expected uint8"
                f" {(1, *into.shape)}: a region has four times the student's tile a side"
            )
        into[...] = found[0]
        return None

    def _whole(self, batch: RegionBatch, reading: list[Future[str | None]]) -> RegionBatch:
        """The batch, once read, without its damaged regions."""
        reasons = [task.result() for task in reading]
        for region, reason in zip(batch.regions.tolist(), reasons, strict=True):
            if reason is not None and not self.damaged[region]:
                self.damaged[region] = True
                _logger.warning(
                    "region %d%s cannot be decoded and is left out: %s",
                    *(region, self._place(region), reason),
                )
        return batch.where(np.array([reason is None for reason in reasons], bool))

    def _place(self, region: int) -> str:
        if self._manifest is None:
            return ""
        source, x, y = self._manifest.places[region].tolist()
        return f" ({self._manifest.sources[source].path} at {x}, {y})"


class RegionSampler:
    """Sampler of regions, int64 (N,), in shuffled epochs; the same for the same seed.

    `sources` (N,) is the slide of each region, where known: slides are then mixed so that only some
    of them are open at a time.
    """

    def __init__(
        self, regions: Numbers, *, batch: int, seed: int, sources: Numbers | None = None
    ) -> None:
        self._regions, self._batch, self._seed = regions, batch, seed
        # Without slides, any order is as good as any other.
        self._sources = np.zeros(len(regions), np.int64) if sources is None else sources
        self._epoch = lru_cache(maxsize=4)(self._shuffled)

    def step(self, number: int) -> tuple[Numbers, Numbers]:
        """The batch of regions of a step, and the epoch of each: int64 (batch,) both."""
        return self.positions(number * self._batch, self._batch)

    def positions(self, first: int, count: int) -> tuple[Numbers, Numbers]:
        """Regions at `count` positions of the endless sequence, and the epoch of each."""
        epochs, within = np.divmod(np.arange(first, first + count), len(self._regions))
        regions = np.empty(count, np.int64)
        for epoch in np.unique(epochs):
            taken = epochs == epoch
            regions[taken] = self._epoch(int(epoch))[within[taken]]
        return regions, epochs

    def _shuffled(self, epoch: int) -> Numbers:
        rng = np.random.default_rng(np.random.SeedSequence((self._seed, epoch, _SHUFFLE)))
        return self._regions[shuffled(self._sources, rng)]


def shuffled(
    sources: Numbers, rng: np.random.Generator, *, at_once: int = _SOURCES_MIXED
) -> Numbers:
    """Shuffled order of regions, int64 (N,), that needs at most `at_once` open sources.

    `sources` is the source of each region, ``manifest.places[:, 0]``. The sources are shuffled and
    dealt into groups of `at_once`, and the regions of a group are shuffled; so a slide is opened
    once an epoch, while each batch still mixes many.
    """
    numbers, inverse = np.unique(sources, return_inverse=True)
    group = rng.permutation(len(numbers))[inverse] // at_once
    mixed = rng.permutation(len(sources))
    return mixed[np.argsort(group[mixed], kind="stable")]


def share(rank: int, world: int, *, batch: int, micro_batch: int) -> Sequence[slice]:
    """Micro-batches of a rank: slices of a step's batch."""
    each = batch // world
    start = rank * each
    return [
        slice(at, min(at + micro_batch, start + each))
        for at in range(start, start + each, micro_batch)
    ]
