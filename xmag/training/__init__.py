"""Parts that all training loops share; the loops are those of `mil`, `finetune` and `distill`."""

from xmag.training.ema import Ema
from xmag.training.ranks import Ranks, joined_ranks
from xmag.training.schedule import best_epoch, warmup_cosine, warn_of_early_best

__all__ = [
    "Ema",
    "Ranks",
    "best_epoch",
    "joined_ranks",
    "warmup_cosine",
    "warn_of_early_best",
]
