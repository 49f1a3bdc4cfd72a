"""The cosines on regions held out, against NumPy, of the average and not of the student."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.distilling import STUDENT, TILE_PX

from xmag.distill.losses import block_means
from xmag.distill.settings import Settings, TrainSettings
from xmag.distill.student import Student, fresh_student
from xmag.distill.trainer import Trainer, Views
from xmag.hub.registry import ModelConfig
from xmag.training import Ranks

CPU = torch.device("cpu")


def trainer(config: ModelConfig = STUDENT) -> Trainer:
    torch.manual_seed(0)
    student = Student(fresh_student(config).vit, config, teacher_dims=[9])
    run = Trainer(
        student, teachers={"t": 1.0}, settings=Settings(train=TrainSettings(batch=4)),
        total_steps=10, ranks=Ranks(), device=CPU,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in run.module.parameters():
            parameter.fill_(torch.nan)  # the average alone is to be looked at
    return run


def held(count: int) -> Views:
    rng = torch.Generator().manual_seed(1)
    low = torch.randint(0, 256, (count, TILE_PX, TILE_PX, 3), dtype=torch.uint8, generator=rng)
    return Views(low=low, targets=[1 + torch.randn(count, 16, 9, generator=rng)])


def mean_cosine(a: np.ndarray, b: np.ndarray) -> float:
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(((a * b).sum(1) / norms).mean())


@pytest.mark.parametrize(("centred", "scale"), [(False, 1.0), (True, 1.0), (True, 3.0)])
def test_the_cosines_are_those_of_the_average_student(centred: bool, scale: float) -> None:
    run, given = trainer(), held(70)  # more than go through at once
    scales = np.linspace(1, scale, 9)
    if centred:
        run.centres = [torch.full((9,), 1.0)]
    if scale != 1:
        run.scales = [torch.from_numpy(scales).float()]
    found = run.validate(given)

    average = run.ema.module
    mean, std = (torch.tensor(rgb).view(3, 1, 1) for rgb in (STUDENT.mean, STUDENT.std))
    with torch.no_grad():
        tokens = average.vit((given.low.permute(0, 3, 1, 2) / 255 - mean) / std)
        region = average.global_heads[0](tokens[:, 0]).double().numpy()
        tiles = average.local_heads[0](block_means(tokens[:, 1:]).flatten(0, 1)).double().numpy()
    target = given.targets[0].double().numpy() * scales
    shift = scales if centred else 0.0
    for level, ours, theirs in (
        ("global", region, target.mean(1)),
        ("local", tiles, target.reshape(-1, 9)),
    ):
        expected = mean_cosine(ours, theirs - shift)
        assert found[f"cosine/{level}/t"] == pytest.approx(expected, abs=1e-5)
        expected = mean_cosine(ours - ours.mean(0), theirs - theirs.mean(0))
        assert found[f"centred_cosine/{level}/t"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("pooling", ["mean", "token+mean"])
def test_the_global_level_is_of_what_the_embedding_is_made_of(pooling: str) -> None:
    """Each part of the embedding has a head, and is compared with the one target of its region."""
    config = replace(STUDENT, vit=replace(STUDENT.vit, registers=2, pooling=pooling))
    run, given = trainer(config), held(70)
    found = run.validate(given)

    average = run.ema.module
    mean, std = (torch.tensor(rgb).view(3, 1, 1) for rgb in (STUDENT.mean, STUDENT.std))
    parts = 2 if pooling == "token+mean" else 1
    assert len(average.global_heads) == parts
    with torch.no_grad():
        embedding = average.vit.embed((given.low.permute(0, 3, 1, 2) / 255 - mean) / std)
        ours = [
            head(rows).double().numpy()
            for head, rows in zip(average.global_heads, embedding.chunk(parts, 1), strict=True)
        ]
        projected = average(given.low)[0].region
    assert projected.shape == ((70, 9) if parts == 1 else (70, 2, 9))
    theirs = given.targets[0].double().numpy().mean(1)
    expected = np.mean([mean_cosine(rows, theirs) for rows in ours])
    assert found["cosine/global/t"] == pytest.approx(expected, abs=1e-5)
    centred = [mean_cosine(rows - rows.mean(0), theirs - theirs.mean(0)) for rows in ours]
    assert found["centred_cosine/global/t"] == pytest.approx(np.mean(centred), abs=1e-4)


def test_a_student_that_says_the_same_of_all_has_no_centred_cosine() -> None:
    run, given = trainer(), held(8)
    with torch.no_grad():
        for heads in (run.ema.module.global_heads, run.ema.module.local_heads):
            heads[0].last.weight.zero_()
            heads[0].last.bias.fill_(1.0)
    found = run.validate(given)
    assert found["cosine/global/t"] > 0.9
    assert abs(found["centred_cosine/global/t"]) < 1e-6


def test_a_rank_whose_regions_are_all_damaged_adds_nothing() -> None:
    run = trainer()
    found = run.validate(held(0))
    assert np.isnan(list(found.values())).all()
