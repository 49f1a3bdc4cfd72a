"""Two processes of torchrun against one with the slides of both; how slides are dealt."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.finetuning import small_encoder, stores
from support.programs import run_on_two_ranks

from xmag.errors import InputError
from xmag.finetune import Settings, finetune_slides, run
from xmag.finetune.cohort import shards, steps_of_epoch
from xmag.training import Ranks

STEP = Settings(
    epochs=2, slides_per_step=2, chunk_tiles=2, learning_rate=1e-3, classifier_learning_rate=1e-3
)

PROGRAM = """
import json, os, sys
from pathlib import Path
from test_ranks_of_finetuning import tuned
out = Path(sys.argv[1])
result = tuned(out / "run.safetensors")
rank = os.environ.get("RANK", "alone")
result.save(out / rank)
rows = [[row.train_loss, row.validation_loss, row.tiles] for row in result.history]
(out / f"{rank}.json").write_text(json.dumps(rows))
"""


def tuned(checkpoint: Path, settings: Settings = STEP):
    """Two slides train, three others validate: a step has the same slides on one process or two."""
    return finetune_slides(
        stores(2), ["a", "b"], validation=(stores(3, seed=40), ["a", "b", "a"]),
        model=small_encoder(), settings=settings, device="cpu", progress=False,
        checkpoint=checkpoint,
    )  # fmt: skip


STEPS = """
import json, os, sys
from pathlib import Path
from test_ranks_of_finetuning import four_slides
from xmag.finetune.trainer import Trainer
out, step = Path(sys.argv[1]), Trainer.step
def stops(self, batch):
    if self.progress.updates == LAST:
        raise SystemExit(0)
    step(self, batch)
Trainer.step = stops
result = four_slides(out / "NAME.safetensors")
rows = [[row.train_loss, row.tiles] for row in result.history]
(out / f"NAME-{os.environ['RANK']}.json").write_text(json.dumps(rows))
"""


def four_slides(checkpoint: Path):
    """Two steps an epoch, with a checkpoint after each."""
    return finetune_slides(
        stores(4), ["a", "b"] * 2, validation=None, model=small_encoder(), device="cpu",
        settings=replace(STEP, checkpoint_steps=1), progress=False, checkpoint=checkpoint,
    )  # fmt: skip


def test_two_processes_that_stopped_within_an_epoch_record_what_those_that_did_not_do(
    tmp_path: Path,
) -> None:
    """The checkpoint of the first process has the losses and tiles of both."""
    for name, last in (("whole", 9), ("stopped", 3), ("stopped", 9)):
        program = STEPS.replace("NAME", name).replace("LAST", str(last))
        run_on_two_ranks(program, tmp_path, beside=__file__)
    for rank in "01":
        whole, resumed = (
            json.loads((tmp_path / f"{name}-{rank}.json").read_text())
            for name in ("whole", "stopped")
        )
        assert resumed == whole
        assert whole[0][1] == sum(len(store) for store in stores(4))


def test_two_processes_do_what_one_does_with_the_slides_of_both(tmp_path: Path) -> None:
    tuned(tmp_path / "alone.safetensors").save(tmp_path / "alone")
    run_on_two_ranks(PROGRAM, tmp_path, beside=__file__)
    for name in ("model", "classifier"):
        alone, first, second = (
            load_file(tmp_path / rank / f"{name}.safetensors") for rank in ("alone", "0", "1")
        )
        for key, expected in alone.items():
            assert torch.equal(first[key], second[key]), key
            assert (first[key] - expected).abs().max() < 1e-5, key
    rows = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in "01"]
    assert rows[0] == rows[1]
    expected = tuned(tmp_path / "alone.safetensors").history
    for row, whole in zip(rows[0], expected, strict=True):
        assert row == pytest.approx(
            [whole.train_loss, whole.validation_loss, whole.tiles], rel=1e-4
        )


def test_every_slide_trains_once_an_epoch_on_one_process() -> None:
    targets = [0] * 7 + [1] * 4
    for world in (1, 2, 4):
        parts = shards(range(11), targets, world=world)
        assert sorted(i for part in parts for i in part) == list(range(11))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        for label, count in ((0, 7), (1, 4)):
            shares = [sum(targets[i] == label for i in part) for part in parts]
            assert max(shares) <= count // world + 1
        orders = set()
        for epoch in range(5):
            steps = steps_of_epoch(parts, slides_per_step=4, seed=0, epoch=epoch)
            assert all(len(step) == world for step in steps)
            assert all(len(own) <= 4 // world for step in steps for own in step)
            flat = [i for step in steps for own in step for i in own]
            assert sorted(flat) == list(range(11))
            assert all(
                set(own) <= set(part)
                for step in steps
                for own, part in zip(step, parts, strict=True)
            )
            orders.add(tuple(flat))
        assert len(orders) == 5


def test_slides_a_step_that_processes_cannot_share_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "joined_ranks", lambda: nullcontext(Ranks(rank=1, world=4)))
    with pytest.raises(InputError, match="slides_per_step is 2 for 4 processes"):
        tuned(tmp_path / "run.safetensors")
