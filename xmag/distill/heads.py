"""Projection heads from the student's width to a teacher's, for training only."""

import torch
import torch.nn.functional as F  # noqa: N812 (the name that every torch reader knows)
from torch import Tensor, nn

from xmag.distill.ranks import summed


class SyncedBatchNorm(nn.Module):
    """Synchronised BatchNorm1d: statistics over the rows of all ranks, on any device.

    PyTorch's SyncBatchNorm refuses the CPU. The names, the defaults and the running statistics are
    those of BatchNorm1d. Rows may carry weights; those of weight 0 count nowhere.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, width: int, *, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        """The normalised rows (N, C), at least float32; `weights` are (N,)."""
        with torch.autocast(rows.device.type, enabled=False):
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
            if not self.training:
                centred, variance = rows - self.running_mean, self.running_var
            else:
                centred, variance = self._centred(rows, weights)
            scale = self.weight * (variance + self.eps).rsqrt()
            return centred * scale + self.bias

    def _centred(self, rows: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """Centred rows and biased variance over all ranks; updates the running statistics.

        The variance is summed over what is centred already: E[x^2] - E[x]^2 would cancel.
        """
        if weights is None:
            weights = rows.new_ones(len(rows))
        weights = weights.to(rows.dtype)[:, None]
        total = summed(torch.cat(((weights * rows).sum(0), weights.sum(0))))
        count = total[-1].detach().clamp(min=1)
        mean = total[:-1] / count
        centred = rows - mean
        variance = summed((weights * centred.square()).sum(0)) / count
        with torch.no_grad():
            # A step without a single good row leaves the running statistics as they are.
            share = self.momentum * (total[-1] > 0).to(mean.dtype)
            unbiased = variance * (count / (count - 1).clamp(min=1))
            self.running_mean += share * (mean - self.running_mean)
            self.running_var += share * (unbiased - self.running_var)
            self.num_batches_tracked += 1
        return centred, variance


class ProjectionHead(nn.Module):
    """Projection head (Linear, BatchNorm, GELU, Linear): a student's width to a teacher's.

    The heads of arXiv 2509.23097, with statistics over all ranks.
    """

    def __init__(self, width: int, teacher_dim: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, teacher_dim)
        self.norm = SyncedBatchNorm(teacher_dim)
        self.last = nn.Linear(teacher_dim, teacher_dim)

    def forward(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        """Project rows (N, width) to float32 (N, teacher_dim); `weights` (N,) are for the norm."""
        projected: Tensor = self.last(F.gelu(self.norm(self.first(rows), weights)))
        return projected.to(torch.promote_types(projected.dtype, torch.float32))
