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
from typing import IO, Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xmag import records
from xmag.devices import resolve_device
from xmag.distill.dataset import Numbers, RegionBatch, RegionLoader, RegionSource, SlideRegions
from xmag.distill.regions import Manifest
from xmag.distill.teachers import Teacher
from xmag.distill.views import LOW_MPP, LOW_PX, SIDE, low_view, teacher_tiles
from xmag.errors import DamagedSlideError, InputError, MismatchError, ModelError
from xmag.files import atomic_path, make_folder, write_text
from xmag.geometry import TileSpec
from xmag.progress import progress_bar
from xmag.provenance import PREPROCESSING_VERSION, Provenance
from xmag.tiles import default_threads
from xmag.training import Ranks
from xmag.training.augmentation import Draws, map_tokens

DONE = "targets.json"
TILES = SIDE * SIDE

_BEGUN = "targets.begun.json"
_FORMAT = records.Format(
    name="xmag-kept-targets",
    version=1,
    writer="cache_features",
    remedy="cache the features again, in another folder",
)
_MOST_SHARDS = 64
"""Limit of shards in a folder: each file stays open while the cache is read."""
_LEAST_SHARD_REGIONS = 512
_AHEAD = 3
"""Batches to prefetch while the teacher works on one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSettings:
    """Settings of a feature cache: with `low`, the low views of the regions are cached too.

    They take 150 kB a region, and training then reads no slide.
    """

    low: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The settings as the fingerprint of a cache has them, plain JSON values."""
        # The rest tells version 1, which had augmented features as well, that these are not.
        return {"kind": "plain", "variants": 1, "augmentation": None, "seed": None, "low": self.low}


class FeatureCache:
    """Feature cache, mapped into memory; a context manager. Made by `cache_features`.

    `provenance` records manifest, teacher and settings (its fingerprint has to match), and
    `good` marks, bool (N,), the regions that could be decoded; the features of the others are NaN.

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
        header = _read_header(self.folder / DONE)
        self.provenance: Provenance = header.provenance
        found = self.provenance.fingerprint
        self.settings = settings or CacheSettings(low=found["kept"]["low"])
        identity = found["teacher"] if teacher is None else teacher.identity
        _check_same(self.folder, _fingerprint(manifest, identity, self.settings), self.provenance)
        self.dim = header.dim
        self.good: NDArray[np.bool_] = np.ones(header.regions, np.bool_)
        self.good[list(header.damaged)] = False
        self._shard_regions = header.shard_regions
        self._arrays = {
            kind: [
                self._mapped(kind, number, rows)
                for number, rows in enumerate(_shards(header.regions, header.shard_regions))
            ]
            for kind in _layout(self.dim, self.settings)
        }

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

    def mean(self) -> Tensor:
        """Mean feature of all tiles of undamaged regions: float32 (D,)."""
        total, count = np.zeros(self.dim), max(int(self.good.sum()) * TILES, 1)
        for features, rows in zip(self._arrays["features"], self._shards(), strict=True):
            for at in np.flatnonzero(self.good[rows.start : rows.stop]).tolist():
                total += features[at].sum((0, 1), dtype=np.float64)
        return torch.from_numpy((total / count).astype(np.float32))

    def close(self) -> None:
        """Close the memory maps. Closing twice is fine."""
        self._arrays = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _shards(self) -> list[range]:
        return _shards(len(self), self._shard_regions)

    def _rows(self, kind: str, regions: Sequence[int] | Numbers) -> Tensor:
        """Rows of the arrays of all shards, copied."""
        numbers = np.asarray(regions, np.int64).reshape(-1)
        if not self._arrays:
            raise InputError(f"{self.folder.name} is closed; use it inside its `with` block")
        if len(numbers) and not (numbers.min() >= 0 and numbers.max() < len(self)):
            raise InputError(
                f"regions {numbers.min()} to {numbers.max()} are asked for; expected numbers from 0"
                f" to {len(self) - 1}"
            )
        if not self.good[numbers].all():
            raise InputError(
                f"region {numbers[~self.good[numbers]][0]} is damaged and has no features; leave it"
                " out: `good` marks those that have"
            )
        shape, kind_of_number = _layout(self.dim, self.settings)[kind]
        result = np.empty((len(numbers), *shape), kind_of_number)
        shards, rows = np.divmod(numbers, self._shard_regions)
        for shard in np.unique(shards).tolist():
            here = shards == shard
            result[here] = self._arrays[kind][shard][rows[here]]
        return torch.from_numpy(result)

    def _mapped(self, kind: str, number: int, rows: range) -> NDArray[Any]:
        path = self.folder / _shard_name(kind, number)
        shape, kind_of_number = _layout(self.dim, self.settings)[kind]
        array = _mapped(path)
        if array is None or array.shape != (len(rows), *shape) or array.dtype != kind_of_number:
            seen = "not there" if array is None else f"{array.dtype} {array.shape}"
            raise InputError(
                f"{path.name} of the cache is {seen}; expected {np.dtype(kind_of_number)}"
                f" {(len(rows), *shape)}. Delete {DONE} and cache the features again"
            )
        return array


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


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedFeatures:
    """Teacher features from a cache; `weight` is of its losses.

    They are flipped and turned with the student's image, but do not follow its colour jitter.
    """

    cache: FeatureCache
    weight: float = 1.0
    needs_pixels: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """The teacher's name."""
        return str(self.cache.provenance.fingerprint["teacher"]["name"])

    @property
    def dim(self) -> int:
        """Length of the teacher's feature vectors."""
        return self.cache.dim

    @property
    def identity(self) -> Mapping[str, Any]:
        """Identity of the teacher, and settings of the cache, as plain JSON values."""
        found = self.cache.provenance.to_dict()["fingerprint"]
        return {**found["teacher"], "kept": found["kept"]}

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
        grid = self.cache.features(regions).view(len(regions), SIDE, SIDE, self.dim)
        return map_tokens(grid, draws).flatten(1, 2)

    def check(self, student: TileSpec) -> None:
        """Raise InputError where the student's tiles are not the low views of regions."""
        if (student.size_px, student.mpp) != (LOW_PX, LOW_MPP):
            raise InputError(
                f"the student's tiles are {student.size_px} px at {student.mpp:g} µm/px, and the"
                f" cached features of {self.name} go with {LOW_PX} px at {LOW_MPP:g} µm/px;"
                " expected a student of such tiles"
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
    progress: bool | None = None,
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
        progress: Show a bar on stderr; None does on a terminal and in a notebook.
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
    folder, ranks = Path(folder), ranks or Ranks()
    settings = settings or CacheSettings()
    if not (folder / DONE).is_file():
        place = resolve_device(device)
        writer = _Writer(folder, source, manifest, teacher, settings, place, batch_regions)
        shard_regions = writer.begun(ranks)
        shards = list(enumerate(_shards(len(manifest), shard_regions)))
        missing = [
            (number, rows)
            for number, rows in shards[ranks.rank :: ranks.world]
            if not writer.is_whole(number, rows)
        ]
        total = sum(len(rows) for _, rows in missing)
        shown = progress if ranks.leads else False
        with progress_bar(shown, total=total, desc=teacher.name, unit="region") as bar:
            for number, rows in missing:
                for done in writer.write_shard(number, rows):
                    bar.update(done)
        ranks.wait()
        if ranks.leads:
            writer.finish(shard_regions)
        ranks.wait()
    return FeatureCache(folder, manifest=manifest, teacher=teacher, settings=settings)


@dataclass(frozen=True, slots=True)
class _Writer:
    """Writer of a feature cache."""

    folder: Path
    source: RegionSource
    manifest: Manifest
    teacher: Teacher
    settings: CacheSettings
    device: torch.device
    batch_regions: int

    def begun(self, ranks: Ranks) -> int:
        """Start or resume the folder; returns its regions per shard."""
        path = self.folder / _BEGUN
        if ranks.leads and not path.is_file():
            make_folder(self.folder)
            size = max(_LEAST_SHARD_REGIONS, -(-len(self.manifest) // _MOST_SHARDS))
            self._write_header(path, size)
        ranks.wait()
        header = _read_header(path)
        _check_same(self.folder, self._fingerprint(), header.provenance)
        return header.shard_regions

    def is_whole(self, number: int, rows: range) -> bool:
        """Whether a shard is complete: all its files there, and of the expected shape."""
        features = _mapped(self.folder / _shard_name("features", number))
        if features is None or features.shape != (len(rows), 1, TILES, self.teacher.dim):
            return False
        return not self.settings.low or (self.folder / _shard_name("low", number)).is_file()

    def write_shard(self, number: int, rows: range) -> Iterator[int]:
        """Write a shard; yields the number of regions of each batch done, for progress."""
        layout = _layout(self.teacher.dim, self.settings)
        numbers = np.arange(rows.start, rows.stop)
        parts = [
            numbers[at : at + self.batch_regions]
            for at in range(0, len(numbers), self.batch_regions)
        ]
        with ExitStack() as stack:
            files: dict[str, IO[bytes]] = {}
            # The low views get their name first: a shard with features is a whole one.
            for kind, (shape, descr) in layout.items():
                path = stack.enter_context(atomic_path(self.folder / _shard_name(kind, number)))
                files[kind] = stack.enter_context(path.open("wb"))
                header = {"descr": descr, "fortran_order": False, "shape": (len(rows), *shape)}
                np.lib.format.write_array_header_1_0(files[kind], header)
            for part, batch in zip(parts, self._batches(parts), strict=True):
                computed = self._computed(batch)
                for kind, (shape, descr) in layout.items():
                    empty = np.nan if kind == "features" else 0
                    values = np.full((len(part), *shape), empty, descr)
                    values[np.isin(part, batch.regions)] = computed[kind]
                    files[kind].write(values.tobytes())
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

    def _computed(self, batch: RegionBatch) -> dict[str, NDArray[Any]]:
        """The features of whole regions, float16 (B, 1, 16, D), and their low views if cached."""
        high = batch.pixels.to(self.device, non_blocking=True)
        wanted = (len(high) * TILES, self.teacher.dim)
        found = self.teacher.features(teacher_tiles(high)) if len(high) else torch.empty(wanted)
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
        computed = {"features": half.view(len(high), 1, TILES, self.teacher.dim).cpu().numpy()}
        if self.settings.low:
            computed["low"] = low_view(high).cpu().numpy()
        return computed

    def finish(self, shard_regions: int) -> None:
        """Write the header, which marks the cache as finished."""
        damaged: list[int] = []
        for number, rows in enumerate(_shards(len(self.manifest), shard_regions)):
            features = _mapped(self.folder / _shard_name("features", number))
            assert features is not None
            damaged += (np.flatnonzero(np.isnan(features[:, 0, 0, 0])) + rows.start).tolist()
        self._write_header(self.folder / DONE, shard_regions, damaged)
        (self.folder / _BEGUN).unlink()

    def _fingerprint(self) -> dict[str, Any]:
        return _fingerprint(self.manifest, self.teacher.identity, self.settings)

    def _write_header(self, path: Path, shard_regions: int, damaged: Sequence[int] = ()) -> None:
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
            provenance=Provenance(self._fingerprint(), record),
        )
        write_text(path, _FORMAT.dumps(records.plain(header), indent=1, sort_keys=True) + "\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Header:
    """Header of a feature cache: the content of `targets.json`."""

    regions: int
    dim: int
    shard_regions: int
    damaged: tuple[int, ...]
    provenance: Provenance


def _read_header(path: Path) -> _Header:
    if not path.is_file():
        raise InputError(
            f"{os.fspath(path.parent)!r} holds no feature cache, or none that is finished; make it"
            " with cache_features(), which goes on where it was stopped"
        )
    fields = _FORMAT.load(path)
    with _FORMAT.reading(path.name):
        header = records.from_dict(_Header, fields)
        augmented = header.provenance.fingerprint["kept"]["kind"] != "plain"
    if augmented:
        raise InputError(
            f"{path.parent.name!r} holds features of augmented views, which version 1 of xmag wrote"
            " and this one no longer reads; cache them again with cache_features(), in another"
            " folder"
        )
    return header


def _fingerprint(
    manifest: Manifest, teacher: Mapping[str, Any], settings: CacheSettings
) -> dict[str, Any]:
    """Fingerprint of a cache: manifest, teacher, settings and preprocessing; it has to match."""
    return {
        "manifest_sha256": manifest.sha256,
        "teacher": teacher,
        "kept": settings.to_dict(),
        "preprocessing_version": PREPROCESSING_VERSION,
    }


def _check_same(folder: Path, expected: Mapping[str, Any], there: Provenance) -> None:
    """Raise MismatchError where the fingerprint of a cache is not the expected one."""
    if differences := Provenance(expected, {}).differences(there):
        raise MismatchError(
            f"the features in {folder.name!r} were made of something else: "
            + "; ".join(differences)
            + ". Cache them again in another folder, or train as they were made"
        )


def _layout(dim: int, settings: CacheSettings) -> dict[str, tuple[tuple[int, ...], str]]:
    """The arrays of a shard by name: shape for a region, and dtype."""
    layout: dict[str, tuple[tuple[int, ...], str]] = {"features": ((1, TILES, dim), "<f2")}
    return layout | ({"low": ((LOW_PX, LOW_PX, 3), "|u1")} if settings.low else {})


def _shards(regions: int, shard_regions: int) -> list[range]:
    """The range of region numbers of each shard."""
    return [
        range(first, min(first + shard_regions, regions))
        for first in range(0, regions, shard_regions)
    ]


def _shard_name(kind: str, number: int) -> str:
    return f"{kind}-{number:03d}.npy"


def _mapped(path: Path) -> NDArray[Any] | None:
    """Memory-map the array in a .npy file; None where it is missing or incomplete."""
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return array
