"""Parts that all training loops share; the loops are those of `mil`, `finetune` and `distill`."""

from xmag.training.augmentation import Augmentation
from xmag.training.checkpoint import Checkpoint
from xmag.training.loop import Ema, Loop, Progress, with_less_memory
from xmag.training.ranks import Ranks, joined_ranks
from xmag.training.schedule import Schedule, best_epoch, warmup_cosine, warn_of_early_best

__all__ = [
    "Augmentation",
    "Checkpoint",
    "Ema",
    "Loop",
    "Progress",
    "Ranks",
    "Schedule",
    "best_epoch",
    "joined_ranks",
    "warmup_cosine",
    "warn_of_early_best",
    "with_less_memory",
]
