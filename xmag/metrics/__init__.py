"""Metrics of all tasks and their bootstrap confidence intervals, in numpy alone.

Labels may be of any hashable kind. `classes` is the order of classes, and of the columns of scores;
by default, the sorted labels. Nothing returns NaN: where a metric has no value, InputError says so.
"""

from xmag.metrics.bootstrap import Interval, interval
from xmag.metrics.decisions import (
    accuracy,
    balanced_accuracy,
    confusion_matrix,
    quadratic_kappa,
    weighted_f1,
)
from xmag.metrics.ranking import RocCurve, auroc, auroc_ovo, auroc_ovr, average_precision, roc_curve
from xmag.metrics.regression import mae, pearson, r2, rmse, spearman
from xmag.metrics.survival import (
    KaplanMeier,
    LogRank,
    brier_score,
    harrell_c,
    integrated_brier_score,
    kaplan_meier,
    log_rank,
    uno_c,
)

__all__ = [
    "Interval",
    "KaplanMeier",
    "LogRank",
    "RocCurve",
    "accuracy",
    "auroc",
    "auroc_ovo",
    "auroc_ovr",
    "average_precision",
    "balanced_accuracy",
    "brier_score",
    "confusion_matrix",
    "harrell_c",
    "integrated_brier_score",
    "interval",
    "kaplan_meier",
    "log_rank",
    "mae",
    "pearson",
    "quadratic_kappa",
    "r2",
    "rmse",
    "roc_curve",
    "spearman",
    "uno_c",
    "weighted_f1",
]


def __dir__() -> list[str]:
    return sorted(__all__)
