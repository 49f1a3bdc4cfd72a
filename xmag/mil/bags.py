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
from xmag.mil.heads import hashables
from xmag.provenance import Provenance
from xmag.training.splits import require_disjoint, units

BagLike = FeatureBag | NDArray[Any] | torch.Tensor | str | os.PathLike[str]
"""Accepted types of a bag: embeddings (N, D), or the path of a file for FeatureBag.load."""

Origin = tuple[int, Provenance | None]
"""Width D and provenance of a bag, in which the bags of a classifier agree."""

_WANTED = (
    "expected a list of FeatureBags, arrays (N, D), tensors (N, D) or paths of"
    f" {', '.join(SUFFIXES)} files"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bag:
    """A bag of which only the embeddings are known, float32 (N, D); see FeatureBag for others."""

    features: NDArray[np.float32]
    coords: None = None
    provenance: None = None
    tiles: None = None


class Bags:
    """The bags of an argument `what`: those in memory as they are, files read at each access.

    Raises InputError for anything but a list of `least` bags or more.
    """

    def __init__(self, bags: Any, *, what: str = "X", least: int = 0) -> None:
        if isinstance(bags, FeatureBag | str | bytes | os.PathLike | Mapping) or not (
            hasattr(bags, "__iter__") and hasattr(bags, "__len__")
        ):
            raise InputError(f"{what} is a {type(bags).__name__}; {_WANTED}. A single bag is [bag]")
        self._bags, self._what = list(bags), what
        if len(self) < least:
            raise InputError(f"{what} is empty; expected one bag or more")

    def __len__(self) -> int:
        return len(self._bags)

    def __getitem__(self, index: int) -> Bag | FeatureBag:
        try:
            return _read(self._bags[index])
        except InputError as error:
            raise InputError(f"{self.name(index)}: {error}") from error
        except (BagError, OSError) as error:
            raise BagError(f"{self.name(index)}: {error}") from error

    def read_matching(
        self, index: int, width: int, fingerprint: Mapping[str, Any] | None
    ) -> Bag | FeatureBag:
        """Read a bag; raises where its width or fingerprint differs from that of the training."""
        bag = self[index]
        expected = None if fingerprint is None else Provenance(fingerprint, {})
        require_same_origin(
            self.name(index), origin_of(bag), "those of the training", (width, expected)
        )
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


@dataclass(slots=True, kw_only=True)
class BagDataset:
    """Dataset of bags with targets and loss weights; indexing reads the features of a bag.

    Attributes:
        bags: The bags of an argument X, of which the dataset has some.
        tiles: The number of tiles of each of `bags` when it was first read.
        digests: The digest of the features of each of `bags`.
        groups: The patient of each of `bags`; None where they are not known.
        first: The first of `bags` with a provenance, with which all others agree; 0 without any.
        origin: The width D of all features, and the provenance of that bag, None without any.
        rows: The place in `bags` of each bag of the dataset, int64 (n,).
        targets: (n, ...).
        weights: float64 (n,).
    """

    bags: Bags
    tiles: list[int]
    digests: list[bytes]
    groups: list[Hashable] | None
    first: int
    origin: Origin
    rows: NDArray[np.int64]
    targets: NDArray[Any]
    weights: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> NDArray[np.float32]:
        """The features of a bag, float32 (N, D); BagError where its file is no longer the same."""
        row = int(self.rows[index])
        features = self.bags[row].features
        expected = (self.tiles[row], self.origin[0])
        if features.shape != expected:
            raise BagError(
                f"{self.bags.name(row)} has changed while training: features {features.shape},"
                f" at first {expected}. Leave the files alone, and fit again"
            )
        return features

    def units(self) -> NDArray[np.int64]:
        """Ids of what must not be split, int64 (n,): patients, and equal bags."""
        groups = None if self.groups is None else [self.groups[row] for row in self.rows]
        return units(groups, [self.digests[row] for row in self.rows])

    def subset(self, mask: NDArray[np.bool_]) -> Self:
        """The part of the dataset where `mask`, bool (n,), is True."""
        return replace(
            self, rows=self.rows[mask], targets=self.targets[mask], weights=self.weights[mask]
        )

    def require_separate(self, validation: "BagDataset") -> None:
        """Raise where validation bags do not match these, or share features or a patient."""
        names = [validation.bags.name(row) for row in range(len(validation.bags))]
        require_same_origin(
            names[validation.first], validation.origin, "the bags to train on", self.origin
        )
        require_disjoint(
            [self.digests[row] for row in self.rows],
            [validation.digests[row] for row in validation.rows],
            names=[names[row] for row in validation.rows],
            what="features",
        )
        if self.groups is not None and validation.groups is not None:
            require_disjoint(self.groups, validation.groups, names=names, what="the patient")


def read_dataset(bags: Bags, targets: NDArray[Any], groups: Any, *, of: str = "") -> BagDataset:
    """Dataset of the bags that have tiles; `of` is put before the name of `groups` in messages.

    Reads every bag once, so that what is wrong with one is known before hours of training. Warns
    of bags without tiles. Raises BagError for a bag that cannot be read, is not finite or is of
    another width, and MismatchError for one that was made otherwise.
    """
    if groups is not None:
        groups = hashables(groups, count=len(bags), what=f"{of}groups")
    tiles, digests, first, origin = [], [], 0, None
    for row in range(len(bags)):
        bag = bags[row]
        origin = origin or origin_of(bag)
        require_same_origin(bags.name(row), origin_of(bag), bags.name(first), origin)
        if origin[1] is None and bag.provenance is not None:
            first, origin = row, origin_of(bag)
        digest = hashlib.blake2b(f"{bag.features.shape}".encode(), digest_size=16)
        digest.update(np.ascontiguousarray(bag.features).data)
        tiles.append(len(bag.features))
        digests.append(digest.digest())
    assert origin is not None  # of one bag or more
    rows = np.flatnonzero(tiles)
    empty = [row for row, count in enumerate(tiles) if not count]
    bags.warn_of_empty(empty, "they are left out of the training")
    return BagDataset(
        bags=bags, tiles=tiles, digests=digests, groups=groups, first=first, origin=origin,
        rows=rows, targets=targets[rows], weights=np.ones(len(rows)),
    )  # fmt: skip


def origin_of(bag: Bag | FeatureBag) -> Origin:
    """The width and provenance of a bag."""
    return bag.features.shape[1], bag.provenance


def require_same_origin(name: str, seen: Origin, reference: str, expected: Origin) -> None:
    """Raise where the width and provenance of a bag are not those of a reference.

    BagError for another width, MismatchError where both provenances are known and their
    fingerprints differ.
    """
    if seen[0] != expected[0]:
        raise BagError(
            f"{name} has {seen[0]} features a tile, and {reference} {expected[0]}; expected the"
            " same: extract all with the same model"
        )
    if seen[1] is None or expected[1] is None:
        return
    if differences := expected[1].differences(seen[1]):
        raise MismatchError(
            f"{name} was made otherwise than {reference}: {'; '.join(differences)}. Extract the"
            " features again with the same model and settings"
        )


def _read(source: Any) -> Bag | FeatureBag:
    if isinstance(source, FeatureBag):
        return source
    if isinstance(source, str | os.PathLike):
        return FeatureBag.load(source)
    if isinstance(source, torch.Tensor):
        source = dense(source)
    if isinstance(source, np.ndarray):
        return Bag(features=_checked(source))
    raise InputError(f"it is a {type(source).__name__}; {_WANTED}")


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
