"""High and low view of a region: teacher tiles at 0.5 µm/px, and the student's tile at 2.0 µm/px.

A region is `REGION_PX` wide at 0.5 µm/px, the high view. The low view is its resize to `LOW_PX`:
Pillow's Lanczos or the mean of 4 x 4 px, to the bit, on any device. Both are augmented by the same
draw.
"""

from functools import lru_cache
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from xmag.errors import InputError
from xmag.geometry import Resample
from xmag.training.augmentation import checked_side

HIGH_MPP, LOW_MPP = 0.5, 2.0
SIDE = 4
"""Teacher tiles along a side of a region, and px of the high view to one of the low view."""
TILE_PX = 224
REGION_PX, LOW_PX = SIDE * TILE_PX, TILE_PX

_LOBES = 3
"""Lobes of the Lanczos kernel, on either side."""
_PRECISION = 22
"""Fractional bits of a resize weight; Pillow keeps 32 - 8 - 2, for sums of 8-bit px."""
_LOW_BITS = 11
"""Bits of the lower part of a weight. Sums of parts times px stay below 2**24, where float32 counts
without rounding, and a part fits TensorFloat-32, so that this setting changes nothing."""
_PART = 16
"""Regions of a chunk in a resize on a GPU: enough to fill it, at 0.4 GB."""


def check_kernel(kernel: str) -> None:
    """Raise InputError where low views are not made with such a kernel."""
    if kernel not in get_args(Resample):
        raise InputError(f"resample is {kernel!r}; expected one of {', '.join(get_args(Resample))}")


def low_view(high: Tensor, kernel: Resample = "lanczos") -> Tensor:
    """Low views (2.0 µm/px) of regions at 0.5 µm/px: uint8 (B, S / 4, S / 4, 3).

    `high` is uint8 (B, S, S, 3) on any device, S a multiple of 4 and `REGION_PX` in training. The
    result is on the same device, and equals ``Image.resize(..., Image.Resampling.LANCZOS)`` in
    every bit, or ``Image.reduce(4)`` with the `kernel` "area". Raises InputError for another shape,
    dtype or kernel.
    """
    size = checked_side(high, SIDE)
    check_kernel(kernel)
    if kernel == "area":
        return _area(high)
    low = high.new_empty((len(high), size // SIDE, size // SIDE, 3))
    if high.device.type == "cpu":
        for image, into in zip(high.numpy(), low, strict=True):
            shape = (size // SIDE, size // SIDE)
            resized = Image.fromarray(image).resize(shape, Image.Resampling.LANCZOS)
            into.copy_(torch.from_numpy(np.array(resized)))
        return low
    for part, into in zip(torch.split(high, _PART), torch.split(low, _PART), strict=True):
        into.copy_(_lanczos(part))
    return low


def teacher_tiles(high: Tensor) -> Tensor:
    """Cut regions into 4 x 4 teacher tiles, row by row: uint8 (B * 16, S / 4, S / 4, 3).

    `high` is uint8 (B, S, S, 3); with S = `REGION_PX` the tiles have `TILE_PX`. Raises InputError
    for another shape or dtype.
    """
    tile = checked_side(high, SIDE) // SIDE
    grid = high.reshape(-1, SIDE, tile, SIDE, tile, 3)
    return grid.transpose(2, 3).flatten(0, 2)


def quarters(grid: Tensor, corners: Tensor) -> Tensor:
    """A quarter of each square grid or image: (B, n, n, ...) -> (B, n / 2, n / 2, ...).

    `corners`, int64 (B,), numbers the quarters row by row; n is even.
    """
    half, rows = grid.shape[1] // 2, torch.arange(len(grid), device=grid.device)
    parts = grid.reshape(len(grid), 2, half, 2, half, *grid.shape[3:]).transpose(2, 3)
    below, right = (corner.to(grid.device) for corner in (corners // 2, corners % 2))
    result: Tensor = parts[rows, below, right]
    return result


def _area(high: Tensor) -> Tensor:
    """Means of 4 x 4 px, halves rounded up, as tiles are read with the kernel "area"."""
    size = high.shape[1] // SIDE
    sums = high.reshape(-1, size, SIDE, size, SIDE, 3).sum((2, 4), dtype=torch.int32)
    return ((sums + SIDE**2 // 2) // SIDE**2).to(torch.uint8)


def _lanczos(high: Tensor) -> Tensor:
    """Pillow's Lanczos resize as matrix products: rows, rounded to uint8, then columns."""
    weights = _weights(high.shape[1], high.device)
    # Contiguous, so that each is one product of two matrices, and not many small ones.
    rows = _weighted(high.permute(0, 1, 3, 2).contiguous(), weights)  # (B, y, 3, x / 4)
    columns = _weighted(rows.permute(0, 2, 3, 1).contiguous(), weights)  # (B, 3, x / 4, y / 4)
    return columns.permute(0, 3, 2, 1)


def _weighted(pixels: Tensor, weights: Tensor) -> Tensor:
    """Resize the last axis of uint8 px, in the integer arithmetic of Pillow's 8-bit resize."""
    with torch.autocast(pixels.device.type, enabled=False):
        upper, lower = (pixels.float() @ weights).to(torch.int32).chunk(2, dim=-1)
    total = (upper << _LOW_BITS) + lower + (1 << (_PRECISION - 1))
    return (total >> _PRECISION).clamp_(0, 255).to(torch.uint8)


@lru_cache(maxsize=8)
def _weights(size: int, device: torch.device) -> Tensor:
    """Upper and lower parts of the resize weights side by side: float32 (size, 2 * size / 4)."""
    weights = _integer_weights(size)
    upper = weights >> _LOW_BITS
    parts = np.concatenate([upper, weights - (upper << _LOW_BITS)])
    return torch.from_numpy(parts.T.astype(np.float32)).to(device)


def _integer_weights(size: int) -> NDArray[np.int64]:
    """Resize weights of px (columns) in resized px (rows), times 2**22: int64 (size / 4, size).

    As Pillow's Resample.c has them (precompute_coeffs, normalize_coeffs_8bpc).
    """
    weights = np.zeros((size // SIDE, size), np.int64)
    for i in range(size // SIDE):
        centre, support = (i + 0.5) * SIDE, _LOBES * SIDE
        first, end = max(int(centre - support + 0.5), 0), min(int(centre + support + 0.5), size)
        x = (np.arange(first, end) - centre + 0.5) / SIDE
        kernel = np.where(np.abs(x) < _LOBES, np.sinc(x) * np.sinc(x / _LOBES), 0.0)
        scaled = kernel / sum(kernel.tolist()) * (1 << _PRECISION)
        weights[i, first:end] = np.trunc(scaled + np.copysign(0.5, scaled))
    return weights
