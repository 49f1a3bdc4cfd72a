"""Losses of the distillation: global and local distances, over all ranks.

The two-level objective of arXiv 2509.23097. Shapes in comments: B regions, 16 tiles (4 x 4, row by
row), D width of the student, Dt width of the teacher.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 (the name that every torch reader knows)
from torch import Tensor

from xmag.errors import InputError


def world_size() -> int:
    """World size: the number of processes that train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def summed(value: Tensor) -> Tensor:
    """Differentiable sum over all ranks (all-reduce); each must give the same shape.

    The gradient of the sum of all ranks' losses: each rank's tensor is in every rank's sum, so
    that what comes back to it is the sum of what all ranks send back.
    """
    if world_size() == 1:
        return value
    result: Tensor = _Summed.apply(value)  # type: ignore[no-untyped-call]
    return result


def gathered(rows: Tensor) -> Tensor:
    """Differentiable all-gather of rows (N, ...) in the order of ranks: (N * world, ...).

    Each rank must give as many rows.
    """
    if world_size() == 1:
        return rows
    result: Tensor = _Gathered.apply(rows)  # type: ignore[no-untyped-call]
    return result


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:  # noqa: ARG004 (torch's signature)
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # noqa: ARG004
        total = grad.clone()
        dist.all_reduce(total)
        return total


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.count = len(rows)
        parts = [torch.empty_like(rows) for _ in range(world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone()
        dist.all_reduce(total)
        start = dist.get_rank() * ctx.count
        return total[start : start + ctx.count]


BLOCKS = 4
"""Blocks of tokens along a side of a region: one for each of the teacher's tiles."""


def block_means(tokens: Tensor) -> Tensor:
    """Average-pool patch tokens over 4 x 4 blocks, row by row as the tiles: (B, 16, D).

    `tokens` are the patch tokens (B, n * n, D), row by row. Raises InputError where n is no
    multiple of 4.
    """
    side = round(tokens.shape[1] ** 0.5)
    if side**2 != tokens.shape[1] or side % BLOCKS:
        raise InputError(
            f"tokens have shape {tuple(tokens.shape)}; expected (B, n * n, D) with n a multiple of"
            f" {BLOCKS}, so that each of the teacher's tiles has a block of tokens"
        )
    each, (batch, _, width) = side // BLOCKS, tokens.shape
    grid = tokens.reshape(batch, BLOCKS, each, BLOCKS, each, width)
    return grid.mean((2, 4)).flatten(1, 2)


def global_loss(
    projected: Tensor,
    teacher: Tensor,
    *,
    distance: str = "cosine",
    weights: Tensor | None = None,
) -> Tensor:
    """Global loss, a scalar: mean distance of regions to the means of 16 teacher vectors.

    `projected` is (B, Dt), `teacher` (B, 16, Dt); regions of weight 0 in `weights` (B,) do not
    count. For `distance` see `DISTANCES`.
    """
    return _weighted_mean(global_distances(projected, teacher, distance, weights), weights)


def local_loss(
    projected: Tensor,
    teacher: Tensor,
    *,
    distance: str = "cosine",
    weights: Tensor | None = None,
) -> Tensor:
    """Local loss, a scalar: mean distance of the 16 blocks to their teacher vectors.

    Both are (B, 16, Dt); the rest is as for `global_loss`.
    """
    return _weighted_mean(local_distances(projected, teacher, distance), weights)


def global_distances(
    projected: Tensor, teacher: Tensor, distance: str, weights: Tensor | None = None
) -> Tensor:
    """Global distance of each region, (B,); see `global_loss`."""
    target = teacher.mean(1)
    if distance == "relational":
        return _relations_of_regions(projected, target, weights)
    return _distance(distance)(projected, target)


def local_distances(projected: Tensor, teacher: Tensor, distance: str) -> Tensor:
    """Mean local distance of the blocks of each region, (B,); see `local_loss`."""
    if distance == "relational":
        return (_cosines(projected, projected) - _cosines(teacher, teacher)).square().mean((1, 2))
    return _distance(distance)(projected, teacher).mean(1)


def _negative_cosine(projected: Tensor, target: Tensor) -> Tensor:
    return -F.cosine_similarity(projected, target, dim=-1)


def _smooth_l1(projected: Tensor, target: Tensor) -> Tensor:
    return F.smooth_l1_loss(projected, target, reduction="none").mean(-1)


def _relations_of_regions(projected: Tensor, target: Tensor, weights: Tensor | None) -> Tensor:
    """Relational loss of each region, (B,): mean squared difference of cosines over all ranks."""
    if weights is None:
        weights = projected.new_ones(len(projected))
    to_all = gathered(weights.to(projected.dtype).detach())
    ours = _cosines(projected, gathered(projected))
    theirs = _cosines(target, gathered(target.detach()))
    count = summed(weights.to(projected.dtype).sum().detach()).clamp(min=1)
    return ((ours - theirs).square() * to_all).sum(1) / count


def _cosines(rows: Tensor, others: Tensor) -> Tensor:
    """Pairwise cosine similarities: (..., N, M)."""
    return F.normalize(rows, dim=-1) @ F.normalize(others, dim=-1).transpose(-1, -2)


DISTANCES: Mapping[str, str] = MappingProxyType(
    {
        "cosine": "-cos(student, teacher)",
        "smooth_l1": "smooth L1, the mean over the teacher's dimensions",
        "relational": "squared difference of pairwise cosines, of regions and of tiles",
    }
)
"""Distances by name. "relational" is the similarity-preserving loss of Tung and Mori (2019)."""

_OF_VECTORS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = MappingProxyType(
    {"cosine": _negative_cosine, "smooth_l1": _smooth_l1}
)


def _distance(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    if name not in _OF_VECTORS:
        raise InputError(f"distance is {name!r}; expected one of {sorted(DISTANCES)}")
    return _OF_VECTORS[name]


def _weighted_mean(distances: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return distances.mean()
    return (distances * weights).sum() / weights.sum().clamp(min=torch.finfo(distances.dtype).tiny)
