"""Bootstrap confidence intervals of metrics, resampled by patient and vectorised."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from xmag.errors import InputError
from xmag.metrics import decisions, labels, ranking, regression, survival
from xmag.metrics.labels import Cases, Ints, Labels, ratio

Floats = NDArray[np.float64]
Values = Callable[[Floats], Floats]
"""A weighted metric: weights of the cases (R, n) -> values (R, ...), NaN where undefined."""

RandomState = int | np.random.Generator | None

_WEIGHTS_AT_ONCE = 250_000
_LEAST_DRAWS_AT_ONCE = 32
"""Fewest draws of a block. Blocks are 2 MB, for caches, unless sorting would dominate."""
_MOST_TRIES = 1000
"""Limit of draws for each wanted resample, before InputError."""


@dataclass(frozen=True, slots=True)
class Interval:
    """Confidence interval with ends `low` and `high`; unpacks as ``low, high = interval``."""

    low: float
    high: float

    def __iter__(self) -> Iterator[float]:
        return iter((self.low, self.high))

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    def __str__(self) -> str:
        return f"({self.low:.3f}, {self.high:.3f})"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcomes:
    """Inputs of a metric of other tasks than classification, for n cases.

    Attributes:
        truth: float64 (n, T): numbers, NaN where missing; labels, 0 or 1; or event and time.
        hats: float64 (n, T): the predicted numbers, or scores of labels; the risk, (n, 1).
        codes: int64 (n,), classes of which each bootstrap draw has to have all.
        within: int64 (n,); scores and risks are compared only where it is equal. None compares all.
        event_weights: float64 (n,), 1 / G(t)² at the time of an event, for Uno's C; None: the
            censoring is that of these cases.
        brier: float64 (n,), each case's part of the integrated Brier score; NaN if not known.
    """

    truth: Floats
    hats: Floats
    codes: Ints
    within: Ints | None = None
    event_weights: Floats | None = None
    brier: Floats | None = None

    def __len__(self) -> int:
        return len(self.truth)

    def survival(self) -> survival.Survival:
        """The times to an event."""
        return survival.Survival(event=self.truth[:, 0] > 0, time=self.truth[:, 1])

    def label(self, place: int) -> Cases:
        """One of several labels, as two classes."""
        score = self.hats[:, place]
        return Cases(
            truth=self.truth[:, place].astype(np.int64),
            classes=(0, 1),
            scores=np.stack([-score, score], axis=1),
            within=self.within,
        )


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric: its function, the same vectorised over weights of the cases, and its title."""

    function: Callable[..., Any]
    values: Callable[[Any, Floats | None], Floats]  # operands, weights (R, n) -> (R,)
    title: str
    of_scores: bool = False
    needs_order: bool = False
    each: Callable[[Any, Floats | None, int], Floats] | None = None
    """Of tasks with columns (targets, labels): the metric of the one at a place."""
    read: Callable[[Any, Any, Ints | None], Outcomes] | None = None
    """Operands from the arguments of `function` and `within`; None of metrics of labels."""
    is_test: bool = False
    """Whether it is the p-value of a test, which has no interval."""
    undefined: str = ""
    """Why it has no value, where it has none."""

    def cases(
        self, y_true: Any, y_hat: Any, classes: Labels | None, within: Labels | None
    ) -> Cases | Outcomes:
        """The checked operands of the metric; `within` matters to metrics of scores alone."""
        if self.read is not None:
            self.function(y_true, y_hat)  # raises for what it does not take
            n = len(np.asarray(y_hat))
            strata = None if within is None else labels.numbered(within, n, "within")
            return self.read(y_true, y_hat, strata)
        if self.needs_order and classes is None:
            self.function(y_true, y_hat)  # raises, and says why an order is needed
        if self.of_scores:
            return labels.scored_cases(y_true, y_hat, classes, within)
        return labels.decided_cases(y_true, y_hat, classes)


def _columns(function: Callable[..., float], title: str, **more: Any) -> Metric:
    """A metric of several targets or labels: the mean of that of `each`."""
    each = more["each"]

    def values(cases: Outcomes, weights: Floats | None) -> Floats:
        places = range(cases.truth.shape[1])
        return np.asarray(np.mean([each(cases, weights, place) for place in places], axis=0))

    return Metric(function, values, title, **more)


def _number(
    function: Callable[..., float],
    values: Callable[[Floats, Floats, Floats], Floats],
    title: str,
    *,
    compares: bool = False,
) -> Metric:
    """A metric of numbers. If it `compares` cases, it is a mean over `within`, by their weights."""

    def each(cases: Outcomes, weights: Floats | None, place: int) -> Floats:
        truth, hats = cases.truth[:, place], cases.hats[:, place]
        weights = np.ones((1, len(cases))) if weights is None else weights
        total, mass = np.zeros(len(weights)), np.zeros(len(weights))
        within = cases.within if compares else None
        for rows in labels.strata_of(within, np.flatnonzero(~np.isnan(truth))):
            own = weights[:, rows]
            found = values(truth[rows], hats[rows], own)
            total += np.where(np.isnan(found), 0, found * own.sum(1))
            mass += np.where(np.isnan(found), 0, own.sum(1))
        return ratio(total, mass)

    needs = "two different known values and predictions" if compares else "two different values"
    undefined = f"no split has {needs} of some target"
    return _columns(function, title, each=each, read=_numbers, undefined=undefined)


def _numbers(y_true: Any, y_hat: Any, within: Ints | None) -> Outcomes:
    truth, hats = (np.asarray(values, np.float64)[:, None] for values in (y_true, y_hat))
    return Outcomes(truth=truth, hats=hats, codes=np.zeros(len(truth), np.int64), within=within)


def _times(y_true: Any, y_hat: Any, within: Ints | None) -> Outcomes:
    seen = survival.as_survival(y_true)
    return Outcomes(
        truth=np.stack([seen.event, seen.time], axis=1).astype(np.float64),
        hats=np.asarray(y_hat, np.float64)[:, None],
        codes=seen.event.astype(np.int64),
        within=within,
    )


def _concordances(cases: Outcomes, weights: Floats | None) -> Floats:
    return survival.concordances(cases.survival(), cases.hats[:, 0], weights, within=cases.within)


def _uno_concordances(cases: Outcomes, weights: Floats | None) -> Floats:
    seen, of_event = cases.survival(), cases.event_weights
    if of_event is None:
        of_event = survival.censoring_weights(seen, seen) ** 2
    risk, within = cases.hats[:, 0], cases.within
    return survival.concordances(seen, risk, weights, of_event=of_event, within=within)


def _brier_scores(cases: Outcomes, weights: Floats | None) -> Floats:
    assert cases.brier is not None
    known = ~np.isnan(cases.brier)
    own = np.ones((1, known.sum())) if weights is None else weights[:, known]
    return ratio(own @ cases.brier[known], own.sum(1))


def _untested(cases: Outcomes, weights: Floats | None) -> Floats:
    raise NotImplementedError("the log-rank test compares groups, which have no weights")


def _labelled(function: Callable[..., float], of_class: Any, title: str) -> Metric:
    """A metric of several labels, from that of the scores of a class."""

    def each(cases: Outcomes, weights: Floats | None, place: int) -> Floats:
        found: Floats = of_class(cases.label(place), weights, 1)
        return found

    undefined = "no split has cases with and without some label"
    return _columns(function, title, each=each, undefined=undefined)


METRICS = {
    metric.function.__name__: metric
    for metric in (
        Metric(decisions.balanced_accuracy, decisions.balanced_accuracies, "balanced accuracy"),
        Metric(decisions.weighted_f1, decisions.weighted_f1s, "weighted F1"),
        Metric(decisions.accuracy, decisions.accuracies, "accuracy"),
        Metric(
            decisions.quadratic_kappa,
            decisions.quadratic_kappas,
            "quadratic kappa",
            needs_order=True,
        ),
        Metric(ranking.auroc_ovr, ranking.ovr_aurocs, "AUROC, one-vs-rest macro", of_scores=True),
        Metric(ranking.auroc_ovo, ranking.ovo_aurocs, "AUROC, one-vs-one macro", of_scores=True),
    )
}
"""Metrics of classification by name, in the order of the rows of tables."""

_INCOMPARABLE = "no two cases of a split can be compared: nobody has an event before another's time"

TASKS: dict[str, dict[str, Metric]] = {
    "classification": METRICS,
    "multilabel": {
        "auroc": _labelled(ranking.auroc, ranking.class_aurocs, "AUROC, macro"),
        "average_precision": _labelled(
            ranking.average_precision, ranking.average_precisions, "average precision, macro"
        ),
    },
    "regression": {
        "r2": _number(regression.r2, regression.r2s, "R²"),
        "mae": _number(regression.mae, regression.maes, "MAE"),
        "rmse": _number(regression.rmse, regression.rmses, "RMSE"),
        "pearson": _number(regression.pearson, regression.pearsons, "Pearson", compares=True),
        "spearman": _number(regression.spearman, regression.spearmans, "Spearman", compares=True),
    },
    "survival": {
        "harrell_c": Metric(
            survival.harrell_c, _concordances, "Harrell's C", read=_times, undefined=_INCOMPARABLE
        ),
        "uno_c": Metric(
            survival.uno_c, _uno_concordances, "Uno's C", read=_times, undefined=_INCOMPARABLE
        ),
        "integrated_brier_score": Metric(
            survival.integrated_brier_score,
            _brier_scores,
            "integrated Brier score",
            undefined="no survival functions are predicted over the times of a split",
        ),
        "log_rank": Metric(survival.log_rank, _untested, "log-rank p of risk groups", is_test=True),
    },
}
"""The metrics of each task by name, in the order of the rows of tables."""


def interval(
    metric: Callable[..., float],
    y_true: Any,
    y_hat: ArrayLike,
    *,
    classes: Labels | None = None,
    groups: Labels | None = None,
    within: Labels | None = None,
    level: float = 0.95,
    resamples: int = 1000,
    random_state: RandomState = 0,
) -> Interval:
    """Percentile bootstrap confidence interval of `metric`, resampled by patient (`groups`).

    Each resample draws as many groups as there are, with replacement, and takes all their cases.
    Cases of one patient are alike, and an interval that drew them one by one would be too narrow.
    A resample that lacks a class which `y_true` has, or in which the metric is not defined, is
    drawn again. Where all resamples agree, as for a few cases without a single error, the interval
    is a point: it cannot see the errors that more cases would show.

    `metric` is one of this module (`y_true` and `y_hat` are then what it takes: labels and labels
    or scores, numbers, times and risks), computed for all resamples at once; or any function
    ``metric(y_true, y_hat)`` of a list of labels and an array, called for each resample, with
    ``classes=`` if they are given. `groups` names the patient of each case; None makes each case
    its own. With `within`, AUROC, C and correlations compare only cases where it is equal. Raises
    InputError for operands that the metric does not take, fewer than two groups, and a metric that
    is almost never defined. Efron and Tibshirani 1993, "An Introduction to the Bootstrap",
    section 13.3.
    """
    more = (m for table in TASKS.values() for m in table.values() if m.read is not None)
    known = next((m for m in (*METRICS.values(), *more) if m.function is metric), None)
    if known is None and within is not None:
        raise InputError(
            f"within is given, but {getattr(metric, '__name__', metric)} is called for each draw"
            " without it; leave it out, or take a metric that compares cases within (of two"
            " classes, auroc_ovr is the AUROC of the second)"
        )
    if known is None:
        truth = labels.as_labels(y_true, "y_true")
        codes = labels.numbered(truth, len(truth), "y_true")
        values = _by_calls(metric, truth, y_hat, {} if classes is None else {"classes": classes})
    else:
        cases = known.cases(y_true, y_hat, classes, within)
        codes = cases.truth if isinstance(cases, Cases) else cases.codes
        values = functools.partial(known.values, cases)
    patients = (
        np.arange(len(codes)) if groups is None else labels.numbered(groups, len(codes), "groups")
    )
    drawn = resampled(values, codes, patients, resamples=resamples, random_state=random_state)
    return percentile_interval(drawn, level=level)


def percentile_interval(values: Floats, *, level: float) -> Interval:
    """Percentile interval: the central share `level` of `values`."""
    if not 0 < level < 1:
        raise InputError(f"level is {level}; expected a share between 0 and 1, such as 0.95")
    low, high = np.quantile(values, ((1 - level) / 2, (1 + level) / 2))
    return Interval(float(low), float(high))


def resampled(
    values: Values, codes: Ints, groups: Ints, *, resamples: int, random_state: RandomState
) -> Floats:
    """Bootstrap values of a metric, (resamples, ...), one for each draw of `groups` (n,)."""
    if resamples < 1:
        raise InputError(f"resamples is {resamples}; expected at least 1, and usually 1000")
    kept: list[Floats] = []
    count = 0
    blocks = drawn_weights(codes, groups, resamples=resamples, random_state=random_state)
    for tries, weights in enumerate(blocks):
        found = values(weights)
        found = found[np.isfinite(found).all(axis=tuple(range(1, found.ndim)))]
        kept.append(found)
        count += len(found)
        if count >= resamples:
            break
        if tries > _MOST_TRIES and count < tries:
            raise InputError(
                "the metric is hardly ever defined; give more patients of the rare classes"
            )
    return np.concatenate(kept)[:resamples]


def drawn_weights(
    codes: Ints, groups: Ints, *, resamples: int, random_state: RandomState
) -> Iterator[Floats]:
    """Endless blocks of bootstrap weights (r, n): counts of each case in draws with all classes."""
    rng = np.random.default_rng(random_state)
    number = int(groups.max()) + 1 if len(groups) else 0
    if number < 2:
        raise InputError(
            f"there is {number} patient to resample; expected two or more, and rather 20"
        )
    _, classes = np.unique(codes, return_inverse=True)
    has_class = np.zeros((number, classes.max() + 1))
    has_class[groups, classes] = 1
    block = max(_LEAST_DRAWS_AT_ONCE, min(resamples, _WEIGHTS_AT_ONCE // len(codes)))
    starts = np.arange(block)[:, None] * number
    failures = 0
    while True:
        draws = rng.integers(number, size=(block, number))
        counts = np.bincount((draws + starts).ravel(), minlength=block * number)
        of_groups = counts.reshape(block, number).astype(np.float64)
        complete = (of_groups @ has_class > 0).all(1)
        if complete.any():
            failures = 0
            yield of_groups[complete][:, groups]
            continue
        failures += block
        if failures > _MOST_TRIES * 10:
            raise InputError(
                f"hardly any draw of {number} patients has all {has_class.shape[1]} classes; give"
                " more patients of the rare classes"
            )


def _by_calls(
    metric: Callable[..., float], truth: list[Any], y_hat: ArrayLike, options: dict[str, Any]
) -> Values:
    """Weighted metric from any function ``metric(y_true, y_hat)``, called once for each draw."""
    hats = np.asarray(y_hat)
    labels.require_length(hats, len(truth), "y_hat")

    def values(weights: Floats) -> Floats:
        found = []
        for row in weights.astype(np.int64):
            rows = np.repeat(np.arange(len(truth)), row)
            found.append(metric([truth[i] for i in rows], hats[rows], **options))
        return np.asarray(found, dtype=np.float64)

    return values
