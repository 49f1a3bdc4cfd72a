"""From a bag of tile embeddings to a diagnosis: aggregators, and the classifier around them."""

from xmag.mil.aggregators import AGGREGATORS, aggregator, aggregator_config
from xmag.mil.output import MILOutput, training_loss

__all__ = ["AGGREGATORS", "MILOutput", "aggregator", "aggregator_config", "training_loss"]
