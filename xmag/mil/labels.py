"""Class labels of any hashable type: their order, indices, class weights and JSON."""

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from xmag.errors import InputError, OutputError
from xmag.metrics.labels import as_labels, refuse_continuous

ClassWeight = Mapping[Any, float] | Literal["balanced"] | None

_PLAIN: dict[str, type] = {"bool": bool, "int": int, "float": float, "str": str}


def hashables(values: Any, *, count: int, what: str) -> list[Hashable]:
    """Labels or groups as plain Python values; InputError unless there are `count` usable ones."""
    if isinstance(values, str | bytes) or not hasattr(values, "__iter__"):
        raise InputError(f"{what} is {values!r}; expected one value for each of {count} bags")
    found = as_labels(values, what)
    if len(found) != count:
        raise InputError(f"{what} has {len(found)} values for {count} bags; expected one for each")
    return found


def distinct(labels: Sequence[Hashable]) -> list[Hashable]:
    """The distinct labels (classes), in order.

    Raises InputError for fewer than two, for two that Python calls equal, and for numbers that are
    not whole.
    """
    refuse_continuous(labels, "y")
    seen: dict[Hashable, Hashable] = {}
    for label in labels:
        first = seen.setdefault(label, label)
        if type(first) is not type(label):
            raise InputError(
                f"the labels hold both {first!r} and {label!r}, which Python takes for the same;"
                " expected labels of one type"
            )
    if len(seen) < 2:
        raise InputError(
            f"the labels are of {len(seen)} class ({', '.join(map(repr, seen))}); expected two or"
            " more"
        )
    return ordered(list(seen))


def ordered(classes: list[Any]) -> list[Hashable]:
    """The classes sorted where they can be compared, else by type and text."""
    if len({type(value) for value in classes}) == 1 and isinstance(
        classes[0], bool | int | float | str | tuple
    ):
        try:
            return sorted(classes)
        except TypeError:
            pass  # tuples of mixed types
    return sorted(classes, key=lambda value: (type(value).__name__, repr(value)))


def class_array(classes: Sequence[Hashable]) -> NDArray[Any]:
    """The classes as an array (C,) from which each comes back unchanged."""
    if all(type(value) in _PLAIN.values() for value in classes):
        array = np.array(classes)
        if [(type(v), v) for v in array.tolist()] == [(type(v), v) for v in classes]:
            return array
    array = np.empty(len(classes), dtype=object)
    for index, value in enumerate(classes):
        array[index] = value
    return array


def indices(
    labels: Sequence[Hashable], classes: Sequence[Hashable], what: str
) -> NDArray[np.int64]:
    """The class index of each label, int64 (n,); InputError for an unknown label."""
    place = {label: index for index, label in enumerate(classes)}
    for index, label in enumerate(labels):
        if label not in place:
            raise InputError(
                f"{what}[{index}] is {label!r}; expected one of the classes that were trained:"
                f" {list(classes)}"
            )
    return np.array([place[label] for label in labels], dtype=np.int64)


def class_weights(
    weight: ClassWeight, classes: Sequence[Hashable], drawn: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The weight in the loss of a bag of each class, (C,).

    "balanced" makes up for how often each class is drawn: classes that are drawn equally often
    count the same. Raises InputError for other values than weights above 0 of known classes.
    """
    if weight is None:
        return np.ones(len(classes))
    if isinstance(weight, str) and weight == "balanced":
        return np.asarray(drawn.sum() / (len(classes) * drawn))
    if not isinstance(weight, Mapping):
        raise InputError(
            f'class_weight is {weight!r}; expected None, "balanced" or {{class: weight}}'
        )
    if unknown := [label for label in weight if label not in classes]:
        raise InputError(
            f"class_weight has the class {unknown[0]!r}; expected those of the labels:"
            f" {list(classes)}"
        )
    for label, value in weight.items():
        if isinstance(value, bool | str) or not (math.isfinite(value) and value > 0):
            raise InputError(f"class_weight[{label!r}] is {value!r}; expected a number above 0")
    return np.array([float(weight.get(label, 1.0)) for label in classes])


def to_json(label: Hashable) -> list[Any]:
    """A label as JSON, with its type; OutputError for a type that is not supported."""
    if isinstance(label, tuple) and type(label) is tuple:
        return ["tuple", [to_json(item) for item in label]]
    for name, kind in _PLAIN.items():
        if type(label) is kind:
            return [name, label]
    raise OutputError(
        f"the class {label!r} is a {type(label).__name__}, which cannot be saved; train with labels"
        " that are str, int, float, bool, or tuples of those"
    )


def from_json(value: Any) -> Hashable:
    """Decode a label of `to_json`; ValueError for anything else."""
    kind, content = value if isinstance(value, list) and len(value) == 2 else (None, None)
    if kind == "tuple" and isinstance(content, list):
        return tuple(from_json(item) for item in content)
    if isinstance(kind, str) and kind in _PLAIN and type(content) is _PLAIN[kind]:
        return content
    raise ValueError(f"{value!r} is no label with its type")
