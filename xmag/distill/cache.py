"""Teacher features, computed online or cached in files.

A folder holds the features of one teacher for the regions of one manifest, in shards that are each
written whole, and `targets.json`, which is written last: without it the folder is not done.
Features are float16 (regions, K, 16, D), the 16 tiles of a region row by row.
"""

import json
import logging
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol, Self, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xmag import records
from xmag.devices import resolve_device
from xmag.distill.dataset import Regions, RegionSource, SlideRegions, read_intact
from xmag.distill.regions import Manifest
from xmag.distill.teachers import Teacher
from xmag.distill.views import (
    LOW_MPP,
    LOW_PX,
    NONE,
    PAPER,
    SIDE,
    Augmentation,
    Draws,
    augment,
    draw,
    low_view,
    map_tokens,
    teacher_tiles,
)
from xmag.errors import DamagedSlideError, InputError, MismatchError, ModelError
from xmag.files import atomic_path, make_folder, write_text
from xmag.geometry import TileSpec
from xmag.progress import progress_bar
from xmag.provenance import PREPROCESSING_VERSION, Provenance
from xmag.training import Ranks

DONE = "targets.json"
TILES = SIDE * SIDE

_FORMAT = records.Format(
    name="xmag-kept-targets", version=1, writer="keep_targets", remedy="keep the targets again"
)
_VIEW = 0
"""View number in the draws of variants, whose epoch is the index of the variant."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetSettings:
    """Settings of a feature cache: plain or augmented, with or without low views.

    With `variants` None it is the features of the region as it is ("plain"), which flips and turns
    can be applied to afterwards (`map_tokens`), but no change of colour. With a number K it is the
    features of K augmented views ("augmented"), drawn with `seed` from `augmentation`. With `low`
    the low view is kept too (150 kB a region), so that no slide is read while training.
    """

    variants: int | None = None
    augmentation: Augmentation = PAPER
    seed: int = 0
    low: bool = False

    def __post_init__(self) -> None:
        if self.variants is not None and self.variants < 1:
            raise InputError(
                f"variants is {self.variants!r}; expected at least 1, or None for the region as it"
                " is"
            )

    def draws(
        self,
        regions: Sequence[int] | NDArray[np.int64],
        variants: Sequence[int] | NDArray[np.int64] | int,
    ) -> Draws:
        """Augmentations of the regions for the teacher; none where plain."""
        if self.variants is None:
            return draw(0, 0, regions, _VIEW, augmentation=NONE)
        return draw(self.seed, variants, regions, _VIEW, augmentation=self.augmentation)

    @property
    def count(self) -> int:
        """The number K of variants of each region."""
        return self.variants or 1

    def to_dict(self) -> dict[str, Any]:
        """The settings that determine the cached features, as plain JSON values."""
        drawn = self.variants is not None
        return {
            "kind": "augmented" if drawn else "plain",
            "variants": self.count,
            "augmentation": self.augmentation.to_dict() if drawn else None,
            "seed": self.seed if drawn else None,
            "low": self.low,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TargetSettings":
        """Settings from a dict of `to_dict`."""
        if values["kind"] == "plain":
            return cls(low=values["low"])
        return cls(
            variants=values["variants"],
            augmentation=Augmentation.from_dict(values["augmentation"]),
            seed=values["seed"],
            low=values["low"],
        )


class KeptTargets:
    """Feature cache, mapped into memory; a context manager. Made by `keep_targets`.

    `provenance` records manifest, teacher and settings (its fingerprint has to match), and
    `good` marks, bool (N,), the regions that could be decoded; the features of the others are NaN.

    Args:
        folder: The folder that `keep_targets` wrote.
        manifest: The expected manifest.
        teacher: The expected teacher; None accepts any.
        settings: The expected settings; None accepts any.

    Raises:
        InputError: The folder holds no finished targets, or its files were damaged.
        MismatchError: They were made of something else; the message lists the differences.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        manifest: Manifest,
        teacher: Teacher | None = None,
        settings: TargetSettings | None = None,
    ) -> None:
        self.folder = Path(folder)
        header = read_header(self.folder / DONE)
        self.provenance: Provenance = header.provenance
        found = self.provenance.fingerprint
        expected = fingerprint_of(
            manifest,
            found["teacher"] if teacher is None else teacher.identity,
            found["kept"] if settings is None else settings.to_dict(),
        )
        check_same(self.folder, expected, self.provenance)
        self.settings = TargetSettings.from_dict(found["kept"])
        self._shape = (header.regions, self.settings.count, TILES, header.dim)
        self.good: NDArray[np.bool_] = np.ones(header.regions, np.bool_)
        self.good[list(header.damaged)] = False
        self._shard_regions = header.shard_regions
        self._features = self._mapped("features", self._shape[1:], np.dtype(np.float16))
        low_shape = (LOW_PX, LOW_PX, 3)
        self._low = self._mapped("low", low_shape, np.dtype(np.uint8)) if self.has_low else []

    def __len__(self) -> int:
        """The number of regions, including damaged ones."""
        return self._shape[0]

    @property
    def variants(self) -> int:
        """The number K of variants of each region."""
        return self._shape[1]

    @property
    def dim(self) -> int:
        """The length D of a feature."""
        return self._shape[3]

    @property
    def augmented(self) -> bool:
        """Whether the variants are augmented views; False for a single plain one."""
        return self.settings.variants is not None

    @property
    def has_low(self) -> bool:
        """Whether low views are cached too."""
        return self.settings.low

    def features(
        self,
        regions: Sequence[int] | NDArray[np.int64],
        variants: Sequence[int] | NDArray[np.int64] | int = 0,
    ) -> Tensor:
        """Cached features of regions: float16 (B, 16, D), CPU; one variant for all, or for each.

        Raises InputError for numbers that do not exist, and for a region that is damaged.
        """
        rows = self._checked(regions)
        chosen = np.broadcast_to(np.asarray(variants, np.int64), rows.shape)
        if len(chosen) and not (chosen.min() >= 0 and chosen.max() < self.variants):
            raise InputError(
                f"variants {chosen.min()} to {chosen.max()} are asked for; expected numbers from 0"
                f" to {self.variants - 1}"
            )
        result = np.empty((len(rows), TILES, self.dim), np.float16)
        for shard, inside in self._by_shard(rows):
            result[inside] = self._features[shard][
                rows[inside] - shard * self._shard_regions, chosen[inside]
            ]
        return torch.from_numpy(result)

    def draws(
        self,
        regions: Sequence[int] | NDArray[np.int64],
        variants: Sequence[int] | NDArray[np.int64] | int = 0,
    ) -> Draws:
        """Augmentations that the cached features were computed with, to apply to the low views.

        None is applied where the targets are plain.
        """
        return self.settings.draws(regions, variants)

    def variants_for(
        self, regions: Sequence[int] | NDArray[np.int64], turn: int
    ) -> NDArray[np.int64]:
        """Index of the variant of each region for its `turn`-th view since training began.

        With ``turn = epoch * views + view`` all K come in turn, and the views of an epoch differ.
        """
        return np.asarray((np.asarray(regions, np.int64) + turn) % self.variants)

    def low(self, regions: Sequence[int] | NDArray[np.int64]) -> Tensor:
        """Cached low views of regions, unaugmented: uint8 (B, 224, 224, 3) on the CPU.

        Raises InputError where they are not kept.
        """
        if not self.has_low:
            raise InputError(
                f"{self.folder.name} keeps features alone; keep the low views too with"
                " TargetSettings(low=True), or read the slides"
            )
        rows = self._checked(regions)
        result = np.empty((len(rows), LOW_PX, LOW_PX, 3), np.uint8)
        for shard, inside in self._by_shard(rows):
            result[inside] = self._low[shard][rows[inside] - shard * self._shard_regions]
        return torch.from_numpy(result)

    def mean(self) -> Tensor:
        """Mean feature of all tiles of undamaged regions: float32 (D,)."""
        total, count = np.zeros(self.dim), 0
        for shard, features in enumerate(self._features):
            first = shard * self._shard_regions
            for at in np.flatnonzero(self.good[first : first + len(features)]).tolist():
                total += features[at].sum((0, 1), dtype=np.float64)
                count += self.variants * TILES
        return torch.from_numpy((total / max(count, 1)).astype(np.float32))

    def close(self) -> None:
        """Close the memory maps. Closing twice is fine."""
        self._features, self._low = [], []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _checked(self, regions: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        rows = np.asarray(regions, np.int64).reshape(-1)
        if not self._features and len(self):
            raise InputError(f"{self.folder.name} is closed; use it inside its `with` block")
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(self)):
            raise InputError(
                f"regions {rows.min()} to {rows.max()} are asked for; expected numbers from 0 to"
                f" {len(self) - 1}"
            )
        if not self.good[rows].all():
            bad = rows[~self.good[rows]]
            raise InputError(
                f"region {bad[0]} is damaged and has no features; leave it out: `good` marks those"
                " that have"
            )
        return rows

    def _by_shard(self, rows: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
        shards = rows // self._shard_regions
        for shard in np.unique(shards).tolist():
            yield shard, np.flatnonzero(shards == shard)

    def _mapped(
        self, kind: str, shape: tuple[int, ...], dtype: "np.dtype[Any]"
    ) -> list[NDArray[Any]]:
        arrays = []
        for number, rows in enumerate(shards_of(self._shape[0], self._shard_regions)):
            path = self.folder / shard_name(kind, number)
            array = mapped(path)
            if array is None or array.shape != (len(rows), *shape) or array.dtype != dtype:
                seen = "not there" if array is None else f"{array.dtype} {array.shape}"
                raise InputError(
                    f"{path.name} of the kept targets is {seen}; expected {dtype}"
                    f" {(len(rows), *shape)}. Delete {DONE} and keep them again"
                )
            arrays.append(array)
        return arrays


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """Header of a feature cache: the content of `targets.json`."""

    regions: int
    dim: int
    shard_regions: int
    damaged: tuple[int, ...]
    provenance: Provenance

    def to_json(self) -> str:
        """The header as JSON text."""
        return _FORMAT.dumps(records.plain(self), indent=1, sort_keys=True) + "\n"


def read_header(path: Path) -> Header:
    """Read the header of a cache. Raises InputError where it is missing or not understood."""
    if not path.is_file():
        raise InputError(
            f"{os.fspath(path.parent)!r} holds no kept targets, or none that are finished; make"
            " them with keep_targets(), which goes on where it was stopped"
        )
    fields = _FORMAT.load(path)
    with _FORMAT.reading(path.name):
        return records.from_dict(Header, fields)


def fingerprint_of(
    manifest: Manifest, teacher: Mapping[str, Any], kept: Mapping[str, Any]
) -> dict[str, Any]:
    """Fingerprint of a cache: manifest, teacher, settings and preprocessing; it has to match."""
    return {
        "manifest_sha256": manifest.sha256,
        "teacher": teacher,
        "kept": kept,
        "preprocessing_version": PREPROCESSING_VERSION,
    }


def check_same(folder: Path, expected: Mapping[str, Any], there: Provenance) -> None:
    """Raise MismatchError where the fingerprint of a cache is not the expected one."""
    if differences := Provenance(expected, {}).differences(there):
        raise MismatchError(
            f"the kept targets in {folder.name!r} were made of something else: "
            + "; ".join(differences)
            + ". Keep them again in another folder, or train as they were made"
        )


def shards_of(regions: int, shard_regions: int) -> list[range]:
    """The range of region numbers of each shard."""
    return [
        range(first, min(first + shard_regions, regions))
        for first in range(0, regions, shard_regions)
    ]


def shard_name(kind: str, number: int) -> str:
    """The name of the file of a shard; `kind` is "features" or "low"."""
    return f"{kind}-{number:03d}.npy"


def mapped(path: Path) -> NDArray[Any] | None:
    """Memory-map the array in a .npy file; None where it is missing or incomplete."""
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return array


class LowViews:
    """Region source of the low views in a feature cache."""

    def __init__(self, kept: KeptTargets) -> None:
        self._kept = kept

    def __len__(self) -> int:
        return len(self._kept)

    def read(self, indices: Sequence[int], /) -> NDArray[np.uint8]:
        """Read low views, uint8 (B, 224, 224, 3); DamagedSlideError where a region has none."""
        if not self._kept.good[list(indices)].all():
            raise DamagedSlideError(
                f"of regions {list(indices)} some were damaged when the features were kept"
            )
        return self._kept.low(indices).numpy()


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


Numbers = NDArray[np.int64]


@runtime_checkable
class Lesson(Protocol):
    """Protocol of a source of teacher features (targets) for regions."""

    @property
    def name(self) -> str:
        """The teacher's name in logs and checkpoints."""
        ...

    @property
    def dim(self) -> int:
        """Length of a feature vector."""
        ...

    @property
    def identity(self) -> Mapping[str, Any]:
        """Identity of the teacher (and cache), as plain JSON values."""
        ...

    @property
    def weight(self) -> float:
        """Weight of the teacher's losses."""
        ...

    @property
    def sees_pixels(self) -> bool:
        """Whether `targets` needs the augmented high views."""
        ...

    @property
    def variants(self) -> TargetSettings | None:
        """Settings of cached augmented variants; None where any augmentation will do."""
        ...

    def knows(self, regions: Numbers) -> NDArray[np.bool_]:
        """Mask of the regions that have targets: bool (B,)."""
        ...

    def targets(
        self, regions: Numbers, draws: Draws, high: Tensor | None, variants: Numbers
    ) -> Tensor:
        """Targets of augmented regions: (B, 16, dim), 0 for a region without targets.

        float32 or float16, on any device. `high` are the augmented high views, where `sees_pixels`;
        `variants` (B,) are the indices of cached variants, where it has `variants`.
        """
        ...

    def check(self, student: TileSpec) -> None:
        """Raise InputError where a student of this tile specification cannot use the targets."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineLesson:
    """Online teacher: computes the features of every augmented view."""

    teacher: Teacher
    weight: float = 1.0

    @property
    def name(self) -> str:
        """The teacher's name."""
        return self.teacher.name

    @property
    def dim(self) -> int:
        """Length of the teacher's feature vectors."""
        return self.teacher.dim

    @property
    def identity(self) -> Mapping[str, Any]:
        """The teacher's identity, as plain JSON values."""
        return self.teacher.identity

    @property
    def sees_pixels(self) -> bool:
        """True: the teacher computes features of pixels."""
        return True

    @property
    def variants(self) -> TargetSettings | None:
        """None: any augmentation will do."""
        return None

    def knows(self, regions: Numbers) -> NDArray[np.bool_]:
        """Mask of the regions that have targets: all, bool (B,)."""
        return np.ones(len(regions), np.bool_)

    def targets(
        self,
        regions: Numbers,  # noqa: ARG002 (it looks at the pixels)
        draws: Draws,  # noqa: ARG002
        high: Tensor | None,
        variants: Numbers,  # noqa: ARG002
    ) -> Tensor:
        """Compute the features of the 16 tiles of each view in `high`: float32 (B, 16, dim)."""
        assert high is not None
        features = self.teacher.features(teacher_tiles(high)).float()
        return features.view(len(high), SIDE**2, self.dim)

    def check(self, student: TileSpec) -> None:
        """Raise InputError where a tile of the student is not 4 x 4 of the teacher's."""
        seen = self.teacher.tile_spec
        if seen.size_px != student.size_px or abs(seen.mpp * SIDE / student.mpp - 1) > 1e-6:
            raise InputError(
                f"the teacher {self.name} sees {seen.size_px} px at {seen.mpp:g} µm/px and the"
                f" student {student.size_px} px at {student.mpp:g} µm/px; expected the same px at"
                f" {SIDE} times the µm/px, so that a tile of the student is {SIDE} x {SIDE} of the"
                " teacher's"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptLesson:
    """Cached teacher features; see `keep_targets`.

    Features of unaugmented regions ("plain") are flipped and turned with the student's image, but
    do not follow its colour jitter. Those of augmented variants go with images augmented likewise,
    all variants in turn.
    """

    kept: KeptTargets
    weight: float = 1.0

    @property
    def name(self) -> str:
        """The teacher's name."""
        return str(self.kept.provenance.fingerprint["teacher"]["name"])

    @property
    def dim(self) -> int:
        """Length of the teacher's feature vectors."""
        return self.kept.dim

    @property
    def identity(self) -> Mapping[str, Any]:
        """Identity of the teacher, and settings of the cache, as plain JSON values."""
        found = self.kept.provenance.to_dict()["fingerprint"]
        return {**found["teacher"], "kept": found["kept"]}

    @property
    def sees_pixels(self) -> bool:
        """False: the features are cached, so no pixels are needed."""
        return False

    @property
    def variants(self) -> TargetSettings | None:
        """Settings of cached augmented variants; None where the features are plain."""
        return self.kept.settings if self.kept.augmented else None

    def knows(self, regions: Numbers) -> NDArray[np.bool_]:
        """Mask of the regions that were not damaged when features were computed: bool (B,)."""
        return np.asarray(self.kept.good[regions])

    def targets(
        self,
        regions: Numbers,
        draws: Draws,
        high: Tensor | None,  # noqa: ARG002 (its features are computed)
        variants: Numbers,
    ) -> Tensor:
        """Cached features, flipped and turned by `draws` if plain: float16 (B, 16, dim), CPU."""
        known = self.knows(regions)
        chosen = variants[known] if self.kept.augmented else 0
        result = torch.zeros(len(regions), SIDE**2, self.dim, dtype=torch.float16)
        result[torch.from_numpy(known)] = self.kept.features(regions[known], chosen)
        if self.kept.augmented:
            return result
        grid = result.view(len(regions), SIDE, SIDE, self.dim)
        return map_tokens(grid, draws).reshape(result.shape)

    def check(self, student: TileSpec) -> None:
        """Raise InputError where the student's tiles are not the low views of regions."""
        if (student.size_px, student.mpp) != (LOW_PX, LOW_MPP):
            raise InputError(
                f"the student's tiles are {student.size_px} px at {student.mpp:g} µm/px, and the"
                f" kept features of {self.name} go with {LOW_PX} px at {LOW_MPP:g} µm/px; expected"
                " a student of such tiles"
            )


def check_lessons(lessons: Sequence[Lesson], student: TileSpec) -> None:
    """Raise InputError where teachers are incompatible with each other, or with the student."""
    names = [lesson.name for lesson in lessons]
    if not names or len(set(names)) < len(names):
        raise InputError(
            f"the teachers are {names}; expected at least one, and a name of its own for each"
        )
    for lesson in lessons:
        lesson.check(student)
    drawn = {lesson.name: lesson.variants for lesson in lessons if lesson.variants is not None}
    if len({json.dumps({**v.to_dict(), "low": False}) for v in drawn.values()}) > 1:
        raise InputError(
            f"the teachers {sorted(drawn)} were kept for different augmentations; expected the same"
            " variants, seed and augmentation, since all teachers look at the same image"
        )
