"""Validation splits by patient, stratified by class."""

import warnings
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from xmag.errors import InputError, XmagWarning
from xmag.metrics.labels import Bools, Floats, Ints

_ORDERS = 16


def read_validation(
    validation: Any, *, what: str
) -> tuple[float | None, tuple[Any, Any, Any] | None]:
    """The `validation=` argument: a share to hold out, or (data, labels, groups), or neither."""
    if validation is None:
        return None, None
    number = isinstance(validation, int | float | np.number) and not isinstance(validation, bool)
    if number and 0 < validation < 1:
        return float(validation), None
    if isinstance(validation, tuple | list) and len(validation) in (2, 3):
        data, labels, groups = (*validation, None)[:3]
        if not hasattr(data, "__len__") or len(data):
            return None, (data, labels, groups)
    seen = repr(validation) if number else f"a {type(validation).__name__}"
    raise InputError(
        f"validation is {seen}; expected a fraction between 0 and 1, ({what}, labels), ({what},"
        " labels, groups), or None, which trains for all epochs and keeps the last weights"
    )


def units(groups: Sequence[Hashable] | None, digests: Sequence[bytes]) -> Ints:
    """Group ids of bags, (n,): one for those of a patient, with equal features, and so on."""
    parent = list(range(len(digests)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[Hashable, int] = {}
    for index, digest in enumerate(digests):
        ties: list[Hashable] = [("features", digest)]
        if groups is not None:
            ties.append(("group", groups[index]))
        for tie in ties:
            parent[root(index)] = root(first.setdefault(tie, index))
    roots = [root(i) for i in range(len(digests))]
    return np.unique(roots, return_inverse=True)[1].astype(np.int64)


def held_out(unit: Ints, labels: Ints, fraction: float, rng: np.random.Generator) -> Bools:
    """Mask of the validation bags, bool (n,): whole units, about `fraction` of each class.

    Units are taken in random order where that brings the shares of the classes nearer; the last of
    a class always stays to be trained on. The best of several orders counts.
    """
    # Classes without any bag (nobody is censored) are none to hold out of.
    present, codes = np.unique(labels, return_inverse=True)
    number = int(unit.max()) + 1
    counts = np.zeros((number, len(present)))
    np.add.at(counts, (unit, codes), 1)
    tried = [_greedy(counts, fraction, rng.permutation(number)) for _ in range(_ORDERS)]
    total = counts.sum(axis=0)
    taken = min(tried, key=lambda t: _distance(counts[t].sum(axis=0) / total, fraction))
    if not taken.any():
        possible = [i for i in range(number) if (total - counts[i] > 0).all()]
        if not possible:
            raise InputError(
                f"no part of {number} patients (or slides, without groups) can be held out so that"
                " every class stays to be trained on; give more, or validation=None, which trains"
                " for all epochs and keeps the last weights"
            )
        taken[min(possible, key=lambda i: _distance(counts[i] / total, fraction))] = True
    chosen: Bools = taken[unit]
    return chosen


def _greedy(counts: Floats, fraction: float, order: Ints) -> Bools:
    """Mask of the units to hold out, bool (U,), chosen greedily in `order` by counts (U, C)."""
    total = counts.sum(axis=0)
    taken, held = np.zeros(len(counts), dtype=np.bool_), np.zeros(len(total))
    for index in order:
        more = held + counts[index]
        nearer = _distance(more / total, fraction) < _distance(held / total, fraction)
        if nearer and (more < total).all():
            taken[index], held = True, more
    return taken


def _distance(held: Floats, fraction: float) -> float:
    # A class without any bag to validate with is worse than one that has too many.
    return float(((held - fraction) ** 2).sum() + (held == 0).sum())


def require_disjoint(
    train: Sequence[Hashable], validation: Sequence[Hashable], *, names: Sequence[str], what: str
) -> None:
    """Raise InputError where both sides share a patient or features; `names` are of validation."""
    known = set(train)
    for name, value in zip(names, validation, strict=True):
        if value in known:
            shown = "" if isinstance(value, bytes) else f" {value!r}"
            raise InputError(
                f"{name} has {what}{shown} that the training bags have too: what is measured on it"
                " is no validation. Split by patient, each slide once, or give validation=0.2"
            )


def warn_without_groups() -> None:
    """Warn that the validation split is by slide, as no patients (groups) were given."""
    warnings.warn(
        "no groups were given, so the validation split is by slide: slides of a patient may lie on"
        " both sides, and training stops too late. Give groups= (the patient of each bag)",
        XmagWarning,
        stacklevel=4,
    )
