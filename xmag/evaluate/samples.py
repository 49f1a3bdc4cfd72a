"""Evaluation datasets: cases X of any type, with labels and patients, checked for leakage."""

import hashlib
import os
import warnings
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from xmag import files
from xmag.bag import SUFFIXES, FeatureBag
from xmag.bag.formats import ForeignBagError
from xmag.errors import InputError, XmagWarning
from xmag.metrics.labels import (
    Labels,
    as_labels,
    class_order,
    encode,
    refuse_continuous,
    require_same_length,
)

OnIdentical = Literal["raise", "warn"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Samples:
    """Dataset of cases with labels and patients, of checked lengths.

    Attributes:
        name: The name of the dataset in messages.
        x: A list, an array, or whatever `taken` can index.
        y: Their labels.
        groups: Their patients; None where they are not known.
    """

    name: str
    x: Any
    y: tuple[Hashable, ...]
    groups: tuple[Hashable, ...] | None

    def __len__(self) -> int:
        return len(self.y)

    def patients(self) -> NDArray[np.int64]:
        """Patient ids, int64 (n,), by first appearance; without groups, each case its own."""
        if self.groups is None:
            return np.arange(len(self.y))
        return encode(self.groups, tuple(dict.fromkeys(self.groups)))


def samples(x: Any, y: Labels, groups: Labels | None, *, name: str) -> Samples:
    """Make Samples; InputError unless there is one label and one patient for each case."""
    try:
        n = len(x)
    except TypeError as error:
        raise InputError(
            f"{name}: X is of {type(x).__name__}, which has no length; give a list or an array"
        ) from error
    labels = as_labels(y, f"{name}: y")
    refuse_continuous(labels, f"{name}: y")
    require_same_length(n, len(labels), f"{name}: y")
    if n == 0:
        raise InputError(f"{name} has no cases; expected at least one of each class")
    if groups is None:
        return Samples(name=name, x=x, y=tuple(labels), groups=None)
    patients = as_labels(groups, f"{name}: groups")
    require_same_length(n, len(patients), f"{name}: groups")
    return Samples(name=name, x=x, y=tuple(labels), groups=tuple(patients))


def warn_without_groups(*, stacklevel: int) -> None:
    """Warn that no groups were given, so that each case counts as a patient of its own."""
    warnings.warn(
        "groups were not given, so patients are not separated: slides of one patient may be on both"
        " sides of a split, and intervals take each case for a patient of its own; give groups=,"
        " the patient of each case",
        XmagWarning,
        stacklevel=stacklevel + 1,
    )


def agreed_classes(parts: Sequence[Samples], classes: Labels | None) -> tuple[Hashable, ...]:
    """The order of classes of all parts; InputError for an unknown label or a part of one class."""
    order = class_order([label for part in parts for label in part.y], classes, name="y")
    for part in parts:
        if len(set(part.y)) < 2:
            raise InputError(
                f"{part.name} has one class only: all {len(part)} cases are {part.y[0]!r}; expected"
                " cases of at least two classes"
            )
    return order


def taken(x: Any, rows: NDArray[np.int64]) -> Any:
    """Index the cases by `rows`: a part of a table or array, or a list from a sequence."""
    if hasattr(x, "iloc"):
        return x.iloc[rows]
    if hasattr(x, "shape"):
        return x[rows]
    return [x[row] for row in rows.tolist()]


def for_fit(labels: Iterable[Hashable], classes: Sequence[Hashable]) -> tuple[NDArray[Any], bool]:
    """Labels that scikit-learn accepts, and whether they are encoded as indices in `classes`.

    Text, whole numbers or bools stay as they are; labels of other types, or mixed, become indices.
    """
    kinds = {type(label) for label in classes}
    if kinds in ({str}, {int}, {bool}):
        return np.array(list(labels)), False
    return encode(labels, classes), True


def require_separate(
    train: tuple[Samples, NDArray[np.int64]],
    test: tuple[Samples, NDArray[np.int64]],
    *,
    where: str,
) -> None:
    """Raise InputError where a patient is in both the `train` and the `test` rows (leakage)."""
    (first, train_rows), (second, test_rows) = train, test
    if first.groups is None or second.groups is None:
        return
    patients = {first.groups[row] for row in train_rows.tolist()}
    shared = dict.fromkeys(g for r in test_rows.tolist() if (g := second.groups[r]) in patients)
    if shared:
        raise InputError(
            f"{where}: patient {next(iter(shared))!r} is on both sides ({len(shared)} such patients"
            " in all); keep all cases of a patient on one side, and if these are different people"
            " with the same number, put the cohort's name before it"
        )


def require_different(
    train: NDArray[np.object_], test: NDArray[np.object_], *, where: str, on_identical: OnIdentical
) -> None:
    """Raise or warn where a test case has the features of a training case, by digest."""
    places = {digest: place for place, digest in enumerate(train) if digest is not None}
    pairs = [(places[digest], place) for place, digest in enumerate(test) if digest in places]
    if not pairs:
        return
    found = (
        f"{where}: test case {pairs[0][1]} has the same features as training case {pairs[0][0]}"
        f" (counted from 0; {len(pairs)} such test cases in all)"
    )
    if on_identical == "raise":
        raise InputError(
            f"{found}; leave out duplicates, or give them the same patient in groups. Where equal"
            ' features are no accident, as with empty tiles: on_identical="warn"'
        )
    warnings.warn(f"{found}, which flatters the result", XmagWarning, stacklevel=4)


def digests(x: Any) -> NDArray[np.object_]:
    """Hash of the features of each case, object (n,); None for a case without features.

    Bags, arrays and tensors are digested by value, feature files by what is in them, other files by
    their bytes. Bags without tiles have no features and are never identical.
    """
    rows: Any = x.to_numpy() if hasattr(x, "to_numpy") else x
    found = np.empty(len(x), dtype=object)
    for place in range(len(x)):
        found[place] = _digest(rows[place])
    return found


def _digest(case: Any) -> bytes | None:
    if isinstance(case, str | os.PathLike):
        path = Path(case)
        if not path.is_file():
            return os.fsencode(case)
        try:
            case = FeatureBag.load(path) if path.suffix in SUFFIXES else None
        except ForeignBagError:
            case = None
        if case is None:
            return files.sha256_of(path).encode()
    if hasattr(case, "detach"):  # a tensor, which may be on a GPU, or bfloat16
        case = case.detach().cpu().double()
    array = np.asarray(case)
    if array.dtype.kind not in "biuf" or array.size == 0:
        return None
    values = np.ascontiguousarray(array, dtype=np.float64)
    digest = hashlib.blake2b(values.data, digest_size=16)
    digest.update(str(values.shape).encode())
    return digest.digest()
