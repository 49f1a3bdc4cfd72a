"""A run that is killed, or whose disk runs full, and what is left of it."""

import hashlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from support.distilling import ArraySource, RandomTeacher, colourful_regions, tiny_student

from xmag.distill.run import distill
from xmag.distill.settings import (
    LoaderSettings,
    LogSettings,
    LossSettings,
    Settings,
    TrainSettings,
)
from xmag.distill.summary import Summary
from xmag.distill.trainer import CHECKPOINT
from xmag.errors import WeightsError
from xmag.training import Checkpoint

STEPS = 24


def run(
    out: Path, *, every: int = 4, damaged: tuple[int, ...] = (), stalls_after: int = 10**9
) -> Summary:
    settings = Settings(
        loss=LossSettings(centre=True, standardise=True, centre_regions=8),
        train=TrainSettings(steps=STEPS, batch=4, lr=2e-3, seed=3),
        loader=LoaderSettings(threads=2),
        log=LogSettings(every=2, checkpoint_every=every, validate_every=6, tensorboard=False),
    )
    source = ArraySource(colourful_regions(12), damaged=damaged)
    read, taken = source.read, []

    def counting(indices):
        taken.extend(indices)
        if len(taken) > stalls_after:
            time.sleep(800)
        return read(indices)

    source.read = counting
    return distill(
        source, RandomTeacher(), tiny_student(), out, settings=settings, validation=[0, 5],
        about={"slides": 1},
    )  # fmt: skip


PROGRAM = """
import sys
from pathlib import Path
sys.path[:0] = {folders!r}
from test_checkpoint import run
run(Path(sys.argv[1]), **{options!r})
"""


def program(**options: object) -> list[str]:
    here = Path(__file__).parent
    text = PROGRAM.format(folders=[str(here), str(here.parent)], options=options)
    return [sys.executable, "-c", text]


def steps_of(checkpoint: Path) -> int:
    return Checkpoint.load(checkpoint, kind="distillation").progress["updates"]


def everything(out: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(out / CHECKPOINT)


def test_a_run_that_is_killed_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    alone = run(tmp_path / "alone", damaged=(7,))
    killed = tmp_path / "killed"
    process = subprocess.Popen([*program(damaged=(7,), stalls_after=60), str(killed)])
    checkpoint = killed / CHECKPOINT
    while not checkpoint.exists() or steps_of(checkpoint) < 8:
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.1)  # somewhere between two checkpoints, or in one
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert steps_of(checkpoint) < STEPS
    assert not (killed / "model").exists()

    resumed = run(killed, damaged=(7,))
    expected, found = everything(tmp_path / "alone"), everything(killed)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    weights = [
        (tmp_path / folder / "model" / "model.safetensors").read_bytes()
        for folder in ("alone", "killed")
    ]
    assert weights[0] == weights[1]
    assert (resumed.validation, resumed.untrained) == (alone.validation, alone.untrained)
    assert resumed.damaged == alone.damaged == 1
    timed = {"regions_per_second", "waiting_share", "seconds"}
    for name in ("metrics.csv", "validation.csv"):
        one, two = ((tmp_path / folder / name).read_text() for folder in ("alone", "killed"))
        header = one.splitlines()[0].split(",")
        assert two.splitlines()[0].split(",") == header
        kept = [i for i, column in enumerate(header) if column not in timed]
        for a, b in zip(one.splitlines(), two.splitlines(), strict=True):
            assert [a.split(",")[i] for i in kept] == [b.split(",")[i] for i in kept]


def test_a_run_that_is_done_is_not_run_again(tmp_path: Path) -> None:
    first = run(tmp_path)
    (tmp_path / "model" / "model.safetensors").unlink()
    again = run(tmp_path)
    assert (again.steps, again.validation) == (first.steps, first.validation)
    assert (tmp_path / "model" / "model.safetensors").exists()


FULL_DISK = """
import resource
checkpoint = Path(sys.argv[1]) / "checkpoint.safetensors"
limit = int(checkpoint.stat().st_size * 0.6)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    run(Path(sys.argv[1]))
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on file sizes to set")
def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    process = subprocess.Popen([*program(stalls_after=60), str(tmp_path)])
    checkpoint = tmp_path / CHECKPOINT
    while not checkpoint.exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    before, step = checkpoint.read_bytes(), steps_of(checkpoint)
    assert step < STEPS
    text = program()[2].replace("run(Path(sys.argv[1]), **{})", FULL_DISK)
    done = subprocess.run(
        [sys.executable, "-c", text, str(tmp_path)],
        capture_output=True, text=True, timeout=800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("OutputError"), done.stdout
    assert "checkpoint.safetensors cannot be written" in done.stdout
    assert checkpoint.read_bytes() == before
    assert not list(tmp_path.glob(".*xmag-tmp"))
    run(tmp_path)
    assert steps_of(checkpoint) == STEPS


def test_a_checkpoint_tells_what_it_is_of(tmp_path: Path) -> None:
    run(tmp_path)
    with safetensors.safe_open(tmp_path / CHECKPOINT, "pt") as file:
        about = json.loads(file.metadata()["checkpoint"])
    assert about["progress"]["updates"] == STEPS
    data = about["identity"]["data"]
    assert data["validation_sha256"] == hashlib.sha256(np.array([0, 5]).tobytes()).hexdigest()
    assert (data["slides"], data["training_regions"], data["validation_regions"]) == (1, 10, 2)
    assert about["identity"]["teachers"][0]["name"] == "random"
    assert everything(tmp_path)["centre.0"].shape == (24,)
    assert everything(tmp_path)["scale.0"].shape == (24,)


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    path = tmp_path / CHECKPOINT
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="no whole checkpoint"):
        run(tmp_path)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / CHECKPOINT)
    with pytest.raises(WeightsError, match="has format None"):
        run(tmp_path)


def test_a_checkpoint_of_version_1_says_what_to_do(tmp_path: Path) -> None:
    header = json.dumps({"format": "xmag-distillation", "schema_version": 1, "step": 4})
    tensors = {"student.vit.cls_token": torch.zeros(1, 1, 32)}
    safetensors.torch.save_file(tensors, tmp_path / CHECKPOINT, metadata={"xmag": header})
    with pytest.raises(WeightsError, match=r"written by xmag 0\.1.*delete the file to begin anew"):
        run(tmp_path)


def test_a_change_of_what_is_logged_is_no_other_run(tmp_path: Path) -> None:
    run(tmp_path)
    assert run(tmp_path, every=7).steps == STEPS
