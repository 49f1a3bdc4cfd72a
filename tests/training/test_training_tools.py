"""The schedule against its closed form, the average against the sum it stands for, two ranks."""

import math
import random
from pathlib import Path

import pytest
import torch
from support.programs import run_on_two_ranks
from torch import nn

from xmag.errors import InputError, XmagWarning
from xmag.training import (
    Ema,
    Ranks,
    best_epoch,
    joined_ranks,
    warmup_cosine,
    warn_of_early_best,
)


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
    run_on_two_ranks(PROGRAM, tmp_path, beside=__file__)
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["2 0.5", "2 0.5"]


def written_out(losses: list[float], epochs: int) -> int:
    """The rule for the epoch to keep, step by step, as a training would go through it."""
    kept, lowest = 0, math.inf
    for epoch in range(1, len(losses) + 1):
        window = [losses[n - 1] for n in range(1, epoch + 1) if n > epoch - -(-epochs // 10)]
        mean = sum(window) / len(window)
        if epoch * 5 < epochs:
            kept = epoch
        elif mean < lowest:
            kept, lowest = epoch, mean
    return kept


@pytest.mark.parametrize("epochs", [1, 3, 10, 11, 20, 57, 100])
def test_the_epoch_to_keep_is_that_of_a_rule_written_out(epochs: int) -> None:
    rng = random.Random(epochs)
    for trend in (-0.02, 0.0, 0.02):
        losses = [0.7 + trend * n + rng.gauss(0, 0.1) for n in range(epochs)]
        for trained in range(1, epochs + 1):
            assert best_epoch(losses[:trained], epochs=epochs) == written_out(
                losses[:trained], epochs
            )


def test_a_lucky_loss_is_not_kept_and_a_trough_is() -> None:
    falling = [1 - 0.01 * n for n in range(50)] + [0.52 + 0.01 * n for n in range(50)]
    assert 50 <= best_epoch(falling, epochs=100) <= 60
    assert best_epoch([0.01, *falling[1:]], epochs=100) == best_epoch(falling, epochs=100)
    lucky = [*falling[:29], 0.3, *falling[30:]]
    assert best_epoch(lucky, epochs=100) == best_epoch(falling, epochs=100)
    assert best_epoch([0.5] * 40, epochs=100) == 20


def test_keeping_the_first_epoch_that_may_be_is_a_warning() -> None:
    def warn(best: int, trained: int) -> None:
        warn_of_early_best(best, trained=trained, epochs=100, stacklevel=1)

    with pytest.warns(XmagWarning, match=r"epoch 20 of 41 is kept.*validation=None") as found:
        warn(20, 41)
    assert found[0].filename == __file__
    warn(21, 41)  # later
    warn(20, 21)  # one other epoch is no evidence


AFTER_RANKS = """
import os, sys
from pathlib import Path
import torch
from xmag.training import joined_ranks
with joined_ranks() as ranks:
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 3))
    model(torch.ones(2, 3)).sum().backward()
    del model
tasks = Path("/proc/self/task").iterdir()
threads = [(task / "comm").read_text().strip() for task in tasks]
Path(sys.argv[1], str(ranks.rank)).write_text(" ".join(threads))
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux' list of threads")
def test_no_thread_of_a_process_group_is_left_behind(tmp_path: Path) -> None:
    run_on_two_ranks(AFTER_RANKS, tmp_path, beside=__file__)
    for rank in "01":
        assert "gloo" not in (tmp_path / rank).read_text()
