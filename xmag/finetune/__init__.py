"""End-to-end fine-tuning of encoder and aggregator from slides and slide-level labels."""

from xmag.finetune.gradients import exact_backward
from xmag.finetune.result import FinetuneResult
from xmag.finetune.run import finetune_slides
from xmag.finetune.settings import Settings
from xmag.finetune.tilestore import TileOptions, TileStore, stored_tiles
from xmag.finetune.trainer import Epoch
from xmag.training import Augmentation

__all__ = [
    "Augmentation",
    "Epoch",
    "FinetuneResult",
    "Settings",
    "TileOptions",
    "TileStore",
    "exact_backward",
    "finetune_slides",
    "stored_tiles",
]


def __dir__() -> list[str]:
    return sorted(__all__)
