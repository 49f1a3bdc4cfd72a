"""Bootstrap confidence intervals of metrics, resampled by patient and vectorised."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from xmag.errors import InputError
from xmag.metrics import decisions, ranking
from xmag.metrics.labels import Cases, Labels, as_labels, decided_cases, numbered, scored_cases

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


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric: its function, the same vectorised over weights of the cases, and its title."""

    function: Callable[..., float]
    values: Callable[[Cases, Floats | None], Floats]  # weights (R, n) -> (R,)
    title: str
    of_scores: bool = False
    needs_order: bool = False

    def cases(
        self, y_true: Labels, y_hat: Any, classes: Labels | None, within: Labels | None
    ) -> Cases:
        """The checked operands of the metric; `within` matters to metrics of scores alone."""
        if self.needs_order and classes is None:
            self.function(y_true, y_hat)  # raises, and says why an order is needed
        if self.of_scores:
            return scored_cases(y_true, y_hat, classes, within)
        return decided_cases(y_true, y_hat, classes)


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
"""Metrics by name, in the order of the rows of tables."""


def interval(
    metric: Callable[..., float],
    y_true: Labels,
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

    `metric` is one of this module (`y_hat` are then labels or scores, as it takes them), computed
    for all resamples at once; or any function ``metric(y_true, y_hat)`` of a list of labels and an
    array, called for each resample, with ``classes=`` if they are given. `groups` names the patient
    of each case; None makes each case its own. `within` is that of `auroc_ovr`. Raises InputError
    for operands that the metric does not take, fewer than two groups, and a metric that is almost
    never defined. Efron and Tibshirani 1993, "An Introduction to the Bootstrap", section 13.3.
    """
    known = next((m for m in METRICS.values() if m.function is metric), None)
    if known is None:
        truth = as_labels(y_true, "y_true")
        codes = numbered(truth, len(truth), "y_true")
        values = _by_calls(metric, truth, y_hat, {} if classes is None else {"classes": classes})
    else:
        cases = known.cases(y_true, y_hat, classes, within)
        codes, values = cases.truth, functools.partial(known.values, cases)
    patients = np.arange(len(codes)) if groups is None else numbered(groups, len(codes), "groups")
    drawn = resampled(values, codes, patients, resamples=resamples, random_state=random_state)
    return percentile_interval(drawn, level=level)


def percentile_interval(values: Floats, *, level: float) -> Interval:
    """Percentile interval: the central share `level` of `values`."""
    if not 0 < level < 1:
        raise InputError(f"level is {level}; expected a share between 0 and 1, such as 0.95")
    low, high = np.quantile(values, ((1 - level) / 2, (1 + level) / 2))
    return Interval(float(low), float(high))


def resampled(
    values: Values,
    codes: NDArray[np.int64],
    groups: NDArray[np.int64],
    *,
    resamples: int,
    random_state: RandomState,
) -> Floats:
    """Bootstrap values of a metric, float64 (resamples, ...), one for each draw of groups.

    `codes` (n,) are the classes, all of which each draw has to have; `groups` (n,) are numbered
    from 0 without gaps.
    """
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
                "the metric is not defined in almost any resample; give more patients of the rare"
                " classes"
            )
    return np.concatenate(kept)[:resamples]


def drawn_weights(
    codes: NDArray[np.int64],
    groups: NDArray[np.int64],
    *,
    resamples: int,
    random_state: RandomState,
) -> Iterator[Floats]:
    """Endless blocks of bootstrap weights (r, n): counts of each case in draws with all classes.

    The same seed gives the same draws, whatever they are used for.
    """
    rng = np.random.default_rng(random_state)
    number = int(groups.max()) + 1 if len(groups) else 0
    if number < 2:
        raise InputError(
            f"there is {number} patient to resample; an interval needs at least two, and some 20"
            " to mean anything"
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
    metric: Callable[..., float],
    truth: list[Any],
    y_hat: ArrayLike,
    options: dict[str, Any],
) -> Values:
    """Weighted metric from any function ``metric(y_true, y_hat)``, called once for each draw."""
    hats = np.asarray(y_hat)
    if len(hats) != len(truth):
        raise InputError(f"y_hat has {len(hats)} entries for {len(truth)} cases")

    def values(weights: Floats) -> Floats:
        found = []
        for row in weights.astype(np.int64):
            rows = np.repeat(np.arange(len(truth)), row)
            found.append(metric([truth[i] for i in rows], hats[rows], **options))
        return np.asarray(found, dtype=np.float64)

    return values
