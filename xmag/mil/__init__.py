"""Multiple-instance learning (MIL): a classifier of bags of tile embeddings, and aggregators."""

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
