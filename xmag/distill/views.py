"""The high and low view of a region, and the same augmentation for both.

A region is `REGION_PX` wide at 0.5 µm/px, the high view. The low view is its Lanczos resize to
`LOW_PX`: Pillow's, to the bit, on any device.

A draw depends on (seed, epoch, region, view) and nothing else: not on the rank, the batch, or what
was drawn before. The same draw fits both views of a region, and the grids of their tokens.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from xmag import records
from xmag.devices import Float32
from xmag.errors import InputError

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


def low_view(high: Tensor) -> Tensor:
    """Low views (2.0 µm/px) of regions at 0.5 µm/px: uint8 (B, S / 4, S / 4, 3).

    `high` is uint8 (B, S, S, 3) on any device, S a multiple of 4 and `REGION_PX` in training. The
    result is on the same device, and equals ``Image.resize(..., Image.Resampling.LANCZOS)`` in
    every bit. Raises InputError for another shape or dtype.
    """
    size = checked_side(high)
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
    tile = checked_side(high) // SIDE
    grid = high.reshape(-1, SIDE, tile, SIDE, tile, 3)
    return grid.transpose(2, 3).flatten(0, 2)


def checked_side(images: Tensor) -> int:
    """The side S of square uint8 images (B, S, S, 3); InputError for other shapes or dtypes."""
    shape = tuple(images.shape)
    fits = len(shape) == 4 and shape[1] == shape[2] and shape[3] == 3 and shape[1] % SIDE == 0
    if not fits or images.dtype != torch.uint8 or not shape[1]:
        raise InputError(
            f"images are {images.dtype} {shape}; expected uint8 (B, S, S, 3) with a side that is a"
            f" multiple of {SIDE}"
        )
    return shape[1]


def _lanczos(high: Tensor) -> Tensor:
    """Pillow's Lanczos resize as matrix products: rows, rounded to uint8, then columns."""
    weights = _weights(high.shape[1], high.device)
    rows = _weighted(high.permute(0, 1, 3, 2), weights)  # (B, y, 3, x / 4)
    return _weighted(rows.permute(0, 2, 3, 1), weights).permute(0, 3, 2, 1)  # from (B, 3, x, y)


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


def _integer_weights(size: int) -> "np.ndarray[tuple[int, int], np.dtype[np.int64]]":
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


_LUMA = (0.299, 0.587, 0.114)
"""Luma weights of R, G and B (ITU-R BT.601), as in Pillow and torchvision."""
_WORDS = 6
"""Random 32-bit words for a region and view: geometry, and one for each colour change."""
_PART_PX = 1 << 24
"""Px of a chunk in recolouring: enough to fill a GPU, at 0.3 GB."""
_VERSION = 1
"""Version of the augmentation; raised whenever the same draws give other images."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Augmentation:
    """Augmentation strengths; the defaults are those of arXiv 2509.23097.

    `brightness`, `contrast` and `saturation` are the largest relative changes (0.05: factors from
    0.95 to 1.05), `hue` the largest turn of the colour circle in whole turns. `flips` and `turns`
    switch mirror images and quarter turns on: with both, all eight positions are equally likely.
    """

    flips: bool = True
    turns: bool = True
    brightness: float = 0.05
    contrast: float = 0.05
    saturation: float = 0.05
    hue: float = 0.05

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation", "hue"):
            most = 0.5 if name == "hue" else 1.0
            fits = 0 <= getattr(self, name) <= most
            records.require(self, name, fits, f"a number from 0 to {most:g}")

    def to_dict(self) -> dict[str, Any]:
        """The fields and the augmentation's version as plain JSON values."""
        return {**asdict(self), "version": _VERSION}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Augmentation":
        """Augmentation from its fields; InputError for an unknown one."""
        if (version := values.get("version", _VERSION)) != _VERSION:
            raise InputError(
                f"an augmentation has version {version!r}, and this xmag draws version {_VERSION};"
                " use the xmag that made it"
            )
        drawn = {key: value for key, value in values.items() if key != "version"}
        return records.from_dict(cls, drawn, "augmentation")


PAPER = Augmentation()
NONE = Augmentation(flips=False, turns=False, brightness=0, contrast=0, saturation=0, hue=0)
"""No augmentation."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Draws:
    """Augmentation parameters drawn for B images: one row for each, on the CPU.

    An image is mirrored left to right where `flips` is 1, then turned counter-clockwise by `turns`
    quarters; both int64 (B,). `brightness`, `contrast` and `saturation` are factors, `hue` is in
    turns; float32 (B,).
    """

    flips: Tensor
    turns: Tensor
    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    hue: Tensor

    def __len__(self) -> int:
        """The number B of images."""
        return len(self.flips)

    def __getitem__(self, rows: slice | Sequence[int] | Tensor) -> "Draws":
        """The draws of some rows (images)."""
        if not isinstance(rows, slice):
            rows = torch.as_tensor(rows)
        return Draws(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def colours(self) -> tuple[Tensor, Tensor]:
        """Colour transform of each image: `matrix` and `pivot`, both float32 (B, 3, 3).

        The colour x (RGB) of an image whose mean colour is m becomes ``matrix @ x + pivot @ m``.
        In this order: brightness scales, contrast draws away from the image's mean grey, saturation
        away from the grey of the px (all three as in PIL.ImageEnhance), and hue turns the colour
        about the grey axis (Rodrigues' formula). All of it is linear, unlike a turn in HSV, and so
        the same before and after a resize.
        """
        with Float32():
            luma = torch.tensor(_LUMA).expand(3, 3)  # what makes RGB grey
            eye, grey = torch.eye(3), torch.full((3, 3), 1 / 3)
            cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
        brightness, contrast, saturation, angle = (
            value.view(-1, 1, 1)
            for value in (self.brightness, self.contrast, self.saturation, self.hue * math.tau)
        )
        hue = grey + angle.cos() * (eye - grey) + angle.sin() * cross
        after = hue @ (saturation * eye + (1 - saturation) * luma)
        return after * contrast * brightness, after @ ((1 - contrast) * brightness * luma)


def draw(
    seed: int,
    epoch: int | Sequence[int] | NDArray[np.int64],
    regions: Sequence[int] | NDArray[np.int64],
    view: int,
    *,
    augmentation: Augmentation = PAPER,
) -> Draws:
    """Draw augmentations for `regions` (their numbers in the manifest) in a view of an epoch.

    `epoch` is one number for all, or one for each. A row depends on (seed, epoch, region, view)
    alone; the random words are those of ``numpy.random.SeedSequence((seed, epoch, region, view))``,
    which NumPy keeps stable. Raises InputError for a negative number.
    """
    numbers = np.asarray(regions, np.int64).reshape(-1)
    epochs = np.broadcast_to(np.asarray(epoch, np.int64), numbers.shape)
    if min(seed, view, *epochs.tolist(), *numbers.tolist(), 0) < 0:
        raise InputError(
            f"seed {seed}, epoch {epoch}, view {view} and regions are numbers from 0 on; expected"
            " none below"
        )
    words = np.empty((len(numbers), _WORDS), np.uint32)
    for row, (turn, region) in enumerate(zip(epochs.tolist(), numbers.tolist(), strict=True)):
        words[row] = np.random.SeedSequence((seed, turn, region, view)).generate_state(_WORDS)
    spread = torch.from_numpy(words[:, 2:].astype(np.float64) / 2**31 - 1)  # in [-1, 1)
    jitter = {
        name: (spread[:, i] * getattr(augmentation, name) + (name != "hue")).float()
        for i, name in enumerate(("brightness", "contrast", "saturation", "hue"))
    }
    flips, turns = (torch.from_numpy(words[:, i].astype(np.int64)) for i in (0, 1))
    # The upper bits, though SeedSequence would allow any.
    return Draws(
        flips=(flips >> 31) * augmentation.flips, turns=(turns >> 30) * augmentation.turns, **jitter
    )


def augment(images: Tensor, draws: Draws) -> Tensor:
    """Augment images by `draws`: uint8 (B, S, S, 3), on the same device.

    `images` is uint8 (B, S, S, 3). Colours are computed in float32, clipped and rounded once.
    Raises InputError where shapes or numbers do not fit.
    """
    side = checked_side(images)
    _check_rows(images, draws)
    result = torch.empty_like(images, memory_format=torch.contiguous_format)
    matrix, pivot = draws.colours()
    recoloured = bool(pivot.any()) or not torch.equal(
        matrix, torch.eye(3, dtype=matrix.dtype).expand_as(matrix)
    )
    colours = [table.to(images.device, non_blocking=True) for table in (matrix, pivot)]
    position = draws.flips * 4 + draws.turns
    most = max(1, _PART_PX // side**2)
    for first in range(0, len(images), most):
        part = slice(first, first + most)
        changed = images[part]
        if recoloured:
            changed = _recoloured(changed, *(table[part] for table in colours))
        for number in set(position[part].tolist()):
            flip, turns = divmod(number, 4)
            these = torch.nonzero(position[part] == number)[:, 0].to(images.device)
            turned = changed[these].flip(2) if flip else changed[these]
            result[part][these] = turned.rot90(turns, (1, 2))
    return result


def map_tokens(grid: Tensor, draws: Draws) -> Tensor:
    """Flip and turn a grid of tokens (B, n, n, D) as `augment` does the images.

    So cached features of plain images (n = 4, row by row) match the augmented ones. Any dtype and
    device; gradients pass. Raises InputError where the shapes do not fit.
    """
    if grid.ndim != 4 or grid.shape[1] != grid.shape[2]:
        raise InputError(
            f"a grid of tokens has shape {tuple(grid.shape)}; expected (B, n, n, D), such as"
            " tokens.unflatten(1, (n, n))"
        )
    _check_rows(grid, draws)
    table = _sources(grid.shape[1])  # (8, n * n)
    index = table[draws.flips * 4 + draws.turns].to(grid.device)
    flat = grid.flatten(1, 2)
    return flat.gather(1, index[..., None].expand_as(flat)).view(grid.shape)


def _recoloured(images: Tensor, matrix: Tensor, pivot: Tensor) -> Tensor:
    """Images after the colour transform of `Draws.colours`."""
    # Sums of integers are exact, so that a mean is the same wherever it is computed.
    mean = images.sum((1, 2), dtype=torch.int64).float() / images.shape[1] ** 2
    shift = (pivot * mean[:, None]).sum(-1)  # (B, 3)
    planes = images.float().unbind(-1)
    result = torch.empty_like(images)
    # Not a matrix product, which TensorFloat-32 or autocast would round.
    for channel, into in enumerate(result.unbind(-1)):
        total = shift[:, channel].view(-1, 1, 1)
        for plane, weight in zip(planes, matrix[:, channel].unbind(-1), strict=True):
            total = torch.addcmul(total, plane, weight.view(-1, 1, 1))
        into.copy_(total.clamp_(0, 255).round_())
    return result


def _check_rows(images: Tensor, draws: Draws) -> None:
    if len(images) != len(draws):
        raise InputError(
            f"there are draws for {len(draws)} images, and {len(images)} images; expected one for"
            " each: draw(seed, epoch, regions, view)"
        )


@lru_cache(maxsize=8)
def _sources(n: int) -> Tensor:
    """Source cell of each cell of an n x n grid, for the 8 flips and turns: int64 (8, n * n)."""
    cells = torch.arange(n * n).view(n, n)
    return torch.stack(
        [side.rot90(k).flatten() for side in (cells, cells.flip(1)) for k in range(4)]
    )
