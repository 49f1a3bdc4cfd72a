"""The losses against the same written out with loops, the blocks against the image."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from xmag.distill.losses import (
    DISTANCES,
    Objective,
    Projection,
    block_means,
    global_loss,
    local_loss,
)
from xmag.distill.settings import LossSettings
from xmag.distill.views import low_view, teacher_tiles
from xmag.errors import InputError
from xmag.training.augmentation import PAPER, augment, draw, map_tokens


def vectors(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(a: Tensor, b: Tensor) -> float:
    x, y = a.tolist(), b.tolist()
    dot = sum(i * j for i, j in zip(x, y, strict=True))
    return dot / math.sqrt(sum(i * i for i in x) * sum(j * j for j in y))


def smooth_l1(a: Tensor, b: Tensor) -> float:
    far = [abs(i - j) for i, j in zip(a.tolist(), b.tolist(), strict=True)]
    return sum(0.5 * d * d if d < 1 else d - 0.5 for d in far) / len(far)


def relations(a: Tensor, b: Tensor) -> float:
    count = len(a)
    squares = [
        (cosine(a[i], a[j]) - cosine(b[i], b[j])) ** 2 for i in range(count) for j in range(count)
    ]
    return sum(squares) / count**2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_both_losses_are_those_written_out(dtype: torch.dtype) -> None:
    region, tiles, teacher = (
        vectors(5, 7, seed=0),
        vectors(5, 16, 7, seed=1),
        vectors(5, 16, 7, seed=2),
    )
    means = [sum(teacher[b]) / 16 for b in range(5)]
    expected = {
        "cosine": (
            -sum(cosine(region[b], means[b]) for b in range(5)) / 5,
            -sum(cosine(tiles[b, t], teacher[b, t]) for b in range(5) for t in range(16)) / 80,
        ),
        "smooth_l1": (
            sum(smooth_l1(region[b], means[b]) for b in range(5)) / 5,
            sum(smooth_l1(tiles[b, t], teacher[b, t]) for b in range(5) for t in range(16)) / 80,
        ),
        "relational": (
            relations(region, torch.stack(means)),
            sum(relations(tiles[b], teacher[b]) for b in range(5)) / 5,
        ),
    }
    assert set(expected) == set(DISTANCES)
    region, tiles, teacher = (x.to(dtype) for x in (region, tiles, teacher))
    for distance, (whole, parts) in expected.items():
        assert float(global_loss(region, teacher, distance=distance)) == pytest.approx(
            whole, abs=1e-6
        )
        assert float(local_loss(tiles, teacher, distance=distance)) == pytest.approx(
            parts, abs=1e-6
        )


@pytest.mark.parametrize("distance", DISTANCES)
def test_of_two_projections_the_loss_is_the_mean_of_both(distance: str) -> None:
    both, teacher = vectors(5, 2, 7, seed=0), vectors(5, 16, 7, seed=2)
    each = [float(global_loss(both[:, at], teacher, distance=distance)) for at in (0, 1)]
    found = float(global_loss(both, teacher, distance=distance))
    assert found == pytest.approx(sum(each) / 2)
    assert abs(each[0] - each[1]) > 1e-3


def test_the_default_distance_is_the_cosine() -> None:
    region, tiles, teacher = (
        vectors(3, 5, seed=0),
        vectors(3, 16, 5, seed=1),
        vectors(3, 16, 5, seed=2),
    )
    assert global_loss(region, teacher) == global_loss(region, teacher, distance="cosine")
    assert local_loss(tiles, teacher) == local_loss(tiles, teacher, distance="cosine")
    assert float(global_loss(3 * teacher.mean(1), teacher)) == pytest.approx(-1)
    assert float(local_loss(0.2 * teacher, teacher)) == pytest.approx(-1)


@pytest.mark.parametrize("distance", DISTANCES)
def test_no_region_at_all_costs_nothing(distance: str) -> None:
    loss = LossSettings(cosine=0.0, **{distance: 1.0}) if distance != "cosine" else LossSettings()
    region, tiles = (vectors(0, *shape, seed=0).requires_grad_() for shape in ((5,), (16, 5)))
    objective = Objective(loss, {"t": 1.0})
    total, terms = objective.sums([Projection(region, tiles)], [vectors(0, 16, 5, seed=2)])
    total.backward()
    assert float(total.detach()) == 0
    assert not terms.any()
    assert region.grad.shape == region.shape


def test_block_means_are_those_of_slices_of_the_grid() -> None:
    tokens = vectors(2, 256, 3, seed=0)
    grid = tokens.view(2, 16, 16, 3)
    means = block_means(tokens)
    assert means.shape == (2, 16, 3)
    for tile in range(16):
        y, x = 4 * (tile // 4), 4 * (tile % 4)
        torch.testing.assert_close(means[:, tile], grid[:, y : y + 4, x : x + 4].mean((1, 2)))


@pytest.mark.parametrize("count", [255, 36])
def test_a_grid_without_blocks_is_refused(count: int) -> None:
    with pytest.raises(InputError, match="multiple of 4"):
        block_means(torch.zeros(1, count, 3))


def test_an_unknown_distance_is_refused() -> None:
    with pytest.raises(InputError, match="'l2'; expected one of"):
        local_loss(torch.zeros(1, 16, 2), torch.zeros(1, 16, 2), distance="l2")


def region_of_sixteen_colours() -> Tensor:
    """An image (1, 896, 896, 3) whose 16 tiles each have a colour of their own."""
    colours = np.random.default_rng(0).permutation(16)[:, None] * np.array([15, 9, 5]) + 10
    cells = colours.reshape(4, 4, 3).astype(np.uint8)
    return torch.from_numpy(cells.repeat(224, 0).repeat(224, 1))[None]


def test_blocks_lie_where_the_teachers_tiles_lie_after_every_flip_and_turn() -> None:
    region = region_of_sixteen_colours()
    plain = teacher_tiles(region).float().mean((1, 2)).view(1, 4, 4, 3)
    seen = set()
    for number in range(60):
        draws = draw(0, 0, [number], 0, augmentation=replace(PAPER, turns=True))
        seen.add((int(draws.flips[0]), int(draws.turns[0])))
        high, low = augment(region, draws), augment(low_view(region), draws)
        of_tiles = teacher_tiles(high).float().mean((1, 2)).view(1, 16, 3)
        # Tokens of the student: the mean colour of each patch of 14 px. Their middles, as the
        # Lanczos kernel rings where the colour changes.
        patches = low.float().view(1, 16, 14, 16, 14, 3).mean((2, 4)).flatten(1, 2)
        torch.testing.assert_close(block_means(patches), of_tiles, atol=1.5, rtol=0)
        # What was computed of the plain region, brought to where it stands now.
        matrix, pivot = draws.colours()
        flat = map_tokens(plain, draws).view(16, 3)
        recoloured = flat @ matrix[0].T + pivot[0] @ region.float().mean((0, 1, 2))
        torch.testing.assert_close(recoloured.clamp(0, 255), of_tiles[0], atol=1, rtol=0)
    assert len(seen) == 8
