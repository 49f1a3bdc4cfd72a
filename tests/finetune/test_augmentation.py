"""Augmentation against numpy, colorsys and closed forms; draws that replay."""

import colorsys
import math

import numpy as np
import pytest
import torch
from support.models import random_tiles

from xmag.errors import InputError
from xmag.finetune import Augmentation
from xmag.finetune.augment import Draws, augment, draw

STILL = Augmentation(flips=False, brightness=0, contrast=0, saturation=0, hue=0)


def drawn(axes=(False, False, False), colours=None, contrast=1.0) -> Draws:
    return Draws(
        axes=torch.tensor([axes]),
        colours=torch.eye(3)[None] if colours is None else colours,
        contrast=torch.tensor([contrast]),
    )


def test_without_strength_nothing_changes() -> None:
    tiles = torch.from_numpy(random_tiles(3, size_px=28))
    changed = augment(tiles, draw(STILL, 3, seed=0))
    assert changed.dtype == torch.float32
    assert (changed - tiles.float()).abs().max() < 1e-3


def test_flips_reach_all_eight_ways_to_lay_a_square_and_equally_often() -> None:
    tile = random_tiles(1, size_px=28)[0]
    ways = [np.rot90(t, turns) for t in (tile, tile[:, ::-1]) for turns in range(4)]
    count = 4000
    axes = draw(Augmentation(), count, seed=0).axes
    tiles = torch.from_numpy(tile[None])
    found = []
    for row in axes.unique(dim=0):
        changed = augment(tiles, drawn(tuple(row.tolist())))[0].numpy()
        fits = [i for i, way in enumerate(ways) if np.abs(changed - way).max() < 1e-3]
        assert len(fits) == 1
        share = (axes == row).all(dim=1).float().mean().item()
        assert share == pytest.approx(1 / 8, abs=4 * math.sqrt(7 / 64 / count))
        found += fits
    assert sorted(found) == list(range(8))


def test_each_tile_gets_its_own_draw_whatever_the_batch() -> None:
    tiles = torch.from_numpy(random_tiles(9, size_px=28))
    draws = draw(Augmentation(), 9, seed=5)
    whole = augment(tiles, draws)
    assert torch.equal(augment(tiles[2:5], draws[2:5]), whole[2:5])
    rows = torch.tensor([7, 0, 3])
    assert torch.equal(augment(tiles[rows], draws[rows]), whole[rows])
    assert len({tuple(c.flatten().tolist()) for c in draws.colours}) == 9


def test_the_same_seed_draws_the_same_and_another_does_not() -> None:
    one, same, other = (draw(Augmentation(), 50, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.axes, same.axes)
    assert torch.equal(one.colours, same.colours)
    assert torch.equal(one.contrast, same.contrast)
    assert not torch.equal(one.colours, other.colours)


def test_drawing_leaves_the_generator_of_the_program_alone() -> None:
    before = torch.get_rng_state()
    draw(Augmentation(), 10, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_brightness_is_a_factor_and_saturation_a_distance_from_grey() -> None:
    tiles = torch.from_numpy(random_tiles(1, size_px=28) // 2)
    bright = Augmentation(flips=False, brightness=0.5, contrast=0, saturation=0, hue=0)
    draws = draw(bright, 1, seed=1)
    factor = float(draws.colours[0].sum(dim=1)[0])
    assert abs(factor - 1) > 0.05
    assert (augment(tiles, draws) - factor * tiles.float()).abs().max() < 1e-3
    saturated = Augmentation(flips=False, brightness=0, contrast=0, saturation=0.5, hue=0)
    draws = draw(saturated, 1, seed=1)
    pixels = tiles.float()
    grey = pixels.mean(dim=3, keepdim=True)
    amount = 1.5 * float(draws.colours[0, 0, 0] - 1 / 3)  # of 1/3 + 2/3 * amount
    assert abs(amount - 1) > 0.05
    expected = (grey + amount * (pixels - grey)).clamp(0, 255)
    assert (augment(tiles, draws) - expected).abs().max() < 1e-3


def test_a_third_of_a_turn_of_hue_swaps_the_channels() -> None:
    """About the grey axis red becomes green, green blue and blue red; colorsys agrees."""
    turned = Augmentation(flips=False, brightness=0, contrast=0, saturation=0, hue=0.5)
    draws = draw(turned, 4000, seed=0)
    third = int((draws.colours[:, 1, 0] - 1).abs().argmin())
    red = torch.zeros(1, 14, 14, 3, dtype=torch.uint8)
    red[..., 0] = 200
    pixel = augment(red, draws[third : third + 1])[0, 0, 0] / 255
    assert colorsys.rgb_to_hsv(*pixel.tolist())[0] == pytest.approx(1 / 3, abs=0.02)
    assert pixel[1] * 255 == pytest.approx(200, abs=1)


def test_contrast_changes_about_the_mean_of_the_tile() -> None:
    tiles = torch.from_numpy(random_tiles(1, size_px=28) // 4 + 90)
    changed = augment(tiles, drawn(contrast=1.3))
    pixels = tiles.double()
    assert (changed - (pixels.mean() + 1.3 * (pixels - pixels.mean()))).abs().max() < 1e-2


def test_values_stay_in_the_range_of_a_pixel() -> None:
    tiles = torch.from_numpy(random_tiles(20, size_px=28))
    strong = Augmentation(brightness=0.9, contrast=0.9, saturation=0.9, hue=0.5)
    changed = augment(tiles, draw(strong, 20, seed=0))
    assert changed.min() == 0
    assert changed.max() == 255


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
@pytest.mark.parametrize("value", [-0.1, 1.0])
def test_a_strength_out_of_range_is_refused(name: str, value: float) -> None:
    with pytest.raises(InputError, match=rf"Augmentation\.{name} is {value}"):
        Augmentation(**{name: value})
