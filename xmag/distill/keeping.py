"""Computing the cache of teacher features, shard by shard; `targets` reads it."""

import logging
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xmag.devices import resolve_device
from xmag.distill.augment import augment
from xmag.distill.manifest import Manifest
from xmag.distill.sources import Regions, RegionSource, SlideRegions, read_intact
from xmag.distill.targets import (
    DONE,
    TILES,
    Header,
    KeptTargets,
    TargetSettings,
    check_same,
    fingerprint_of,
    mapped,
    read_header,
    shard_name,
    shards_of,
)
from xmag.distill.teachers import Teacher
from xmag.distill.views import LOW_PX, low_view, teacher_tiles
from xmag.errors import InputError, ModelError
from xmag.files import atomic_path, make_folder, write_text
from xmag.progress import progress_bar
from xmag.provenance import Provenance
from xmag.training import Ranks

_logger = logging.getLogger(__name__)

_BEGUN = "targets.begun.json"
_MOST_SHARDS = 64
"""Limit of shards in a folder: each file stays open while the cache is read."""
_LEAST_SHARD_REGIONS = 512
_AHEAD = 3
"""Batches to prefetch while the teacher works on one."""

PLAIN = TargetSettings()


def keep_targets(
    folder: str | os.PathLike[str],
    source: RegionSource,
    manifest: Manifest,
    teacher: Teacher,
    *,
    settings: TargetSettings = PLAIN,
    device: str | torch.device = "auto",
    batch_regions: int = 16,
    progress: bool | None = None,
    ranks: Ranks | None = None,
) -> KeptTargets:
    """Compute a teacher's features of all regions into a cache in `folder`; returns it opened.

    A finished folder is used as it is, an unfinished one is resumed after its last whole shard.
    Regions that cannot be decoded are logged, counted (`KeptTargets.good`), and have no features.

    Args:
        folder: The folder of the cache; it is made.
        source: Reader of the regions of `manifest`, such as SlideRegions.
        manifest: The regions.
        teacher: The teacher; for several teachers, a folder each.
        settings: Plain or augmented features, with or without low views.
        device: Device on which views are augmented and cut into tiles: best the teacher's.
        batch_regions: Regions of a batch, 16 tiles each.
        progress: Show a bar on stderr; None does on a terminal and in a notebook.
        ranks: The processes that share the work, each some of the shards; all of them call this.

    Raises:
        MismatchError: The folder holds targets of something else; the message lists what differs.
        ModelError: The teacher gives values that are not finite, or too large for float16.
        OutputError: The folder cannot be written; what was whole stays.
    """
    if len(source) != len(manifest) or batch_regions < 1:
        raise InputError(
            f"the source has {len(source)} regions, the manifest {len(manifest)}, and"
            f" batch_regions is {batch_regions}; expected the same number, and at least 1"
        )
    folder, ranks = Path(folder), ranks or Ranks()
    if not (folder / DONE).is_file():
        job = _Job(
            folder, source, manifest, teacher, settings, resolve_device(device), batch_regions
        )
        shard_regions = _begun(job, ranks)
        shards = list(enumerate(shards_of(len(manifest), shard_regions)))[ranks.rank :: ranks.world]
        missing = [(number, rows) for number, rows in shards if not _is_whole(job, number, rows)]
        total = sum(len(rows) for _, rows in missing)
        shown = progress if ranks.leads else False
        with progress_bar(shown, total=total, desc=teacher.name, unit="region") as bar:
            for number, rows in missing:
                for done in _write_shard(job, number, rows):
                    bar.update(done)
        ranks.wait()
        if ranks.leads:
            _finish(job, shard_regions)
        ranks.wait()
    return KeptTargets(folder, manifest=manifest, teacher=teacher, settings=settings)


@dataclass(frozen=True, slots=True)
class _Job:
    folder: Path
    source: RegionSource
    manifest: Manifest
    teacher: Teacher
    settings: TargetSettings
    device: torch.device
    batch_regions: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the features of a region: (K, 16, D)."""
        return (self.settings.count, TILES, self.teacher.dim)

    def header(self, shard_regions: int, damaged: Sequence[int] = ()) -> Header:
        """The cache's header: sizes, damaged regions and provenance."""
        fingerprint = fingerprint_of(self.manifest, self.teacher.identity, self.settings.to_dict())
        record = {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "xmag": version("xmag"),
            "torch": version("torch"),
            "device": self.device.type,
        }
        return Header(
            regions=len(self.manifest),
            dim=self.teacher.dim,
            shard_regions=shard_regions,
            damaged=tuple(damaged),
            provenance=Provenance(fingerprint, record),
        )


def _begun(job: _Job, ranks: Ranks) -> int:
    """Start or resume a cache folder; returns its regions per shard."""
    path = job.folder / _BEGUN
    if ranks.leads and not path.is_file():
        make_folder(job.folder)
        size = max(_LEAST_SHARD_REGIONS, -(-len(job.manifest) // _MOST_SHARDS))
        write_text(path, job.header(size).to_json())
    ranks.wait()
    begun = read_header(path)
    check_same(job.folder, job.header(0).provenance.fingerprint, begun.provenance)
    return begun.shard_regions


def _is_whole(job: _Job, number: int, rows: range) -> bool:
    """Whether a shard is complete: all its files there, and of the expected shape."""
    features = mapped(job.folder / shard_name("features", number))
    if features is None or features.shape != (len(rows), *job.shape):
        return False
    return not job.settings.low or (job.folder / shard_name("low", number)).is_file()


def _write_shard(job: _Job, number: int, rows: range) -> Iterator[int]:
    """Write a shard; yields the number of regions of each batch done, for progress."""
    with ExitStack() as stack:

        def opened(kind: str, shape: tuple[int, ...], descr: str) -> IO[bytes]:
            path = stack.enter_context(atomic_path(job.folder / shard_name(kind, number)))
            file = stack.enter_context(path.open("wb"))
            header = {"descr": descr, "fortran_order": False, "shape": (len(rows), *shape)}
            np.lib.format.write_array_header_1_0(file, header)
            return file

        # The low views get their name first: a shard with features is a whole one.
        features = opened("features", job.shape, "<f2")
        low = opened("low", (LOW_PX, LOW_PX, 3), "|u1") if job.settings.low else None
        for regions, good, views in _read_ahead(job, rows):
            kept = np.full((len(regions), *job.shape), np.nan, np.float16)
            lows = np.zeros((len(regions), LOW_PX, LOW_PX, 3), np.uint8)
            if views is not None:
                high = torch.from_numpy(views).to(job.device)
                kept[good] = _features(job, regions[good], high)
                if low is not None:
                    lows[good] = low_view(high).cpu().numpy()
            features.write(kept.tobytes())
            if low is not None:
                low.write(lows.tobytes())
            yield len(regions)


def _read_ahead(
    job: _Job, rows: range
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], Regions | None]]:
    """Prefetched batches of a shard: region numbers, rows of undamaged ones, and their views."""
    numbers = np.arange(rows.start, rows.stop)
    batches = deque(
        numbers[at : at + job.batch_regions] for at in range(0, len(numbers), job.batch_regions)
    )
    pool = ThreadPoolExecutor(_AHEAD, thread_name_prefix="xmag-targets")
    try:
        pending: deque[tuple[NDArray[np.int64], Future[Any]]] = deque()
        while batches or pending:
            while batches and len(pending) < _AHEAD:
                batch = batches.popleft()
                pending.append((batch, pool.submit(read_intact, job.source, batch.tolist())))
            batch, reading = pending.popleft()
            good, views = reading.result()
            for region in np.delete(batch, good).tolist():
                _log_damage(job, region)
            yield batch, good, views
    finally:
        pool.shutdown(cancel_futures=True)


def _features(job: _Job, regions: NDArray[np.int64], high: Tensor) -> NDArray[np.float16]:
    """Compute the features of regions in all variants: float16 (B, K, 16, D)."""
    kept = np.empty((len(regions), *job.shape), np.float16)
    for variant in range(job.settings.count):
        tiles = teacher_tiles(augment(high, job.settings.draws(regions, variant)))
        found = job.teacher.features(tiles)
        if found.shape != (len(tiles), job.teacher.dim):
            raise ModelError(
                f"{job.teacher.name} returned {tuple(found.shape)} for {len(tiles)} tiles; expected"
                f" ({len(tiles)}, {job.teacher.dim})"
            )
        half = found.half()
        if not torch.isfinite(half).all():
            raise ModelError(
                f"{job.teacher.name} gave features that are not finite in float16 (largest"
                f" {float(found.abs().max()):.3g}); check its weights, or scale its features down"
            )
        kept[:, variant] = half.view(len(regions), TILES, -1).cpu().numpy()
    return kept


def _log_damage(job: _Job, region: int) -> None:
    place = job.manifest.region(region)
    path = job.manifest.sources[place.source].path
    reasons = job.source.damaged if isinstance(job.source, SlideRegions) else {}
    _logger.warning(
        "region %d (%s at %d, %d) cannot be decoded and is left out: %s",
        *(region, path, place.x, place.y, reasons.get(region, "it is damaged")),
    )


def _finish(job: _Job, shard_regions: int) -> None:
    """Write the header, which marks the cache as complete."""
    damaged: list[int] = []
    for number, rows in enumerate(shards_of(len(job.manifest), shard_regions)):
        features = mapped(job.folder / shard_name("features", number))
        assert features is not None
        lost = np.isnan(features[:, 0, 0, 0])
        damaged += (np.flatnonzero(lost) + rows.start).tolist()
    write_text(job.folder / DONE, job.header(shard_regions, damaged).to_json())
    (job.folder / _BEGUN).unlink()
