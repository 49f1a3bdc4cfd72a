"""The schedule against its closed form, the average against the sum it stands for, two ranks."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from xmag.errors import InputError
from xmag.training import Ema, Ranks, joined_ranks, warmup_cosine


def test_the_rate_rises_to_one_and_decays_to_the_floor() -> None:
    rates = [warmup_cosine(s, total=100, warmup=10, floor=0.1) for s in range(100)]
    assert rates[:10] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert max(rates) == rates[9] == 1.0
    assert rates == sorted(rates[:10]) + sorted(rates[10:], reverse=True)
    middle = 10 + 45 - 1
    assert rates[middle] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.5)))
    assert rates[-1] == pytest.approx(0.1)
    assert warmup_cosine(500, total=100, warmup=10) == pytest.approx(0.0)


@pytest.mark.parametrize(("total", "warmup"), [(10, 10), (10, 11), (10, -1), (0, 0)])
def test_a_warm_up_without_decay_is_refused(total: int, warmup: int) -> None:
    with pytest.raises(InputError, match="decays"):
        warmup_cosine(0, total=total, warmup=warmup)


def test_the_average_is_the_weighted_sum_of_all_states() -> None:
    module = nn.BatchNorm1d(3)
    states = [torch.randn(3, generator=torch.Generator().manual_seed(n)) for n in range(5)]
    with torch.no_grad():
        module.weight.copy_(states[0])
    ema = Ema(module, decay=0.9)
    for state in states[1:]:
        with torch.no_grad():
            module.weight.copy_(state)
        module.num_batches_tracked += 1
        ema.update(module)
    weights = [0.9**4, *(0.1 * 0.9 ** (4 - n) for n in range(1, 5))]
    expected = sum(w * s for w, s in zip(weights, states, strict=True))
    torch.testing.assert_close(ema.module.weight.data, expected)
    assert int(ema.module.num_batches_tracked) == 4
    assert not ema.module.weight.requires_grad


def test_the_average_of_half_precision_is_kept_in_full() -> None:
    module = nn.Linear(2, 2).to(torch.bfloat16)
    ema = Ema(module, decay=0.999)
    start = ema.module.weight.clone()
    with torch.no_grad():
        module.weight += 0.01
    ema.update(module)
    assert ema.module.weight.dtype == torch.float32
    moved = (ema.module.weight - start).detach() / (module.weight.detach().float() - start)
    assert float(moved.mean()) == pytest.approx(
        0.001, rel=0.05
    )  # bfloat16 would not have moved at all


def test_a_decay_outside_its_range_is_refused() -> None:
    with pytest.raises(InputError, match="decay"):
        Ema(nn.Linear(1, 1), decay=1.0)


def test_a_process_alone_is_the_leader_of_one() -> None:
    with joined_ranks() as ranks:
        assert ranks == Ranks(rank=0, world=1)
        assert ranks.leads
        assert float(ranks.mean(torch.tensor(3.0))) == 3.0


PROGRAM = """
import pathlib, sys
import torch
from xmag.training import joined_ranks
with joined_ranks() as ranks:
    mean = ranks.mean(torch.tensor(float(ranks.rank)))
    ranks.wait()
    out = pathlib.Path(sys.argv[1]) / str(ranks.rank)
    out.write_text(f"{ranks.world} {float(mean)}")
assert not torch.distributed.is_initialized()
"""


def test_two_processes_of_torchrun_join_and_part(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            "--nproc-per-node=2", str(script), str(tmp_path),
        ],
        capture_output=True, text=True, timeout=800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["2 0.5", "2 0.5"]
