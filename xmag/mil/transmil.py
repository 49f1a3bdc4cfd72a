"""TransMIL: two transformer layers with Nystrom attention and convolutional positions (PPEG)."""

import math

import torch
from torch import Tensor, nn

from xmag.devices import full_precision
from xmag.mil.pooling import Aggregator, MILOutput, full

_PINV_STEPS = 6
_RESIDUAL_KERNEL = 33


class NystromAttention(nn.Module):
    """Nystrom self-attention over (1, T, E): linear cost in T, by landmarks.

    Xiong et al., Nystromformer, AAAI 2021, algorithm 1, with the depthwise convolution of the
    values beside it. The sequence is padded with zeros in front to a multiple of `landmarks`; a
    landmark is the mean of a stretch of queries or keys.
    """

    def __init__(self, dim: int, *, heads: int, landmarks: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.landmarks = heads, landmarks
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Sequential(nn.Linear(dim, dim), nn.Dropout(dropout))
        kernel = (_RESIDUAL_KERNEL, 1)
        padding = (_RESIDUAL_KERNEL // 2, 0)
        self.residual = nn.Conv2d(heads, heads, kernel, padding=padding, groups=heads, bias=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The new tokens (1, T, E), and the attention of the first one to each: (heads, T)."""
        length = tokens.shape[1]
        front = -length % self.landmarks
        padded = nn.functional.pad(tokens, (0, 0, front, 0))
        # (1, T, 3 E) -> three of (1, heads, T, E / heads)
        qkv = self.qkv(padded).reshape(1, front + length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q = q * q.shape[-1] ** -0.5
        q_landmarks, k_landmarks = self._means(q), self._means(k)
        to_landmarks = torch.softmax(q @ k_landmarks.mT, dim=-1)
        between = pseudo_inverse(torch.softmax(full(q_landmarks @ k_landmarks.mT), dim=-1))
        from_landmarks = torch.softmax(q_landmarks @ k.mT, dim=-1)
        between = between.to(v.dtype)
        mixed = (to_landmarks @ between) @ (from_landmarks @ v) + self.residual(v)
        tokens = self.out(mixed.transpose(1, 2).flatten(2))[:, front:]
        first = (to_landmarks[:, :, front : front + 1] @ between) @ from_landmarks
        return tokens, full(first[0, :, 0, front:])

    def _means(self, x: Tensor) -> Tensor:
        stretch = x.shape[2] // self.landmarks
        return x.reshape(1, self.heads, self.landmarks, stretch, -1).mean(dim=3)


def pseudo_inverse(matrices: Tensor) -> Tensor:
    """Moore-Penrose inverse of softmax matrices (..., M, M); Nystromformer, equation 11.

    In float32 under autocast too: the steps amplify what half precision loses.
    """
    with full_precision(matrices.device):
        size = matrices.abs()
        z = matrices.mT / (size.sum(dim=-1).max() * size.sum(dim=-2).max())
        one = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
        for _ in range(_PINV_STEPS):
            product = matrices @ z
            inner = 15 * one - product @ (7 * one - product)
            z = 0.25 * z @ (13 * one - product @ inner)
        return z


class PositionEncoding(nn.Module):
    """Position encoding (PPEG of TransMIL): depthwise convolutions of 7, 5, 3 over the square."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim) for kernel in (7, 5, 3)
        )

    def forward(self, tokens: Tensor, side: int) -> Tensor:
        """Tokens with positions, (1, 1 + side^2, E); the first, the class token, is unchanged."""
        first, tiles = tokens[:, :1], tokens[:, 1:]
        square = tiles.mT.reshape(1, -1, side, side)
        for convolution in self.convolutions:
            tiles = tiles + convolution(square).flatten(2).mT
        return torch.cat([first, tiles], dim=1)


class TransMIL(Aggregator):
    """TransMIL: two transformer layers over a class token and all tiles; takes one bag at a time.

    The tiles are embedded, laid out in a square in their order (the first ones are repeated to
    fill it), attend to each other, get their positions from convolutions over the square, and
    attend again; the class token then goes through a linear layer. Shao et al., TransMIL, NeurIPS
    2021, algorithm 1 and figure 3. A bag without tiles counts as one tile of zeros.

    `attention` is how much the class token attends to each tile in the second layer, a mean over
    heads: what the approximation makes negative counts as 0, and the rest is scaled to sum to 1.
    """

    batched = False
    attention_kind = "nystrom"

    def __init__(
        self,
        *,
        in_dim: int,
        classes: int,
        embed_dim: int = 512,
        heads: int = 8,
        landmarks: int = 256,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(
            in_dim, classes,
            embed_dim=embed_dim, heads=heads, landmarks=landmarks, dropout=dropout,
        )  # fmt: skip
        self.embed = nn.Sequential(nn.Linear(in_dim, embed_dim), nn.ReLU())
        self.class_token = nn.Parameter(torch.randn(1, 1, embed_dim))
        self.norms = nn.ModuleList(nn.LayerNorm(embed_dim) for _ in range(2))
        self.layers = nn.ModuleList(
            NystromAttention(embed_dim, heads=heads, landmarks=landmarks, dropout=dropout)
            for _ in range(2)
        )
        self.positions = PositionEncoding(embed_dim)
        self.final_norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, classes)

    def forward(self, features: Tensor, mask: Tensor, labels: Tensor | None = None) -> MILOutput:  # noqa: ARG002
        """Logits (1, C) and attention (1, N) of features (1, N, D); mask is True on tiles."""
        rows = features[0][mask[0]]
        count = len(rows)
        if count == 0:
            rows = rows.new_zeros(1, self.in_dim)
        side = math.isqrt(len(rows) - 1) + 1
        repeated = side**2 - len(rows)
        tiles = self.embed(rows)[None]
        tokens = torch.cat([self.class_token.to(tiles.dtype), tiles, tiles[:, :repeated]], dim=1)
        tokens = tokens + self.layers[0](self.norms[0](tokens))[0]
        tokens = self.positions(tokens, side)
        change, attended = self.layers[1](self.norms[1](tokens))
        pooled = self.final_norm(tokens + change)[:, 0]
        attention = torch.zeros(mask.shape, dtype=attended.dtype, device=attended.device)
        if count:
            attention[mask] = _of_tiles(attended.mean(dim=0)[1:], count)
        return MILOutput(logits=self.head(pooled), attention=attention, pooled=pooled)


def _of_tiles(attended: Tensor, count: int) -> Tensor:
    """Attention weights of the tiles, (N,), summing to 1, from those of the padded square."""
    attended = attended.clamp(min=0)
    repeated = attended[count:]
    weights = attended[:count] + nn.functional.pad(repeated, (0, count - len(repeated)))
    return weights / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)
