"""Metrics of numbers: R², MAE, RMSE, and Pearson's and Spearman's correlation."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from xmag.errors import InputError
from xmag.metrics.labels import Bools, Floats, ratio


def as_numbers(values: Any, n: int, name: str) -> Floats:
    """Targets of n cases as float64 (n,) or (n, T), NaN if missing; InputError for others."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{name} holds values that are no numbers ({error}); expected numbers, NaN for missing"
            " ones: for classes, give a classifier such as MILClassifier"
        ) from None
    if array.ndim not in (1, 2) or len(array) != n or 0 in array.shape:
        raise InputError(
            f"{name} has shape {array.shape} for {n} cases; expected ({n},) or ({n}, targets)"
        )
    if np.isinf(array).any():
        raise InputError(f"{name} holds infinite values; expected numbers, or NaN if missing")
    return array


def r2(y_true: ArrayLike, y_pred: ArrayLike) -> float:
    """R², the coefficient of determination: 1 - squared error / variance of the truth.

    1 is perfect, 0 is what the mean of the truth has, less is worse. `y_true` and `y_pred` are
    (n,), with missing truth as NaN, which is left out. Raises InputError for other shapes, values
    of `y_pred` that are not finite, fewer than two cases, and a constant truth.
    """
    return _of(r2s, "R²", y_true, y_pred)


def mae(y_true: ArrayLike, y_pred: ArrayLike) -> float:
    """Mean absolute error, in units of the target. Operands and errors as `r2`."""
    return _of(maes, "MAE", y_true, y_pred)


def rmse(y_true: ArrayLike, y_pred: ArrayLike) -> float:
    """Root mean squared error, in units of the target. Operands and errors as `r2`."""
    return _of(rmses, "RMSE", y_true, y_pred)


def pearson(y_true: ArrayLike, y_pred: ArrayLike) -> float:
    """Pearson's correlation of truth and prediction, -1 to 1. Operands and errors as `r2`.

    InputError also for a constant prediction, whose correlation does not exist.
    """
    return _of(pearsons, "Pearson's correlation", y_true, y_pred)


def spearman(y_true: ArrayLike, y_pred: ArrayLike) -> float:
    """Spearman's correlation: Pearson's of the ranks, ties by their mean. Errors as `pearson`."""
    return _of(spearmans, "Spearman's correlation", y_true, y_pred)


def r2s(truth: Floats, predicted: Floats, weights: Floats) -> Floats:
    """R² (R,) under each row of case weights (R, n); NaN where the truth is constant."""
    error = weights @ (truth - predicted) ** 2
    mean = ratio(weights @ truth, weights.sum(1))
    spread = (weights * (truth - mean[:, None]) ** 2).sum(1)
    return np.where(_varies(truth, weights), 1 - ratio(error, spread), np.nan)


def maes(truth: Floats, predicted: Floats, weights: Floats) -> Floats:
    """Mean absolute error (R,) under each row of case weights (R, n)."""
    return ratio(weights @ np.abs(truth - predicted), weights.sum(1))


def rmses(truth: Floats, predicted: Floats, weights: Floats) -> Floats:
    """Root mean squared error (R,) under each row of case weights (R, n)."""
    return np.sqrt(ratio(weights @ (truth - predicted) ** 2, weights.sum(1)))


def pearsons(truth: Floats, predicted: Floats, weights: Floats) -> Floats:
    """Pearson's correlation (R,) under each row of case weights (R, n); NaN for a constant."""
    return _correlations(truth[None], predicted[None], weights)


def spearmans(truth: Floats, predicted: Floats, weights: Floats) -> Floats:
    """Spearman's correlation (R,) under each row of case weights (R, n); NaN for a constant."""
    return _correlations(_ranks(truth, weights), _ranks(predicted, weights), weights)


def _correlations(a: Floats, b: Floats, weights: Floats) -> Floats:
    total = weights.sum(1, keepdims=True)
    both = _varies(a, weights) & _varies(b, weights)
    a, b = (values - ratio((weights * values).sum(1, keepdims=True), total) for values in (a, b))
    covariance, of_a, of_b = ((weights * p).sum(1) for p in (a * b, a * a, b * b))
    found = np.clip(ratio(covariance, np.sqrt(of_a * of_b)), -1, 1)
    return np.where(both, found, np.nan)


def _varies(values: Floats, weights: Floats) -> Bools:
    """Whether values (..., n) differ in the cases with a weight: in a sum, rounding would, (R,)."""
    highest = np.where(weights > 0, values, -np.inf).max(axis=1, initial=-np.inf)
    lowest = np.where(weights > 0, values, np.inf).min(axis=1, initial=np.inf)
    return np.asarray(highest > lowest)


def _ranks(values: Floats, weights: Floats) -> Floats:
    """Mean ranks (R, n) of values when each case is there as often as its weight says."""
    _, place = np.unique(values, return_inverse=True)
    ties = np.zeros((len(weights), place.max() + 1))
    np.add.at(ties.T, place, weights.T)
    ranks: Floats = np.cumsum(ties, axis=1) - (ties - 1) / 2
    return ranks[:, place]


def _of(
    metric: Callable[[Floats, Floats, Floats], Floats],
    name: str,
    y_true: ArrayLike,
    y_pred: ArrayLike,
) -> float:
    truth, predicted = np.asarray(y_true, np.float64), np.asarray(y_pred, np.float64)
    if truth.ndim != 1 or truth.shape != predicted.shape:
        raise InputError(
            f"y_true has shape {truth.shape}, y_pred {predicted.shape}; expected (n,) for both: of"
            " several targets, one after the other"
        )
    known = ~np.isnan(truth)
    truth, predicted = truth[known], predicted[known]
    if np.isinf(truth).any() or not np.isfinite(predicted).all():
        raise InputError("y_true or y_pred hold values that are not finite; expected numbers")
    if len(truth) < 2:
        raise InputError(f"{len(truth)} cases have a known truth; expected two or more")
    value = float(metric(truth, predicted, np.ones((1, len(truth))))[0])
    if np.isnan(value):
        raise InputError(
            f"{name} does not exist where all of the truth, or of the prediction, is one number"
        )
    return value
