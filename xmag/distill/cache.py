"""Cache of teacher features: computed once, kept in files, and read while training.

A cache is a folder with one teacher's features of the regions of one manifest as they are, without
augmentation: in shards that are each written whole, and `targets.json`, which is written last;
without it the cache is not finished. Features are float16 (regions, 1, 16, D), the 16 tiles of a
region row by row.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xmag import records
from xmag.devices import resolve_device
from xmag.distill.dataset import (
    Numbers,
    RegionBatch,
    RegionLoader,
    RegionSource,
    SlideRegions,
    checked_numbers,
)
from xmag.distill.regions import Manifest
from xmag.distill.teachers import Teacher
from xmag.distill.views import LOW_MPP, LOW_PX, SIDE, check_kernel, low_view, teacher_tiles
from xmag.errors import DamagedSlideError, InputError, MismatchError, ModelError
from xmag.files import atomic_path, make_folder, write_text
from xmag.geometry import Resample, TileSpec
from xmag.progress import ProgressOption, progress_bar
from xmag.provenance import PREPROCESSING_VERSION, Provenance
from xmag.tiles.stream import default_threads
from xmag.training import Ranks
from xmag.training.augmentation import Draws, token_sources
from xmag.urls import base_name

_DONE = "targets.json"
_BEGUN = "targets.begun.json"
_FORMAT = records.Format(
    name="xmag-kept-targets",
    version=1,
    writer="cache_features",
    remedy="cache the features again, in another folder",
)
_TILES = SIDE * SIDE
_MOST_SHARDS = 64
"""Limit of shards in a folder: each file stays open while the cache is read."""
_LEAST_SHARD_REGIONS = 512
_AHEAD = 3
"""Batches to prefetch while the teacher works on one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSettings:
    """Settings of a feature cache: with `low`, the low views of the regions are cached too.

    They take 150 kB a region, and training then reads no slide; `resample` is the kernel that they
    are made with, which has to be the student's. With `turned` the features of a
    tile are the mean of those of its eight positions, four turns of it and of its mirror image:
    right for a student that is shown flips and turns, and eight times the work.
    """

    low: bool = False
    turned: bool = False
    resample: Resample = "lanczos"

    def __post_init__(self) -> None:
        check_kernel(self.resample)

    def to_dict(self) -> dict[str, Any]:
        """The settings as the fingerprint of a cache has them, plain JSON values."""
        # The rest tells version 1, which had augmented features as well, that these are not.
        kept = {"kind": "plain", "variants": 1, "augmentation": None, "seed": None, "low": self.low}
        kept |= {"turned": True} if self.turned else {}
        # Features alone are those of any kernel, and version 1 had Lanczos low views alone.
        named = self.low and self.resample != "lanczos"
        return kept | ({"resample": self.resample} if named else {})

    @classmethod
    def of(cls, kept: Mapping[str, Any]) -> Self:
        """The settings that a fingerprint has."""
        return cls(
            low=kept["low"],
            turned=kept.get("turned", False),
            resample=kept.get("resample", "lanczos"),
        )


class FeatureCache:
    """Feature cache, mapped into memory; a context manager. Made by `cache_features`.

    `dim` is the length D of a feature, `provenance` records manifest, teacher and settings (its
    fingerprint has to match), and `good` marks, bool (N,), the regions that could be decoded; the
    features of the others are NaN.

    Args:
        folder: The folder that `cache_features` wrote.
        manifest: The expected manifest.
        teacher: The expected teacher; None accepts any.
        settings: The expected settings; None accepts any.

    Raises:
        InputError: The folder holds no finished cache, its files were damaged, or version 1 of xmag
            wrote it, of augmented views.
        MismatchError: It was made of something else; the message lists the differences.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        manifest: Manifest,
        teacher: Teacher | None = None,
        settings: CacheSettings | None = None,
    ) -> None:
        self.folder = Path(folder)
        header = _read_header(self.folder / _DONE, manifest, teacher, settings)
        self.provenance: Provenance = header.provenance
        self.settings = CacheSettings.of(header.provenance.fingerprint["kept"])
        self.dim = header.dim
        self.good: NDArray[np.bool_] = np.ones(header.regions, np.bool_)
        self.good[list(header.damaged)] = False
        self._files = _Files(
            self.folder, header.regions, header.shard_regions, _layout(header.dim, self.settings)
        )
        self._arrays = {kind: self._files.read(kind) for kind in self._files.layout}

    def __len__(self) -> int:
        """The number of regions, including damaged ones."""
        return len(self.good)

    def features(self, regions: Sequence[int] | Numbers) -> Tensor:
        """Cached features of regions: float16 (B, 16, D) on the CPU.

        Raises InputError for numbers that do not exist, and for a region that is damaged.
        """
        return self._rows("features", regions)[:, 0]

    def low(self, regions: Sequence[int] | Numbers) -> Tensor:
        """Cached low views of regions: uint8 (B, 224, 224, 3) on the CPU.

        Raises InputError where they are not cached, and as `features` does.
        """
        if not self.settings.low:
            raise InputError(
                f"{self.folder.name} holds features alone; cache the low views too with"
                " CacheSettings(low=True), or read the slides"
            )
        return self._rows("low", regions)

    def close(self) -> None:
        """Close the memory maps. Closing twice is fine."""
        self._arrays = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _rows(self, kind: str, regions: Sequence[int] | Numbers) -> Tensor:
        """Rows of the arrays of all shards, copied."""
        if not self._arrays:
            raise InputError(f"{self.folder.name} is closed; use it inside its `with` block")
        numbers = checked_numbers(regions, len(self))
        if not self.good[numbers].all():
            raise InputError(
                f"region {numbers[~self.good[numbers]][0]} is damaged and has no features; leave it"
                " out: `good` marks those that have"
            )
        shape, dtype = self._files.layout[kind]
        result = np.empty((len(numbers), *shape), dtype)
        shards, rows = np.divmod(numbers, self._files.shard_regions)
        for shard in np.unique(shards).tolist():
            here = shards == shard
            result[here] = self._arrays[kind][shard][rows[here]]
        return torch.from_numpy(result)


class LowViews:
    """Region source of the low views in a feature cache."""

    def __init__(self, cache: FeatureCache) -> None:
        self._cache = cache

    def __len__(self) -> int:
        return len(self._cache)

    def read(self, indices: Sequence[int], /) -> NDArray[np.uint8]:
        """Read low views, uint8 (B, 224, 224, 3); DamagedSlideError where a region has none."""
        if not self._cache.good[list(indices)].all():
            raise DamagedSlideError(
                f"of regions {list(indices)} some were damaged when the features were cached"
            )
        return self._cache.low(indices).numpy()


class CachedFeatures:
    """Teacher features from a cache; `weight` is of its losses.

    They are flipped and turned with the student's image, but do not follow its colour jitter.
    """

    needs_pixels = False

    def __init__(self, cache: FeatureCache, weight: float = 1.0) -> None:
        fingerprint = cache.provenance.to_dict()["fingerprint"]
        self.cache, self.weight, self.dim = cache, weight, cache.dim
        self.name = str(fingerprint["teacher"]["name"])
        self.identity: Mapping[str, Any] = {**fingerprint["teacher"], "kept": fingerprint["kept"]}

    def __repr__(self) -> str:
        regions = f"{len(self.cache.good):,} regions"
        return f"<CachedFeatures of {base_name(self.name)!r}: {regions}, {self.dim} features>"

    def available(self, regions: Numbers) -> NDArray[np.bool_]:
        """Mask of the regions that were not damaged when features were computed: bool (B,)."""
        return np.asarray(self.cache.good[regions])

    def targets(
        self,
        regions: Numbers,
        draws: Draws,
        high: Tensor | None,  # noqa: ARG002 (its features are computed)
    ) -> Tensor:
        """Cached features, flipped and turned by `draws`: float16 (B, 16, dim), on the CPU."""
        features = self.cache.features(regions).numpy()
        # As `map_tokens`, by NumPy: PyTorch would wait for all cores, which are busy decoding.
        cells = token_sources(SIDE, draws).numpy()
        return torch.from_numpy(features[np.arange(len(cells))[:, None], cells])

    def check(self, student: TileSpec) -> None:
        """Raise InputError where the student's tiles are not the low views of regions."""
        if (student.size_px, student.mpp) != (LOW_PX, LOW_MPP):
            raise InputError(
                f"the student's tiles are {student.size_px} px at {student.mpp:g} µm/px, and the"
                f" cached features of {self.name} go with {LOW_PX} px at {LOW_MPP:g} µm/px;"
                " expected a student of such tiles"
            )
        kept = self.cache.settings
        if kept.low and kept.resample != student.resample:
            raise InputError(
                f"the low views cached with the features of {self.name} are made with the kernel"
                f" {kept.resample!r}, and the student's tiles with {student.resample!r}; expected"
                " the same. Cache the features again, with the student's kernel as resample"
            )


def cache_features(
    folder: str | os.PathLike[str],
    source: RegionSource,
    manifest: Manifest,
    teacher: Teacher,
    *,
    settings: CacheSettings | None = None,
    device: str | torch.device = "auto",
    batch_regions: int = 16,
    progress: ProgressOption = None,
    ranks: Ranks | None = None,
) -> FeatureCache:
    """Compute a teacher's features of all regions into a cache in `folder`; returns it opened.

    A finished folder is used as it is, an unfinished one is resumed after its last whole shard.
    Regions that cannot be decoded are logged, counted (`FeatureCache.good`), and have no features.

    Args:
        folder: The folder of the cache; it is made.
        source: Reader of the regions of `manifest`, such as SlideRegions.
        manifest: The regions.
        teacher: The teacher; for several teachers, a folder each.
        settings: Whether to cache the low views too; None does not.
        device: Device on which regions are cut into tiles: best the teacher's.
        batch_regions: Regions of a batch, 16 tiles each.
        progress: Show a bar on stderr; None does on a terminal and in a notebook. A function is
            called with each `xmag.progress.ProgressEvent` instead.
        ranks: The processes that share the work, each some of the shards; all of them call this.

    Raises:
        MismatchError: The folder holds features of something else; the message lists what differs.
        ModelError: The teacher gives values that are not finite, or too large for float16.
        OutputError: The folder cannot be written; what was whole stays.
    """
    if len(source) != len(manifest) or batch_regions < 1:
        raise InputError(
            f"the source has {len(source)} regions, the manifest {len(manifest)}, and"
            f" batch_regions is {batch_regions}; expected the same number, and at least 1"
        )
    folder, settings = Path(folder), settings or CacheSettings()
    if not (folder / _DONE).is_file():
        place = resolve_device(device)
        writer = _Writer(folder, source, manifest, teacher, settings, place, batch_regions)
        writer.write(ranks or Ranks(), progress)
    return FeatureCache(folder, manifest=manifest, teacher=teacher, settings=settings)


@dataclass(frozen=True, slots=True)
class _Writer:
    """Writer of a feature cache: the arguments of `cache_features`."""

    folder: Path
    source: RegionSource
    manifest: Manifest
    teacher: Teacher
    settings: CacheSettings
    device: torch.device
    batch_regions: int

    def write(self, ranks: Ranks, progress: ProgressOption) -> None:
        """Start or resume the folder, write this rank's shards, and finish it on rank 0."""
        begun = self.folder / _BEGUN
        if ranks.leads and not begun.is_file():
            make_folder(self.folder)
            size = max(_LEAST_SHARD_REGIONS, -(-len(self.manifest) // _MOST_SHARDS))
            self._write_header(begun, size)
        ranks.wait()
        header = _read_header(begun, self.manifest, self.teacher, self.settings)
        layout = _layout(self.teacher.dim, self.settings)
        files = _Files(self.folder, header.regions, header.shard_regions, layout)
        missing = [
            number
            for number in range(ranks.rank, len(files.shards()), ranks.world)
            if any(files.mapped(kind, number) is None for kind in layout)
        ]
        total = sum(len(files.shards()[number]) for number in missing)
        shown = progress if ranks.leads else False
        with progress_bar(shown, total=total, desc=self.teacher.name, unit="region") as bar:
            for number in missing:
                for done in self._write_shard(files, number):
                    bar.update(done)
        ranks.wait()
        if ranks.leads:
            parts = [np.isnan(features[:, 0, 0, 0]) for features in files.read("features")]
            damaged = np.flatnonzero(np.concatenate(parts)) if parts else ()
            self._write_header(self.folder / _DONE, files.shard_regions, [int(n) for n in damaged])
            begun.unlink()
        ranks.wait()

    def _write_shard(self, files: "_Files", number: int) -> Iterator[int]:
        """Write a shard; yields the number of regions of each batch done, for progress."""
        rows = files.shards()[number]
        numbers = np.arange(rows.start, rows.stop)
        parts = np.split(numbers, range(self.batch_regions, len(numbers), self.batch_regions))
        with ExitStack() as stack:
            into: dict[str, IO[bytes]] = {}
            # The low views get their name first: a shard with features is a whole one.
            for kind, (shape, dtype) in files.layout.items():
                path = stack.enter_context(atomic_path(files.path(kind, number)))
                into[kind] = stack.enter_context(path.open("wb"))
                header = {"descr": dtype, "fortran_order": False, "shape": (len(rows), *shape)}
                np.lib.format.write_array_header_1_0(into[kind], header)
            for part, batch in zip(parts, self._batches(parts), strict=True):
                whole = np.isin(part, batch.regions)
                for kind, computed in self._computed(batch).items():
                    shape, dtype = files.layout[kind]
                    values = np.full((len(part), *shape), np.nan if dtype == "<f2" else 0, dtype)
                    values[whole] = computed.cpu().numpy()
                    into[kind].write(values.tobytes())
                yield len(part)

    def _batches(self, parts: Sequence[Numbers]) -> Iterator[RegionBatch]:
        source = self.source
        loader = RegionLoader(
            source,
            side=self.manifest.spec.size_px,
            threads=source.threads if isinstance(source, SlideRegions) else default_threads(),
            ahead=_AHEAD,
            device=self.device,
            manifest=self.manifest,
        )
        return loader.read((part, np.zeros_like(part)) for part in parts)

    def _computed(self, batch: RegionBatch) -> dict[str, Tensor]:
        """The features of whole regions, float16 (B, 1, 16, D), and their low views if cached."""
        high = batch.pixels.to(self.device, non_blocking=True)
        wanted = (len(high) * _TILES, self.teacher.dim)
        found = self._features(teacher_tiles(high)) if len(high) else torch.empty(wanted)
        if found.shape != wanted:
            raise ModelError(
                f"{self.teacher.name} returned {tuple(found.shape)} for {wanted[0]} tiles; expected"
                f" {wanted}"
            )
        half = found.half()
        if not torch.isfinite(half).all():
            raise ModelError(
                f"{self.teacher.name} gave features that are not finite in float16 (largest"
                f" {float(found.abs().max()):.3g}); check its weights, or scale its features down"
            )
        features = {"features": half.view(len(high), 1, _TILES, self.teacher.dim)}
        settings = self.settings
        return features | ({"low": low_view(high, settings.resample)} if settings.low else {})

    def _features(self, tiles: Tensor) -> Tensor:
        """The teacher's features of tiles, or the mean over their eight positions."""
        if not self.settings.turned:
            return self.teacher.features(tiles)
        total: Tensor | float = 0.0
        for mirrored in (tiles, tiles.flip(2)):
            for turns in range(4):
                total = total + self.teacher.features(mirrored.rot90(turns, (1, 2)).contiguous())
        assert isinstance(total, Tensor)
        return total / 8

    def _write_header(self, path: Path, shard_regions: int, damaged: Sequence[int] = ()) -> None:
        fingerprint = _fingerprint(self.manifest, self.teacher.identity, self.settings.to_dict())
        record = {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "xmag": version("xmag"),
            "torch": version("torch"),
            "device": self.device.type,
        }
        header = _Header(
            regions=len(self.manifest),
            dim=self.teacher.dim,
            shard_regions=shard_regions,
            damaged=tuple(damaged),
            provenance=Provenance(fingerprint, record),
        )
        write_text(path, _FORMAT.dumps(records.plain(header), indent=1, sort_keys=True) + "\n")


@dataclass(frozen=True, slots=True)
class _Files:
    """Array files of a cache; `layout` names the arrays: shape of a region's row, and dtype."""

    folder: Path
    regions: int
    shard_regions: int
    layout: Mapping[str, tuple[tuple[int, ...], str]]

    def shards(self) -> list[range]:
        """The range of region numbers of each shard."""
        step = self.shard_regions
        return [range(at, min(at + step, self.regions)) for at in range(0, self.regions, step)]

    def path(self, kind: str, number: int) -> Path:
        """The file of a shard of an array."""
        return self.folder / f"{kind}-{number:03d}.npy"

    def mapped(self, kind: str, number: int) -> NDArray[Any] | None:
        """Memory-mapped shard of an array; None where it is missing, incomplete, or another."""
        shape, dtype = self.layout[kind]
        try:
            found: NDArray[Any] = np.load(
                self.path(kind, number), mmap_mode="r", allow_pickle=False
            )
        except (OSError, ValueError, EOFError):
            return None
        fits = found.shape == (len(self.shards()[number]), *shape) and found.dtype == dtype
        return found if fits else None

    def read(self, kind: str) -> list[NDArray[Any]]:
        """All shards of an array, memory-mapped; InputError where one is not whole."""
        arrays = []
        for number in range(len(self.shards())):
            array = self.mapped(kind, number)
            if array is None:
                shape, dtype = self.layout[kind]
                raise InputError(
                    f"{self.path(kind, number).name} of the cache is not there, or not"
                    f" {np.dtype(dtype)} {(len(self.shards()[number]), *shape)}; delete {_DONE} and"
                    " cache the features again"
                )
            arrays.append(array)
        return arrays


def _layout(dim: int, settings: CacheSettings) -> dict[str, tuple[tuple[int, ...], str]]:
    layout: dict[str, tuple[tuple[int, ...], str]] = {"features": ((1, _TILES, dim), "<f2")}
    return layout | ({"low": ((LOW_PX, LOW_PX, 3), "|u1")} if settings.low else {})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Header:
    """Header of a feature cache: the content of `targets.json`."""

    regions: int
    dim: int
    shard_regions: int
    damaged: tuple[int, ...]
    provenance: Provenance


def _read_header(
    path: Path, manifest: Manifest, teacher: Teacher | None, settings: CacheSettings | None
) -> _Header:
    """The header of a cache of these, where they are given; see `FeatureCache` for the errors."""
    folder = path.parent.name
    if not path.is_file():
        raise InputError(
            f"{os.fspath(path.parent)!r} holds no feature cache, or none that is finished; make it"
            " with cache_features(), which goes on where it was stopped"
        )
    fields = _FORMAT.load(path)
    with _FORMAT.reading(path.name):
        header = records.from_dict(_Header, fields)
        found = header.provenance.fingerprint
        augmented = found["kept"]["kind"] != "plain"
        expected = _fingerprint(
            manifest,
            teacher.identity if teacher else found["teacher"],
            settings.to_dict() if settings else found["kept"],
        )
    if augmented:
        raise InputError(
            f"{folder!r} holds features of augmented views, which version 1 of xmag wrote and this"
            " one no longer reads; cache them again with cache_features(), in another folder"
        )
    if differences := Provenance(expected, {}).differences(header.provenance):
        raise MismatchError(
            f"the features in {folder!r} were made of something else: {'; '.join(differences)}."
            " Cache them again in another folder, or train as they were made"
        )
    return header


def _fingerprint(
    manifest: Manifest, teacher: Mapping[str, Any], kept: Mapping[str, Any]
) -> dict[str, Any]:
    """Fingerprint of a cache: manifest, teacher, settings and preprocessing; it has to match."""
    return {
        "manifest_sha256": manifest.sha256,
        "teacher": teacher,
        "kept": kept,
        "preprocessing_version": PREPROCESSING_VERSION,
    }
