"""Cases: bags of embeddings, in memory or in files read when indexed; datasets to train on."""

import copy
import hashlib
import os
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray

from xmag.bag import SUFFIXES, FeatureBag
from xmag.bag.formats import dense
from xmag.errors import BagError, InputError, MismatchError, XmagWarning
from xmag.metrics.labels import Bools, Floats, Ints, as_labels
from xmag.provenance import Provenance
from xmag.training.splits import require_disjoint, units

SingleBag = FeatureBag | NDArray[Any] | torch.Tensor | str | os.PathLike[str]
"""Accepted types of a bag: embeddings (N, D), or the path of a file for FeatureBag.load."""

BagLike = SingleBag | Sequence[SingleBag]
"""Accepted types of a case: a bag, or a non-empty list or tuple of the bags of a patient."""

Fusion = Literal["early", "late"]
Features = NDArray[np.float32]

Origin = tuple[int, Provenance | None]
"""Width D and provenance of a bag, in which the bags of an estimator agree."""

_WANTED = (
    "expected a list of FeatureBags, arrays (N, D), tensors (N, D) or paths of"
    f" {', '.join(SUFFIXES)} files, or of lists of these: the bags of a case"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bag:
    """A bag of which only the embeddings are known, float32 (N, D); see FeatureBag for others."""

    features: Features
    coords: None = None
    provenance: None = None
    tiles: None = None


class Bags:
    """The cases of an argument `what`, each a list of bags: files are read at each access."""

    def __init__(self, cases: Any, *, what: str = "X", least: int = 0) -> None:
        if isinstance(cases, FeatureBag | str | bytes | os.PathLike | Mapping) or not (
            hasattr(cases, "__iter__") and hasattr(cases, "__len__")
        ):
            raise InputError(
                f"{what} is a {type(cases).__name__}; {_WANTED}. A single bag is [bag]"
            )
        if len(cases) < least:
            raise InputError(f"{what} is empty; expected one bag or more")
        cases = list(cases)
        self.has_lists = any(map(is_list, cases))
        self._names: list[str] = []  # of the cases
        self._cases: list[list[tuple[str, Any]]] = []  # name and source of each of their bags
        for index, case in enumerate(cases):
            name = f"{what}[{index}]"
            if is_list(case) and not case:
                raise InputError(f"{name} is an empty {type(case).__name__}; leave the case out")
            if is_list(case) and any(map(is_list, case)):
                raise InputError(f"{name}: it is a {type(case).__name__}; {_WANTED}")
            if is_list(case):
                bags = [(_named(f"{name}[{place}]", bag), bag) for place, bag in enumerate(case)]
            else:
                name = _named(name, case)
                bags = [(name, case)]
            self._names.append(name)
            self._cases.append(bags)

    def __len__(self) -> int:
        return len(self._cases)

    def __getitem__(self, index: int) -> list[Bag | FeatureBag]:
        """The bags of a case, in their order."""
        return [_read(name, source) for name, source in self._cases[index]]

    def alone(self) -> tuple["Bags", Ints]:
        """Every bag as a case of its own, n of them, and the case it is of, int64 (n,)."""
        apart = copy.copy(self)
        apart._cases = [[bag] for case in self._cases for bag in case]
        apart._names = [name for case in self._cases for name, _ in case]
        return apart, np.repeat(np.arange(len(self)), [len(case) for case in self._cases])

    def each(
        self, of: Callable[[list[Features]], Floats], of_empty: str, *, width: int, origin: Origin
    ) -> tuple[Floats, Bools]:
        """Results (n, width) of `of` for each case; 0 where it has no tiles, which the mask says.

        A warning says so too, and what their result is: `of_empty`.
        """
        found, empty = np.zeros((len(self), width)), np.zeros(len(self), dtype=np.bool_)
        for row in range(len(self)):
            bags = self.read_matching(row, origin)
            features = [bag.features for bag in bags if len(bag.features)]
            empty[row] = not features
            if features:
                found[row] = of(features)
        self.warn_of_empty(np.flatnonzero(empty).tolist(), of_empty)
        return found, empty

    def read_matching(self, index: int, origin: Origin) -> list[Bag | FeatureBag]:
        """Read a case; raises where it has not the width and fingerprint of the training."""
        bags = self[index]
        for slide, bag in enumerate(bags):
            name = self.name(index, slide)
            require_same_origin(name, origin_of(bag), "those of the training", origin)
        return bags

    def warn_of_empty(self, rows: Sequence[int], what: str) -> None:
        """Warn of cases without tiles; `what` says what is done about them."""
        if len(rows):
            more = f" and {len(rows) - 3} more" if len(rows) > 3 else ""
            names = ", ".join(self.name(row) for row in rows[:3])
            warnings.warn(f"{names}{more} have no tiles; {what}", XmagWarning, stacklevel=4)

    def name(self, index: int, slide: int | None = None) -> str:
        """The name of a case, or of a bag of it, in messages: its index, and its file if any."""
        return self._names[index] if slide is None else self._cases[index][slide][0]


def _named(name: str, bag: Any) -> str:
    return f"{name} ({os.fspath(bag)})" if isinstance(bag, str | os.PathLike) else name


def is_list(case: Any) -> bool:
    """Whether a case is a list or tuple of bags, and not a bag."""
    return isinstance(case, list | tuple)


def joined(bags: Sequence[Features]) -> tuple[Features, list[int]]:
    """Features of bags as one, (N, D), in an order that does not depend on how they are listed."""
    order = by_content(bags)
    return bags[0] if len(bags) == 1 else np.concatenate([bags[i] for i in order]), order


def mean_of(bags: Sequence[Features]) -> Floats:
    """The mean of all tiles of bags, (D,)."""
    sums = [bag.sum(axis=0, dtype=np.float64) for bag in bags]
    return np.asarray(sum(sums) / max(1, sum(map(len, bags))))


def by_content(bags: Sequence[Features]) -> list[int]:
    """The places of bags in an order that depends on their content alone."""
    if len(bags) == 1:
        return [0]
    return sorted(range(len(bags)), key=lambda i: bags[i].tobytes())


@dataclass(slots=True, kw_only=True)
class BagDataset:
    """Dataset of samples with targets and loss weights; indexing reads the features of one.

    A sample is a case, and with fusion="late" each of its bags.

    Attributes:
        bags: The samples of an argument X, of which the dataset has some.
        cases: The case that each of `bags` is of, int64 (n,).
        tiles: The number of tiles of each of `bags` when it was first read.
        digests: Of the features of each bag of each of `bags`; empty for a bag without tiles.
        means: The mean of the tiles of each of `bags`, (n, D); 0 for one without.
        groups: The patient of each of `bags`; None where they are not known.
        first: The name of the bag that `origin` is of: the first with a provenance, if any has one.
        origin: Width and provenance, with which all bags agree.
        rows: The place in `bags` of each sample of the dataset, int64 (n,).
        targets: (n, ...), of these samples.
        weights: float64 (n,), of these samples.
    """

    bags: Bags
    cases: Ints
    tiles: list[int]
    digests: list[list[bytes]]
    means: Floats
    groups: list[Hashable] | None
    first: str
    origin: Origin
    rows: Ints
    targets: NDArray[Any]
    weights: Floats

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Features:
        """The features of a sample, float32 (N, D); BagError where files are no longer the same."""
        return joined(self.features(index))[0]

    def features(self, index: int) -> list[Features]:
        """The features of each bag of a sample that has tiles; BagError as for `dataset[index]`."""
        row = int(self.rows[index])
        features = [bag.features for bag in self.bags[row]]
        shapes = {(sum(len(part) for part in features), part.shape[1]) for part in features}
        expected = (self.tiles[row], self.origin[0])
        if shapes != {expected}:
            raise BagError(
                f"{self.bags.name(row)} has changed while training: features"
                f" {str(sorted(shapes))[1:-1]}, at first {expected}. Leave the files alone"
            )
        return [part for part in features if len(part)]

    @property
    def slides(self) -> list[tuple[int, int, bytes]]:
        """Row, place in the case and digest of each bag with tiles that the dataset has."""
        return [
            (int(row), slide, digest)
            for row in self.rows
            for slide, digest in enumerate(self.digests[row])
            if digest
        ]

    def units(self) -> Ints:
        """Ids of what must not be split, int64 (n,): patients, cases, and equal bags."""
        ties: list[Hashable] = list(self.cases) if self.groups is None else self.groups
        slides = self.slides
        found = units([ties[row] for row, _, _ in slides], [digest for *_, digest in slides])
        unit_of = {row: unit for (row, _, _), unit in zip(slides, found, strict=True)}
        return np.array([unit_of[int(row)] for row in self.rows], dtype=np.int64)

    def subset(self, mask: Bools) -> Self:
        """The part of the dataset where `mask`, bool (n,), is True."""
        return replace(
            self, rows=self.rows[mask], targets=self.targets[mask], weights=self.weights[mask]
        )

    def require_separate(self, validation: "BagDataset") -> None:
        """Raise where validation bags do not match these, or share features or a patient."""
        require_same_origin(validation.first, validation.origin, "those to train on", self.origin)
        require_disjoint(
            [digest for *_, digest in self.slides],
            [digest for *_, digest in validation.slides],
            names=[validation.bags.name(row, slide) for row, slide, _ in validation.slides],
            what="features",
        )
        if self.groups is not None and validation.groups is not None:
            names = [validation.bags.name(row) for row in range(len(validation.bags))]
            require_disjoint(self.groups, validation.groups, names=names, what="the patient")


def read_dataset(
    bags: Bags, targets: NDArray[Any], groups: Any, *, fusion: Fusion = "early", of: str = ""
) -> BagDataset:
    """Dataset of the cases that have tiles, of which every bag is read once; see `fit`."""
    whole, cases = bags, np.arange(len(bags))
    if groups is not None:
        groups = as_labels(groups, f"{of}groups", n=len(bags))
    if fusion == "late":
        bags, cases = whole.alone()
        targets, groups = targets[cases], groups and [groups[case] for case in cases]
    tiles, digests, means, first, origin = [], [], [], bags.name(0, 0), None
    for row in range(len(bags)):
        slides = bags[row]
        for slide, bag in enumerate(slides):
            origin = origin or origin_of(bag)
            require_same_origin(bags.name(row, slide), origin_of(bag), first, origin)
            if origin[1] is None and bag.provenance is not None:
                first, origin = bags.name(row, slide), origin_of(bag)
        features = [bag.features for bag in slides]
        tiles.append(sum(map(len, features)))
        means.append(mean_of(features))
        digests.append([_digest(bag.features) for bag in slides])
    assert origin is not None  # of one bag or more
    filled = np.bincount(cases, weights=tiles, minlength=len(whole)) > 0
    whole.warn_of_empty(np.flatnonzero(~filled).tolist(), "they are left out")
    # Bags of a case come by content, so that a training does not depend on how they were listed.
    rows = np.array(
        sorted(np.flatnonzero(tiles), key=lambda row: (cases[row], digests[row])), dtype=np.int64
    )
    return BagDataset(
        bags=bags, cases=cases, tiles=tiles, digests=digests, means=np.array(means),
        groups=groups, first=first, origin=origin,
        rows=rows, targets=targets[rows], weights=np.ones(len(rows)),
    )  # fmt: skip


def _digest(features: Features) -> bytes:
    """The digest of a bag that has tiles; empty for one that has none, which is like no other."""
    if not len(features):
        return b""
    digest = hashlib.blake2b(f"{features.shape}".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(features).data)
    return digest.digest()


def origin_of(bag: Bag | FeatureBag) -> Origin:
    """The width and provenance of a bag."""
    return bag.features.shape[1], bag.provenance


def require_same_origin(name: str, seen: Origin, reference: str, expected: Origin) -> None:
    """Raise BagError for another width than expected, MismatchError for another fingerprint."""
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


def _read(name: str, source: Any) -> Bag | FeatureBag:
    """The bag that an accepted value stands for; errors begin with its name."""
    try:
        if isinstance(source, FeatureBag):
            return source
        if isinstance(source, str | os.PathLike):
            return FeatureBag.load(source)
        if isinstance(source, torch.Tensor):
            source = dense(source)
        if isinstance(source, np.ndarray):
            return Bag(features=_checked(source))
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    except (BagError, OSError) as error:
        raise BagError(f"{name}: {error}") from error
    raise InputError(f"{name}: it is a {type(source).__name__}; {_WANTED}")


def _checked(array: NDArray[Any]) -> NDArray[np.float32]:
    if array.dtype.kind not in "iuf" or array.ndim != 2 or array.shape[1] == 0:
        raise BagError(
            f"it is an array of {array.dtype} with shape {array.shape}; expected floats (N, D)"
        )
    with np.errstate(over="ignore"):
        features: NDArray[np.float32] = array.astype(np.float32, copy=False)
    finite = np.isfinite(features)
    if not finite.all():
        row, column = np.argwhere(~finite)[0]
        raise BagError(
            f"it holds {array[row, column]} in row {row} ({np.count_nonzero(~finite)} such values"
            " in all); expected values finite in float32: extract again, or leave the bag out"
        )
    return features
