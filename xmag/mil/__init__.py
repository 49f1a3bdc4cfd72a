"""Multiple-instance learning (MIL): estimators of bags of tile embeddings, and aggregators."""

from xmag.mil.aggregators import AGGREGATORS, aggregator, aggregator_config
from xmag.mil.classifier import MILClassifier
from xmag.mil.heads import training_loss
from xmag.mil.pooling import Attention, MILOutput
from xmag.mil.regressor import MILRegressor
from xmag.mil.survival import MILSurvival, SurvivalFunction

__all__ = [
    "AGGREGATORS",
    "Attention",
    "MILClassifier",
    "MILOutput",
    "MILRegressor",
    "MILSurvival",
    "SurvivalFunction",
    "aggregator",
    "aggregator_config",
    "training_loss",
]
