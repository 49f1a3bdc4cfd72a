"""Differentiable all-reduce and all-gather over ranks, also on the CPU (gloo)."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


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
