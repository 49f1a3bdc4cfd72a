"""Whole runs: what is learned, what is written, what happens to damage, ranks and bad input."""

import csv
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from support.distilling import (
    STUDENT,
    TILE_PX,
    ArraySource,
    RandomTeacher,
    colourful_regions,
    tiny_student,
)
from support.models import default_dtype
from support.programs import run_on_two_ranks

import xmag
from xmag.distill.run import distill
from xmag.distill.settings import (
    LoaderSettings,
    LogSettings,
    LossSettings,
    Settings,
    TrainSettings,
)
from xmag.distill.student import StudentStart
from xmag.distill.summary import Summary
from xmag.distill.teachers import OnlineFeatures
from xmag.errors import InputError, MismatchError, MissingExtraError, ModelError
from xmag.progress import ProgressEvent
from xmag.training.augmentation import Augmentation


def quick(
    loss: LossSettings | None = None, log: LogSettings | None = None, **train: Any
) -> Settings:
    return Settings(
        loss=loss or LossSettings(),
        train=TrainSettings(**{"steps": 4, "batch": 4, "lr": 2e-3, "seed": 3, **train}),
        loader=LoaderSettings(threads=2, prefetch=2),
        log=log or LogSettings(every=2, checkpoint_every=2, validate_every=2, tensorboard=False),
    )


def run(
    out: Path, settings: Settings | None = None, *, source: ArraySource | None = None, **more: Any
) -> Summary:
    source = source or ArraySource(colourful_regions(12))
    options = {"validation": [0, 5], **more}
    teachers = options.pop("teachers", RandomTeacher())
    student = options.pop("student", None) or tiny_student()
    return distill(source, teachers, student, out, settings=settings or quick(), **options)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(out / "model" / "model.safetensors")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("centre", [False, True])
def test_a_student_learns_what_an_untrained_one_does_not_know(tmp_path: Path, centre: bool) -> None:
    settings = Settings(
        loss=LossSettings(centre=centre, centre_regions=24),
        train=TrainSettings(steps=120, batch=8, lr=4e-3, views=1, ema=0.9, seed=1),
        log=LogSettings(every=30, tensorboard=False),
    )
    source = ArraySource(colourful_regions(56))
    summary = run(tmp_path, settings, source=source, validation=range(40, 56))
    kind = "centred_cosine" if centre else "cosine"
    for level in ("global", "local"):
        name = f"{kind}/{level}/random"
        assert summary.untrained[name] < 0.3
        assert summary.validation[name] > (0.7 if centre else 0.9)
        # What tells regions apart is learned too, if later without centring.
        name = f"centred_cosine/{level}/random"
        assert summary.validation[name] > summary.untrained[name] + 0.2
    encoder = xmag.load_model(tmp_path / "model", device="cpu")
    assert encoder.embed(source.regions[:2, :56, :56]).shape == (2, 32)


def test_targets_are_standardised_by_the_tiles_of_the_training_regions(tmp_path: Path) -> None:
    loss = LossSettings(centre=True, standardise=True, centre_regions=10)
    source, teacher = ArraySource(colourful_regions(12)), RandomTeacher()
    run(tmp_path, quick(loss), source=source, teachers=teacher)
    kept = safetensors.torch.load_file(tmp_path / "checkpoint.safetensors")
    cells = source.regions.reshape(12, 4, TILE_PX, 4, TILE_PX, 3).swapaxes(2, 3)
    features = teacher.features(torch.from_numpy(cells.reshape(-1, TILE_PX, TILE_PX, 3))).numpy()
    learned = np.delete(features.reshape(12, 16, 24), [0, 5], axis=0).reshape(-1, 24)
    np.testing.assert_allclose(kept["centre.0"], learned.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(kept["scale.0"], 1 / learned.std(0), rtol=1e-4)


def test_the_run_leaves_metrics_a_checkpoint_and_a_model(tmp_path: Path) -> None:
    summary = run(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "metrics.csv", "validation.csv", "checkpoint.safetensors", "model",
    }  # fmt: skip
    assert (summary.steps, summary.regions, summary.damaged) == (4, 10, 0)
    assert summary.epochs == pytest.approx(4 * 4 / 10)
    metrics, validation = rows(tmp_path / "metrics.csv"), rows(tmp_path / "validation.csv")
    assert [row["step"] for row in metrics] == ["2", "4"]
    assert [row["step"] for row in validation] == ["0", "2", "4"]
    assert set(metrics[0]) == {
        "step", "epoch", "rate", "loss", "global/random", "local/random", "gradient_norm",
        "regions_per_second", "waiting_share", "damaged_regions", "seconds",
    }  # fmt: skip
    for row in metrics:
        parts = float(row["global/random"]) + 0.5 * float(row["local/random"])
        assert float(row["loss"]) == pytest.approx(parts, abs=1e-4)
    assert float(validation[-1]["cosine/global/random"]) == pytest.approx(
        summary.validation["cosine/global/random"], abs=1e-4
    )


def test_the_model_is_the_average_of_the_student(tmp_path: Path) -> None:
    run(tmp_path)
    state = safetensors.torch.load_file(tmp_path / "checkpoint.safetensors")
    for name, tensor in weights(tmp_path).items():
        assert torch.equal(tensor, state[f"ema.vit.{name}"])
        assert not torch.equal(tensor, state[f"module.vit.{name}"])


def test_the_caller_keeps_its_random_numbers(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_the_same_run_gives_the_same_weights(tmp_path: Path) -> None:
    run(tmp_path / "a")
    run(tmp_path / "b", quick(log=LogSettings(every=1, tensorboard=False)))
    run(tmp_path / "c", quick(seed=4))
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_of_the_program_changes_no_number(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    teacher = RandomTeacher()
    settings = replace(quick(), augment=Augmentation(turns=True))
    run(tmp_path / "expected", settings, teachers=teacher)
    with default_dtype(dtype):
        run(tmp_path / "found", settings, teachers=teacher)
    found, expected = (weights(tmp_path / name) for name in ("found", "expected"))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_damaged_regions_are_counted_and_left_out(tmp_path: Path) -> None:
    regions = colourful_regions(12)
    source = ArraySource(regions, damaged=[3, 5, 7])
    summary = run(tmp_path / "a", quick(steps=6), source=source)
    assert summary.damaged == 3
    assert rows(tmp_path / "a" / "metrics.csv")[-1]["damaged_regions"] == "3"
    # Whatever stands in their place, it has no part in it.
    changed = regions.copy()
    changed[[3, 5, 7]] = 77
    run(tmp_path / "b", quick(steps=6), source=ArraySource(changed, damaged=[3, 5, 7]))
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_what_the_source_raises_besides_damage_is_raised(tmp_path: Path) -> None:
    class Broken(ArraySource):
        def read(self, indices: Any) -> np.ndarray:
            raise FileNotFoundError("gone")

    with pytest.raises(FileNotFoundError, match="gone"):
        run(tmp_path, source=Broken(colourful_regions(8)))


def test_several_teachers_have_heads_and_metrics_of_their_own(tmp_path: Path) -> None:
    teachers = [
        OnlineFeatures(teacher=RandomTeacher(24, name="a"), weight=1.0),
        OnlineFeatures(teacher=RandomTeacher(10, seed=1, name="b"), weight=0.5),
    ]
    summary = run(tmp_path, teachers=teachers)
    assert {name.rpartition("/")[2] for name in summary.validation} == {"a", "b"}
    state = safetensors.torch.load_file(tmp_path / "checkpoint.safetensors")
    assert state["module.global_heads.1.last.weight"].shape == (10, 10)


def test_without_regions_held_out_nothing_is_validated(tmp_path: Path) -> None:
    summary = run(tmp_path, validation=())
    assert not summary.validation
    assert not (tmp_path / "validation.csv").exists()
    assert "held out. 0 were damaged" in (tmp_path / "model" / "README.md").read_text()


def test_micro_batches_take_as_many_steps(tmp_path: Path) -> None:
    summary = run(tmp_path, quick(micro_batch=3))
    assert summary.steps == 4
    assert all(torch.isfinite(t).all() for t in weights(tmp_path).values())


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, quick(log=LogSettings(every=2, tensorboard=True)))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    logged = {event.step: event.value for event in events.Scalars("metrics/loss")}
    expected = {int(row["step"]): float(row["loss"]) for row in rows(tmp_path / "metrics.csv")}
    assert logged == pytest.approx(expected, abs=1e-4)


def test_without_tensorboard_the_install_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'xmag\[distill\]'"):
        run(tmp_path, Settings())
    run(tmp_path)


def test_a_teacher_of_another_scale_is_refused(tmp_path: Path) -> None:
    teacher = RandomTeacher()
    teacher.tile_spec = xmag.TileSpec(mpp=0.25, size_px=56)
    with pytest.raises(InputError, match=r"sees 56 px at 0\.25 µm/px"):
        run(tmp_path, teachers=teacher)
    with pytest.raises(InputError, match="sees 112 px"):
        run(tmp_path, teachers=RandomTeacher(size_px=112))


def test_regions_of_another_size_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected uint8 \\(1, 224, 224, 3\\)"):
        run(tmp_path, source=ArraySource(colourful_regions(8, side=112)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation": [12]}, "numbers from 0 to 11"),
        ({"validation": range(12)}, "none is left to learn from"),
        ({"teachers": []}, "at least one"),
        ({"teachers": [RandomTeacher(), RandomTeacher(seed=1)]}, "a name of its own"),
    ],
)
def test_what_makes_no_sense_is_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    start = tiny_student()
    with torch.no_grad():
        start.vit.norm.weight[0] = torch.nan
    with pytest.raises(ModelError, match="no longer finite"):
        run(tmp_path, student=start, validation=())
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_another_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    with pytest.raises(MismatchError, match=r"settings.train.lr: 0.002 there, 0.001 here"):
        run(tmp_path, quick(lr=1e-3))
    with pytest.raises(MismatchError, match=r"data\.validation_sha256"):
        run(tmp_path, validation=[0, 6])
    with pytest.raises(MismatchError, match=r"teachers\[0\]\.seed: 0 there, 9 here"):
        run(tmp_path, teachers=RandomTeacher(seed=9))
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before


def test_each_step_is_told_under_the_name_of_the_work(tmp_path: Path) -> None:
    events: list[ProgressEvent] = []
    run(tmp_path, progress=events.append)
    told = [(event.what, event.done, event.total) for event in events]
    assert told == [("preparing the first regions", 0, None)] + [
        ("distilling", done, 4) for done in range(5)
    ]


PROGRAM = """
import sys
from pathlib import Path
from test_training import STUDENT, quick, run
run(Path(sys.argv[1]), quick(batch=4, steps=3, lr=1e-4))
"""


def test_two_ranks_make_the_run_of_one(tmp_path: Path) -> None:
    run_on_two_ranks(PROGRAM, tmp_path / "two", beside=__file__)
    run(tmp_path / "one", quick(batch=4, steps=3, lr=1e-4))
    for name in ("metrics.csv", "validation.csv"):
        one, two = (rows(tmp_path / folder / name) for folder in ("one", "two"))
        for a, b in zip(one, two, strict=True):
            for key in a.keys() - {"regions_per_second", "waiting_share", "seconds"}:
                assert float(a[key]) == pytest.approx(float(b[key]), abs=2e-4), key
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:  # Adam turns rounding into up to its rate where a gradient is 0
        torch.testing.assert_close(one[name], two[name], atol=3e-4, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_run_on_cuda(tmp_path: Path) -> None:
    summary = run(tmp_path, quick(loss=LossSettings(centre=True, centre_regions=4)))
    assert np.isfinite(list(summary.validation.values())).all()
    assert isinstance(xmag.load_model(tmp_path / "model"), xmag.Encoder)
    assert isinstance(tiny_student(), StudentStart)
    assert STUDENT.tile_spec.mpp == 2.0
