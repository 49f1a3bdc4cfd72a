"""Low views against Pillow, in every bit, teacher tiles against slices, and both augmented."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from support.slides import texture
from torch import Tensor

from xmag.distill import views
from xmag.distill.cache import CacheSettings
from xmag.distill.views import LOW_PX, REGION_PX, low_view, quarters, teacher_tiles
from xmag.errors import InputError
from xmag.slide.pixels import resample
from xmag.training.augmentation import PAPER, Draws, augment, draw, map_tokens

POSITIONS = [(flip, turns) for flip in (0, 1) for turns in range(4)]


def extremes(side: int) -> np.ndarray:
    """Images in which Lanczos overshoots, rounds and clips as often as it can."""
    rng = np.random.default_rng(side)
    noise = rng.integers(0, 256, (side, side, 3), np.uint8)
    hard = np.where(rng.random((side, side, 3)) < 0.5, 0, 255).astype(np.uint8)
    blocks = hard[: side // 4, : side // 4].repeat(4, 0).repeat(4, 1)
    return np.stack([noise, hard, blocks, np.full_like(noise, 255), texture(side, side)])


def pillow(images: np.ndarray) -> np.ndarray:
    size = (images.shape[2] // 4, images.shape[1] // 4)
    resized = [Image.fromarray(image).resize(size, Image.Resampling.LANCZOS) for image in images]
    return np.stack([np.asarray(image) for image in resized])


@pytest.mark.parametrize("side", [REGION_PX, 64, 20, 4])
def test_the_low_view_is_pillows_lanczos_in_every_bit(side: int) -> None:
    images = extremes(side)
    found = low_view(torch.from_numpy(images))
    assert found.dtype == torch.uint8
    assert np.array_equal(found.numpy(), pillow(images))
    assert LOW_PX * 4 == REGION_PX == 896


@pytest.mark.parametrize("side", [REGION_PX, 64, 20, 4])
def test_the_arithmetic_of_a_gpu_is_pillows_lanczos_in_every_bit(side: int) -> None:
    images = extremes(side)[:, :, :, [2, 0, 1]]
    found = views._lanczos(torch.from_numpy(images))
    assert np.array_equal(found.numpy(), pillow(images))


@pytest.mark.parametrize("side", [REGION_PX, 64, 20, 4])
def test_the_area_view_is_what_a_tile_of_two_micrometres_is_read_as(side: int) -> None:
    """Pillow's reduce, and the mean in whole numbers, halves rounded up."""
    images = extremes(side)
    found = low_view(torch.from_numpy(images), "area").numpy()
    reduced = np.stack([np.asarray(Image.fromarray(image).reduce(4)) for image in images])
    read = resample(images[0], (0, 0, side, side), (side // 4, side // 4), "area")
    sums = images.astype(int).reshape(5, side // 4, 4, side // 4, 4, 3).sum((2, 4))
    assert found.dtype == np.uint8
    assert np.array_equal(found, (sums + 8) // 16)
    assert np.array_equal(found, reduced)
    assert np.array_equal(found[0], read)


def test_parts_of_weights_fit_tensorfloat_and_their_sums_float32() -> None:
    weights = views._weights(REGION_PX, torch.device("cpu")).double()
    assert float(weights.abs().max()) <= 2**11  # 11 significant bits
    assert float(weights.abs().sum(0).max()) * 255 < 2**24
    upper, lower = weights.chunk(2, dim=1)
    whole = upper * 2**views._LOW_BITS + lower
    assert float((whole.sum(0) / 2**22 - 1).abs().max()) < 1e-5


@pytest.fixture
def _tensorfloat() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.usefixtures("_tensorfloat")
def test_the_low_view_is_pillows_on_cuda_under_autocast_and_tensorfloat() -> None:
    images = np.concatenate([extremes(REGION_PX)] * 4)  # more than are resized at once
    with torch.autocast("cuda", torch.bfloat16):
        found = low_view(torch.from_numpy(images).cuda())
    assert np.array_equal(found.cpu().numpy(), pillow(images))


def test_teacher_tiles_are_the_slices_row_by_row() -> None:
    images = extremes(64)
    tiles = teacher_tiles(torch.from_numpy(images)).numpy()
    assert tiles.shape == (5 * 16, 16, 16, 3)
    for number, tile in enumerate(tiles):
        image, cell = divmod(number, 16)
        y, x = 16 * (cell // 4), 16 * (cell % 4)
        assert np.array_equal(tile, images[image, y : y + 16, x : x + 16])


@pytest.mark.parametrize("view", [low_view, teacher_tiles])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 8, 12, 3), torch.uint8),
        ((1, 8, 8, 4), torch.uint8),
        ((8, 8, 3), torch.uint8),
        ((1, 6, 6, 3), torch.uint8),
        ((1, 0, 0, 3), torch.uint8),
        ((1, 8, 8, 3), torch.float32),
    ],
)
def test_other_shapes_and_types_are_refused(view, shape, dtype) -> None:
    with pytest.raises(InputError, match=r"expected uint8 \(B, S, S, 3\)"):
        view(torch.zeros(shape, dtype=dtype))


def test_no_regions_give_no_views() -> None:
    none = torch.empty((0, 64, 64, 3), dtype=torch.uint8)
    assert low_view(none).shape == (0, 16, 16, 3)
    assert teacher_tiles(none).shape == (0, 16, 16, 3)


def position(flip: int, turns: int) -> Draws:
    """A flip and turn of one image, without a change of colour."""
    one, none = torch.ones(1), torch.zeros(1)
    return Draws(
        flips=torch.tensor([flip]), turns=torch.tensor([turns]),
        brightness=one, contrast=one, saturation=one, hue=none,
    )  # fmt: skip


def numbered_tiles(side: int = 64) -> Tensor:
    """A region whose 16 tiles differ in colour, with a bright corner in each to show its turn."""
    tile = side // 4
    image = np.zeros((side, side, 3), np.uint8)
    for cell in range(16):
        y, x = tile * (cell // 4), tile * (cell % 4)
        image[y : y + tile, x : x + tile] = (10 + 12 * cell, 200 - 11 * cell, 60 + 5 * cell)
    return torch.from_numpy(image)[None]


@pytest.mark.parametrize(("flip", "turns"), POSITIONS)
def test_blocks_of_the_low_view_line_up_with_the_teachers_tiles(flip: int, turns: int) -> None:
    """Block (i, j) of 4 x 4 tokens of the low view shows what teacher tile (i, j) shows."""
    draws = position(flip, turns)
    region = numbered_tiles(896)
    high = augment(region, draws)
    tiles = teacher_tiles(high).float().mean((1, 2))  # (16, 3)

    student = augment(low_view(region), draws).float()  # what the student gets
    tokens = student.unflatten(2, (16, 14)).unflatten(1, (16, 14)).mean((2, 4))  # (1, 16, 16, 3)
    blocks = tokens.unflatten(2, (4, 4)).unflatten(1, (4, 4)).mean((2, 4)).view(16, 3)
    assert float((blocks - tiles).abs().max()) < 2  # Lanczos rings at the edges of tiles
    wrong = (blocks[:, None] - tiles[None]).abs().amax(-1) + 99 * torch.eye(16)
    assert float(wrong.min()) > 8

    # Features of the plain region, mapped, are those of the augmented one.
    plain = teacher_tiles(region).float().mean((1, 2)).view(1, 4, 4, 3)
    assert torch.equal(map_tokens(plain, draws).view(16, 3), tiles)


@pytest.mark.parametrize(("flip", "turns"), POSITIONS)
def test_positions_and_the_resize_can_change_places(flip: int, turns: int) -> None:
    high = torch.from_numpy(texture(896, 896))[None]
    draws = position(flip, turns)
    first, then = low_view(augment(high, draws)), augment(low_view(high), draws)
    # A quarter turn swaps rows and columns, and Pillow rounds in between.
    assert int((first.int() - then.int()).abs().max()) <= (1 if turns % 2 else 0)
    assert float((first != then).float().mean()) < 0.2


def test_colours_and_the_resize_can_change_places() -> None:
    high = torch.from_numpy(texture(896, 896))[None].expand(4, -1, -1, -1)
    draws = draw(0, 0, range(4), 0, augmentation=replace(PAPER, jitter=1.0))
    first, then = low_view(augment(high, draws)), augment(low_view(high), draws)
    difference = (first.float() - then.float()).abs()
    assert float(difference.mean()) < 0.5
    assert float((difference > 2).float().mean()) < 0.01  # what was clipped before the resize


def test_quarters_are_slices_row_by_row() -> None:
    images = torch.from_numpy(texture(64, 64))[None].expand(4, -1, -1, -1)
    found = quarters(images, torch.tensor([3, 0, 2, 1]))
    image = images[0]
    expected = image[32:, 32:], image[:32, :32], image[32:, :32], image[:32, 32:]
    assert torch.equal(found, torch.stack(expected))


def test_another_kernel_is_refused() -> None:
    with pytest.raises(InputError, match="resample is 'box'; expected one of"):
        low_view(torch.zeros(1, 8, 8, 3, dtype=torch.uint8), "box")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="resample is 'box'"):
        CacheSettings(low=True, resample="box")  # type: ignore[arg-type]
