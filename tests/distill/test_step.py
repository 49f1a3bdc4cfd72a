"""One step on one process against its parts by hand, and on two ranks against one."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F  # noqa: N812
from support.distilling import STUDENT, TILE_PX, tiny_student
from support.programs import run_on_two_ranks
from torch import Tensor

from xmag.distill.losses import block_means
from xmag.distill.settings import LossSettings, Settings, TrainSettings
from xmag.distill.student import Student
from xmag.distill.trainer import Trainer, Views, decayed
from xmag.training import Ranks, warmup_cosine

CPU = torch.device("cpu")


def views(count: int, seed: int, dims: tuple[int, ...] = (12,)) -> Views:
    rng = torch.Generator().manual_seed(seed)
    shape = (count, TILE_PX, TILE_PX, 3)
    return Views(
        low=torch.randint(0, 256, shape, dtype=torch.uint8, generator=rng),
        targets=[torch.randn(count, 16, dim, generator=rng) for dim in dims],
    )


def some(given: Views, rows: Sequence[int]) -> Views:
    rows = list(rows)
    return Views(low=given.low[rows], targets=[target[rows] for target in given.targets])


def trainer(
    loss: LossSettings | None = None,
    teachers: dict[str, float] | None = None,
    dims: tuple[int, ...] = (12,),
    total_steps: int = 100,
    dtype: torch.dtype = torch.float32,
    **train: object,
) -> Trainer:
    loss = loss or LossSettings()
    settings = Settings(loss=loss, train=TrainSettings(**{"batch": 4, "views": 2, **train}))
    torch.manual_seed(0)
    student = Student(
        tiny_student().vit, STUDENT, teacher_dims=dims,
        with_global=loss.global_weight > 0, with_local=loss.local_weight > 0,
    )  # fmt: skip
    return Trainer(
        student.to(dtype), teachers=teachers or {"t": 1.0}, settings=settings,
        total_steps=total_steps, ranks=Ranks(), device=CPU,
    )  # fmt: skip


# Where a gradient is 0 but for rounding (a bias before a norm), Adam moves by the sign of that
# rounding. In double precision it is below Adam's epsilon.
DOUBLE = torch.float64


def step(run: Trainer, *parts: Views, number: int = 0) -> dict[str, float]:
    """Train on micro-batches; the metrics of the step."""
    found = run.optimize(parts, number=number, count=len(parts))
    return dict(zip(run.metrics, found.tolist(), strict=True))


def test_the_loss_is_one_of_regions_and_half_of_tiles() -> None:
    run, given = trainer(), views(8, 0)
    images = given.low.permute(0, 3, 1, 2) / 255 - torch.tensor(STUDENT.mean).view(3, 1, 1)
    tokens = run.module.vit(images / torch.tensor(STUDENT.std).view(3, 1, 1))
    with torch.no_grad():
        region = run.module.global_heads[0](tokens[:, 0])
        tiles = run.module.local_heads[0](block_means(tokens[:, 1:]).flatten(0, 1))
    target = given.targets[0]
    expected = {
        "global/t": -F.cosine_similarity(region, target.mean(1)).mean(),
        "local/t": -F.cosine_similarity(tiles, target.flatten(0, 1)).mean(),
    }
    run = trainer()
    got = step(run, given)
    for name, value in expected.items():
        assert got[name] == pytest.approx(float(value), abs=1e-5)
    whole = float(expected["global/t"] + 0.5 * expected["local/t"])
    assert got["loss"] == pytest.approx(whole, abs=1e-5)


def test_quarters_count_as_images_with_the_tiles_that_they_have() -> None:
    """The loss of a step is the mean over whole views and quarters; a quarter has 2 x 2 blocks."""
    run, given = trainer(quarters=1, dtype=DOUBLE), views(8, 0)
    run.module.eval()
    small = given.quarters(torch.arange(8) % 4)
    assert small.low.shape[1] == given.low.shape[1] // 2
    parts = []
    for part, side in ((given, 4), (small, 2)):
        images = part.low.permute(0, 3, 1, 2) / 255 - torch.tensor(STUDENT.mean).view(3, 1, 1)
        images = (images / torch.tensor(STUDENT.std).view(3, 1, 1)).to(DOUBLE)
        tokens = run.module.vit(images)
        each = tokens[:, 1:].unflatten(1, (side, 2, side, 2)).mean((2, 4)).flatten(1, 2)
        target = part.targets[0]
        region = run.module.global_heads[0](tokens[:, 0])
        tiles = run.module.local_heads[0](each.flatten(0, 1))
        parts.append(
            -F.cosine_similarity(region, target.mean(1)).mean()
            - 0.5 * F.cosine_similarity(tiles, target.flatten(0, 1)).mean()
        )
    got = step(run, given, small)
    assert got["loss"] == pytest.approx(sum(parts).item() / 2, abs=1e-5)


def test_teachers_and_distances_add_up_by_their_weights() -> None:
    dims, teachers = (12, 7), {"a": 1.0, "b": 0.25}
    loss = LossSettings(global_weight=2, local_weight=3, cosine=1, smooth_l1=0.5, relational=4)
    one = {}
    for distance, weight in (("cosine", 1), ("smooth_l1", 0.5), ("relational", 4)):
        only = LossSettings(cosine=0, **{distance: 1.0}) if distance != "cosine" else LossSettings()
        got = step(trainer(only, teachers, dims), views(8, 0, dims))
        for name in ("global/a", "local/a", "global/b", "local/b"):
            one[name] = one.get(name, 0) + weight * got[name]
    got = step(trainer(loss, teachers, dims), views(8, 0, dims))
    for name, value in one.items():
        assert got[name] == pytest.approx(value, abs=1e-5)
    expected = (
        2 * one["global/a"] + 3 * one["local/a"] + 0.25 * (2 * one["global/b"] + 3 * one["local/b"])
    )
    assert got["loss"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("level", ["global", "local"])
def test_a_level_without_weight_has_no_heads(level: str) -> None:
    other = "local" if level == "global" else "global"
    run = trainer(LossSettings(**{f"{other}_weight": 0.0}))
    assert list(run.objective.terms) == [f"{level}/t"]
    assert not any(name.startswith(f"{other}_heads") for name in run.module.state_dict())
    got = step(run, views(8, 0))
    assert got["loss"] == pytest.approx(got[f"{level}/t"] * (1 if level == "global" else 0.5))


def test_parts_of_a_batch_add_up_to_its_mean() -> None:
    """In eval mode, since each part has statistics of its own in the heads."""
    whole, parts = trainer(), trainer()
    given = views(8, 0)
    pieces = [some(given, rows) for rows in (range(3), range(3, 6), (), range(6, 8))]
    for run, split in ((whole, [given]), (parts, pieces)):
        run.module.eval()
        step(run, *split)
    for (name, one), other in zip(
        whole.module.named_parameters(), parts.module.parameters(), strict=True
    ):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_what_damaged_regions_leave_of_a_batch_is_a_batch() -> None:
    # The other one's batch is as small as what is left, so that its gradient is their plain mean.
    one, other = trainer(dtype=DOUBLE), trainer(dtype=DOUBLE, batch=3)
    whole = some(views(8, 0), [0, 1, 3, 4, 6, 7])
    first, second = (step(run, whole) for run in (one, other))
    assert first == pytest.approx(second, abs=1e-6, rel=1e-6)
    for (name, a), b in zip(
        one.module.state_dict().items(), other.module.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-6, msg=name)


def test_a_step_without_a_whole_region_has_no_gradient() -> None:
    run = trainer()
    before = {name: value.clone() for name, value in run.module.named_buffers()}
    assert step(run, some(views(8, 0), [])) == dict.fromkeys(run.metrics, 0.0)
    assert not any(p.grad.any() for p in run.module.parameters())
    for name, value in run.module.named_buffers():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(value, before[name]), name


def test_a_step_is_adamw_on_the_clipped_gradient_then_the_average() -> None:
    run = trainer(clip=0.05, lr=1e-2, warmup=0.1, ema=0.9, ema_ramp=False)
    before = {name: p.detach().clone() for name, p in run.module.named_parameters()}
    found = step(run, views(8, 0))
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in run.module.parameters()))
    assert found["gradient_norm"] > 0.05
    assert norm == pytest.approx(0.05, rel=1e-3)
    rate = 1e-2 * warmup_cosine(0, total=100, warmup=10)
    assert [group["lr"] for group in run.optimizer.param_groups] == pytest.approx([rate, rate])
    for name, p in run.module.named_parameters():
        # The first step of Adam is the sign of the gradient, but for its epsilon.
        decay = 0.05 if decayed(name, p) else 0.0
        expected = before[name] * (1 - rate * decay) - rate * p.grad / (p.grad.abs() + 1e-8)
        torch.testing.assert_close(p.detach(), expected, atol=1e-6, rtol=1e-5, msg=name)
        mean = 0.9 * before[name] + 0.1 * p.detach()
        torch.testing.assert_close(run.ema.module.get_parameter(name).data, mean)


def test_weight_decay_spares_biases_norms_and_layer_scale() -> None:
    names = {name: decayed(name, p) for name, p in trainer().module.named_parameters()}
    spared = {name for name, decays in names.items() if not decays}
    assert {name for name in names if name.endswith(("bias", "gamma"))} <= spared
    assert {name for name in names if "norm" in name} <= spared
    assert all(
        name.endswith(("bias", "gamma", "norm.weight", "norm1.weight", "norm2.weight"))
        for name in spared
    )


def test_the_average_forgets_its_start_sooner_with_the_ramp() -> None:
    run = trainer(ema=0.999, total_steps=60_000, lr=1e-2)
    for number, decay in ((0, 0.1), (8, 0.5), (100, 101 / 110), (50_000, 0.999)):
        before = run.ema.module.vit.patch_embed.proj.weight.clone()
        step(run, views(8, 0), number=number)
        now = run.module.vit.patch_embed.proj.weight
        expected = decay * before + (1 - decay) * now
        torch.testing.assert_close(run.ema.module.vit.patch_embed.proj.weight, expected)


PROGRAM = """
import sys
from dataclasses import replace
import safetensors.torch, torch
import torch.distributed as dist
from test_step import DOUBLE, LOSS, STEPS, WHOLE, some, trainer, views
from xmag.distill.trainer import Trainer
from xmag.training import joined_ranks
with joined_ranks() as ranks:
    alone = trainer(LOSS, dtype=DOUBLE)
    run = Trainer(alone.module, teachers={"t": 1.0}, settings=alone.settings, total_steps=100,
                  ranks=ranks, device=alone.device)
    records = []
    for number in range(STEPS):
        # Both views of half the regions.
        half = [2 * ranks.rank + i for i in (0, 1, 4, 5)]
        part = some(views(8, number), [i for i in half if i in WHOLE[number]])
        records.append(run.optimize([part], number=number, count=1))
    state = {f"student.{k}": v for k, v in run.module.state_dict().items()}
    state |= {f"ema.{k}": v for k, v in run.ema.module.state_dict().items()}
    state |= {f"grad.{k}": p.grad for k, p in run.module.named_parameters()}
    state["records"] = torch.stack(records)
    safetensors.torch.save_file(state, f"{sys.argv[1]}/{ranks.rank}.safetensors")
"""
STEPS = 4
LOSS = LossSettings(relational=0.5)
WHOLE = (range(8), (0, 2, 3, 4, 5), range(8), (0, 1, 4, 5))
"""The images of each step whose regions are not damaged: at last none of the second rank's."""


def test_two_ranks_with_half_the_batch_take_the_step_of_one(tmp_path: Path) -> None:
    run_on_two_ranks(PROGRAM, tmp_path, beside=__file__)

    run = trainer(LOSS, dtype=DOUBLE)
    records = []
    for number in range(STEPS):
        given = some(views(8, number), WHOLE[number])
        records.append(run.optimize([given], number=number, count=1))
    expected: dict[str, Tensor] = {"records": torch.stack(records)}
    expected |= {f"student.{k}": v for k, v in run.module.state_dict().items()}
    expected |= {f"ema.{k}": v for k, v in run.ema.module.state_dict().items()}
    expected |= {f"grad.{k}": p.grad for k, p in run.module.named_parameters()}
    for rank in (0, 1):
        got = safetensors.torch.load_file(tmp_path / f"{rank}.safetensors")
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, atol=1e-5, rtol=1e-5, msg=name)
