"""The loop that trainers fill in, its checkpoints, and work that is done again in smaller parts."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import save_file
from torch import nn

from xmag.errors import MismatchError, ModelError, OutputError, WeightsError
from xmag.training import Checkpoint, Ema, Loop, Ranks, Schedule, warmup_cosine, with_less_memory
from xmag.training.checkpoint import tensors_of

IDENTITY = {"seed": 3, "settings": {"lr": 0.1}, "teachers": [{"seed": 0}], "labels": ("a", "b")}


class Fits(Loop[int]):
    """A line fitted to random points of a seed for each step, with an average."""

    kind = "a test"

    def __init__(self, *, losses: Sequence[float] = (), stop: int | None = None, **options) -> None:
        module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.fill_(0.1)
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        super().__init__(
            module, optimizer, schedule=Schedule(total=13, warmup=3), ema=Ema(module, decay=0.9),
            **{"epochs": 4, **options},
        )  # fmt: skip
        self.losses, self.stop = losses, stop
        self.rates: list[float] = []
        self.saved: list[tuple[int, int]] = []
        self.path: Path | None = None

    def steps(self, epoch: int) -> Sequence[int]:
        return range(3 * epoch, 3 * epoch + 3)

    def step(self, batch: int) -> None:
        if self.progress.updates == self.stop:
            raise KeyboardInterrupt
        rng = torch.Generator().manual_seed(batch)
        points = torch.randn(5, 3, generator=rng)
        self.optimizer.zero_grad()
        (self.module(points)[:, 0] - points.sum(1)).square().mean().backward()
        self.rates.append(self.optimizer.param_groups[0]["lr"])
        self.optimizer.step()
        self.ema.update(self.module, step=self.progress.updates)
        self.bar.update()

    def end_epoch(self) -> float | None:
        return self.losses[self.progress.epoch] if self.losses else None

    def save(self) -> None:
        self.saved.append((self.progress.epoch, self.progress.step))
        if self.path is not None:
            self.write_checkpoint(self.path, IDENTITY)


def test_the_rate_follows_the_schedule_and_checkpoints_come_when_due() -> None:
    loop = Fits(checkpoint_steps=2)
    loop.run(False)
    expected = [0.1 * warmup_cosine(step, total=13, warmup=3) for step in range(12)]
    assert loop.rates == expected
    assert loop.saved == [(0, 2), (1, 0), (1, 2), (2, 0), (2, 2), (3, 0), (3, 2), (4, 0)]
    assert (loop.progress.epoch, loop.progress.updates, loop.progress.seconds > 0) == (4, 12, True)
    assert loop.best is None
    assert loop.progress.best_epoch is None
    assert loop.result() is loop.ema.module


def test_the_weights_of_the_best_epoch_are_kept_and_training_stops_after_it() -> None:
    losses = [0.9, 0.5, 0.6, 0.7, 0.1, 0.0, 0.0]
    loop = Fits(losses=losses, epochs=7, patience=2)
    loop.run(False)
    assert loop.progress.losses == losses[:4]
    assert loop.progress.best_epoch == 2
    until_then = Fits(epochs=2)
    until_then.run(False)
    for one, other in zip(
        loop.result().state_dict().values(), until_then.result().state_dict().values(), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("stop", [1, 2, 3, 7, 11])
def test_a_run_that_stopped_anywhere_goes_on_to_the_same_bits(tmp_path: Path, stop: int) -> None:
    losses = [0.9, 0.5, 0.6, 0.7]
    whole = Fits(losses=losses)
    whole.run(False)
    stopped = Fits(losses=losses, stop=stop, checkpoint_steps=1)
    stopped.path = tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt):
        stopped.run(False)
    resumed = Fits(losses=losses)
    assert not resumed.resume(tmp_path / "none", IDENTITY, Ranks())
    assert resumed.resume(stopped.path, IDENTITY, Ranks())
    assert resumed.progress.updates == stop
    resumed.run(False)
    expected, tensors = whole.state(), resumed.state()
    assert expected.keys() == tensors.keys()
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)
    assert resumed.progress.losses == whole.progress.losses
    assert stopped.rates + resumed.rates == whole.rates


def test_the_optimizer_comes_back_by_the_names_of_its_parameters() -> None:
    loop = Fits()
    loop.run(False)
    tensors = loop.state()
    assert torch.equal(
        tensors["optimizer.0.weight.exp_avg"],
        loop.optimizer.state[loop.module[0].weight]["exp_avg"],
    )
    again = Fits()
    other = again.module
    groups = [{"params": [other[1].weight, other[0].bias]},
              {"params": [other[0].weight, other[1].bias]}]  # fmt: skip
    again.optimizer = torch.optim.AdamW(groups)
    again.restore(tensors, {})
    for name, parameter in other.named_parameters():
        for key, value in again.optimizer.state[parameter].items():
            assert torch.equal(value, tensors[f"optimizer.{name}.{key}"])
        assert set(again.optimizer.state[parameter]) == {"step", "exp_avg", "exp_avg_sq"}
    assert set(tensors_of(tensors, "module")) == set(other.state_dict())


def test_a_file_of_another_run_is_refused_with_what_is_different(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    Fits().write_checkpoint(path, IDENTITY)
    assert Checkpoint.load(tmp_path / "none", kind="a test") is None
    assert Checkpoint.load(path, kind="a test", identity=IDENTITY) is not None
    for change, message in (
        ({"seed": 4}, "seed: 3 there, 4 here"),
        ({"settings": {"lr": 0.2}}, r"settings\.lr: 0\.1 there, 0\.2 here"),
        ({"teachers": [{"seed": 9}]}, r"teachers\[0\]\.seed: 0 there, 9 here"),
        ({"labels": ("a",)}, r"labels\[1\]: 'b' there, None here"),
    ):
        with pytest.raises(MismatchError, match=message):
            Checkpoint.load(path, kind="a test", identity=IDENTITY | change)
    with pytest.raises(WeightsError, match="no checkpoint of distillation, but of a test"):
        Checkpoint.load(path, kind="distillation")


def test_a_file_that_is_none_or_of_another_version_is_refused(tmp_path: Path) -> None:
    path, tensors = tmp_path / "run.safetensors", {"x": torch.zeros(1)}
    Fits().write_checkpoint(path, IDENTITY)
    with safetensors.safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["checkpoint"])
    assert header["schema_version"] == 2
    for metadata, message in (
        (None, "no checkpoint of a test"),
        ({"format": "pt"}, "has format 'pt'"),
        ({"checkpoint": json.dumps(header | {"schema_version": 3})}, "upgrade"),
        ({"checkpoint": "{"}, "not JSON"),
        ({"checkpoint": '{"schema_version": 2}'}, "not what a training run wrote"),
        ({"xmag": "something"}, "no checkpoint of a test"),
        ({"format": "xmag-finetune-checkpoint", "header": "{}"}, "version 1, written by xmag 0.1"),
        ({"xmag": '{"format": "xmag-distillation"}'}, "version 1, .*; finish that run with xmag"),
    ):
        save_file(tensors, path, metadata=metadata)
        with pytest.raises(WeightsError, match=message) as caught:
            Checkpoint.load(path, kind="a test")
        assert "\n" not in str(caught.value)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(WeightsError, match=r"no whole checkpoint.*delete it"):
        Checkpoint.load(path, kind="a test")


def test_tensors_that_share_memory_or_are_not_contiguous_are_saved(tmp_path: Path) -> None:
    path, grid = tmp_path / "run.safetensors", torch.arange(12.0).view(3, 4)
    tensors = {"a": grid, "b": grid[1:], "c": grid.T}
    Checkpoint(kind="a test", identity=IDENTITY, progress={}, tensors=tensors).save(path)
    found = Checkpoint.load(path, kind="a test").tensors
    assert torch.equal(found["b"], grid[1:])
    assert torch.equal(found["c"], grid.T)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert not Fits().resume(tmp_path / "run.safetensors", IDENTITY, Ranks())
    with pytest.raises(OutputError, match=r"no folder .*nowhere.*create it first"):
        Fits().resume(tmp_path / "nowhere" / "run.safetensors", IDENTITY, Ranks())


def test_work_is_done_again_in_halves_until_it_fits() -> None:
    sizes, size = [], 64

    def run() -> int:
        sizes.append(size)
        if size > 10:
            raise torch.cuda.OutOfMemoryError("no room")
        return size

    def halve(error: torch.cuda.OutOfMemoryError) -> None:
        nonlocal size
        if size == 1:
            raise ModelError("nothing fits") from error
        size //= 2

    assert with_less_memory(run, halve) == 8
    assert sizes == [64, 32, 16, 8]

    def never() -> int:
        raise torch.cuda.OutOfMemoryError("no room")

    with pytest.raises(ModelError, match="nothing fits"):
        with_less_memory(never, halve)
    with pytest.raises(ZeroDivisionError):  # any other error is not for it
        with_less_memory(lambda: 1 // 0, halve)


def test_the_average_follows_faster_in_the_first_steps() -> None:
    module = nn.Linear(1, 1, bias=False)
    ema = Ema(module, decay=0.9)
    start = module.weight.item()
    with torch.no_grad():
        module.weight += 1
    ema.update(module, step=0)
    assert ema.module.weight.item() - start == pytest.approx(1 - 1 / 10, abs=1e-6)
    ema.update(module, step=1000)
    assert ema.module.weight.item() - start == pytest.approx(1 - 0.1 * 0.9, abs=1e-6)
