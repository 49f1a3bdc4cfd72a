"""Classification metrics and their bootstrap confidence intervals, in numpy alone.

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
from xmag.metrics.ranking import RocCurve, auroc, auroc_ovo, auroc_ovr, roc_curve

__all__ = [
    "Interval",
    "RocCurve",
    "accuracy",
    "auroc",
    "auroc_ovo",
    "auroc_ovr",
    "balanced_accuracy",
    "confusion_matrix",
    "interval",
    "quadratic_kappa",
    "roc_curve",
    "weighted_f1",
]
