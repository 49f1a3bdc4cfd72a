"""Cache of teacher features on disk, since a teacher costs some thirty times its student.

A folder holds the features of one teacher for the regions of one manifest, in shards that are each
written whole, and `targets.json`, which is written last: without it the folder is not done.
Features are float16 (regions, K, 16, D), the 16 tiles of a region row by row.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xmag import records
from xmag.distill.augment import NONE, PAPER, Augmentation, Draws, draw
from xmag.distill.manifest import Manifest
from xmag.distill.teachers import Teacher
from xmag.distill.views import LOW_PX, SIDE
from xmag.errors import InputError, MismatchError
from xmag.provenance import PREPROCESSING_VERSION, Provenance

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
