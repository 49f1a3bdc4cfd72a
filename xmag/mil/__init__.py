"""Multiple-instance learning (MIL): estimators of bags of tile embeddings, and aggregators."""

from xmag.mil.aggregators import AGGREGATORS, aggregator, aggregator_config
from xmag.mil.classifier import MILClassifier
from xmag.mil.heads import training_loss
from xmag.mil.ordinal import OrderedLinear
from xmag.mil.pooling import Attention, MILOutput
from xmag.mil.regressor import MILRegressor
from xmag.mil.saving import load_estimator
from xmag.mil.survival import MILSurvival, SurvivalFunction

__all__ = [
    "AGGREGATORS",
    "Attention",
    "MILClassifier",
    "MILOutput",
    "MILRegressor",
    "MILSurvival",
    "OrderedLinear",
    "SurvivalFunction",
    "aggregator",
    "aggregator_config",
    "load_estimator",
    "training_loss",
]


def __dir__() -> list[str]:
    return sorted(__all__)
