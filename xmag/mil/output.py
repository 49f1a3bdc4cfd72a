"""The output of an aggregator, and its training loss."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True, kw_only=True)
class MILOutput:
    """Output of an aggregator for a batch of bags: logits, attention and auxiliary loss.

    Attributes:
        logits: float (B, C).
        attention: float (B, N), the weight of each tile: sums to 1 over a bag, 0 where padded and
            in a bag without tiles. None for an aggregator that has no such thing.
        loss: An auxiliary loss of the whole batch, a scalar, to be added to that of the bags.
        bag_weight: Weight of the bags' cross-entropy beside it; see `training_loss`.
    """

    logits: Tensor
    attention: Tensor | None
    loss: Tensor | None = None
    bag_weight: float = 1.0


def training_loss(output: MILOutput, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """The loss to minimise, a scalar: ``bag_weight * mean cross-entropy + loss``.

    Args:
        output: Of an aggregator that was given `labels` where it has an auxiliary loss.
        labels: int64 (B,).
        weights: float (B,), weight of each bag in the mean; all the same by default.
    """
    losses = functional.cross_entropy(full(output.logits), labels, reduction="none")
    weights = torch.ones_like(losses) if weights is None else weights
    loss = output.bag_weight * (weights * losses).sum() / weights.sum()
    return loss if output.loss is None else loss + output.loss


def masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Masked softmax of scores (..., N) over the tiles; all zero for a bag without tiles.

    In float32 where the scores are in half precision: weights of 100,000 tiles are small.
    """
    scores = full(scores)
    lowest = torch.finfo(scores.dtype).min
    # Without any tile the softmax is uniform over the padding, which the product takes out again:
    # no value and no gradient is ever NaN.
    return torch.softmax(scores.masked_fill(~mask, lowest), dim=-1) * mask


def full(values: Tensor) -> Tensor:
    """Half-precision values cast to float32; others as they are."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
