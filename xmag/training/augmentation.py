"""Augmentation of images: flips, quarter turns and colour jitter, drawn by numbers.

A draw depends on (seed, epoch, item, view) and nothing else: not on the rank, the batch, or what
was drawn before. The same draw fits an image, another scale of it, and the grids of their tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xmag import records
from xmag.devices import Float32
from xmag.errors import InputError

_LUMA = (0.299, 0.587, 0.114)
"""Luma weights of R, G and B (ITU-R BT.601), as in Pillow and torchvision."""
_COLOURS = ("brightness", "contrast", "saturation", "hue")
_WORDS = 11
"""Random 32-bit words of an item and view: flip, turns, each colour change, whether any is made,
and the optical density: of R, G and B, and of all three."""
_PART_PX = 1 << 24
"""Px of a chunk in recolouring: enough to fill a GPU, at 0.3 GB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Augmentation(records.Record):
    """Augmentation strengths; by default flips, and a strong jitter of every image.

    With `flips` and `turns` all eight positions of a square are equally likely; with flips alone
    an image is mirrored left to right, and upside down, each with probability 1/2. A share `jitter`
    of the images changes in colour: `brightness`, `contrast` and `saturation` are the largest
    relative changes (0.05: factors from 0.95 to 1.05), `hue` the largest turn of the colour circle
    in whole turns. `stain` and `density` change the optical density, -log10 of the transmitted
    light, as more or less of a stain does: each channel's by its own factor, and all channels' by
    one (0.25: factors from 1 / 1.25 to 1.25); white stays white. The default is the one of those
    tried that trains a student best: predictions of an unseen patient's teacher features by 0.025
    of cosine nearer than with `PAPER`, which is what arXiv 2509.23097 trained with, and by 0.04
    worse with quarter turns (benchmarks/augmentation.py).
    """

    flips: bool = True
    turns: bool = False
    jitter: float = 1.0
    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2
    hue: float = 0.05
    stain: float = 0.0
    density: float = 0.0

    def __post_init__(self) -> None:
        for name in ("jitter", *_COLOURS, "stain", "density"):
            most = 0.5 if name == "hue" else 1.0
            fits = 0 <= getattr(self, name) <= most
            records.require(self, name, fits, f"a number from 0 to {most:g}")


PAPER = Augmentation(jitter=0.5, brightness=0.05, contrast=0.05, saturation=0.05)
"""Augmentation of the code of arXiv 2509.23097: each flip, and all jitter, with probability 1/2."""
NONE = Augmentation(flips=False, turns=False, jitter=0, **dict.fromkeys(_COLOURS, 0.0))
"""No augmentation."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Draws:
    """Augmentation parameters drawn for B images: one row for each, on the CPU.

    An image is mirrored left to right where `flips` is 1, then turned counter-clockwise by `turns`
    quarters; both int64 (B,). `brightness`, `contrast` and `saturation` are factors, `hue` is in
    turns; float32 (B,). `gains` are factors of the optical density of R, G and B, float32 (B, 3);
    None changes none.
    """

    flips: Tensor
    turns: Tensor
    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    hue: Tensor
    gains: Tensor | None = None

    def __len__(self) -> int:
        """The number B of images."""
        return len(self.flips)

    def __getitem__(self, rows: slice | Sequence[int] | Tensor) -> "Draws":
        """The draws of some rows (images)."""
        if not isinstance(rows, slice):
            rows = torch.as_tensor(rows)
        parts: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        taken: dict[str, Any] = {n: None if p is None else p[rows] for n, p in parts.items()}
        return Draws(**taken)

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
    items: Sequence[int] | NDArray[np.int64],
    view: int,
    *,
    augmentation: Augmentation | None = None,
) -> Draws:
    """Draw augmentations for `items` (numbers of regions or tiles) in a view of an epoch.

    `epoch` is one number for all, or one for each. A row depends on (seed, epoch, item, view)
    alone; the random words are those of ``numpy.random.SeedSequence((seed, epoch, item, view))``,
    which NumPy keeps stable. Raises InputError for a negative number.
    """
    augmentation = augmentation or Augmentation()
    numbers = np.asarray(items, np.int64).reshape(-1)
    epochs = np.broadcast_to(np.asarray(epoch, np.int64), numbers.shape)
    if min(seed, view, *epochs.tolist(), *numbers.tolist(), 0) < 0:
        raise InputError(
            f"seed {seed}, epoch {epoch}, view {view} and the items; expected numbers from 0 on"
        )
    words = np.empty((len(numbers), _WORDS), np.uint32)
    for row, (turn, item) in enumerate(zip(epochs.tolist(), numbers.tolist(), strict=True)):
        words[row] = np.random.SeedSequence((seed, turn, item, view)).generate_state(_WORDS)
    # The upper bits, though SeedSequence would allow any.
    flips, turns = words[:, 0].astype(np.int64) >> 31, words[:, 1].astype(np.int64) >> 30
    if not augmentation.turns:
        # Upside down is half a turn of what is mirrored left to right.
        upside_down = (turns >> 1) * augmentation.flips
        flips, turns = flips ^ upside_down, 2 * upside_down
    spread = words[:, 2:6].astype(np.float64) / 2**31 - 1  # in [-1, 1)
    spread[words[:, 6] / 2**32 >= augmentation.jitter] = 0
    colours = {
        name: torch.from_numpy(spread[:, i] * getattr(augmentation, name) + (name != "hue")).float()
        for i, name in enumerate(_COLOURS)
    }
    gains = None
    if augmentation.stain or augmentation.density:
        apart = words[:, 7:].astype(np.float64) / 2**31 - 1
        apart[words[:, 6] / 2**32 >= augmentation.jitter] = 0
        own = (1 + augmentation.stain) ** apart[:, :3]
        common = (1 + augmentation.density) ** apart[:, 3:]
        gains = torch.from_numpy(own * common).float()
    return Draws(
        flips=torch.from_numpy(flips * augmentation.flips),
        turns=torch.from_numpy(turns),
        gains=gains,
        **colours,
    )


def augment(images: Tensor, draws: Draws, *, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Augment images by `draws`: (B, S, S, 3) of `dtype` from 0 to 255, on the same device.

    `images` is uint8 (B, S, S, 3). The optical density is changed first, and rounded; then colours
    are computed in float32 and clipped, and rounded once if `dtype` is uint8. Raises InputError
    where shapes or numbers do not fit.
    """
    side = checked_side(images)
    _check_rows(images, draws)
    result = torch.empty_like(images, dtype=dtype, memory_format=torch.contiguous_format)
    matrix, pivot = draws.colours()
    same = torch.eye(3, dtype=matrix.dtype).expand_as(matrix)
    recoloured = bool(pivot.any()) or not torch.equal(matrix, same)
    colours = [table.to(images.device, non_blocking=True) for table in (matrix, pivot)]
    stains = None if draws.gains is None else _stain_tables(draws.gains).to(images.device)
    position = draws.flips * 4 + draws.turns
    most = max(1, _PART_PX // side**2)
    for first in range(0, len(images), most):
        part = slice(first, first + most)
        changed = images[part]
        if stains is not None:
            changed = _stained(changed, stains[part])
        if recoloured:
            changed = _recoloured(changed, *(table[part] for table in colours), dtype=dtype)
        changed = changed.to(dtype)
        for number in set(position[part].tolist()):
            flip, turns = divmod(number, 4)
            these = torch.nonzero(position[part] == number)[:, 0]
            these = these.to(images.device, non_blocking=True)
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
    starts = torch.arange(len(grid))[:, None] * grid.shape[1] ** 2
    rows = (starts + token_sources(grid.shape[1], draws)).flatten()
    moved = grid.flatten(0, 2).index_select(0, rows.to(grid.device, non_blocking=True))
    return moved.view(grid.shape)


def checked_side(images: Tensor, multiple: int = 1) -> int:
    """The side S of square uint8 images (B, S, S, 3), a multiple of `multiple`; else InputError."""
    shape = tuple(images.shape)
    square = len(shape) == 4 and shape[1] == shape[2] and shape[3] == 3
    if not square or images.dtype != torch.uint8 or not shape[1] or shape[1] % multiple:
        side = f" with a side that is a multiple of {multiple}" if multiple > 1 else ""
        raise InputError(f"images are {images.dtype} {shape}; expected uint8 (B, S, S, 3){side}")
    return shape[1]


def _stain_tables(gains: Tensor) -> Tensor:
    """Each grey level with its optical density times `gains` (B, 3): uint8 (B, 3, 256)."""
    light = torch.arange(256, dtype=torch.float64) / 255
    return (light ** gains[..., None].double() * 255).round().byte()


def _stained(images: Tensor, tables: Tensor) -> Tensor:
    """Images with the px values looked up, on any device the same: uint8 (B, S, S, 3)."""
    rows = torch.arange(tables.shape[0] * 3, dtype=torch.int32, device=images.device) * 256
    places = images.to(torch.int32) + rows.view(-1, 1, 1, 3)
    return tables.flatten().index_select(0, places.flatten()).view(images.shape)


def _recoloured(images: Tensor, matrix: Tensor, pivot: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Images after the colour transform of `Draws.colours`."""
    # Sums of integers are exact, so that a mean is the same wherever it is computed.
    mean = images.sum((1, 2), dtype=torch.int64).float() / images.shape[1] ** 2
    shift = (pivot * mean[:, None]).sum(-1)  # (B, 3)
    planes = images.float().unbind(-1)
    result = torch.empty_like(images, dtype=dtype)
    # Not a matrix product, which TensorFloat-32 or autocast would round.
    for channel, into in enumerate(result.unbind(-1)):
        total = shift[:, channel].view(-1, 1, 1)
        for plane, weight in zip(planes, matrix[:, channel].unbind(-1), strict=True):
            total = torch.addcmul(total, plane, weight.view(-1, 1, 1))
        total = total.clamp_(0, 255)
        into.copy_(total.round_() if dtype == torch.uint8 else total)
    return result


def _check_rows(images: Tensor, draws: Draws) -> None:
    if len(images) != len(draws):
        raise InputError(
            f"there are draws for {len(draws)} images, and {len(images)} images; expected one for"
            " each: draw(seed, epoch, items, view)"
        )


def token_sources(n: int, draws: Draws) -> Tensor:
    """Source token of each token of n x n grids that `map_tokens` makes: int64 (B, n * n)."""
    return _sources(n)[draws.flips * 4 + draws.turns]


@lru_cache(maxsize=8)
def _sources(n: int) -> Tensor:
    """Source cell of each cell of an n x n grid, for the 8 flips and turns: int64 (8, n * n)."""
    cells = torch.arange(n * n).view(n, n)
    turned = [side.rot90(k).flatten() for side in (cells, cells.flip(1)) for k in range(4)]
    return torch.stack(turned)
