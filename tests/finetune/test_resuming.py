"""Runs that are killed, interrupted, or out of disk: what they lose, and what they come to."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.finetuning import LABELS, PATIENTS, small_encoder, stores

from xmag import files
from xmag.errors import MismatchError, OutputError, WeightsError, XmagWarning
from xmag.finetune import FinetuneResult, Settings, finetune_slides
from xmag.finetune.trainer import Trainer

RUN = Settings(
    epochs=4, patience=None, slides_per_step=2, chunk_tiles=2, learning_rate=1e-3,
    classifier_learning_rate=1e-3, checkpoint_steps=1,
)  # fmt: skip
TESTS = Path(__file__).parents[1]


def tuned(checkpoint: Path | None = None, **options: Any) -> FinetuneResult:
    return finetune_slides(
        stores(), LABELS, model=small_encoder(), groups=PATIENTS, device="cpu", progress=False,
        checkpoint=checkpoint, **{"settings": RUN, **options},
    )  # fmt: skip


def state_of(result: FinetuneResult) -> dict[str, torch.Tensor]:
    return {
        **{f"encoder.{k}": t for k, t in result.encoder.vit.state_dict().items()},
        **{f"head.{k}": t for k, t in result.classifier.aggregator_.state_dict().items()},
    }


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


PROGRAM = """
import sys, time
from pathlib import Path
from test_resuming import tuned
from xmag.finetune.trainer import Trainer
out, pause = Path(sys.argv[1]), float(sys.argv[2])
step, done = Trainer.step, []
def stalls(self, *args, **kwargs):
    step(self, *args, **kwargs)
    done.append(1)
    if len(done) > 3:
        time.sleep(pause)
Trainer.step = stalls
tuned(out / "run.safetensors").save(out / "result")
"""


def program(out: Path, pause: float) -> subprocess.Popen:
    path = os.pathsep.join([str(TESTS), str(TESTS / "finetune"), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(out), str(pause)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        cwd=TESTS.parent,
    )


def test_a_run_that_is_killed_and_resumed_gives_the_same_weights(tmp_path: Path) -> None:
    expected = tuned()
    killed = program(tmp_path, pause=800)
    checkpoint = tmp_path / "run.safetensors"
    while not (checkpoint.exists() and updates_in(checkpoint) >= 2):
        assert killed.poll() is None
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert updates_in(checkpoint) < 4 * len(PATIENTS) // 2
    assert not (tmp_path / "result").exists()
    resumed = program(tmp_path, pause=0.0)
    assert resumed.wait() == 0
    saved = {
        f"{part}.{key}": tensor
        for part, name in (("encoder", "model"), ("head", "classifier"))
        for key, tensor in load_file(tmp_path / "result" / f"{name}.safetensors").items()
    }
    assert_same(saved, state_of(expected))


def updates_in(checkpoint: Path) -> int:
    with safe_open(checkpoint, "pt") as file:
        return json.loads(file.metadata()["checkpoint"])["progress"]["updates"]


class StopError(Exception):
    """What ends a run in the tests below."""


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int, error: BaseException) -> None:
    step, done = Trainer.step, []

    def limited(self: Trainer, *args: Any, **kwargs: Any) -> None:
        if len(done) == steps:
            raise error
        step(self, *args, **kwargs)
        done.append(1)

    monkeypatch.setattr(Trainer, "step", limited)


@pytest.mark.parametrize("steps", [1, 3, 4, 8, 11])
def test_wherever_it_stops_it_goes_on_with_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """Steps 3, 6, 9 and 12 end an epoch; four patients in all, of whom one validates."""
    expected = tuned(random_state=1)
    path = tmp_path / "run.safetensors"
    with monkeypatch.context() as patch:
        stop_after(patch, steps, StopError())
        with pytest.raises(StopError):
            tuned(path, random_state=1)
    assert updates_in(path) == steps
    found = tuned(path, random_state=1)
    assert_same(state_of(found), state_of(expected))
    for one, other in zip(found.history, expected.history, strict=True):
        for name in ("epoch", "train_loss", "validation_loss", "validation_auroc", "tiles"):
            assert getattr(one, name) == getattr(other, name)
    assert found.best_epoch == expected.best_epoch


def test_without_checkpoints_within_an_epoch_it_goes_on_from_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(epochs=3, slides_per_step=2, learning_rate=1e-3)
    expected = tuned(settings=settings)
    path = tmp_path / "run.safetensors"
    with monkeypatch.context() as patch:
        stop_after(patch, 5, StopError())
        with pytest.raises(StopError):
            tuned(path, settings=settings)
    assert updates_in(path) == 3
    assert_same(state_of(tuned(path, settings=settings)), state_of(expected))


def test_a_run_that_is_done_comes_back_without_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.safetensors"
    expected = tuned(path)
    stop_after(monkeypatch, 0, StopError())
    assert_same(state_of(tuned(path)), state_of(expected))


def test_an_interrupt_says_what_is_kept_and_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.safetensors"
    with monkeypatch.context() as patch:
        stop_after(patch, 4, KeyboardInterrupt())
        with pytest.raises(
            KeyboardInterrupt,
            match=r"interrupted in epoch 1; the checkpoint .*run\.safetensors of epoch 1, step 1,"
            r" is kept: make the same call again",
        ):
            tuned(path)
    with monkeypatch.context() as patch:
        stop_after(patch, 0, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt, match="is kept"):
            tuned(path)
        with pytest.raises(KeyboardInterrupt, match="no checkpoint yet: give checkpoint="):
            tuned()


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"random_state": 5}, "random_state: 0 there, 5 here"),
        ({"mode": "sampled"}, "mode: 'exact' there, 'sampled' here"),
        ({"aggregator": "mean"}, r"aggregator\.name: 'abmil' there, 'mean' here"),
        (
            {"settings": Settings(epochs=4, slides_per_step=2)},
            "settings.learning_rate: 0.001 there",
        ),
        ({"validation": None}, "validation_slides: 2 there, 0 here"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], difference: str
) -> None:
    path = tmp_path / "run.safetensors"
    with monkeypatch.context() as patch:
        stop_after(patch, 1, StopError())
        with pytest.raises(StopError):
            tuned(path)
    before = path.read_bytes()
    with pytest.raises(MismatchError, match=difference):
        tuned(path, **options)
    assert path.read_bytes() == before


def test_chunks_of_another_size_are_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.safetensors"
    with monkeypatch.context() as patch:
        stop_after(patch, 1, StopError())
        with pytest.raises(StopError):
            tuned(path)
    tuned(
        path,
        settings=Settings(**{**RUN.to_dict(), "augmentation": RUN.augmentation, "chunk_tiles": 64}),
    )


def test_a_full_disk_costs_a_checkpoint_and_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, path = tuned(), tmp_path / "run.safetensors"
    replace, written = Path.replace, []

    def full(self: Path, target: Path) -> Path:
        if Path(target).name == path.name and len(written) >= 2:
            raise OSError(28, os.strerror(28))
        written.append(target)
        return replace(self, target)

    monkeypatch.setattr(files.Path, "replace", full)
    with pytest.warns(
        XmagWarning, match=r"No space left.*Training goes on; the checkpoint .* of epoch 0, step 2"
    ):
        found = tuned(path)
    assert_same(state_of(found), state_of(expected))
    assert updates_in(path) == 2
    monkeypatch.undo()
    assert_same(state_of(tuned(path)), state_of(expected))


def test_a_damaged_checkpoint_is_an_error_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    tuned(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match=r"no whole checkpoint.*delete it"):
        tuned(path)
    assert path.stat().st_size == len(whole) // 2


def test_another_file_is_no_checkpoint(tmp_path: Path) -> None:
    small_encoder().save(tmp_path)
    with pytest.raises(WeightsError, match="is no checkpoint"):
        tuned(tmp_path / "model.safetensors")


def test_a_folder_that_is_not_there_is_known_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(monkeypatch, 0, StopError())
    with pytest.raises(OutputError, match=r"no folder .*nowhere.*create it first"):
        tuned(tmp_path / "nowhere" / "run.safetensors")
