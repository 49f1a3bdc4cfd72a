"""Result: the predictions of one evaluation, and the metrics with their intervals."""

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xmag.errors import InputError
from xmag.metrics.bootstrap import METRICS, Floats, Interval, percentile_interval, resampled
from xmag.metrics.decisions import confusions
from xmag.metrics.labels import Cases
from xmag.metrics.ranking import class_aurocs


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Estimate of a metric, with its bootstrap interval.

    Attributes:
        value: The metric; None where it is not defined.
        interval: Its bootstrap interval, resampled by patient; None where there is none.
        reason: Why one of them is None.
    """

    value: float | None
    interval: Interval | None = None
    reason: str = ""

    def __str__(self) -> str:
        if self.value is None:
            return "–"
        if self.interval is None:
            return f"{self.value:.3f}"
        return f"{self.value:.3f} ({self.interval.low:.3f}–{self.interval.high:.3f})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Settings of bootstrap intervals: confidence level, number of draws, and seed."""

    level: float = 0.95
    resamples: int = 1000
    random_state: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.level < 1 or self.resamples < 1:
            raise InputError(
                f"level={self.level}, resamples={self.resamples}; expected a share between 0 and 1,"
                " and at least 1"
            )
        if not isinstance(self.random_state, Integral) or self.random_state < 0:
            raise InputError(f"random_state is {self.random_state!r}; expected an int from 0 on")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Result:
    """Predictions and metrics of a cross-validation, or of one model on one cohort.

    Row i of the arrays is one prediction; a case that is tested in several repeats has several.
    The arrays are read-only. Two results are equal if all their fields are.

    Attributes:
        trained_on: The cohort that the model was fitted on; empty where that is not known.
        tested_on: The cohort that it was tested on.
        classes: The order of classes, C of them.
        rows: int64 (m,), the index of the case in X.
        truth: int64 (m,), its class, as an index in `classes`.
        predicted: int64 (m,), the predicted class, likewise.
        scores: float64 (m, C), the probabilities in the order of `classes`.
        patients: int64 (m,), its patient, numbered from 0 by first appearance in X.
        splits: int64 (m,), the number of the split whose model predicted it.
        repeats: int64 (m,), the repeat that the split belongs to.
        estimates: By name of the metric.
        class_aurocs: The AUROC of each class against the rest, in the order of `classes`.
    """

    trained_on: str
    tested_on: str
    classes: tuple[Hashable, ...]
    rows: NDArray[np.int64]
    truth: NDArray[np.int64]
    predicted: NDArray[np.int64]
    scores: NDArray[np.float64]
    patients: NDArray[np.int64]
    splits: NDArray[np.int64]
    repeats: NDArray[np.int64]
    estimates: Mapping[str, Estimate]
    class_aurocs: tuple[Estimate, ...]

    def __post_init__(self) -> None:
        for array in (getattr(self, name) for name in ARRAYS):
            array.flags.writeable = False

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Result):
            return NotImplemented
        mine = ((getattr(self, f.name), getattr(other, f.name)) for f in fields(Result))
        return all(
            np.array_equal(a, b) if isinstance(a, np.ndarray) else bool(a == b) for a, b in mine
        )

    __hash__ = None  # type: ignore[assignment]

    @property
    def cases(self) -> int:
        """The number of cases tested."""
        return len(np.unique(self.rows))

    def counts(self) -> NDArray[np.int64]:
        """The number of cases tested of each class, int64 (C,)."""
        _, first = np.unique(self.rows, return_index=True)
        return np.bincount(self.truth[first], minlength=len(self.classes))

    def confusion(self) -> NDArray[np.float64]:
        """Confusion matrix, float64 (C, C): true class (row), predicted class; mean over repeats.

        A case that is tested in some repeats only counts by their share.
        """
        return np.asarray(confusions(cases_of(self), None)[0] / len(np.unique(self.repeats)))

    def per_split(self, metric: str) -> tuple[float | None, ...]:
        """The metric in each split alone, in their order; None where it is not defined there.

        As scikit-learn's ``cross_val_score`` has it, for a mean and a deviation over folds.
        Raises InputError for a metric that does not exist.
        """
        if metric not in METRICS:
            raise InputError(f"there is no metric {metric!r}; expected one of {sorted(METRICS)}")
        parts = [cases_of(self, self.splits == split) for split in np.unique(self.splits)]
        values = [float(METRICS[metric].values(cases, None)[0]) for cases in parts]
        return tuple(None if np.isnan(value) else value for value in values)


ARRAYS = ("rows", "truth", "predicted", "scores", "patients", "splits", "repeats")
"""Names of the fields of a Result that are arrays."""


def cases_of(result: Result, places: Any = slice(None)) -> Cases:
    """The predictions at `places`, as operands of metrics.

    Scores are compared within a split alone: those of two models have no common scale.
    """
    return Cases(
        truth=result.truth[places],
        classes=result.classes,
        predicted=result.predicted[places],
        scores=result.scores[places],
        within=result.splits[places],
    )


def with_estimates(result: Result, *, ordered: bool, sampling: Sampling) -> Result:
    """A copy of the result with its metrics and bootstrap intervals computed."""
    known = {name: metric for name, metric in METRICS.items() if ordered or not metric.needs_order}
    one_vs_rest = [functools.partial(class_aurocs, place=p) for p in range(len(result.classes))]
    return replace(
        result,
        estimates={n: _estimate(result, metric.values, sampling) for n, metric in known.items()},
        class_aurocs=tuple(_estimate(result, values, sampling) for values in one_vs_rest),
    )


def _estimate(result: Result, values: Callable[..., Floats], sampling: Sampling) -> Estimate:
    """Estimate of a metric: mean over repeats, and an interval that draws patients in all."""
    places = [np.flatnonzero(result.repeats == repeat) for repeat in np.unique(result.repeats)]
    repeats = [(rows, cases_of(result, rows)) for rows in places]

    def of_draws(weights: Floats) -> Floats:
        parts = [values(cases, weights[:, rows]) for rows, cases in repeats]
        return np.asarray(np.mean(parts, axis=0))

    value = float(np.mean([values(cases, None)[0] for _, cases in repeats]))
    if np.isnan(value):
        return Estimate(value=None, reason=_why_undefined([cases for _, cases in repeats]))
    try:
        drawn = resampled(
            of_draws,
            result.truth,
            result.patients,
            resamples=sampling.resamples,
            random_state=sampling.random_state,
        )
    except InputError as error:
        return Estimate(value=value, reason=f"no interval: {error}")
    return Estimate(value=value, interval=percentile_interval(drawn, level=sampling.level))


def _why_undefined(repeats: Sequence[Cases]) -> str:
    for cases in repeats:
        if missing := cases.missing():
            return f"no case of class {missing[0]!r}"
    if len(np.unique(repeats[0].truth)) == 1:
        return "all cases are of one class"
    return "no split has cases of two classes to compare"
