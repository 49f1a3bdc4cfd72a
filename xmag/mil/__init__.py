"""From a bag of tile embeddings to a diagnosis: aggregators, and the classifier around them."""

from xmag.mil.aggregators import AGGREGATORS, aggregator, aggregator_config
from xmag.mil.attention import Attention
from xmag.mil.classifier import MILClassifier
from xmag.mil.output import MILOutput, training_loss

__all__ = [
    "AGGREGATORS",
    "Attention",
    "MILClassifier",
    "MILOutput",
    "aggregator",
    "aggregator_config",
    "training_loss",
]
