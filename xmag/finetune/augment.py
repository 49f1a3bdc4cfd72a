"""Tile augmentation: random flips, quarter turns and colour jitter, replayable by seed."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from xmag import records
from xmag.devices import Float32

_AXES = 3
"""Number of mirror axes (left-right, up-down, diagonal), which give the 8 square symmetries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Augmentation:
    """Augmentation strengths: flips and turns, brightness, contrast, saturation, hue.

    `flips` allows the eight flips and quarter turns of a square, all equally likely. `brightness`,
    `contrast` and `saturation` are the largest relative changes, `hue` the largest turn about the
    grey axis as a part of the full circle; each is drawn uniformly from -x to x.
    """

    flips: bool = True
    brightness: float = 0.05
    contrast: float = 0.05
    saturation: float = 0.05
    hue: float = 0.02

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation", "hue"):
            records.require(self, name, 0 <= getattr(self, name) < 1, f"0 <= {name} < 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """Augmentation of N tiles: `axes` bool (N, 3), `colours` (N, 3, 3), `contrast` (N,)."""

    axes: Tensor
    colours: Tensor
    contrast: Tensor

    def __getitem__(self, rows: "Tensor | slice") -> "Draws":
        return Draws(axes=self.axes[rows], colours=self.colours[rows], contrast=self.contrast[rows])


def draw(augmentation: Augmentation, count: int, *, seed: int) -> Draws:
    """Draw augmentations for `count` tiles: the same for the same seed, and indexable by tile."""
    rng = torch.Generator().manual_seed(seed)
    uniform = torch.rand(count, _AXES + 4, generator=rng, dtype=torch.float32)
    axes = (uniform[:, :_AXES] < 0.5) & augmentation.flips
    limits = torch.tensor(
        [
            augmentation.brightness,
            augmentation.contrast,
            augmentation.saturation,
            2 * math.pi * augmentation.hue,
        ],
        dtype=torch.float32,
    )
    brightness, contrast, saturation, angle = ((2 * uniform[:, _AXES:] - 1) * limits).unbind(1)
    colours = _colour_matrices(1 + brightness, 1 + saturation, angle)
    return Draws(axes=axes, colours=colours, contrast=1 + contrast)


def augment(tiles: Tensor, draws: Draws) -> Tensor:
    """Augment tiles: uint8 (B, S, S, 3) -> float32 (B, S, S, 3) from 0 to 255, not rounded.

    Colours first are turned, saturated and brightened by a matrix, then their contrast changes
    about the mean of the tile, then they are cut off at 0 and 255.
    """
    axes = draws.axes.to(tiles.device, non_blocking=True).view(-1, _AXES, 1, 1, 1)
    tiles = torch.where(axes[:, 0], tiles.flip(2), tiles)
    tiles = torch.where(axes[:, 1], tiles.flip(1), tiles)
    tiles = torch.where(axes[:, 2], tiles.transpose(1, 2), tiles)
    colours = draws.colours.to(tiles.device, non_blocking=True)
    contrast = draws.contrast.to(tiles.device, non_blocking=True).view(-1, 1, 1, 1)
    pixels = (tiles.float().flatten(1, 2) @ colours.transpose(1, 2)).view(tiles.shape)
    mean = pixels.mean(dim=(1, 2, 3), keepdim=True)
    return torch.lerp(mean, pixels, contrast).clamp_(0, 255)


def _colour_matrices(brightness: Tensor, saturation: Tensor, angle: Tensor) -> Tensor:
    """Colour matrices of RGB, (N, 3, 3): hue turn, then saturation, then brightness."""
    brightness, saturation, angle = (x.view(-1, 1, 1) for x in (brightness, saturation, angle))
    with Float32():
        grey, one = torch.full((3, 3), 1 / 3), torch.eye(3)
        cross = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)
    # Rodrigues' formula about the axis (1, 1, 1) / sqrt(3), which grey does not leave.
    turn = grey + angle.cos() * (one - grey) + angle.sin() * cross
    return brightness * (grey + saturation * (turn - grey))
