"""Preparation of `fit`: checked settings, and the training and validation sets."""

import math
import warnings
from collections.abc import Hashable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xmag.errors import InputError, XmagWarning
from xmag.mil.bags import require_same_origin, require_width
from xmag.mil.cohort import Cohort, Labelled, read_labelled
from xmag.mil.labels import ClassWeight, class_weights, distinct, indices
from xmag.mil.training import Settings
from xmag.provenance import Provenance
from xmag.training.splits import held_out, require_disjoint, units, warn_without_groups


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """Training and validation sets, classes and other inputs of a `Trainer`.

    `prior` is the frequency of each class among the labels, (C,).
    """

    train: Cohort
    validation: Cohort | None
    classes: list[Hashable]
    prior: NDArray[np.float64]
    width: int
    provenance: Provenance | None


def checked_settings(params: dict[str, Any]) -> Settings:
    """Training settings from a classifier's parameters; InputError for an invalid value."""
    whole = {name: params[name] for name in ("epochs", "patience", "batch_size")}
    if params["max_tiles"] is not None:
        whole["max_tiles"] = params["max_tiles"]
    for name, value in whole.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise InputError(f"{name} is {value!r}; expected an int from 1 on")
    for name, least in (("lr", "above 0"), ("weight_decay", "from 0 on")):
        value = params[name]
        number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
        if not number or value < 0 or (least == "above 0" and value == 0):
            raise InputError(f"{name} is {value!r}; expected a number {least}")
    if params["sampling"] not in ("balanced", "shuffled"):
        raise InputError(
            f'sampling is {params["sampling"]!r}; expected "balanced" (classes equally often) or'
            ' "shuffled" (each bag once an epoch)'
        )
    return Settings(**{name: params[name] for name in Settings.__dataclass_fields__})


def prepare(  # the arguments of fit, and parameters that it needs
    X: Any,  # noqa: N803
    y: Any,
    groups: Any,
    validation: Any,
    *,
    class_weight: ClassWeight,
    balanced: bool,
    rng: np.random.Generator,
) -> Setup:
    """Split X, y into training and validation sets; raises what `MILClassifier.fit` says."""
    fraction, other = _checked_validation(validation)
    data = read_labelled(X, y, groups)
    classes = distinct(data.labels)
    every = indices(data.labels, classes, "y")
    labels = every[data.kept]
    _require_tiles(labels, classes)
    held = np.zeros(len(labels), dtype=np.bool_)
    if fraction is not None:
        if data.groups is None:
            warn_without_groups()
        own = None if data.groups is None else [data.groups[row] for row in data.kept]
        unit = units(own, [data.facts[row].digest for row in data.kept])
        held = held_out(unit, labels, fraction, rng)
    counts = np.bincount(labels[~held], minlength=len(classes)).astype(np.float64)
    weights = class_weights(class_weight, classes, np.ones_like(counts) if balanced else counts)
    train = data.cohort(data.kept[~held], labels[~held], weights)
    check = None
    if fraction is not None:
        check = _weighed(data, data.kept[held], labels[held], weights, balanced=balanced)
    elif other is not None:
        _require_no_leak(data, other)
        own_labels = indices(other.labels, classes, "validation y")[other.kept]
        check = _weighed(other, other.kept, own_labels, weights, balanced=balanced)
    if check is not None:
        _warn_of_missing(check.labels, classes)
    return Setup(
        train=train,
        validation=check,
        classes=classes,
        prior=np.bincount(every, minlength=len(classes)) / len(every),
        width=data.facts[0].width,
        provenance=data.provenance,
    )


def _checked_validation(validation: Any) -> tuple[float | None, Labelled | None]:
    """The `validation=` argument as (fraction, None) or (None, given bags); both None without."""
    if validation is None:
        return None, None
    if isinstance(validation, tuple | list) and len(validation) in (2, 3):
        given = [*validation, None][:3]
        other = read_labelled(*given, of="validation ")
        if not len(other.kept):
            raise InputError("the validation bags have no tiles at all; give others, or None")
        return None, other
    number = isinstance(validation, Real) and not isinstance(validation, bool)
    if number and 0 < validation < 1:
        return float(validation), None
    seen = validation if number else f"a {type(validation).__name__}"
    raise InputError(
        f"validation is {seen}; expected a fraction between 0 and 1, (X, y), (X, y, groups), or"
        " None, which trains for all epochs and keeps the last weights"
    )


def _require_tiles(labels: NDArray[np.int64], classes: list[Hashable]) -> None:
    missing = [value for index, value in enumerate(classes) if index not in labels]
    if missing:
        raise InputError(
            f"no bag of the class {missing[0]!r} has any tile; expected one or more of each class:"
            " extract them again, or leave the class out"
        )


def _warn_of_missing(labels: NDArray[np.int64], classes: list[Hashable]) -> None:
    missing = [value for index, value in enumerate(classes) if index not in labels]
    if missing:
        warnings.warn(
            f"no bag to validate with is of the class {', '.join(map(repr, missing))}, so the epoch"
            " to keep is chosen without it; give more patients, or validation=(X, y, groups)",
            XmagWarning,
            stacklevel=4,
        )


def _weighed(
    data: Labelled,
    rows: NDArray[np.int64],
    labels: NDArray[np.int64],
    weights: NDArray[np.float64],
    *,
    balanced: bool,
) -> Cohort:
    """A validation set whose class weights match those of the training."""
    if balanced:
        counts = np.bincount(labels, minlength=len(weights))
        weights = weights / np.maximum(counts, 1)
    return data.cohort(rows, labels, weights)


def _require_no_leak(train: Labelled, validation: Labelled) -> None:
    names = [validation.bags.name(row) for row in range(len(validation.bags))]
    reference = train.bags.name(0)
    for name, fact in zip(names, validation.facts, strict=True):
        require_width(fact.width, train.facts[0].width, name, reference)
        require_same_origin(fact.provenance, train.provenance, name, "the bags to train on")
    require_disjoint(
        [train.facts[row].digest for row in train.kept],
        [validation.facts[row].digest for row in validation.kept],
        names=[names[row] for row in validation.kept],
        what="features",
    )
    if train.groups is not None and validation.groups is not None:
        require_disjoint(train.groups, validation.groups, names=names, what="the patient")
    else:
        warn_without_groups()
