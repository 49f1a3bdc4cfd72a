"""Metrics of survival: Harrell's and Uno's C, Brier score, Kaplan-Meier, log-rank.

Times may be censored: of a case without `event` it is known only that nothing had happened by its
`time`. A risk is any number that is larger for those expected to have the event earlier.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from xmag.errors import InputError
from xmag.metrics.labels import Bools, Floats, Ints, Labels, as_labels, numbered, ratio

_TIED = 1e-8
"""Risks that differ by no more count as equal, as in scikit-survival."""
_ROWS_AT_ONCE = 256
_NORMAL_975 = 1.959963984540054


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Survival:
    """Times to an event, or to the end of the observation: `event` bool (n,), `time` float (n,)."""

    event: Bools
    time: Floats

    def __len__(self) -> int:
        return len(self.time)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class KaplanMeier:
    """Kaplan-Meier estimate: the share of cases without an event, as a step function of time.

    Attributes:
        times: float64 (k,), the different times, rising; values hold from their time on.
        survival: float64 (k,).
        low: float64 (k,), lower end of the 95% interval (Greenwood's variance, on log(-log)).
        high: float64 (k,), its upper end.
        at_risk: int64 (k,), cases that are still observed just before each time.
    """

    times: Floats
    survival: Floats
    low: Floats
    high: Floats
    at_risk: Ints

    def __repr__(self) -> str:
        ends = f": {self.survival[-1]:.3g} at {self.times[-1]:g}" if len(self.times) else ""
        return f"<KaplanMeier of {len(self.times):,} times{ends}>"

    def at(self, time: ArrayLike) -> Floats:
        """The share without an event at any times; 1 before the first."""
        place = np.searchsorted(self.times, np.asarray(time, np.float64), side="right")
        return np.append(1.0, self.survival)[place]

    def at_risk_at(self, time: ArrayLike) -> Ints:
        """Cases still observed just before any times, for the table below a picture."""
        place = np.searchsorted(self.times, np.asarray(time, np.float64), side="left")
        return np.append(self.at_risk, 0)[place]


@dataclass(frozen=True, slots=True, kw_only=True)
class LogRank:
    """Log-rank test: `statistic` (chi-squared with `groups` - 1 degrees of freedom), `p_value`."""

    statistic: float
    p_value: float
    groups: int


def as_survival(y: Any, name: str = "y") -> Survival:
    """Checked times to an event, from what scikit-survival and scikit-learn users have.

    `y` is a structured array of two fields (event, time) in that order, as
    ``sksurv.util.Surv.from_arrays`` makes it, or an array (n, 2) of event and time. Raises
    InputError for another shape, an event that is not 0, 1 or bool, so that swapped columns are
    seen, and a time that is negative or not finite.
    """
    if isinstance(y, Survival):
        return y
    array = np.asarray(y)
    if array.dtype.names is not None and len(array.dtype.names) == 2 and array.ndim == 1:
        event, time = (array[field] for field in array.dtype.names)
    elif array.dtype.names is None and array.ndim == 2 and array.shape[1] == 2:
        event, time = array.T
    else:
        raise InputError(
            f"{name} has shape {array.shape} and type {array.dtype}; expected (event, time) of each"
            " case: a structured array of these two fields, or an array of shape (n, 2)"
        )
    try:
        events, times = event.astype(np.float64), time.astype(np.float64)
    except (TypeError, ValueError):
        raise InputError(
            f"{name} holds {event.dtype} and {time.dtype}; expected event (bool, or 0 and 1) and"
            " time (a number)"
        ) from None
    if not np.isin(events, (0, 1)).all():
        strange = events[~np.isin(events, (0, 1))][0]
        raise InputError(
            f"the events of {name} hold {strange:g}; expected bool, or 0 (censored) and 1: the"
            " first column is the event, the second the time"
        )
    wrong = ~np.isfinite(times) | (times < 0)
    if wrong.any():
        raise InputError(
            f"a time of {name} is {times[wrong][0]:g} (case {int(np.argmax(wrong))}); expected"
            " finite numbers from 0 on. Leave such cases out"
        )
    return Survival(event=events == 1, time=times)


def harrell_c(y: Any, risk: ArrayLike) -> float:
    """Harrell's C: the share of comparable pairs that `risk` puts in the right order.

    Two cases are comparable where the one with the shorter time has the event; of equal times only
    an event and a censored one are. Equal risks count half, so a constant gives 0.5. `y` is as
    `as_survival` takes it, `risk` (n,). Raises InputError where no two cases can be compared.
    Harrell et al. 1996, Statistics in Medicine 15, 361-387.
    """
    survival = as_survival(y)
    return _defined(concordances(survival, _risks(risk, survival)), survival)


def uno_c(y: Any, risk: ArrayLike, *, train: Any | None = None, tau: float | None = None) -> float:
    """Uno's C: Harrell's C with pairs weighted so that it does not depend on the censoring.

    Each pair counts 1 / G(t)² at the time t of its event, where G is the Kaplan-Meier estimate of
    being uncensored in `train`, the cases that were fitted on (by default those of `y`). `tau`
    leaves out events from that time on, where hardly anybody is left. Raises InputError as
    `harrell_c`, and where an event lies at a time when all of `train` are censored. Uno et al.
    2011, Statistics in Medicine 30, 1105-1117.
    """
    survival = as_survival(y)
    known = survival if train is None else as_survival(train, "train")
    weights = censoring_weights(survival, known, tau=tau) ** 2
    return _defined(concordances(survival, _risks(risk, survival), of_event=weights), survival)


def concordances(
    survival: Survival,
    risk: Floats,
    weights: Floats | None = None,
    *,
    of_event: Floats | None = None,
    within: Ints | None = None,
) -> Floats:
    """Concordance (R,) under case weights (R, n), within equal `within`; NaN without any pair.

    `of_event` (n,) weighs the pairs by their case with the event.
    """
    if weights is None:
        weights = np.ones((1, len(survival)))
    right, pairs = np.zeros(len(weights)), np.zeros(len(weights))
    events = np.flatnonzero(survival.event)
    for first in range(0, len(events), _ROWS_AT_ONCE):
        rows = events[first : first + _ROWS_AT_ONCE]
        time = survival.time[rows, None]
        comparable = (survival.time > time) | ((survival.time == time) & ~survival.event)
        if within is not None:
            comparable &= within == within[rows, None]
        lead = risk[rows, None] - risk
        agreeing = comparable * np.where(np.abs(lead) <= _TIED, 0.5, lead > 0)
        own = weights[:, rows] if of_event is None else weights[:, rows] * of_event[rows]
        right += (own * (weights @ agreeing.T)).sum(1)
        pairs += (own * (weights @ comparable.T)).sum(1)
    return ratio(right, pairs)


def censoring_weights(survival: Survival, train: Survival, *, tau: float | None = None) -> Floats:
    """1 / G(t) (n,) of cases with an event, 0 of others; G is that of `train`, see `uno_c`."""
    counted = survival.event if tau is None else survival.event & (survival.time < tau)
    shares = _uncensored(train).at(survival.time[counted])
    if (shares <= 0).any():
        raise InputError(
            "an event lies at a time when all of the cases to train on are censored, so that"
            " nothing is known of it; give tau= (the time up to which to look)"
        )
    weights = np.zeros(len(survival))
    weights[counted] = 1 / shares
    return weights


def brier_score(y: Any, survival: ArrayLike, times: ArrayLike, *, train: Any) -> Floats:
    """Brier score (T,) at `times`: mean squared error of predicted survival, by 1/G weights.

    `survival` (n, T) is the predicted probability of no event up to each of `times`, which rise
    within the times of `y`; `train` are the cases that were fitted on. 0 is best; 0.25 is what a
    constant 0.5 has. Raises InputError for shapes and times that do not fit. Graf et al. 1999,
    Statistics in Medicine 18, 2529-2545.
    """
    seen, known = as_survival(y), as_survival(train, "train")
    at, predicted = np.asarray(times, np.float64), np.asarray(survival, np.float64)
    if at.ndim != 1 or predicted.shape != (len(seen), len(at)):
        raise InputError(
            f"survival has shape {predicted.shape} for {len(seen)} cases and times {at.shape};"
            " expected (cases, times)"
        )
    first, last = seen.time.min(), seen.time.max()
    if not len(at) or (np.diff(at) <= 0).any() or at[0] < first or at[-1] >= last:
        raise InputError(
            f"times go from {at.min(initial=math.inf):g} to {at.max(initial=-math.inf):g}; expected"
            f" rising times from {first:g} to below {last:g}, between which there are cases"
        )
    return np.asarray(brier_errors(seen, predicted, at, known).mean(axis=0))


def brier_errors(seen: Survival, predicted: Floats, at: Floats, train: Survival) -> Floats:
    """Squared errors (n, T) of predicted survival at times (T,), by 1/G weights of `train`."""
    uncensored = _uncensored(train)
    at_own, at_times = (np.nan_to_num(ratio(1.0, uncensored.at(each))) for each in (seen.time, at))
    had_event = (seen.time[:, None] <= at) & seen.event[:, None]
    is_free = seen.time[:, None] > at
    errors: Floats = predicted**2 * had_event * at_own[:, None]
    errors += (1 - predicted) ** 2 * is_free * at_times
    return errors


def integrated_brier_score(y: Any, survival: ArrayLike, times: ArrayLike, *, train: Any) -> float:
    """Integrated Brier score: the mean of `brier_score` over time (trapezoids)."""
    scores, at = brier_score(y, survival, times, train=train), np.asarray(times, np.float64)
    if len(at) < 2:
        raise InputError(f"there is {len(at)} time to integrate over; expected two or more")
    means = (scores[1:] + scores[:-1]) / 2
    return float(means @ np.diff(at) / (at[-1] - at[0]))


def kaplan_meier(y: Any) -> KaplanMeier:
    """Kaplan-Meier estimate of survival, with a 95% interval and the numbers at risk.

    Kaplan and Meier 1958; the interval of Kalbfleisch and Prentice (log(-log), Greenwood).
    """
    survival = as_survival(y)
    times, at_risk, events, _ = _counts(survival)
    shares = np.cumprod(1 - events / at_risk, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = np.cumsum(events / (at_risk * (at_risk - events)))
        spread = _NORMAL_975 * np.sqrt(variance) / np.log(shares)
        low, high = shares ** np.exp(-spread), shares ** np.exp(spread)
    inside = (shares > 0) & (shares < 1)
    return KaplanMeier(
        times=times,
        survival=shares,
        low=np.where(inside, low, shares),
        high=np.where(inside, high, shares),
        at_risk=at_risk,
    )


def log_rank(y: Any, groups: Labels) -> LogRank:
    """Log-rank test that groups of cases have the same survival, for two groups or more.

    Raises InputError for one group only, and where nobody has an event. Peto and Peto 1972.
    """
    survival = as_survival(y)
    codes = numbered(groups, len(survival), "groups")
    if (count := len(set(codes.tolist()))) < 2:
        named = sorted(map(str, set(as_labels(groups, "groups"))))
        raise InputError(f"groups are {named}; expected two or more to compare")
    _require_event(survival)
    excess, variance = np.zeros(count), np.zeros((count, count))
    for time in np.unique(survival.time[survival.event]):
        at_risk = np.bincount(codes[survival.time >= time], minlength=count).astype(np.float64)
        now = survival.event & (survival.time == time)
        total, events = at_risk.sum(), float(now.sum())
        share = at_risk / total
        excess += np.bincount(codes[now], minlength=count) - events * share
        if total > 1:
            spread = events * (total - events) / (total - 1)
            variance += spread * (np.diag(share) - np.outer(share, share))
    # The groups' sums are 0 together: one of them says nothing new.
    statistic = float(excess[1:] @ np.linalg.pinv(variance[1:, 1:]) @ excess[1:])
    return LogRank(statistic=statistic, p_value=_chi_squared(statistic, count - 1), groups=count)


def _counts(survival: Survival) -> tuple[Floats, Ints, Ints, Ints]:
    """Of each different time: the time, cases at risk before it, its events, and its censored."""
    times, place = np.unique(survival.time, return_inverse=True)
    events = np.bincount(place[survival.event], minlength=len(times)).astype(np.int64)
    ended = np.bincount(place, minlength=len(times)).astype(np.int64)
    at_risk: Ints = len(survival) - np.cumsum(ended) + ended
    return times, at_risk, events, ended - events


def _uncensored(survival: Survival) -> KaplanMeier:
    """Kaplan-Meier estimate of the censoring; of equal times, events come before it."""
    times, at_risk, events, censored = _counts(survival)
    left = at_risk - events
    shares = np.cumprod(1 - np.divide(censored, left, out=np.zeros(len(left)), where=left > 0))
    return KaplanMeier(times=times, survival=shares, low=shares, high=shares, at_risk=at_risk)


def _risks(risk: ArrayLike, survival: Survival) -> Floats:
    values = np.asarray(risk, np.float64)
    if values.shape != (len(survival),) or not np.isfinite(values).all():
        raise InputError(
            f"risk has shape {values.shape} for {len(survival)} cases"
            f"{'' if np.isfinite(values).all() else ', with values that are not finite'}; expected"
            " one finite number for each"
        )
    return values


def _defined(found: Floats, survival: Survival) -> float:
    value = float(found[0])
    if math.isnan(value):
        _require_event(survival)
        raise InputError(
            "no two cases can be compared: after each event nobody is observed; give more cases"
        )
    return value


def _require_event(survival: Survival) -> None:
    if not survival.event.any():
        raise InputError(
            f"none of the {len(survival)} cases has an event, so that nothing can be compared; give"
            " cases with one (1 in the first column, or True)"
        )


def _chi_squared(statistic: float, degrees: int) -> float:
    """Probability that chi-squared with so many degrees of freedom exceeds a value.

    By the recurrence of the incomplete gamma function, Q(a + 1, x) = Q(a, x) + x^a e^-x / Γ(a + 1).
    """
    x, a = statistic / 2, 0.5 if degrees % 2 else 1.0
    tail = math.erfc(math.sqrt(x)) if degrees % 2 else math.exp(-x)
    while a < degrees / 2:
        tail += math.exp(a * math.log(x) - x - math.lgamma(a + 1)) if x > 0 else 0.0
        a += 1
    return min(tail, 1.0)
