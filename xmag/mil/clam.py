"""CLAM-SB: gated attention with an instance-level loss on the most and least attended tiles."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from xmag.mil.pooling import (
    Aggregator,
    GatedAttention,
    MILOutput,
    full,
    masked_softmax,
    tile_embedding,
    weighted_mean,
)

InstanceLoss = Literal["svm", "ce"]


class CLAMSB(Aggregator):
    """CLAM with a single attention branch (CLAM-SB); takes one bag at a time.

    The bag goes through gated attention as in ABMIL. While training, the `k_sample` most attended
    tiles are taken as evidence of the bag's class and the `k_sample` least attended ones as none,
    and a linear layer of that class has to tell them apart. With `subtyping`, where classes exclude
    each other, the most attended tiles are no evidence in the layers of the other classes. The
    loss is ``bag_weight * cross-entropy + (1 - bag_weight) * instance loss``. Lu et al.,
    Data-efficient and weakly supervised computational pathology on whole-slide images, Nature
    Biomedical Engineering 2021, Methods.

    `instance_loss` is "svm", the smooth top-1 SVM loss of that paper (temperature and margin 1), or
    "ce", cross-entropy. Where a bag has fewer than 2 `k_sample` tiles, half of them are taken, so
    that none is both.
    """

    batched = False
    attention_kind = "softmax"

    def __init__(
        self,
        *,
        in_dim: int,
        classes: int,
        embed_dim: int = 512,
        attention_dim: int = 256,
        dropout: float = 0.25,
        k_sample: int = 8,
        bag_weight: float = 0.7,
        subtyping: bool = False,
        instance_loss: InstanceLoss = "svm",
    ) -> None:
        super().__init__(
            in_dim, classes,
            embed_dim=embed_dim, attention_dim=attention_dim, dropout=dropout, k_sample=k_sample,
            bag_weight=bag_weight, subtyping=subtyping, instance_loss=instance_loss,
        )  # fmt: skip
        self.k_sample, self.bag_weight = k_sample, bag_weight
        self.subtyping, self.instance_loss = subtyping, instance_loss
        self.embed = tile_embedding(in_dim, embed_dim, dropout)
        self.attention = GatedAttention(embed_dim, attention_dim, dropout)
        self.head = nn.Linear(embed_dim, classes)
        self.instance_heads = nn.ModuleList(nn.Linear(embed_dim, 2) for _ in range(classes))

    def forward(self, features: Tensor, mask: Tensor, labels: Tensor | None = None) -> MILOutput:
        """Logits (1, C), attention (1, N) and, given labels (1,), the instance loss of one bag."""
        tiles = self.embed(features)
        attention = masked_softmax(self.attention(tiles), mask)
        pooled = weighted_mean(tiles, attention)
        logits = self.head(pooled)
        if labels is None:
            return MILOutput(logits=logits, attention=attention, pooled=pooled)
        loss = self._told_apart(tiles[0][mask[0]], attention[0][mask[0]], int(labels))
        return MILOutput(
            logits=logits,
            attention=attention,
            loss=(1 - self.bag_weight) * loss,
            bag_weight=self.bag_weight,
            pooled=pooled,
        )

    def _told_apart(self, tiles: Tensor, attention: Tensor, label: int) -> Tensor:
        """The instance loss of tiles (N, E): 0 where there are fewer than two."""
        k = min(self.k_sample, len(tiles) // 2)
        if k == 0:
            return tiles.sum() * 0
        most = tiles[attention.topk(k).indices]
        least = tiles[attention.topk(k, largest=False).indices]
        evidence = torch.ones(k, dtype=torch.int64, device=tiles.device)
        pairs = torch.cat([most, least]), torch.cat([evidence, 1 - evidence])
        total = self._loss(self.instance_heads[label](pairs[0]), pairs[1])
        if not self.subtyping:
            return total
        for other, head in enumerate(self.instance_heads):
            if other != label:
                total = total + self._loss(head(most), 1 - evidence)
        return total / self.classes

    def _loss(self, logits: Tensor, target: Tensor) -> Tensor:
        if self.instance_loss == "ce":
            return functional.cross_entropy(full(logits), target)
        return smooth_svm(full(logits), target)


def smooth_svm(logits: Tensor, target: Tensor) -> Tensor:
    """The smooth top-1 SVM loss, a mean over rows: log sum_j exp([j != y] + s_j - s_y).

    Berrada, Zisserman and Kumar, Smooth Loss Functions for Deep Top-k Classification, ICLR 2018,
    with temperature 1 and margin 1.
    """
    margin = 1 - functional.one_hot(target, logits.shape[1])
    return functional.cross_entropy(logits + margin, target)
