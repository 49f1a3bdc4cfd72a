"""Losses of the distillation: global and local distances to the teachers, over all ranks.

The two-level objective of arXiv 2509.23097. Shapes: B regions, 16 tiles of each (4 x 4, row by
row), D width of the student, Dt width of the teacher.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 (the name that every torch reader knows)
from torch import Tensor

from xmag.distill.settings import LossSettings
from xmag.distill.views import SIDE
from xmag.errors import InputError

DISTANCES: Mapping[str, str] = MappingProxyType(
    {
        "cosine": "-cos(student, teacher)",
        "smooth_l1": "smooth L1, the mean over the teacher's dimensions",
        "relational": "squared difference of pairwise cosines, of regions and of tiles",
    }
)
"""Distances by name. "relational" is the similarity-preserving loss of Tung and Mori (2019)."""


class Projection(NamedTuple):
    """Projections of B images by the heads of one teacher; None for a level not trained."""

    region: Tensor | None
    """Class token or mean of patch tokens through the global head, float32 (B, Dt).

    Both through heads of their own, (B, 2, Dt), where the student pools "token+mean".
    """
    tiles: Tensor | None
    """Block means through the local head, float32 (B, 16, Dt)."""


def block_means(tokens: Tensor, blocks: int = SIDE) -> Tensor:
    """Average-pool patch tokens over 4 x 4 blocks, row by row as the tiles: (B, 16, D).

    `tokens` are the patch tokens (B, n * n, D), row by row; of a quarter of a region there are 2
    `blocks` a side. Raises InputError where n is no multiple of them.
    """
    side = round(tokens.shape[1] ** 0.5)
    if side**2 != tokens.shape[1] or side % blocks:
        raise InputError(
            f"tokens have shape {tuple(tokens.shape)}; expected (B, n * n, D) with n a multiple of"
            f" {blocks}, so that each of the teacher's tiles has a block of tokens"
        )
    each, (batch, _, width) = side // blocks, tokens.shape
    grid = tokens.reshape(batch, blocks, each, blocks, each, width)
    return grid.mean((2, 4)).flatten(1, 2)


def global_loss(projected: Tensor, teacher: Tensor, *, distance: str = "cosine") -> Tensor:
    """Global loss, a scalar: mean distance of regions to the means of 16 teacher vectors.

    `projected` is (B, Dt), or (B, 2, Dt) for the mean of two; `teacher` is (B, 16, Dt). For
    `distance` see `DISTANCES`.
    """
    return global_distances(projected, teacher, distance).mean()


def local_loss(projected: Tensor, teacher: Tensor, *, distance: str = "cosine") -> Tensor:
    """Local loss, a scalar: mean distance of the 16 blocks to their teacher vectors.

    Both are (B, 16, Dt). For `distance` see `DISTANCES`.
    """
    return local_distances(projected, teacher, distance).mean()


def global_distances(projected: Tensor, teacher: Tensor, distance: str) -> Tensor:
    """Global distance of each region, (B,); "relational" compares with the regions of all ranks.

    Of two projections, (B, 2, Dt), it is the mean of their distances.
    """
    if projected.ndim == 3:
        both = [global_distances(each, teacher, distance) for each in projected.unbind(1)]
        return torch.stack(both).mean(0)
    target = teacher.mean(1)
    if distance == "relational":
        ours = _cosines(projected, gathered(projected))
        theirs = _cosines(target, gathered(target.detach()))
        return (ours - theirs).square().mean(1)
    return _vector_distances(projected, target, distance)


def local_distances(projected: Tensor, teacher: Tensor, distance: str) -> Tensor:
    """Mean local distance of the 16 blocks of each region, (B,)."""
    if distance == "relational":
        return (_cosines(projected, projected) - _cosines(teacher, teacher)).square().mean((1, 2))
    return _vector_distances(projected, teacher, distance).mean(1)


class Objective:
    """Distillation loss of several teachers: weighted global and local distances.

    `teachers` maps names to weights, in the order of projections and targets. `terms` names the
    loss terms that `sums` returns besides the total.
    """

    def __init__(self, settings: LossSettings, teachers: Mapping[str, float]) -> None:
        levels = {"global": settings.global_weight, "local": settings.local_weight}
        self._levels = {level: weight for level, weight in levels.items() if weight}
        self._distances = {name: w for name, w in settings.distances().items() if w}
        self._weights = list(teachers.values())
        self.terms = [f"{level}/{name}" for name in teachers for level in self._levels]

    def sums(
        self, projections: Sequence[Projection], targets: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Total loss summed over images, a scalar, and its terms by level and teacher, detached.

        Sums, and not means: parts of a batch, on one rank or several, add up to the whole.
        """
        parts, terms = [], []
        for weight, projected, target in zip(self._weights, projections, targets, strict=True):
            for level, factor in self._levels.items():
                term = self._sum(level, projected, target)
                parts.append(weight * factor * term)
                terms.append(term.detach())
        return torch.stack(parts).sum(), torch.stack(terms)

    def _sum(self, level: str, projected: Projection, target: Tensor) -> Tensor:
        of_regions = level == "global"
        ours = projected.region if of_regions else projected.tiles
        assert ours is not None  # a level with a weight has heads
        distances = global_distances if of_regions else local_distances
        sums = [w * distances(ours, target, name).sum() for name, w in self._distances.items()]
        return torch.stack(sums).sum()


def _vector_distances(projected: Tensor, target: Tensor, distance: str) -> Tensor:
    """Distances of vectors (..., Dt): (...,)."""
    if distance == "cosine":
        return -F.cosine_similarity(projected, target, dim=-1)
    if distance == "smooth_l1":
        return F.smooth_l1_loss(projected, target, reduction="none").mean(-1)
    raise InputError(f"distance is {distance!r}; expected one of {sorted(DISTANCES)}")


def _cosines(rows: Tensor, others: Tensor) -> Tensor:
    """Pairwise cosine similarities: (..., N, M)."""
    return F.normalize(rows, dim=-1) @ F.normalize(others, dim=-1).transpose(-1, -2)


def summed(value: Tensor) -> Tensor:
    """Differentiable sum over all ranks (all-reduce); each must give the same shape.

    The gradient is that of the sum of all ranks' losses: each rank's tensor is in every rank's sum,
    so that what comes back to it is the sum of what all ranks send back.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return value
    result: Tensor = _Summed.apply(value)  # type: ignore[no-untyped-call]
    return result


def gathered(rows: Tensor) -> Tensor:
    """Differentiable all-gather of rows (N, D) in the order of ranks, each of which has its own N.

    A sum of what is 0 but for the rank's own rows: collectives that gather need equal numbers.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return rows
    counts = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=rows.device)
    counts[dist.get_rank()] = len(rows)
    before, after = summed(counts).tensor_split([dist.get_rank()])
    return summed(F.pad(rows, (0, 0, int(before.sum()), int(after[1:].sum()))))


class _Summed(torch.autograd.Function):
    """Sum over ranks: torch.distributed.nn.functional.all_reduce, which torch 2.13 deprecates."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:  # noqa: ARG004 (torch's signature)
        total = value.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _Summed.forward(ctx, grad)
