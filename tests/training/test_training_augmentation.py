"""Draws by number; images against Pillow, NumPy and colorsys; grids of tokens in step."""

import colorsys
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from support.models import random_tiles
from support.slides import texture
from torch import Tensor

from xmag.errors import InputError
from xmag.training.augmentation import (
    NONE,
    PAPER,
    Augmentation,
    Draws,
    augment,
    draw,
    map_tokens,
)

NAMES = ("brightness", "contrast", "saturation", "hue")
POSITIONS = [(flip, turns) for flip in (0, 1) for turns in range(4)]


TURNED = replace(PAPER, turns=True, jitter=1.0)
"""All positions of a square, and mild colours."""


def draws_of(count: int = 1, **changes: float | list[float]) -> Draws:
    """Draws that change nothing but what is named."""
    plain = {"flips": 0, "turns": 0, "brightness": 1.0, "contrast": 1.0, "saturation": 1.0}
    values = {**plain, "hue": 0.0, **changes}
    kinds = {"flips": torch.int64, "turns": torch.int64}
    return Draws(
        **{
            name: torch.tensor(value, dtype=kinds.get(name, torch.float32)).expand(count)
            for name, value in values.items()
        }
    )


def tissue(side: int = 64, seed: int = 0) -> Tensor:
    return torch.from_numpy(texture(side, side, seed=seed))[None]


def colours_of_tissue() -> Tensor:
    """H&E colours that no jitter of 5% brings to the edge of what RGB can show."""
    rng = np.random.default_rng(0)
    base = np.array([[105, 70, 150], [200, 190, 205], [215, 150, 190]], np.float32)
    mixed = rng.dirichlet((1, 1, 1), 64 * 64) @ base + rng.normal(0, 4, (64 * 64, 3))
    return torch.from_numpy(mixed.reshape(1, 64, 64, 3).round().astype(np.uint8))


def largest_difference(found: Tensor, expected: object) -> float:
    return float(np.abs(found.numpy().astype(float) - np.asarray(expected, float)).max())


def test_a_draw_depends_on_its_numbers_and_on_nothing_else() -> None:
    whole = draw(7, 3, range(40), 1)
    shuffled = draw(7, 3, [31, 5, 5, 0], 1)
    for name in ("flips", "turns", "brightness", "contrast", "saturation", "hue"):
        assert getattr(shuffled, name).tolist() == getattr(whole, name)[[31, 5, 5, 0]].tolist()
    for other in (draw(8, 3, range(40), 1), draw(7, 4, range(40), 1), draw(7, 3, range(40), 0)):
        assert float((other.hue - whole.hue).abs().min()) > 0
    assert draw(7, 3, np.arange(40), 1).hue.tolist() == whole.hue.tolist()


def test_draws_are_the_same_in_years() -> None:
    """Written down once: what is recorded by its seed must come out again."""
    found = draw(2024, 5, [0, 123456], 1, augmentation=TURNED)
    assert found.flips.tolist() == [1, 0]
    assert found.turns.tolist() == [3, 3]
    jitter = torch.stack([getattr(found, name) for name in NAMES], 1)
    expected = [
        [1.008043, 1.043907, 1.013087, 0.048173],
        [1.002565, 0.982884, 0.969908, -0.04389],
    ]
    torch.testing.assert_close(jitter, torch.tensor(expected), atol=1e-6, rtol=0)


def test_draws_are_uniform_and_independent() -> None:
    found = draw(0, 0, range(4000), 0, augmentation=TURNED)
    counts = torch.bincount(found.flips * 4 + found.turns, minlength=8)
    assert float(((counts - 500) ** 2 / 500).sum()) < 24.3  # chi-square, 7 degrees, p = 0.001
    columns = torch.stack([found.brightness, found.contrast, found.saturation, 1 + found.hue])
    assert float(columns.min()) >= 0.95
    assert float(columns.max()) <= 1.05
    uniform = torch.linspace(0.95, 1.05, 4000)
    distance = (columns.sort(1).values - uniform).abs().max(1).values * 10
    assert float(distance.max()) < 1.95 / math.sqrt(4000)  # Kolmogorov-Smirnov, p = 0.001
    every = torch.cat([columns, found.flips[None], found.turns[None]])
    correlation = torch.corrcoef(torch.cat([every[:, 1:], every[:, :-1]])) - torch.eye(12)
    assert float(correlation.abs().max()) < 3.9 / math.sqrt(4000)


def test_what_is_switched_off_is_not_drawn() -> None:
    found = draw(0, 0, range(50), 0, augmentation=replace(TURNED, flips=False, hue=0.0))
    assert found.flips.tolist() == [0] * 50
    assert found.hue.tolist() == [0.0] * 50
    assert len(set(found.turns.tolist())) == 4
    images = tissue().expand(50, -1, -1, -1)
    assert torch.equal(augment(images, draw(0, 0, range(50), 0, augmentation=NONE)), images)


def test_the_papers_preset_flips_each_way_and_recolours_half_of_the_images() -> None:
    """arXiv 2509.23097: each flip with probability 1/2, jitter with 1/2, and no quarter turns."""
    count = 4000
    found = draw(0, 0, range(count), 0, augmentation=PAPER)
    image = tissue()[0].numpy()
    mirrored = {
        (0, 0): image, (1, 0): image[:, ::-1], (0, 1): image[::-1], (1, 1): image[::-1, ::-1],
    }  # fmt: skip
    plain = Augmentation(turns=False, jitter=0)
    images = augment(
        tissue().expand(count, -1, -1, -1), draw(0, 0, range(count), 0, augmentation=plain)
    )
    kinds = images.flatten(1).unique(dim=0, return_counts=True)
    assert {kind.numpy().tobytes() for kind in kinds[0]} == {
        way.copy().tobytes() for way in mirrored.values()
    }
    assert float(((kinds[1] - count / 4) ** 2 / (count / 4)).sum()) < 16.3  # 3 degrees, p = 0.001
    changed = torch.stack(
        [found.brightness != 1, found.contrast != 1, found.saturation != 1, found.hue != 0]
    )
    assert bool((changed.any(0) == changed.all(0)).all())  # all four or none
    assert float(changed.all(0).float().mean()) == pytest.approx(0.5, abs=4 * 0.5 / count**0.5)
    # What is recoloured, and how, is what the default draws too.
    default = draw(0, 0, range(count), 0)
    rows = changed.all(0)
    assert torch.equal(found.hue[rows], default.hue[rows])


@pytest.mark.parametrize(("flip", "turns"), POSITIONS)
def test_positions_are_those_of_numpy(flip: int, turns: int) -> None:
    image = tissue()
    found = augment(image, draws_of(flips=flip, turns=turns))
    expected = image[0].numpy()[:, ::-1] if flip else image[0].numpy()
    assert np.array_equal(found[0].numpy(), np.rot90(expected, turns))


def test_images_of_a_batch_get_each_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.cat([tissue(seed=seed) for seed in range(20)])
    draws = draw(1, 2, range(20), 0)
    alone = [augment(images[i : i + 1], draws[[i]]) for i in range(20)]
    assert torch.equal(augment(images, draws), torch.cat(alone))
    monkeypatch.setattr("xmag.training.augmentation._PART_PX", 3 * 64**2)  # in parts
    assert torch.equal(augment(images, draws), torch.cat(alone))


@pytest.mark.parametrize("factor", [0.95, 1.05])
@pytest.mark.parametrize("kind", ["Brightness", "Contrast", "Color"])
def test_brightness_contrast_and_saturation_are_pillows(kind: str, factor: float) -> None:
    image = colours_of_tissue()
    name = {"Color": "saturation"}.get(kind, kind.lower())
    found = augment(image, draws_of(**{name: factor}))
    expected = getattr(ImageEnhance, kind)(Image.fromarray(image[0].numpy())).enhance(factor)
    # Pillow rounds greys and cuts results off, where we round once.
    assert largest_difference(found, np.asarray(expected)[None]) <= 1
    assert largest_difference(found, image) > 2


@pytest.mark.parametrize("turn", [-0.05, 0.05])
def test_hue_turns_the_colour_circle_and_keeps_mean_and_chroma(turn: float) -> None:
    """In the polar coordinates of Hanbury & Serra (2003): intensity, hue angle, chroma."""
    image = colours_of_tissue()
    draws = draws_of(hue=turn)
    matrix, pivot = draws.colours()
    assert not pivot.any()
    before = image.double().reshape(-1, 3)
    after = before @ matrix[0].double().T

    def polar(rgb: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r, g, b = rgb.unbind(1)
        alpha, beta = r - (g + b) / 2, (g - b) * math.sqrt(3) / 2
        return rgb.mean(1), torch.atan2(beta, alpha), torch.hypot(alpha, beta)

    (mean, angle, chroma), (new_mean, new_angle, new_chroma) = polar(before), polar(after)
    torch.testing.assert_close(new_mean, mean, atol=1e-3, rtol=0)
    torch.testing.assert_close(new_chroma, chroma, atol=1e-3, rtol=0)
    turned = torch.remainder(new_angle - angle - math.tau * turn + math.pi, math.tau) - math.pi
    assert float((turned * chroma).abs().max()) < 1e-2
    assert largest_difference(augment(image, draws).reshape(-1, 3), after) <= 0.5 + 1e-3


@pytest.mark.parametrize("turn", [-0.05, 0.05])
def test_hue_is_close_to_a_turn_in_hsv(turn: float) -> None:
    """What torchvision and albumentations do, which is not linear."""
    image = colours_of_tissue()[:, :16, :16]
    found = augment(image, draws_of(hue=turn)).reshape(-1, 3)
    turned, differences = [], []
    for rgb, ours in zip(
        (image.reshape(-1, 3) / 255).tolist(), (found / 255).tolist(), strict=True
    ):
        h, s, v = colorsys.rgb_to_hsv(*rgb)
        moved = (colorsys.rgb_to_hsv(*ours)[0] - h + 0.5) % 1 - 0.5
        turned.append(moved)
        differences.append(np.subtract(colorsys.hsv_to_rgb((h + turn) % 1, s, v), ours) * 255)
    assert np.mean(turned) == pytest.approx(turn, abs=0.005)
    assert np.abs(np.array(turned) - turn).max() < 0.02
    assert np.abs(differences).max() < 12


def test_all_changes_together_are_one_after_the_other() -> None:
    """Written out px by px in float64, in the order of the documentation."""
    image, factors = colours_of_tissue(), (1.04, 0.96, 1.05)
    found = augment(image, draws_of(**dict(zip(NAMES, (*factors, -0.03), strict=True))))
    x = image[0].numpy().astype(np.float64).reshape(-1, 3)
    luma = np.array([0.299, 0.587, 0.114])
    x = x * factors[0]
    x = factors[1] * x + (1 - factors[1]) * (x @ luma).mean()
    x = factors[2] * x + (1 - factors[2]) * (x @ luma)[:, None]
    axis, angle = np.ones(3) / math.sqrt(3), -0.03 * math.tau
    along = (x @ axis)[:, None] * axis
    x = along + math.cos(angle) * (x - along) + math.sin(angle) * np.cross(axis, x)
    assert largest_difference(found, x.reshape(1, 64, 64, 3)) <= 0.5 + 1e-3


def test_what_leaves_the_range_is_clipped() -> None:
    image = torch.tensor([0, 255], dtype=torch.uint8).repeat(1, 8, 4)[..., None].repeat(1, 1, 1, 3)
    found = augment(image, draws_of(brightness=1.05, contrast=1.05))
    assert set(found.flatten().tolist()) == {0, 255}


@pytest.mark.parametrize("n", [1, 4, 16])
def test_tokens_are_mapped_as_the_pixels_that_they_stand_for(n: int) -> None:
    generator = torch.Generator().manual_seed(0)
    grid = torch.randint(0, 256, (8, n, n, 3), generator=generator, dtype=torch.uint8)
    flips, turns = (list(column) for column in zip(*POSITIONS, strict=True))
    draws = draws_of(8, flips=flips, turns=turns)
    pixels = grid.repeat_interleave(4, 1).repeat_interleave(4, 2)
    mapped = map_tokens(grid, draws)
    assert torch.equal(augment(pixels, draws)[:, ::4, ::4], mapped)
    assert map_tokens(grid[..., :1], draws).shape == (8, n, n, 1)


def test_float_images_are_the_same_before_rounding() -> None:
    images = torch.cat([tissue(seed=seed) for seed in range(6)])
    draws = draw(1, 2, range(6), 0)
    exact = augment(images, draws, dtype=torch.float32)
    assert exact.dtype == torch.float32
    assert torch.equal(exact.round().to(torch.uint8), augment(images, draws))
    assert float((exact - exact.round()).abs().max()) > 0.4
    assert torch.equal(
        augment(images, draw(0, 0, range(6), 0, augmentation=NONE), dtype=torch.float32),
        images.float(),
    )


def test_values_stay_in_the_range_of_a_pixel() -> None:
    strong = Augmentation(brightness=0.9, contrast=0.9, saturation=0.9, hue=0.5)
    images = torch.from_numpy(random_tiles(20, size_px=28))
    changed = augment(images, draw(0, 0, range(20), 0, augmentation=strong), dtype=torch.float32)
    assert changed.min() == 0
    assert changed.max() == 255


def test_a_third_of_a_turn_of_hue_swaps_the_channels() -> None:
    """About the grey axis red becomes green, green blue and blue red; colorsys agrees."""
    red = torch.zeros(1, 14, 14, 3, dtype=torch.uint8)
    red[..., 0] = 200
    pixel = augment(red, draws_of(hue=1 / 3))[0, 0, 0] / 255
    assert colorsys.rgb_to_hsv(*pixel.tolist())[0] == pytest.approx(1 / 3, abs=0.02)
    assert pixel[1] * 255 == pytest.approx(200, abs=1)


def test_drawing_leaves_the_generators_of_the_program_alone() -> None:
    before = torch.get_rng_state()
    augment(tissue(), draw(0, 0, [0], 0))
    assert torch.equal(torch.get_rng_state(), before)


def test_gradients_pass_through_the_map() -> None:
    grid = torch.randn(8, 4, 4, 2, generator=torch.Generator().manual_seed(0)).double()
    grid.requires_grad_()
    draws = draw(0, 0, range(8), 0)
    assert torch.autograd.gradcheck(lambda g: map_tokens(g, draws), (grid,))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_images_to_a_grey_level() -> None:
    images = torch.cat([tissue(256, seed=seed) for seed in range(16)])
    draws = draw(3, 1, range(16), 0)
    on_cpu, on_gpu = augment(images, draws), augment(images.cuda(), draws).cpu()
    difference = (on_cpu.int() - on_gpu.int()).abs()
    assert int(difference.max()) <= 1
    assert float((difference > 0).float().mean()) < 1e-4
    grid = torch.randn(16, 4, 4, 8)
    assert torch.equal(map_tokens(grid.cuda(), draws).cpu(), map_tokens(grid, draws))


def test_settings_come_back_from_json_and_impossible_ones_are_refused() -> None:
    strong = Augmentation(turns=False, hue=0.1)
    assert Augmentation.from_dict(strong.to_dict()) == strong
    assert Augmentation.from_dict({}) == Augmentation()
    with pytest.raises(InputError, match=r"Augmentation\.blur is no known key"):
        Augmentation.from_dict({"blur": 1})
    with pytest.raises(InputError, match=r"hue is 0\.6"):
        Augmentation(hue=0.6)
    for name in ("jitter", "brightness", "contrast", "saturation", "hue"):
        for value in (-0.1, 1.1):
            with pytest.raises(InputError, match=rf"Augmentation\.{name} is {value}"):
                Augmentation(**{name: value})
    with pytest.raises(InputError, match="brightness is nan"):
        Augmentation(brightness=math.nan)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="from 0 on"):
        draw(0, 0, [3, -1], 0)
    with pytest.raises(InputError, match="draws for 2 images, and 1"):
        augment(tissue(), draw(0, 0, [1, 2], 0))
    with pytest.raises(InputError, match="draws for 2 images, and 1"):
        map_tokens(torch.zeros(1, 4, 4, 8), draw(0, 0, [1, 2], 0))
    with pytest.raises(InputError, match=r"expected \(B, n, n, D\)"):
        map_tokens(torch.zeros(1, 16, 8), draw(0, 0, [1], 0))
    none = torch.empty((0, 64, 64, 3), dtype=torch.uint8)
    assert augment(none, draw(0, 0, [], 0)).shape == none.shape


STAINED = Augmentation(
    brightness=0, contrast=0, saturation=0, hue=0, flips=False, stain=0.25, density=0.15
)


def test_stain_and_density_are_factors_of_the_optical_density() -> None:
    """Beer and Lambert: light falls by a power of ten of the amount of stain."""
    image = colours_of_tissue()
    draws = draw(3, 0, range(5), 0, augmentation=STAINED)
    found = augment(image.expand(5, -1, -1, -1), draws).numpy() / 255
    density = -np.log10(image.numpy() / 255)
    for number, gains in enumerate(draws.gains.tolist()):
        light = 10 ** -(density[0] * np.array(gains))
        assert np.abs(found[number] - light).max() <= 0.5 / 255 + 1e-6
    white = torch.full((5, 8, 8, 3), 255, dtype=torch.uint8)
    assert torch.equal(augment(white, draws), white)
    assert not augment(0 * white, draws).any()


def test_gains_are_drawn_evenly_as_factors_around_one() -> None:
    gains = draw(0, 0, range(4000), 0, augmentation=replace(STAINED, density=0.0)).gains
    assert float(gains.min()) >= 1 / 1.25
    assert float(gains.max()) <= 1.25
    uniform = torch.linspace(-1, 1, 4000).double()
    powers = (gains.double().log() / math.log(1.25)).sort(0).values
    distance = (powers - uniform[:, None]).abs().max(0).values / 2
    assert float(distance.max()) < 1.95 / math.sqrt(4000)  # Kolmogorov-Smirnov, p = 0.001
    assert float((torch.corrcoef(gains.T) - torch.eye(3)).abs().max()) < 3.9 / math.sqrt(4000)
    common = draw(0, 0, range(400), 0, augmentation=replace(STAINED, stain=0.0)).gains
    assert torch.equal(common[:, 0], common[:, 2])
    assert float(common.max()) <= 1.15
    some = draw(0, 0, range(400), 0, augmentation=replace(STAINED, jitter=0.5)).gains
    assert 140 < int((some == 1).all(1).sum()) < 260


def test_stains_leave_the_other_draws_as_they_are() -> None:
    plain, stained = Augmentation(), Augmentation(stain=0.3, density=0.1)
    one, other = (draw(1, 2, range(30), 0, augmentation=each) for each in (plain, stained))
    assert one.gains is None
    for name in ("flips", "turns", *NAMES):
        assert torch.equal(getattr(one, name), getattr(other, name))
    assert torch.equal(other[[4, 2]].gains, other.gains[[4, 2]])
    images = torch.cat([tissue(seed=seed) for seed in range(30)])
    alone = [augment(images[i : i + 1], other[[i]]) for i in range(30)]
    assert torch.equal(augment(images, other), torch.cat(alone))
    with pytest.raises(InputError, match="stain"):
        Augmentation(stain=1.5)
