"""Model evaluation: cross-validation, external validation, probes of embeddings, and reports.

Needs ``pip install "xmag[evaluate]"``: scikit-learn, and matplotlib for the pictures.
"""

from xmag.evaluate.folds import Folds, Split
from xmag.evaluate.pictures import confusion_figure, roc_figure
from xmag.evaluate.probes import LinearProbe, NearestNeighbours, SimpleShot
from xmag.evaluate.probing import knn, linear_probe, simpleshot
from xmag.evaluate.report import Report
from xmag.evaluate.results import Estimate, Result, Sampling
from xmag.evaluate.validation import cross_validate, external

__all__ = [
    "Estimate",
    "Folds",
    "LinearProbe",
    "NearestNeighbours",
    "Report",
    "Result",
    "Sampling",
    "SimpleShot",
    "Split",
    "confusion_figure",
    "cross_validate",
    "external",
    "knn",
    "linear_probe",
    "roc_figure",
    "simpleshot",
]
