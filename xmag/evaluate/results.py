"""Result: the predictions of one evaluation, and the metrics with their intervals."""

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xmag.errors import InputError
from xmag.metrics import bootstrap
from xmag.metrics.bootstrap import TASKS, Floats, Interval, Outcomes
from xmag.metrics.decisions import confusions
from xmag.metrics.labels import Cases
from xmag.metrics.ranking import class_aurocs
from xmag.metrics.survival import Survival, log_rank


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
        if self.interval is None:
            return shown(self.value)
        return f"{shown(self.value)} ({shown_interval(self.interval)})"


def shown(value: float | None) -> str:
    """A value of a metric as text: three decimals, fewer from 100 on, or three digits if tiny."""
    if value is None:
        return "–"
    if abs(value) >= 100:
        return f"{value:,.1f}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:.3f}" if value == 0 or abs(value) >= 5e-4 else f"{value:.3g}"


def shown_p(p: float | None) -> str:
    """A p-value as text: three decimals, and below 0.001 no more than that."""
    return "< 0.001" if p is not None and p < 1e-3 else shown(p)


def shown_interval(interval: Interval | None) -> str:
    """An interval as text; a dash where there is none."""
    if interval is None:
        return "–"
    return f"{shown(interval.low)}{' to ' if interval.low < 0 else '–'}{shown(interval.high)}"


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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Result:
    """Predictions and metrics of a cross-validation, or of one model on one cohort.

    Row i of the arrays is one prediction; a case that is tested in several repeats has several.
    The arrays are read-only. Two results are equal if all their fields are.

    Attributes:
        trained_on: The cohort that the model was fitted on; empty where that is not known.
        tested_on: The cohort that it was tested on.
        task: "classification", "multilabel", "regression" or "survival".
        classes: The order of classes, C of them; names of the labels or targets; "censored" and
            "event" in survival.
        rows: int64 (m,), the index of the case in X.
        truth: int64 (m,), its class, as an index in `classes`; 0 or 1 of each label, int64 (m, C);
            numbers, float64 (m, C), NaN where missing; event and time, float64 (m, 2).
        predicted: int64 (m,), the predicted class, likewise, and labels and numbers as in `truth`;
            in survival the risk group, 1 above the median risk of the cases fitted on, else 0.
        scores: float64 (m, C), the probabilities in the order of `classes`; in survival the risk
            (m, 1); in regression (m, 0).
        patients: int64 (m,), its patient, numbered from 0 by first appearance in X.
        splits: int64 (m,), the number of the split whose model predicted it.
        repeats: int64 (m,), the repeat that the split belongs to.
        estimates: By name of the metric.
        of_each: By name of the metric, that of each label or target, or of each class against the
            rest, in the order of `classes`; empty where there is one target, and in survival.
        event_weights: float64 (m,), in survival 1 / G(t)² at the time of an event, where G is the
            estimate of being uncensored from the cases fitted on; otherwise (0,).
        brier: float64 (m,), in survival the case's part of the integrated Brier score, NaN where
            no survival function is predicted; otherwise (0,).
    """

    task: str
    trained_on: str
    tested_on: str
    classes: tuple[Hashable, ...]
    rows: NDArray[np.int64]
    truth: NDArray[Any]
    predicted: NDArray[Any]
    scores: NDArray[np.float64]
    patients: NDArray[np.int64]
    splits: NDArray[np.int64]
    repeats: NDArray[np.int64]
    estimates: Mapping[str, Estimate]
    of_each: Mapping[str, tuple[Estimate, ...]]
    event_weights: Floats = field(default_factory=lambda: np.zeros(0))
    brier: Floats = field(default_factory=lambda: np.zeros(0))

    def __post_init__(self) -> None:
        for name in ARRAYS:
            getattr(self, name).flags.writeable = False

    def __repr__(self) -> str:
        cohort = f", tested on {self.tested_on}" if self.tested_on else ""
        return f"<Result of {self.task}{cohort}: {self.cases:,} cases>"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Result):
            return NotImplemented
        pairs = ((getattr(self, item.name), getattr(other, item.name)) for item in fields(Result))
        return all(
            np.array_equal(a, b, equal_nan=True) if isinstance(a, np.ndarray) else bool(a == b)
            for a, b in pairs
        )

    __hash__ = None  # type: ignore[assignment]

    @property
    def cases(self) -> int:
        """The number of cases tested."""
        return len(np.unique(self.rows))

    @property
    def class_aurocs(self) -> tuple[Estimate, ...]:
        """The AUROC of each class against the rest, or of each label, in the order of `classes`."""
        return self.of_each.get("auroc", ())

    def counts(self) -> NDArray[np.int64]:
        """The number of cases tested of each class, int64 (C,).

        Of labels it is that of the cases that have them, of targets that of the known ones.
        """
        truth = self.truth[np.unique(self.rows, return_index=True)[1]]
        if self.task == "regression":
            return np.asarray((~np.isnan(truth)).sum(0))
        if self.task == "multilabel":
            return np.asarray(truth.sum(0))
        codes = truth[:, 0].astype(np.int64) if self.task == "survival" else truth
        return np.bincount(codes, minlength=len(self.classes))

    def confusion(self) -> NDArray[np.float64]:
        """Confusion matrix, float64 (C, C): true class (row), predicted class; mean over repeats.

        A case that is tested in some repeats only counts by their share. InputError for other tasks
        than classification.
        """
        cases = cases_of(self)
        if not isinstance(cases, Cases):
            raise InputError(f"the task is {self.task}, which has no confusion matrix")
        return np.asarray(confusions(cases, None)[0] / len(np.unique(self.repeats)))

    def risk_groups(self) -> tuple[Survival, NDArray[np.int64]]:
        """In survival: the times of the cases tested, and whether their risk is high, int64 (n,).

        A case has the group of most of its repeats, and of as many of both, the high one.
        InputError for other tasks.
        """
        if self.task != "survival":
            raise InputError(f"the task is {self.task}, which has no risk groups")
        _, first, place = np.unique(self.rows, return_index=True, return_inverse=True)
        share = np.bincount(place, self.predicted) / np.bincount(place)
        event, time = self.truth[first].T
        return Survival(event=event > 0, time=time), (share >= 0.5).astype(np.int64)

    def per_split(self, metric: str) -> tuple[float | None, ...]:
        """The metric in each split alone, in their order; None where it is not defined there.

        As scikit-learn's ``cross_val_score`` has it, for a mean and a deviation over folds.
        Raises InputError for a metric that does not exist.
        """
        known = {name: one for name, one in TASKS[self.task].items() if not one.is_test}
        if metric not in known:
            raise InputError(f"there is no metric {metric!r}; expected one of {sorted(known)}")
        parts = [cases_of(self, self.splits == split) for split in np.unique(self.splits)]
        values = [float(known[metric].values(cases, None)[0]) for cases in parts]
        return tuple(None if np.isnan(value) else value for value in values)


ARRAYS = (
    "rows", "truth", "predicted", "scores", "patients", "splits", "repeats", "event_weights",
    "brier",
)  # fmt: skip


def cases_of(result: Result, places: Any = slice(None)) -> Cases | Outcomes:
    """The predictions at `places`, as operands of metrics.

    Scores are compared within a split alone: those of two models have no common scale.
    """
    truth, predicted = result.truth[places], result.predicted[places]
    scores, within = result.scores[places], result.splits[places]
    if result.task == "classification":
        return Cases(
            truth=truth, classes=result.classes, predicted=predicted, scores=scores, within=within
        )
    is_survival = result.task == "survival"
    return Outcomes(
        truth=truth.astype(np.float64),
        hats=predicted if result.task == "regression" else scores,
        codes=truth[:, 0].astype(np.int64) if is_survival else np.zeros(len(truth), np.int64),
        within=within,
        event_weights=result.event_weights[places] if is_survival else None,
        brier=result.brier[places] if is_survival else None,
    )


def with_estimates(result: Result, *, ordered: bool, sampling: Sampling) -> Result:
    """A copy of the result with its metrics and bootstrap intervals computed."""
    table = TASKS[result.task]
    known = {name: metric for name, metric in table.items() if ordered or not metric.needs_order}
    each: dict[str, tuple[Callable[..., Floats], str]] = {
        name: (m.each, m.undefined) for name, m in known.items() if m.each is not None
    }
    if result.task == "classification":
        each = {"auroc": (class_aurocs, "")}
    repeats = _repeats(result)

    def estimate(values: Callable[..., Floats], undefined: str) -> Estimate:
        return _estimate(functools.partial(_mean_of, values, repeats), undefined, result, sampling)

    places = range(len(result.classes) if len(result.classes) > 1 else 0)
    return replace(
        result,
        estimates={
            name: _log_rank(result) if m.is_test else estimate(m.values, m.undefined)
            for name, m in known.items()
        },
        of_each={
            name: tuple(estimate(functools.partial(values, place=n), reason) for n in places)
            for name, (values, reason) in each.items()
            if places
        },
    )


def difference(one: Result, other: Result, metric: str, sampling: Sampling) -> Estimate:
    """Estimate of a metric of one result less that of another, of the same cases and splits.

    The interval draws patients, the same for both (a paired bootstrap). Raises InputError for
    results of other cases, or of other splits.
    """
    if not all(
        np.array_equal(getattr(one, name), getattr(other, name), equal_nan=name == "truth")
        for name in ("rows", "truth", "patients", "splits", "repeats")
    ):
        raise InputError("the results are of different cases or splits; expected the same of both")
    values, parts = TASKS[one.task][metric].values, [_repeats(one), _repeats(other)]

    def of_draws(weights: Floats | None) -> Floats:
        first, second = (_mean_of(values, repeats, weights) for repeats in parts)
        return np.asarray(first - second)

    return _estimate(of_draws, "one of the two is not defined", one, sampling)


_Repeats = Sequence[tuple[NDArray[np.int64], Any]]


def _repeats(result: Result) -> _Repeats:
    """The places of each repeat, and the predictions there."""
    places = [np.flatnonzero(result.repeats == repeat) for repeat in np.unique(result.repeats)]
    return [(rows, cases_of(result, rows)) for rows in places]


def _mean_of(values: Callable[..., Floats], repeats: _Repeats, weights: Floats | None) -> Floats:
    """The mean over repeats of a metric with weights of all predictions, (R, m)."""
    parts = [values(cases, None if weights is None else weights[:, at]) for at, cases in repeats]
    return np.asarray(np.mean(parts, axis=0))


def _estimate(
    of_draws: Callable[[Floats | None], Floats], reason: str, result: Result, sampling: Sampling
) -> Estimate:
    """The estimate of what `of_draws` gives with and without weights, or why there is none.

    `reason` is that; where it is empty, as of classes, it is found.
    """
    value = float(of_draws(None)[0])
    if np.isnan(value):
        return Estimate(value=None, reason=reason or _why_undefined(result))
    cases = cases_of(result)
    try:
        drawn = bootstrap.resampled(
            of_draws,
            cases.truth if isinstance(cases, Cases) else cases.codes,
            result.patients,
            resamples=sampling.resamples,
            random_state=sampling.random_state,
        )
    except InputError as error:
        return Estimate(value=value, reason=f"no interval: {error}")
    return Estimate(
        value=value, interval=bootstrap.percentile_interval(drawn, level=sampling.level)
    )


def _log_rank(result: Result) -> Estimate:
    """The p-value of the log-rank test of the risk groups, which has no interval."""
    try:
        return Estimate(value=log_rank(*result.risk_groups()).p_value)
    except InputError as error:
        return Estimate(value=None, reason=str(error))


def _why_undefined(result: Result) -> str:
    repeats = _repeats(result)
    for _, cases in repeats:
        if missing := cases.missing():
            return f"no case of class {missing[0]!r}"
    if len(np.unique(repeats[0][1].truth)) == 1:
        return "all cases are of one class"
    return "no split has cases of two classes to compare"
