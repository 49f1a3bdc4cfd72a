"""Lazy dataset of bags: FeatureBags, arrays, tensors, or files that are read when indexed."""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from xmag.bag import SUFFIXES, FeatureBag
from xmag.bag.formats import dense
from xmag.errors import BagError, InputError, MismatchError
from xmag.geometry import TileGeometry
from xmag.provenance import Provenance

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Metadata of a bag without its features: tile count, width, digest, provenance."""

    tiles: int
    width: int
    digest: bytes
    provenance: Provenance | None


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

    def name(self, index: int) -> str:
        """The name of a bag in messages: its index, and its file where it has one."""
        bag = self._bags[index]
        file = f" ({os.fspath(bag)})" if isinstance(bag, str | os.PathLike) else ""
        return f"{self._what}[{index}]{file}"

    def facts(self) -> Iterator[Facts]:
        """The `Facts` of each bag, in order; reads every bag once."""
        for bag in self:
            features = bag.features
            digest = hashlib.blake2b(f"{features.shape}".encode(), digest_size=16)
            digest.update(np.ascontiguousarray(features).data)
            yield Facts(
                tiles=len(features),
                width=features.shape[1],
                digest=digest.digest(),
                provenance=bag.provenance,
            )


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
