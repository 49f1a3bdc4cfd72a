"""Model evaluation: cross-validation, external validation, probes of embeddings, and reports.

Needs ``pip install "xmag[evaluate]"``: scikit-learn, and matplotlib for the pictures.
"""

from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from xmag.evaluate.folds import Folds, Split
from xmag.evaluate.pictures import (
    calibration_figure,
    confusion_figure,
    kaplan_meier_figure,
    roc_figure,
    scatter_figure,
)
from xmag.evaluate.probes import LinearProbe, NearestNeighbours, SimpleShot, probe
from xmag.evaluate.report import Report
from xmag.evaluate.results import Estimate, Result, Sampling
from xmag.evaluate.validation import cross_validate, external

if TYPE_CHECKING:
    from xmag.evaluate.comparison import ComparedModel, Comparison, compare

# Aliases of `probe`, by its method.
linear_probe = partial(probe, method="linear")
knn = partial(probe, method="knn")
simpleshot = partial(probe, method="simpleshot")

__all__ = [
    "ComparedModel",
    "Comparison",
    "Estimate",
    "Folds",
    "LinearProbe",
    "NearestNeighbours",
    "Report",
    "Result",
    "Sampling",
    "SimpleShot",
    "Split",
    "calibration_figure",
    "compare",
    "confusion_figure",
    "cross_validate",
    "external",
    "kaplan_meier_figure",
    "probe",
    "roc_figure",
    "scatter_figure",
]


def __getattr__(name: str) -> Any:
    """Names of the comparison, whose encoders need torch; metrics and reports do without."""
    if name in ("ComparedModel", "Comparison", "compare"):
        return getattr(import_module("xmag.evaluate.comparison"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
