"""Checked inputs of metrics: labels of any hashable type, encoded as class indices."""

import math
from collections.abc import Hashable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from xmag.errors import InputError
from xmag.files import is_missing

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Labels = Sequence[Hashable] | NDArray[Any]

CONTINUOUS = (
    "each different number would become a class of its own. MILRegressor is for continuous labels;"
    " or group them into classes, such as below and above a cutoff"
)
"""Message for labels that are measurements: why they are refused, and the remedy."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Cases:
    """Inputs of a metric for n cases: class indices, and predictions or scores.

    Attributes:
        truth: int64 (n,), the index of the true class.
        classes: The order of classes, C of them.
        predicted: int64 (n,), the index of the predicted class; None where only scores are known.
        scores: float64 (n, C), larger for likelier; None where only decisions are known.
        within: int64 (n,); AUROC compares only cases with the same number. None compares all.
    """

    truth: Ints
    classes: tuple[Hashable, ...]
    predicted: Ints | None = None
    scores: Floats | None = None
    within: Ints | None = None

    def __len__(self) -> int:
        return len(self.truth)

    def missing(self) -> list[Hashable]:
        """The classes without any case."""
        present = set(self.truth.tolist())
        return [label for place, label in enumerate(self.classes) if place not in present]


def as_labels(
    values: Labels | Iterable[Hashable], name: str, *, n: int | None = None
) -> list[Hashable]:
    """Checked labels as a list of plain Python values; `n` of them, where that is given.

    Raises InputError for what is not one-dimensional, not hashable, missing (None, NaN, NA, empty,
    text such as "nan") or text with blanks around it, which would make two classes of one.
    """
    if isinstance(values, str | bytes) or not hasattr(values, "__iter__"):
        raise InputError(f"{name} is {values!r}; expected a sequence with one label for each case")
    array_shape = getattr(values, "shape", None)
    if array_shape is not None and len(array_shape) != 1:
        raise InputError(
            f"{name} has shape {tuple(array_shape)}; expected one label for each case, (n,)"
        )
    # An array gives Python's own numbers by tolist(), but would take tuples for rows.
    plain = [_plain(value) for value in values]
    for place, value in enumerate(plain):
        where = f"{name}[{place}] is {value!r}"
        try:
            hash(value)
        except TypeError as error:
            raise InputError(
                f"{where}, a {type(value).__name__} that cannot be hashed; expected text, a number,"
                " a tuple of those or another hashable label"
            ) from error
        if any(map(_stands_for_missing, _parts(value))):
            raise InputError(
                f"{where}, a missing value; leave out cases without one (what is really called so"
                " needs another name)"
            )
        if any(isinstance(part, str) and part != part.strip() for part in _parts(value)):
            raise InputError(
                f"{where}, with blanks around it, which would tell it from the same without them;"
                " take them off, as str.strip() does"
            )
    if n is not None:
        require_length(plain, n, name)
    return plain


def _plain(value: Any) -> Any:
    if type(value) is tuple:
        return tuple(map(_plain, value))
    numpy_like = isinstance(value, np.generic | np.ndarray) or type(value).__module__ == "torch"
    return value.item() if numpy_like and getattr(value, "ndim", None) == 0 else value


def _parts(label: Hashable) -> Iterator[Hashable]:
    """The parts of a tuple, and of tuples in it; another label is its only part."""
    if type(label) is not tuple:
        yield label
        return
    for part in label:
        yield from _parts(part)


def _stands_for_missing(part: Any) -> bool:
    if isinstance(part, str):
        return is_missing(part)
    if isinstance(part, float):
        return math.isnan(part)
    return part is None or type(part).__name__ in ("NAType", "NaTType")  # pandas' own


def refuse_continuous(labels: Iterable[Hashable], name: str) -> None:
    """Raise InputError where a label is a number that is not whole: a measurement, not a class."""
    for label in labels:
        for part in _parts(label):
            if isinstance(part, float | Decimal | Fraction) and part % 1 != 0:
                raise InputError(
                    f"{name} holds {label!r}, a number that is not whole: {CONTINUOUS}. Where"
                    " they are names of classes, give them as text"
                )


def class_order(
    labels: Iterable[Hashable], classes: Labels | None, *, name: str = "y_true"
) -> tuple[Hashable, ...]:
    """The order of classes: the one given, which has to have all labels, else the sorted labels."""
    found = dict.fromkeys(labels)
    if classes is None:
        refuse_continuous(found, name)
        try:
            return tuple(sorted(found))  # type: ignore[type-var]
        except TypeError as error:
            kinds = sorted({type(label).__name__ for label in found})
            raise InputError(
                f"labels of {', '.join(kinds)} cannot be sorted; give their order: classes=[...]"
            ) from error
    order = tuple(as_labels(classes, "classes"))
    if len(set(order)) < len(order):
        twice = next(label for label in order if order.count(label) > 1)
        raise InputError(f"classes has {twice!r} more than once; expected each class once")
    unknown = [label for label in found if label not in set(order)]
    if unknown:
        raise InputError(
            f"{name} has the label {unknown[0]!r}, which is not in classes {_listed(order)}; add it"
            " there, or leave such cases out"
        )
    return order


def encode(labels: Iterable[Hashable], classes: Iterable[Hashable]) -> Ints:
    """The index of each label in `classes`, which has them all: int64 (n,)."""
    place = {label: number for number, label in enumerate(classes)}
    return np.array([place[label] for label in labels], dtype=np.int64)


def numbered(labels: Labels, n: int, name: str) -> Ints:
    """Label ids, int64 (n,), by first appearance, from 0 on; InputError unless there are `n`."""
    listed = as_labels(labels, name, n=n)
    return encode(listed, dict.fromkeys(listed))


def strata_of(within: Ints | None, rows: Ints) -> list[Ints]:
    """The `rows` of each value of `within` (n,), all of them where it is None."""
    if within is None:
        return [rows] if len(rows) else []
    return [rows[within[rows] == one] for one in np.unique(within[rows])]


def ratio(a: ArrayLike, b: ArrayLike) -> Floats:
    """A / b, NaN where b is not above 0."""
    empty = np.full(np.broadcast(a, b).shape, np.nan)
    return np.asarray(np.divide(a, b, out=empty, where=np.asarray(b) > 0))


def class_array(classes: Sequence[Hashable]) -> NDArray[Any]:
    """The classes as an array (C,) from which each comes back unchanged: of objects, if need be."""
    if all(type(label) in (bool, int, float, str) for label in classes):
        array = np.array(classes)
        if [(type(v), v) for v in array.tolist()] == [(type(v), v) for v in classes]:
            return array
    array = np.empty(len(classes), dtype=object)
    array[:] = list(classes)
    return array


def require_length(values: Sized, n: int, name: str) -> None:
    """Raise InputError unless there are `n` values."""
    if len(values) != n:
        raise InputError(
            f"{name} has {len(values)} entries for {n} cases; expected one for each case"
        )


def as_scores(
    scores: ArrayLike, n: int, classes: Sequence[Hashable], *, name: str = "scores"
) -> Floats:
    """Checked finite scores, float64 (n, C); from (n,) too, those of the second of two classes."""
    try:
        array = np.asarray(scores, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} are not numbers: {error}; expected an array of floats") from error
    if array.ndim == 1 and len(classes) == 2:
        array = np.stack([-array, array], axis=1)
    if array.ndim != 2 or array.shape[1] != len(classes):
        raise InputError(
            f"{name} have shape {array.shape} for {len(classes)} classes {_listed(classes)};"
            f" expected ({n}, {len(classes)}), or (n,) for two classes; where a class does not"
            " occur, give classes="
        )
    require_length(array, n, name)
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        row, column = bad[0]
        raise InputError(
            f"{name} have {array[row, column]} in row {row} for class {classes[column]!r}"
            f" ({len(bad)} such values in all); expected finite numbers"
        )
    return array


def decided_cases(y_true: Labels, y_pred: Labels, classes: Labels | None) -> Cases:
    """`Cases` with predicted classes; `classes` defaults to the sorted labels of both."""
    truth = _some(y_true)
    predicted = as_labels(y_pred, "y_pred", n=len(truth))
    if classes is None:
        order = class_order([*truth, *predicted], None)
    else:
        order = class_order(truth, classes)
        class_order(predicted, classes, name="y_pred")
    return Cases(truth=encode(truth, order), predicted=encode(predicted, order), classes=order)


def scored_cases(
    y_true: Labels, scores: ArrayLike, classes: Labels | None, within: Labels | None = None
) -> Cases:
    """`Cases` with scores; `classes` defaults to the sorted labels of `y_true`."""
    truth = _some(y_true)
    order = class_order(truth, classes)
    if len(order) < 2:
        raise InputError(
            f"y_true has one class only, {order[0]!r}; give cases of two classes or more"
        )
    return Cases(
        truth=encode(truth, order),
        scores=as_scores(scores, len(truth), order),
        classes=order,
        within=None if within is None else numbered(within, len(truth), "within"),
    )


def _some(y_true: Labels) -> list[Hashable]:
    labels = as_labels(y_true, "y_true")
    if not labels:
        raise InputError("y_true is empty; expected at least one case")
    return labels


def _listed(classes: Sequence[Hashable]) -> str:
    shown = ", ".join(repr(label) for label in classes[:8])
    return f"({shown}{', ...' if len(classes) > 8 else ''})"
