"""Predictions of an estimator of any task: columns of a table, and each case in words."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from xmag.cli.table import Target
from xmag.errors import InputError
from xmag.mil import MILClassifier, MILRegressor, MILSurvival
from xmag.mil.estimator import MILEstimator

Estimator = MILEstimator[Any]


class Predictions(NamedTuple):
    """Predictions of cases: columns of text by their names, and each case in words."""

    columns: dict[str, list[str]]
    words: list[str]


def predictions(
    estimator: Estimator,
    cases: Sequence[Any],
    *,
    target: Target | None = None,
    times: Sequence[float] | None = None,
) -> Predictions:
    """Predictions of cases, as the estimator's task has them.

    The `target` names several numbers or labels (which have numbers from 1 on without it); `times`
    are those at which survival is asked for (by default quarters of what the training knows of).
    Raises InputError for `times` of another task, or beyond the training's.
    """
    if isinstance(estimator, MILSurvival):
        return _of_survival(estimator, cases, times)
    if times is not None:
        raise InputError(f"--times is for survival, but this is a {type(estimator).__name__}")
    if isinstance(estimator, MILRegressor):
        table = estimator.predict(cases).reshape(len(cases), -1)
        return _of_numbers(table, _named(target, table.shape[1]))
    assert isinstance(estimator, MILClassifier)  # there is no other
    probabilities = estimator.predict_proba(cases)
    if estimator.predict([]).ndim > 1:
        return _of_labels(probabilities, _named(target, probabilities.shape[1]))
    return _of_classes(probabilities, [str(label) for label in estimator.classes_.tolist()])


def _of_classes(probabilities: NDArray[np.float64], classes: Sequence[str]) -> Predictions:
    chosen = [classes[row.argmax()] for row in probabilities]
    columns = {"prediction": chosen}
    for label, column in zip(classes, probabilities.T, strict=True):
        columns[f"probability {label}"] = [f"{p:.6f}" for p in column]
    words = []
    for label, row in zip(chosen, probabilities, strict=True):
        each = ", ".join(f"{c} {p:.3f}" for c, p in zip(classes, row, strict=True))
        words.append(f"{label} ({each})")
    return Predictions(columns, words)


def _of_labels(probabilities: NDArray[np.float64], names: Sequence[str]) -> Predictions:
    columns = {}
    for name, column in zip(names, probabilities.T, strict=True):
        columns[f"prediction {name}"] = [str(int(p > 0.5)) for p in column]
        columns[f"probability {name}"] = [f"{p:.6f}" for p in column]
    words = [
        ", ".join(f"{name} {int(p > 0.5)} ({p:.3f})" for name, p in zip(names, row, strict=True))
        for row in probabilities
    ]
    return Predictions(columns, words)


def _of_numbers(table: NDArray[np.float64], names: Sequence[str]) -> Predictions:
    if len(names) == 1:
        (numbers,) = table.T.tolist()
        texts = [f"{number:.6g}" for number in numbers]
        return Predictions({"prediction": texts}, [f"{number:.4g}" for number in numbers])
    columns = {
        f"prediction {name}": [f"{number:.6g}" for number in column]
        for name, column in zip(names, table.T, strict=True)
    }
    words = [
        ", ".join(f"{name} {number:.4g}" for name, number in zip(names, row, strict=True))
        for row in table
    ]
    return Predictions(columns, words)


def _of_survival(
    estimator: MILSurvival, cases: Sequence[Any], times: Sequence[float] | None
) -> Predictions:
    risks = estimator.predict(cases)
    functions = estimator.predict_survival_function(cases)
    if times is None:
        end = functions[0].domain[1] if functions else 0.0
        times = [float(f"{share * end:.2g}") for share in (0.25, 0.5, 0.75)]
    shares = np.array([function(times) for function in functions]).reshape(-1, len(times))
    columns = {"risk": [f"{risk:.6f}" for risk in risks]}
    for time, column in zip(times, shares.T, strict=True):
        columns[f"survival at {time:g}"] = [f"{share:.6f}" for share in column]
    words = []
    for risk, row in zip(risks, shares, strict=True):
        each = ", ".join(f"{share:.3f} at {time:g}" for time, share in zip(times, row, strict=True))
        words.append(f"risk {risk:.3f}, survival {each}")
    return Predictions(columns, words)


def _named(target: Target | None, count: int) -> Sequence[str]:
    """The names of the target's columns, if they are as many as wanted, else numbers from 1 on."""
    if target is not None and len(target.columns) == count:
        return target.columns
    return [str(number) for number in range(1, count + 1)]
