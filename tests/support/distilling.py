"""Small worlds to distil in: regions in memory, a frozen random teacher, a tiny student."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from xmag.distill.student import StudentStart, fresh_student
from xmag.errors import DamagedSlideError
from xmag.geometry import TileSpec
from xmag.hub.registry import ModelConfig
from xmag.vit import ViTConfig

TILE_PX = 56
"""Of teacher and student alike; a region has four times as much. A quarter of the real thing."""
STUDENT = ModelConfig(
    vit=ViTConfig(width=32, depth=2, heads=2, hidden=64, patch_px=7, position_grid=8),
    tile_spec=TileSpec(mpp=2.0, size_px=TILE_PX),
)


def tiny_student(seed: int = 0) -> StudentStart:
    return fresh_student(STUDENT, seed=seed)


def colourful_regions(count: int, *, side: int = 4 * TILE_PX, seed: int = 0) -> np.ndarray:
    """uint8 (count, side, side, 3): in each, 16 tiles of colours and contrasts of their own."""
    rng = np.random.default_rng(seed)
    cells = rng.integers(40, 216, (count, 4, 4, 3)).astype(np.float32)
    spread = rng.uniform(2, 40, (count, 4, 4, 1)).astype(np.float32)
    each = side // 4
    base, scale = (v.repeat(each, 1).repeat(each, 2) for v in (cells, spread))
    noise = rng.standard_normal((count, side // 8, side // 8, 1)).astype(np.float32)
    return np.clip(base + scale * noise.repeat(8, 1).repeat(8, 2), 0, 255).astype(np.uint8)


class ArraySource:
    """A source of regions that lie in memory; those in `damaged` cannot be read."""

    def __init__(self, regions: np.ndarray, damaged: Sequence[int] = ()) -> None:
        self.regions, self.damaged = regions, set(damaged)

    def __len__(self) -> int:
        return len(self.regions)

    def read(self, indices: Sequence[int]) -> np.ndarray:
        if bad := self.damaged.intersection(indices):
            raise DamagedSlideError(f"regions {sorted(bad)} are damaged; expected whole ones")
        return self.regions[list(indices)]


class RandomTeacher:
    """A frozen convolution with random weights: what a tile looks like, in `dim` numbers."""

    def __init__(
        self, dim: int = 24, *, seed: int = 0, name: str = "random", size_px: int = TILE_PX
    ) -> None:
        rng = torch.Generator().manual_seed(seed)
        self.name, self.dim = name, dim
        self.identity: dict[str, Any] = {"name": name, "seed": seed, "dim": dim}
        self.tile_spec = TileSpec(mpp=0.5, size_px=size_px)
        self._filters = torch.randn(32, 3, 3, 3, generator=rng) / 3
        self._out = torch.randn(32, dim, generator=rng) / 4
        self.calls = 0

    @torch.no_grad()
    def features(self, tiles: Tensor) -> Tensor:
        self.calls += 1
        pooled = F.avg_pool2d(tiles.permute(0, 3, 1, 2).float() / 64 - 2, 4)
        responses = F.conv2d(pooled, self._filters.to(tiles.device)).relu().mean((2, 3))
        return responses @ self._out.to(tiles.device)
