"""Labels of any hashable kind, and their places in an explicit order of classes."""

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from xmag.errors import InputError

Labels = Sequence[Hashable] | NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Cases:
    """What metrics are computed from: n cases, their classes as places in the order of classes.

    Attributes:
        truth: int64 (n,), the true class.
        classes: The order of classes, C of them.
        predicted: int64 (n,), the decision; None where only scores are known.
        scores: float64 (n, C), larger for likelier; None where only decisions are known.
        within: int64 (n,); AUROC compares only cases with the same number. None compares all.
    """

    truth: NDArray[np.int64]
    classes: tuple[Hashable, ...]
    predicted: NDArray[np.int64] | None = None
    scores: NDArray[np.float64] | None = None
    within: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.truth)

    def counts(self) -> NDArray[np.int64]:
        """int64 (C,), how many cases have each class."""
        return np.bincount(self.truth, minlength=len(self.classes))


def as_labels(values: Labels | Iterable[Hashable], name: str) -> list[Hashable]:
    """The labels as a list of plain Python values.

    Raises InputError for what is not one-dimensional, not hashable, or missing (None, NaN).
    """
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise InputError(f"{name} is {values!r}; expected a sequence with one label for each case")
    array_shape = getattr(values, "shape", None)
    if array_shape is not None and len(array_shape) != 1:
        raise InputError(
            f"{name} has shape {tuple(array_shape)}; expected one label for each case, of shape"
            " (n,)"
        )
    listed = values.tolist() if hasattr(values, "tolist") else list(values)
    plain = [value.item() if isinstance(value, np.generic) else value for value in listed]
    for place, value in enumerate(plain):
        if not isinstance(value, Hashable):
            raise InputError(
                f"{name}[{place}] is {value!r}, which cannot be hashed; expected text, a number or"
                " another hashable label"
            )
        if value is None or (isinstance(value, float) and math.isnan(value)):
            raise InputError(
                f"{name}[{place}] is {value!r}, a missing value; leave out cases without a label"
            )
    return plain


def class_order(
    labels: Iterable[Hashable], classes: Labels | None, *, name: str = "y_true"
) -> tuple[Hashable, ...]:
    """The order of classes: the one that is given, else the sorted labels that occur.

    Raises InputError where labels cannot be sorted, a class is given twice, or a label is unknown.
    """
    found = dict.fromkeys(labels)
    if classes is None:
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
            f"{name} has the label {unknown[0]!r}, which is not in classes"
            f" {_listed(order)}; add it there, or leave such cases out"
        )
    return order


def encode(labels: Iterable[Hashable], classes: Sequence[Hashable]) -> NDArray[np.int64]:
    """int64 (n,), the place of each label in `classes`, which has them all."""
    place = {label: number for number, label in enumerate(classes)}
    return np.array([place[label] for label in labels], dtype=np.int64)


def numbered(labels: Labels | None, n: int, name: str) -> NDArray[np.int64] | None:
    """int64 (n,), a number for each different label, by first appearance; None stays None.

    Raises InputError where there are not `n` of them.
    """
    if labels is None:
        return None
    listed = as_labels(labels, name)
    require_same_length(n, len(listed), name)
    return encode(listed, tuple(dict.fromkeys(listed)))


def require_same_length(n: int, other: int, name: str) -> None:
    """Raise InputError unless `other`, the length of `name`, is `n`."""
    if n != other:
        raise InputError(f"{name} has {other} entries for {n} cases; expected one for each case")


def as_scores(
    scores: ArrayLike, n: int, classes: Sequence[Hashable], *, name: str = "scores"
) -> NDArray[np.float64]:
    """float64 (n, C); for two classes also from (n,), the scores of the second class.

    Raises InputError for another shape, and for values that are not finite numbers.
    """
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
    require_same_length(n, len(array), name)
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        row, column = bad[0]
        raise InputError(
            f"{name} have {array[row, column]} in row {row} for class {classes[column]!r}"
            f" ({len(bad)} such values in all); expected finite numbers"
        )
    return array


def decided_cases(y_true: Labels, y_pred: Labels, classes: Labels | None) -> Cases:
    """Cases of decisions; the classes default to the sorted labels of both."""
    truth, predicted = as_labels(y_true, "y_true"), as_labels(y_pred, "y_pred")
    _require_cases(truth)
    require_same_length(len(truth), len(predicted), "y_pred")
    if classes is None:
        order = class_order([*truth, *predicted], None)
    else:
        order = class_order(truth, classes)
        class_order(predicted, classes, name="y_pred")
    return Cases(truth=encode(truth, order), predicted=encode(predicted, order), classes=order)


def scored_cases(
    y_true: Labels, scores: ArrayLike, classes: Labels | None, within: Labels | None = None
) -> Cases:
    """Cases of scores; the classes default to the sorted labels of `y_true`."""
    truth = as_labels(y_true, "y_true")
    _require_cases(truth)
    order = class_order(truth, classes)
    if len(order) < 2:
        raise InputError(
            f"y_true has one class only, {order[0]!r}, and nothing to tell it from; give cases of"
            " two classes or more"
        )
    return Cases(
        truth=encode(truth, order),
        scores=as_scores(scores, len(truth), order),
        classes=order,
        within=numbered(within, len(truth), "within"),
    )


def _require_cases(labels: list[Hashable]) -> None:
    if not labels:
        raise InputError("y_true is empty; expected at least one case")


def _listed(classes: Sequence[Hashable]) -> str:
    shown = ", ".join(repr(label) for label in classes[:8])
    return f"({shown}{', ...' if len(classes) > 8 else ''})"
