"""Mean ROC curves over splits, with bootstrap confidence bands."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xmag.errors import InputError
from xmag.evaluate.results import Result, Sampling
from xmag.metrics.bootstrap import drawn_weights

Floats = NDArray[np.float64]

_MOST_DRAWS = 500
"""Limit of bootstrap draws for a band, which is drawn and not reported as a number."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Curve:
    """The ROC curve of one class; `low` and `high` are the pointwise band at `band_fpr`, or None.

    Of several splits it is their mean at each false positive rate, weighted by their pairs of a
    positive and a negative case, so that the area under it is the AUROC of the report.
    """

    fpr: Floats
    tpr: Floats
    band_fpr: Floats
    low: Floats | None
    high: Floats | None


def curve_of(result: Result, place: int, *, sampling: Sampling) -> Curve | None:
    """The ROC curve of the class at `place` against the rest; None without a pair to compare."""
    strata = [
        stratum
        for split in np.unique(result.splits)
        if (stratum := _stratum(result, np.flatnonzero(result.splits == split), place)) is not None
    ]
    if not strata:
        return None
    grid = np.linspace(0, 1, 201)
    ones = np.ones((1, len(result.rows)))
    # A mean of steps is exact where they are, from the left and from the right.
    steps = np.unique(np.concatenate([stratum.curves(ones)[0][0] for stratum in strata]))
    fpr = np.union1d((steps - 1e-9).clip(0), steps)
    tpr = _mean(strata, ones, fpr)[0]
    fpr, tpr = np.append(0.0, fpr), np.append(0.0, tpr)
    low, high = _band(result, strata, grid, sampling=sampling)
    return Curve(fpr=fpr, tpr=tpr, band_fpr=grid, low=low, high=high)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Stratum:
    """The predictions of one split, sorted by descending score of one class."""

    order: NDArray[np.int64]
    positive: NDArray[np.bool_]
    last_of_tie: NDArray[np.int64]

    def curves(self, weights: Floats) -> tuple[Floats, Floats, Floats]:
        """False and true positive rates (R, k), and pairs (R,), under weights; 0 without a pair."""
        sorted_weights = weights[:, self.order]
        hits = np.cumsum(sorted_weights * self.positive, axis=1)[:, self.last_of_tie]
        alarms = np.cumsum(sorted_weights * ~self.positive, axis=1)[:, self.last_of_tie]
        most_hits, most_alarms = hits[:, -1:], alarms[:, -1:]
        tpr = hits / np.where(most_hits > 0, most_hits, 1)
        fpr = alarms / np.where(most_alarms > 0, most_alarms, 1)
        return fpr, tpr, (most_hits * most_alarms)[:, 0]


def _stratum(result: Result, places: NDArray[np.int64], place: int) -> _Stratum | None:
    score = result.scores[places, place]
    order = np.argsort(-score, kind="stable")
    positive = result.truth[places][order] == place
    if positive.all() or not positive.any():
        return None
    ends = np.append(np.flatnonzero(np.diff(score[order])), len(order) - 1)
    return _Stratum(order=places[order], positive=positive, last_of_tie=ends)


def _mean(strata: list[_Stratum], weights: Floats, grid: Floats) -> Floats:
    """Mean true positive rate (R, g) at each false positive rate of `grid`; NaN without pairs."""
    total = np.zeros((len(weights), len(grid)))
    pairs = np.zeros((len(weights), 1))
    for stratum in strata:
        fpr, tpr, number = stratum.curves(weights)
        rows = [
            np.interp(grid, np.append(0.0, x), np.append(0.0, y))
            for x, y in zip(fpr, tpr, strict=True)
        ]
        total += number[:, None] * np.array(rows)
        pairs += number[:, None]
    return np.where(pairs > 0, total / np.where(pairs > 0, pairs, 1), np.nan)


def _band(
    result: Result, strata: list[_Stratum], grid: Floats, *, sampling: Sampling
) -> tuple[Floats | None, Floats | None]:
    wanted = min(sampling.resamples, _MOST_DRAWS)
    kept: list[Floats] = []
    try:
        draws = drawn_weights(
            result.truth, result.patients, resamples=wanted, random_state=sampling.random_state
        )
        for _ in range(wanted):
            curves = _mean(strata, next(draws), grid)
            kept.append(curves[np.isfinite(curves[:, 0])])
            if sum(map(len, kept)) >= wanted:
                break
    except InputError:
        return None, None  # too few patients for an interval, as the report says
    if not sum(map(len, kept)):
        return None, None
    ends = (1 - sampling.level) / 2, (1 + sampling.level) / 2
    low, high = np.quantile(np.concatenate(kept)[:wanted], ends, axis=0)
    return low, high
