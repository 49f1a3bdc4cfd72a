"""The low view against Pillow, in every bit, and the teacher's tiles against slices."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image
from support.slides import texture

from xmag.distill import views
from xmag.distill.views import LOW_PX, REGION_PX, low_view, teacher_tiles
from xmag.errors import InputError


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
