"""Bags of embeddings, in memory or in files read when indexed, and datasets to train on."""

import hashlib
import os
import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from xmag.bag import SUFFIXES, FeatureBag
from xmag.bag.formats import dense
from xmag.errors import BagError, InputError, MismatchError, XmagWarning
from xmag.geometry import TileGeometry
from xmag.mil.heads import hashables
from xmag.provenance import Provenance
from xmag.training.splits import require_disjoint, units

BagLike = FeatureBag | NDArray[Any] | torch.Tensor | str | os.PathLike[str]
"""Accepted types of a bag: embeddings (N, D), or the path of a file for FeatureBag.load."""

_WANTED = (
    "expected a list of FeatureBags, arrays (N, D), tensors (N, D) or paths of"
    f" {', '.join(SUFFIXES)} files"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bag:
    """A bag: embeddings float32 (N, D), with coords, provenance and tile geometry where known."""

    features: NDArray[np.float32]
    coords: NDArray[np.int64] | None = None
    provenance: Provenance | None = None
    tiles: TileGeometry | None = None


class Bags(Sequence[Bag]):
    """Sequence of the bags in `X`: those in memory as they are, files read at each access."""

    def __init__(self, bags: Any, *, what: str = "X") -> None:
        if isinstance(bags, FeatureBag | str | bytes | os.PathLike | Mapping) or not (
            hasattr(bags, "__iter__") and hasattr(bags, "__len__")
        ):
            raise InputError(f"{what} is a {type(bags).__name__}; {_WANTED}. A single bag is [bag]")
        self._bags = list(bags)
        self._what = what

    def __len__(self) -> int:
        return len(self._bags)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        try:
            return _read(self._bags[index])
        except InputError as error:
            raise InputError(f"{self.name(index)}: {error}") from error
        except (BagError, OSError) as error:
            raise BagError(f"{self.name(index)}: {error}") from error

    def read_like(self, index: int, width: int, fingerprint: Mapping[str, Any] | None) -> Bag:
        """Read a bag; raises where its width or fingerprint differs from that of the training."""
        bag: Bag = self[index]
        reference = "those of the training"
        require_width(bag.features.shape[1], width, self.name(index), reference)
        if fingerprint is not None:
            expected = Provenance(fingerprint, {})
            require_same_origin(bag.provenance, expected, self.name(index), reference)
        return bag

    def warn_of_empty(self, rows: Sequence[int], what: str) -> None:
        """Warn of bags without tiles; `what` says what is done about them."""
        if len(rows):
            more = f" and {len(rows) - 3} more" if len(rows) > 3 else ""
            names = ", ".join(self.name(row) for row in rows[:3])
            warnings.warn(f"{names}{more} have no tiles; {what}", XmagWarning, stacklevel=4)

    def name(self, index: int) -> str:
        """The name of a bag in messages: its index, and its file where it has one."""
        bag = self._bags[index]
        file = f" ({os.fspath(bag)})" if isinstance(bag, str | os.PathLike) else ""
        return f"{self._what}[{index}]{file}"


@dataclass(frozen=True, slots=True, kw_only=True)
class BagFacts:
    """Metadata of a bag without its features: tile count, width, digest, provenance."""

    tiles: int
    width: int
    digest: bytes
    provenance: Provenance | None

    @classmethod
    def of(cls, bag: Bag) -> Self:
        """The metadata of a bag."""
        digest = hashlib.blake2b(f"{bag.features.shape}".encode(), digest_size=16)
        digest.update(np.ascontiguousarray(bag.features).data)
        tiles, width = bag.features.shape
        return cls(tiles=tiles, width=width, digest=digest.digest(), provenance=bag.provenance)


@dataclass(slots=True, kw_only=True)
class BagDataset:
    """Dataset of bags with targets and loss weights; indexing reads the features of a bag.

    Attributes:
        bags: The bags of an argument X, of which the dataset has some.
        facts: Of each of `bags`, as it was when it was first read.
        groups: The patient of each of `bags`; None where they are not known.
        rows: The place in `bags` of each bag of the dataset, int64 (n,).
        targets: (n, ...).
        weights: float64 (n,).
    """

    bags: Bags
    facts: list[BagFacts]
    groups: list[Hashable] | None
    rows: NDArray[np.int64]
    targets: NDArray[Any]
    weights: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> NDArray[np.float32]:
        """The features of a bag, float32 (N, D); BagError where its file is no longer the same."""
        row = int(self.rows[index])
        features: NDArray[np.float32] = self.bags[row].features
        expected = (self.facts[row].tiles, self.facts[row].width)
        if features.shape != expected:
            raise BagError(
                f"{self.bags.name(row)} has changed while training: features {features.shape},"
                f" at first {expected}. Leave the files alone, and fit again"
            )
        return features

    @property
    def width(self) -> int:
        """The width D of all features."""
        return self.facts[0].width

    @property
    def provenance(self) -> Provenance | None:
        """The provenance of the first bag that has one; None without any."""
        return next((f.provenance for f in self.facts if f.provenance is not None), None)

    def digests(self) -> list[bytes]:
        """The digest of the features of each bag of the dataset."""
        return [self.facts[row].digest for row in self.rows]

    def units(self) -> NDArray[np.int64]:
        """Ids of what must not be split, int64 (n,): patients, and equal bags."""
        groups = None if self.groups is None else [self.groups[row] for row in self.rows]
        return units(groups, self.digests())

    def subset(self, mask: NDArray[np.bool_]) -> Self:
        """The part of the dataset where `mask`, bool (n,), is True."""
        return replace(
            self, rows=self.rows[mask], targets=self.targets[mask], weights=self.weights[mask]
        )

    def require_separate(self, validation: "BagDataset") -> None:
        """Raise where validation bags do not match these, or share features or a patient."""
        names = [validation.bags.name(row) for row in range(len(validation.bags))]
        for name, fact in zip(names, validation.facts, strict=True):
            require_width(fact.width, self.width, name, self.bags.name(0))
            require_same_origin(fact.provenance, self.provenance, name, "the bags to train on")
        own = [names[row] for row in validation.rows]
        require_disjoint(self.digests(), validation.digests(), names=own, what="features")
        if self.groups is not None and validation.groups is not None:
            require_disjoint(self.groups, validation.groups, names=names, what="the patient")


def nonempty(X: Any, what: str) -> Bags:  # noqa: N803
    """The bags of an argument that may not be empty; `what` is its name."""
    bags = Bags(X, what=what)
    if len(bags) == 0:
        raise InputError(f"{what} is empty; expected one bag or more")
    return bags


def read_dataset(bags: Bags, targets: NDArray[Any], groups: Any, *, of: str = "") -> BagDataset:
    """Dataset of the bags that have tiles; `of` is put before the name of `groups` in messages.

    Reads every bag once, so that what is wrong with one is known before hours of training. Warns
    of bags without tiles. Raises BagError for a bag that cannot be read, is not finite or is of
    another width, and MismatchError for one that was made otherwise.
    """
    if groups is not None:
        groups = hashables(groups, count=len(bags), what=f"{of}groups")
    facts: list[BagFacts] = []
    made: int | None = None
    for row, bag in enumerate(bags):
        fact = BagFacts.of(bag)
        facts.append(fact)
        require_width(fact.width, facts[0].width, bags.name(row), bags.name(0))
        if made is None:
            made = row if fact.provenance is not None else None
        else:
            origin = facts[made].provenance
            require_same_origin(fact.provenance, origin, bags.name(row), bags.name(made))
    tiles = np.array([fact.tiles for fact in facts])
    bags.warn_of_empty(np.flatnonzero(tiles == 0).tolist(), "they are left out of the training")
    rows = np.flatnonzero(tiles)
    return BagDataset(
        bags=bags, facts=facts, groups=groups, rows=rows, targets=targets[rows],
        weights=np.ones(len(rows)),
    )  # fmt: skip


def require_width(width: int, expected: int, name: str, reference: str) -> None:
    """Raise BagError where the feature width of a bag differs from that of the others."""
    if width != expected:
        raise BagError(
            f"{name} has {width} features a tile, and {reference} {expected}; expected the same:"
            " extract all with the same model"
        )


def require_same_origin(
    provenance: Provenance | None, expected: Provenance | None, name: str, reference: str
) -> None:
    """Raise MismatchError where both provenances are known and their fingerprints differ."""
    if provenance is None or expected is None:
        return
    if differences := expected.differences(provenance):
        raise MismatchError(
            f"{name} was made otherwise than {reference}: {'; '.join(differences)}. Extract the"
            " features again with the same model and settings"
        )


def _read(source: Any) -> Bag:
    if isinstance(source, str | os.PathLike):
        return _of_feature_bag(FeatureBag.load(source))
    if isinstance(source, FeatureBag):
        return _of_feature_bag(source)
    if isinstance(source, torch.Tensor):
        return Bag(features=_checked(dense(source)))
    if isinstance(source, np.ndarray):
        return Bag(features=_checked(source))
    raise InputError(f"it is a {type(source).__name__}; {_WANTED}")


def _of_feature_bag(bag: FeatureBag) -> Bag:
    return Bag(features=bag.features, coords=bag.coords, provenance=bag.provenance, tiles=bag.tiles)


def _checked(array: NDArray[Any]) -> NDArray[np.float32]:
    if array.dtype.kind not in "iuf" or array.ndim != 2 or array.shape[1] == 0:
        raise BagError(
            f"it is an array of {array.dtype} with shape {array.shape}; expected floats (N, D), a"
            " row for each tile"
        )
    with np.errstate(over="ignore"):
        features: NDArray[np.float32] = array.astype(np.float32, copy=False)
    finite = np.isfinite(features)
    if not finite.all():
        row, column = np.argwhere(~finite)[0]
        raise BagError(
            f"it holds {array[row, column]} in row {row} ({np.count_nonzero(~finite)} such values"
            " in all); expected values that are finite in float32: extract the features again, or"
            " leave the bag out"
        )
    return features
