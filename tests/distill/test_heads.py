"""The batch norm of the heads against PyTorch's, and over ranks against one process."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from support.programs import run_on_two_ranks
from torch import Tensor, nn

from xmag.distill.losses import global_loss
from xmag.distill.student import ProjectionHead, SyncedBatchNorm


def rows(count: int, width: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 + 2 * torch.randn(count, width, generator=generator, dtype=dtype)


def settled(norm: nn.Module) -> nn.Module:
    norm = norm.double()
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 1.5, len(norm.weight)))
        norm.bias.copy_(torch.linspace(-1, 1, len(norm.bias)))
    return norm


def test_alone_it_is_the_batch_norm_of_torch() -> None:
    ours, theirs = settled(SyncedBatchNorm(5)), settled(nn.BatchNorm1d(5))
    for turn in range(3):
        x = rows(8, 5, turn).requires_grad_()
        y = x.detach().clone().requires_grad_()
        out, expected = ours(x), theirs(y)
        torch.testing.assert_close(out, expected)
        out.pow(3).sum().backward()
        expected.pow(3).sum().backward()
        torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
    torch.testing.assert_close(ours.bias.grad, theirs.bias.grad)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value)
    x = rows(4, 5, 9)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_the_gradients_are_those_of_finite_differences() -> None:
    norm = settled(SyncedBatchNorm(3))
    assert torch.autograd.gradcheck(norm, rows(4, 3, 0).requires_grad_())


def test_no_row_at_all_leaves_the_statistics_as_they_were() -> None:
    norm = SyncedBatchNorm(4)
    norm(rows(3, 4, 0, torch.float32))
    before = norm.running_mean.clone(), norm.running_var.clone()
    assert norm(rows(0, 4, 1, torch.float32)).shape == (0, 4)
    torch.testing.assert_close((norm.running_mean, norm.running_var), before, rtol=0, atol=0)


def test_it_does_not_cancel_far_from_zero() -> None:
    x = 1e4 + rows(64, 3, 0, torch.float32)
    exact = nn.BatchNorm1d(3).double()(x.double()).float()
    torch.testing.assert_close(SyncedBatchNorm(3)(x), exact, atol=2e-3, rtol=0)


def test_a_head_is_linear_norm_gelu_linear() -> None:
    head = ProjectionHead(6, 10)
    written_out = nn.Sequential(nn.Linear(6, 10), nn.BatchNorm1d(10), nn.GELU(), nn.Linear(10, 10))
    written_out[0].load_state_dict(head.first.state_dict())
    written_out[3].load_state_dict(head.last.state_dict())
    x = rows(7, 6, 0, torch.float32)
    torch.testing.assert_close(head(x), written_out(x))


def test_statistics_are_computed_in_full_precision_under_autocast() -> None:
    head = ProjectionHead(6, 10)
    x = rows(64, 6, 0, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = head(x)
    assert out.dtype == head.norm.running_mean.dtype == torch.float32
    torch.testing.assert_close(out, head(x), atol=0.05, rtol=0.05)


PROGRAM = """
import sys
import safetensors.torch, torch
from test_heads import SHARES
from xmag.distill.student import SyncedBatchNorm
from xmag.distill.losses import gathered, global_distances
from xmag.training import joined_ranks
folder = sys.argv[1]
given = safetensors.torch.load_file(folder + "/given.safetensors")
with joined_ranks() as ranks:
    norm, x = SyncedBatchNorm(5).double(), given["x"].requires_grad_()
    for share in SHARES:
        mine = share[ranks.rank]
        out = norm(x[mine])
        far = global_distances(out, given["teacher"][mine], "relational")
        (out.pow(3).sum() + far.sum() / 8).backward()
        assert torch.equal(gathered(x[mine]), x)
    grads = {"x": x.grad, "weight": norm.weight.grad, "bias": norm.bias.grad,
             "mean": norm.running_mean, "var": norm.running_var}
    safetensors.torch.save_file(grads, f"{folder}/{ranks.rank}.safetensors")
"""
SHARES = [(slice(0, 4), slice(4, 8)), (slice(0, 5), slice(5, 8)), (slice(0, 8), slice(8, 8))]
"""Rows of each rank, in turn: as many, unequally many, all and none."""


def test_two_ranks_with_some_of_the_rows_are_one_with_all(tmp_path: Path) -> None:
    x, teacher = rows(8, 5, 0), rows(8 * 16, 5, 1).view(8, 16, 5)
    safetensors.torch.save_file({"x": x, "teacher": teacher}, tmp_path / "given.safetensors")
    run_on_two_ranks(PROGRAM, tmp_path, beside=__file__)

    norm, x = SyncedBatchNorm(5).double(), x.requires_grad_()
    for _ in SHARES:
        out = norm(x)
        (out.pow(3).sum() + global_loss(out, teacher, distance="relational")).backward()
    ranks = [safetensors.torch.load_file(tmp_path / f"{n}.safetensors") for n in (0, 1)]
    torch.testing.assert_close(sum(r["x"] for r in ranks), x.grad)
    for name in ("weight", "bias"):
        torch.testing.assert_close(sum(r[name] for r in ranks), getattr(norm, name).grad)
    for rank in ranks:
        torch.testing.assert_close(rank["mean"], norm.running_mean)
        torch.testing.assert_close(rank["var"], norm.running_var)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_gives_what_the_cpu_gives() -> None:
    head = ProjectionHead(6, 10)
    x = rows(64, 6, 0, torch.float32)
    expected = head(x)
    torch.testing.assert_close(head.cuda()(x.cuda()).cpu(), expected, atol=1e-4, rtol=1e-4)
