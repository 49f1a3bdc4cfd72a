"""What an aggregator returns, and the loss it is trained with."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True, kw_only=True)
class MILOutput:
    """What an aggregator makes of a batch of bags; `training_loss` puts its parts together.

    Attributes:
        logits: float (B, C).
        attention: float (B, N), the weight of each tile: sums to 1 over a bag, 0 where padded and
            in a bag without tiles. None for an aggregator that has no such thing.
        loss: An auxiliary loss of the whole batch, a scalar, to be added to that of the bags.
        bag_weight: What the cross-entropy of the bags counts beside it.
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
        weights: float (B,), what each bag counts in the mean; all the same by default.
    """
    losses = functional.cross_entropy(full(output.logits), labels, reduction="none")
    weights = torch.ones_like(losses) if weights is None else weights
    loss = output.bag_weight * (weights * losses).sum() / weights.sum()
    return loss if output.loss is None else loss + output.loss


def masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """The softmax of scores (..., N) over the tiles of a mask; all zero where there is none.

    In float32 where the scores are in half precision: weights of 100,000 tiles are small.
    """
    scores = full(scores)
    lowest = torch.finfo(scores.dtype).min
    # Without any tile the softmax is uniform over the padding, which the product takes out again:
    # no value and no gradient is ever NaN.
    return torch.softmax(scores.masked_fill(~mask, lowest), dim=-1) * mask


def full(values: Tensor) -> Tensor:
    """The values in float32 where they are in half precision, else as they are."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
