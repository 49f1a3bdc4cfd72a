"""Metrics of scores: ROC curve, AUROC (binary, one-vs-rest, one-vs-one), average precision."""

from collections.abc import Hashable
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import ArrayLike

from xmag.errors import InputError
from xmag.metrics.labels import Bools, Cases, Floats, Labels, ratio, scored_cases, strata_of


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class RocCurve:
    """ROC curve: its points from (0, 0) to (1, 1), one for each different score.

    Attributes:
        fpr: float64 (k,), share of the negative cases with a score of at least the threshold.
        tpr: float64 (k,), the same of the positive cases.
        thresholds: float64 (k,), falling; the first is infinite.
    """

    fpr: Floats
    tpr: Floats
    thresholds: Floats

    def __repr__(self) -> str:
        return f"<RocCurve of {len(self.fpr):,} points>"


def roc_curve(
    y_true: Labels,
    scores: ArrayLike,
    *,
    classes: Labels | None = None,
    positive: Hashable | None = None,
) -> RocCurve:
    """The ROC curve of class `positive` against the rest; no point is left out.

    `scores` are (n, C) in the order of `classes` (by default, the sorted labels), or (n,) for two
    classes. `positive` is the second of two classes by default; of more it has to be given. Raises
    InputError where it is missing, or where all cases or none are of that class.
    """
    cases = scored_cases(y_true, scores, classes)
    place = _positive_place(cases, positive)
    weights = np.ones((1, len(cases)))
    hits, alarms, thresholds = _steps(_column(cases, place), cases.truth == place, weights)
    return RocCurve(
        fpr=np.append(0.0, alarms[0] / alarms[0, -1]),
        tpr=np.append(0.0, hits[0] / hits[0, -1]),
        thresholds=np.append(np.inf, thresholds),
    )


def auroc(
    y_true: Labels,
    scores: ArrayLike,
    *,
    classes: Labels | None = None,
    positive: Hashable | None = None,
    within: Labels | None = None,
) -> float:
    """AUROC: the area under the ROC curve of class `positive` against the rest.

    It is the share of pairs of a positive and a negative case that the scores put in the right
    order; equal scores count half, so constant scores give 0.5. With `within` (the fold of each
    case, say), only pairs with the same value there are compared: scores of two models have no
    common scale. Operands and errors are those of `roc_curve`. Hanley and McNeil 1982.
    """
    cases = scored_cases(y_true, scores, classes, within)
    return _value(class_aurocs(cases, None, _positive_place(cases, positive)), cases)


def auroc_ovr(
    y_true: Labels,
    scores: ArrayLike,
    *,
    classes: Labels | None = None,
    within: Labels | None = None,
) -> float:
    """Macro one-vs-rest AUROC: the mean of `auroc` over classes, each against all others.

    `scores` are (n, C) in the order of `classes` (by default, the sorted labels). Of two classes it
    is the AUROC of the second. Raises InputError where a class of `classes` has no case.
    """
    cases = scored_cases(y_true, scores, classes, within)
    return _value(ovr_aurocs(cases, None), cases)


def auroc_ovo(
    y_true: Labels,
    scores: ArrayLike,
    *,
    classes: Labels | None = None,
    within: Labels | None = None,
) -> float:
    """Macro one-vs-one AUROC: Hand and Till's M.

    The mean over ordered pairs of classes (i, j) of the AUROC of class i against class j by the
    scores of class i, among cases of these two; unlike one-vs-rest, it does not depend on how
    common the classes are. Of two classes it is the AUROC of the second. Raises InputError where a
    class of `classes` has no case. Hand and Till 2001, Machine Learning 45, 171-186, equation 7.
    """
    cases = scored_cases(y_true, scores, classes, within)
    return _value(ovo_aurocs(cases, None), cases)


def average_precision(
    y_true: Labels,
    scores: ArrayLike,
    *,
    classes: Labels | None = None,
    positive: Hashable | None = None,
    within: Labels | None = None,
) -> float:
    """Average precision: the mean of the precision at each step of recall, without interpolation.

    Scores without information have the share of positive cases. With `within`, a mean over its
    values, weighted by their positive cases. Operands and errors are those of `auroc`. It is the
    sum that Su, Yuan and Zhu 2015 define, and what scikit-learn computes.
    """
    cases = scored_cases(y_true, scores, classes, within)
    return _value(average_precisions(cases, None, _positive_place(cases, positive)), cases)


def average_precisions(cases: Cases, weights: Floats | None, place: int) -> Floats:
    """Average precision (R,) of the class at `place` under weights (R, n); NaN if not defined."""
    positive, score = cases.truth == place, _column(cases, place)
    weights = np.ones((1, len(cases))) if weights is None else weights
    total, mass = np.zeros(len(weights)), np.zeros(len(weights))
    for rows in strata_of(cases.within, np.arange(len(cases))):
        hits, alarms, _ = _steps(score[rows], positive[rows], weights[:, rows])
        found = np.diff(hits, axis=1, prepend=0) * hits / np.maximum(hits + alarms, 1e-300)
        both = alarms[:, -1] > 0
        total += np.where(both, found.sum(1), 0)
        mass += np.where(both, hits[:, -1], 0)
    return ratio(total, mass)


def class_aurocs(cases: Cases, weights: Floats | None, place: int) -> Floats:
    """AUROC (R,) of the class at `place` under weights (R, n); NaN where no pair is comparable."""
    positive = cases.truth == place
    return _areas(cases, weights, _column(cases, place), positive, ~positive)


def ovr_aurocs(cases: Cases, weights: Floats | None) -> Floats:
    """Macro one-vs-rest AUROC (R,) under each row of weights (R, n)."""
    places = range(len(cases.classes)) if len(cases.classes) > 2 else (1,)
    return np.asarray(np.mean([class_aurocs(cases, weights, place) for place in places], axis=0))


def ovo_aurocs(cases: Cases, weights: Floats | None) -> Floats:
    """Macro one-vs-one AUROC (R,) under each row of weights (R, n)."""
    size = len(cases.classes)
    pairs = permutations(range(size), 2) if size > 2 else [(1, 0)]
    truth = cases.truth
    areas = [_areas(cases, weights, _column(cases, i), truth == i, truth == j) for i, j in pairs]
    return np.asarray(np.mean(areas, axis=0))


def mean_roc(
    cases: Cases, weights: Floats | None, place: int, fpr: Floats | None = None
) -> tuple[Floats, Floats]:
    """Mean ROC curve over the values of `within`, of the class at `place` against the rest.

    Each weighs by its pairs, so that the area under the mean is the AUROC. Returns the false
    positive rates (k,), by default both sides of each step, and the true positive rate at each
    under each row of weights (R, n): (R, k), NaN where no pair can be compared.
    """
    positive, score = cases.truth == place, _column(cases, place)
    weights = np.ones((1, len(cases))) if weights is None else weights
    curves = []
    for rows in strata_of(cases.within, np.arange(len(cases))):
        hits, alarms, _ = _steps(score[rows], positive[rows], weights[:, rows])
        most_hits, most_alarms = hits[:, -1:], alarms[:, -1:]
        if (pairs := most_hits * most_alarms).any():
            x = alarms / np.where(most_alarms > 0, most_alarms, 1)
            y = hits / np.where(most_hits > 0, most_hits, 1)
            curves.append((x, y, pairs))
    if fpr is None:
        steps = np.unique(np.concatenate([np.empty(0), *(x[0] for x, _, _ in curves)]))
        fpr = np.union1d((steps - 1e-9).clip(0), steps)
    total, weight = np.zeros((len(weights), len(fpr))), np.zeros((len(weights), 1))
    for x, y, pairs in curves:
        rates = zip(x, y, strict=True)
        total += pairs * [np.interp(fpr, np.append(0.0, a), np.append(0.0, b)) for a, b in rates]
        weight += pairs
    return fpr, ratio(total, weight)


def _steps(score: Floats, positive: Bools, weights: Floats) -> tuple[Floats, Floats, Floats]:
    """Weights (R, k) of the positive and the negative cases down to each different score (k,)."""
    order = np.argsort(-score, kind="stable")
    last_of_tie = np.append(np.flatnonzero(np.diff(score[order])), len(order) - 1)
    in_order, positive = weights[:, order], positive[order]
    hits = np.cumsum(in_order * positive, axis=1)[:, last_of_tie]
    alarms = np.cumsum(in_order * ~positive, axis=1)[:, last_of_tie]
    return hits, alarms, score[order][last_of_tie]


def _areas(
    cases: Cases, weights: Floats | None, score: Floats, positive: Bools, negative: Bools
) -> Floats:
    """Weighted AUROC (R,): the share of pairs ranked right, each weighted by both its cases."""
    kept = np.flatnonzero(positive | negative)
    within = np.zeros(len(cases), np.int64) if cases.within is None else cases.within
    order = kept[np.lexsort((score[kept], within[kept]))]
    if not positive.any() or not negative.any():
        return np.full(1 if weights is None else len(weights), np.nan)
    sorted_weights = np.ones((1, len(order))) if weights is None else weights[:, order]
    new_stratum = np.diff(within[order]) != 0
    new_tie = new_stratum | (np.diff(score[order]) != 0)
    ties = np.concatenate([[0], np.flatnonzero(new_tie) + 1])
    hits = sorted_weights * positive[order]
    misses = sorted_weights - hits
    if len(ties) < len(order):
        hits = np.add.reduceat(hits, ties, axis=1)
        misses = np.add.reduceat(misses, ties, axis=1)

    below = np.cumsum(misses, axis=1)
    below -= misses / 2
    # Each stratum begins at a tie; what lies below a case counts from there.
    strata = np.searchsorted(ties, np.concatenate([[0], np.flatnonzero(new_stratum) + 1]))
    if len(strata) > 1:
        base = below[:, strata] - misses[:, strata] / 2
        below -= np.repeat(base, np.diff(np.append(strata, len(ties))), axis=1)
    in_order = np.einsum("rk,rk->r", hits, below)
    pairs = (np.add.reduceat(hits, strata, axis=1) * np.add.reduceat(misses, strata, axis=1)).sum(1)
    return ratio(in_order, pairs)


def _column(cases: Cases, place: int) -> Floats:
    if cases.scores is None:
        raise InputError("a metric of scores was asked for, but only decisions are known")
    return cases.scores[:, place]


def _positive_place(cases: Cases, positive: Hashable | None) -> int:
    if positive is None:
        if len(cases.classes) > 2:
            raise InputError(
                f"there are {len(cases.classes)} classes; say which one the curve is of: positive="
            )
        place = 1
    elif positive in cases.classes:
        place = cases.classes.index(positive)
    else:
        raise InputError(f"positive is {positive!r}, which is not one of {cases.classes}")
    count = int(np.count_nonzero(cases.truth == place))
    if count in (0, len(cases)):
        raise InputError(
            f"{count} of {len(cases)} cases are of class {cases.classes[place]!r}; expected some"
            " that are and some that are not"
        )
    return place


def _value(values: Floats, cases: Cases) -> float:
    if np.isnan(values[0]):
        if missing := cases.missing():
            raise InputError(
                f"AUROC is not defined: no case is of class {missing[0]!r}; leave it out of"
                " classes and scores, or give cases of it"
            )
        raise InputError(
            "AUROC is not defined: no two cases of some two classes have the same value of"
            " within; compare across it (within=None), or give fewer, larger folds"
        )
    return float(values[0])
