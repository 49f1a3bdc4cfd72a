"""Output of aggregators, and batched ones: gated attention (ABMIL), mean and max pooling."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from xmag.geometry import TileGeometry


@dataclass(frozen=True, slots=True, kw_only=True)
class MILOutput:
    """Output of an aggregator for a batch of bags: logits, attention, pooled vectors, loss.

    Attributes:
        logits: float (B, C).
        attention: float (B, N), the weight of each tile: sums to 1 over a bag, 0 where padded and
            in a bag without tiles. None for an aggregator that has no such thing.
        pooled: float (B, E), the vector of each bag of which the last layer makes the logits. None
            for an aggregator that has no such thing.
        loss: An auxiliary loss of the whole batch, a scalar, to be added to that of the bags.
        bag_weight: Weight of the bags' cross-entropy beside it; see `xmag.mil.training_loss`.
    """

    logits: Tensor
    attention: Tensor | None
    loss: Tensor | None = None
    bag_weight: float = 1.0
    pooled: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Attention:
    """Attention weights of the tiles of a bag; row i belongs to tile i of the bag.

    Attributes:
        scores: float32 (N,), not negative; they sum to 1 over a bag that has tiles.
        coords: int64 (N, 2), top-left corner of each tile, level-0 px; None for a bag without.
        kind: "softmax" for learned weights of a mean (ABMIL, CLAM-SB), "nystrom" for what
            TransMIL's class token attends to, "custom" for an aggregator that says nothing. Any
            other is a name of your own, by which the legends of pictures call the scores.
        tiles: Size and scale of the tiles; None where the bag does not know.
    """

    scores: NDArray[np.float32]
    coords: NDArray[np.int64] | None
    kind: str
    tiles: TileGeometry | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def __repr__(self) -> str:
        ends = f", from {self.scores.min():.3g} to {self.scores.max():.3g}" if len(self) else ""
        places = "" if self.coords is not None else ", without places"
        return f"<Attention of {len(self):,} tiles, {self.kind}{ends}{places}>"


def masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Masked softmax of scores (..., N) over the tiles, never in half; 0 for an empty bag."""
    scores = full(scores)
    lowest = torch.finfo(scores.dtype).min
    # Without any tile the softmax is uniform over the padding, which the product takes out again:
    # no value and no gradient is ever NaN.
    return torch.softmax(scores.masked_fill(~mask, lowest), dim=-1) * mask


def full(values: Tensor) -> Tensor:
    """Half-precision values cast to float32; others as they are."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


class Aggregator(nn.Module):
    """Base of xmag's aggregators; `options` are those that its constructor was given, by name."""

    batched = True
    attention_kind: str | None = None

    def __init__(self, in_dim: int, classes: int, **options: Any) -> None:
        super().__init__()
        self.in_dim, self.classes, self.options = in_dim, classes, options


class GatedAttention(nn.Module):
    """Gated attention scores of tiles, (B, N, E) -> (B, N): w^T (tanh(V h) * sigmoid(U h)).

    Ilse et al. 2018, equation 9; the dropout on both branches is that of Lu et al. 2021.
    """

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.content = nn.Linear(dim, hidden)
        self.gate = nn.Linear(dim, hidden)
        self.score = nn.Linear(hidden, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tiles: Tensor) -> Tensor:
        """The attention score of each tile, (B, N), before the softmax."""
        content = self.dropout(torch.tanh(self.content(tiles)))
        gate = self.dropout(torch.sigmoid(self.gate(tiles)))
        scores: Tensor = self.score(content * gate)
        return scores.squeeze(-1)


def tile_embedding(in_dim: int, embed_dim: int, dropout: float) -> nn.Sequential:
    """Embedding layer of features, (..., D) -> (..., E): linear, ReLU and dropout."""
    return nn.Sequential(nn.Linear(in_dim, embed_dim), nn.ReLU(), nn.Dropout(dropout))


def weighted_mean(tiles: Tensor, attention: Tensor) -> Tensor:
    """Attention-weighted mean (B, E) of tiles (B, N, E); zero for a bag without tiles."""
    return (attention.to(tiles.dtype).unsqueeze(1) @ tiles).squeeze(1)


class ABMIL(Aggregator):
    """Attention-based MIL (ABMIL): gated attention pooling of embedded tiles, then a linear layer.

    h = dropout(ReLU(W x)), a = softmax over the bag of w^T (tanh(V h) * sigmoid(U h)), logits =
    head(sum of a h). A bag without tiles gives the bias of the head. Ilse, Tomczak and Welling,
    Attention-based Deep Multiple Instance Learning, ICML 2018, equations 7 and 9.
    """

    attention_kind = "softmax"

    def __init__(
        self,
        *,
        in_dim: int,
        classes: int,
        embed_dim: int = 512,
        attention_dim: int = 384,
        dropout: float = 0.25,
    ) -> None:
        options = {"embed_dim": embed_dim, "attention_dim": attention_dim, "dropout": dropout}
        super().__init__(in_dim, classes, **options)
        self.embed = tile_embedding(in_dim, embed_dim, dropout)
        self.attention = GatedAttention(embed_dim, attention_dim, dropout)
        self.head = nn.Linear(embed_dim, classes)

    def forward(self, features: Tensor, mask: Tensor, labels: Tensor | None = None) -> MILOutput:  # noqa: ARG002
        """Logits (B, C) and attention (B, N) of features (B, N, D); `mask` is True on tiles."""
        tiles = self.embed(features)
        attention = masked_softmax(self.attention(tiles), mask)
        pooled = weighted_mean(tiles, attention)
        return MILOutput(logits=self.head(pooled), attention=attention, pooled=pooled)


class _Pool(Aggregator):
    """Base of mean and max pooling: embedded tiles, pooled without attention, then a linear."""

    def __init__(
        self, *, in_dim: int, classes: int, embed_dim: int = 512, dropout: float = 0.25
    ) -> None:
        super().__init__(in_dim, classes, embed_dim=embed_dim, dropout=dropout)
        self.embed = tile_embedding(in_dim, embed_dim, dropout)
        self.head = nn.Linear(embed_dim, classes)


class MeanPool(_Pool):
    """Mean pooling: the mean of embedded tiles, then a linear layer.

    logits = head(mean of dropout(ReLU(W x))). A bag without tiles gives the bias of the head.
    """

    def forward(self, features: Tensor, mask: Tensor, labels: Tensor | None = None) -> MILOutput:  # noqa: ARG002
        """Logits (B, C) of features (B, N, D); `mask` is True on tiles."""
        weights = mask.to(features.dtype) / mask.sum(dim=1, keepdim=True).clamp(min=1)
        pooled = weighted_mean(self.embed(features), weights)
        return MILOutput(logits=self.head(pooled), attention=None, pooled=pooled)


class MaxPool(_Pool):
    """Max pooling: the largest value of each channel over embedded tiles, then a linear layer.

    logits = head(max of dropout(ReLU(W x))). A bag without tiles gives the bias of the head.
    """

    def forward(self, features: Tensor, mask: Tensor, labels: Tensor | None = None) -> MILOutput:  # noqa: ARG002
        """Logits (B, C) of features (B, N, D); `mask` is True on tiles."""
        tiles = self.embed(features)
        # What ReLU gives is never below the zeros that stand for padding, and for a bag without
        # tiles; a row of zeros more lets amax have something where N is 0.
        tiles = nn.functional.pad(tiles * mask.unsqueeze(-1), (0, 0, 0, 1))
        pooled = tiles.amax(dim=1)
        return MILOutput(logits=self.head(pooled), attention=None, pooled=pooled)
