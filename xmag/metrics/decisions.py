"""Metrics of predicted classes, from the confusion matrix: accuracy, F1, kappa."""

import numpy as np

from xmag.errors import InputError
from xmag.metrics.labels import Cases, Floats, Ints, Labels, decided_cases, ratio


def confusion_matrix(y_true: Labels, y_pred: Labels, *, classes: Labels | None = None) -> Ints:
    """Confusion matrix, int64 (C, C): counts of true class (row) and predicted class (column).

    `classes` is the order of rows and columns; by default, the sorted labels of both. Raises
    InputError for labels that do not fit each other or `classes`.
    """
    cases = decided_cases(y_true, y_pred, classes)
    return np.asarray(confusions(cases, None)[0], dtype=np.int64)


def accuracy(y_true: Labels, y_pred: Labels, *, classes: Labels | None = None) -> float:
    """Accuracy: the share of correct predictions. Raises InputError as `confusion_matrix`."""
    return float(accuracies(decided_cases(y_true, y_pred, classes), None)[0])


def balanced_accuracy(y_true: Labels, y_pred: Labels, *, classes: Labels | None = None) -> float:
    """Balanced accuracy: the mean over classes of their recall (macro recall).

    A class that no case has is left out of the mean; with one class only it is that class's recall.
    Raises InputError as `confusion_matrix`. Brodersen et al. 2010, "The balanced accuracy and its
    posterior distribution", for any number of classes.
    """
    return float(balanced_accuracies(decided_cases(y_true, y_pred, classes), None)[0])


def weighted_f1(y_true: Labels, y_pred: Labels, *, classes: Labels | None = None) -> float:
    """Weighted F1: the mean of F1 = 2 TP / (2 TP + FP + FN) over classes, weighted by cases.

    A class that no case has weighs nothing. Raises InputError as `confusion_matrix`.
    """
    return float(weighted_f1s(decided_cases(y_true, y_pred, classes), None)[0])


def quadratic_kappa(y_true: Labels, y_pred: Labels, *, classes: Labels | None = None) -> float:
    """Cohen's kappa with quadratic weights: 1 for agreement, 0 for what chance gives.

    For classes with an order, such as grades: to be off by two costs four times as much as by one.
    `classes` is that order and has to be given, also for numbers, where a grade that nobody has
    would otherwise make its neighbours adjacent. Raises InputError without it, where all cases have
    and are given one and the same class (kappa is 0/0 there), and as `confusion_matrix`. Where all
    cases have one class and decisions differ, it is 0. Cohen 1968, "Weighted kappa".
    """
    if classes is None:
        raise InputError(
            "quadratic kappa needs the order of the classes, from lowest on; give classes=[...]"
        )
    cases = decided_cases(y_true, y_pred, classes)
    value = float(quadratic_kappas(cases, None)[0])
    if np.isnan(value):
        raise InputError(
            f"quadratic kappa is not defined: all {len(cases)} cases have and were given the class"
            f" {cases.classes[cases.truth[0]]!r}; give cases of two classes or more"
        )
    return value


def confusions(cases: Cases, weights: Floats | None) -> Floats:
    """Confusion matrices (R, C, C) under each row of weights (R, n); None weighs each case 1."""
    if cases.predicted is None:
        raise InputError("a metric of decisions was asked for, but only scores are known")
    size = len(cases.classes)
    cells = cases.truth * size + cases.predicted
    if weights is None:
        return np.bincount(cells, minlength=size**2).reshape(1, size, size).astype(np.float64)
    found, place = np.unique(cells, return_inverse=True)
    indicator = (place[:, None] == np.arange(len(found))).astype(np.float64)
    matrices = np.zeros((len(weights), size**2))
    matrices[:, found] = weights @ indicator
    return matrices.reshape(-1, size, size)


def accuracies(cases: Cases, weights: Floats | None) -> Floats:
    """Accuracy (R,) under each row of weights (R, n)."""
    matrices = confusions(cases, weights)
    return np.asarray(_diagonals(matrices).sum(1) / matrices.sum((1, 2)))


def balanced_accuracies(cases: Cases, weights: Floats | None) -> Floats:
    """Balanced accuracy (R,) under each row of weights (R, n)."""
    matrices = confusions(cases, weights)
    actual = matrices.sum(2)
    present = actual > 0
    recalls = _diagonals(matrices) / np.where(present, actual, 1)
    return np.asarray(recalls.sum(1) / present.sum(1))


def weighted_f1s(cases: Cases, weights: Floats | None) -> Floats:
    """Weighted F1 (R,) under each row of weights (R, n)."""
    matrices = confusions(cases, weights)
    actual, given = matrices.sum(2), matrices.sum(1)
    either = actual + given
    f1 = 2 * _diagonals(matrices) / np.where(either > 0, either, 1)
    return np.asarray((actual * f1).sum(1) / actual.sum(1))


def quadratic_kappas(cases: Cases, weights: Floats | None) -> Floats:
    """Quadratic kappa (R,) under each row of weights (R, n); NaN where it is 0/0."""
    matrices = confusions(cases, weights)
    places = np.arange(matrices.shape[1])
    cost = (places[:, None] - places) ** 2.0
    by_chance = matrices.sum(2)[:, :, None] * matrices.sum(1)[:, None, :]
    expected = (cost * by_chance).sum((1, 2)) / matrices.sum((1, 2))
    return 1 - ratio((cost * matrices).sum((1, 2)), expected)


def _diagonals(matrices: Floats) -> Floats:
    return np.diagonal(matrices, axis1=1, axis2=2)
