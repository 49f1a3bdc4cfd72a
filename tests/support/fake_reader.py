"""A SlideReader over an array in memory: exact pixels, and a count of what was read and decoded."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from xmag.errors import DamagedSlideError
from xmag.slide.reader import Level, Pixels, ScaleMetadata


def box_average(pixels: Pixels, n: int) -> Pixels:
    """Plain n x n box average, rounded half up; what does not fill a box is cut off."""
    height, width = pixels.shape[0] // n * n, pixels.shape[1] // n * n
    blocks = pixels[:height, :width].reshape(height // n, n, width // n, n, -1).astype(np.float64)
    return np.floor(blocks.mean(axis=(1, 3)) + 0.5).astype(np.uint8)


def noise(width: int, height: int, *, seed: int = 0) -> Pixels:
    """Pixels in which no two places look alike."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


class FakeTileReader:
    """Tiles of an array, with levels made by box averaging; "compressed" means raw bytes."""

    format = "fake"

    def __init__(
        self,
        pixels: Pixels,
        *,
        tile: tuple[int, int] = (240, 240),
        factors: Sequence[int] = (1,),
        mpp: float | None = 0.25,
        reductions: tuple[int, ...] = (1, 2, 4, 8),
        origin: tuple[int, int] = (0, 0),
        canvas: tuple[int, int] | None = None,
        missing: Sequence[int] = (),
        damaged: Sequence[int] = (),
    ) -> None:
        self.stored = [box_average(pixels, factor) for factor in factors]
        self.metadata = ScaleMetadata(mpp=None if mpp is None else (mpp, mpp), mpp_source="fake")
        self.missing, self.damaged = set(missing), set(damaged)
        self.read: Counter[int] = Counter()
        self.decoded: Counter[int] = Counter()
        self.levels = tuple(
            Level(
                size=self._size(stored, factor, canvas),
                downsample=float(factor),
                tile_size=tile,
                origin=(origin[0] // factor, origin[1] // factor),
                stored_size=(stored.shape[1], stored.shape[0]),
                reductions=reductions,
            )
            for stored, factor in zip(self.stored, factors, strict=True)
        )

    @staticmethod
    def _size(stored: Pixels, factor: int, canvas: tuple[int, int] | None) -> tuple[int, int]:
        if canvas is None:
            return stored.shape[1], stored.shape[0]
        return canvas[0] // factor, canvas[1] // factor

    def read_tile_bytes(self, level: int, indices: Sequence[int]) -> list[bytes | None]:
        self.read.update(indices)
        return [self._bytes(level, index) for index in indices]

    def _bytes(self, level: int, index: int) -> bytes | None:
        if index in self.missing:
            return None
        size = self.levels[level].tile_size
        width, height = size
        row, column = divmod(index, self.levels[level].tiles_across)
        part = self.stored[level][row * height : (row + 1) * height]
        part = part[:, column * width : (column + 1) * width]
        tile = np.full((height, width, 3), 77, np.uint8)  # padding that must never be seen
        tile[: part.shape[0], : part.shape[1]] = part
        head = index.to_bytes(4, "big")
        return head + tile.tobytes()[: 10 if index in self.damaged else None]

    def decode(self, level: int, data: bytes, reduction: int) -> Pixels:
        self.decoded[int.from_bytes(data[:4], "big")] += 1
        size = self.levels[level].tile_size
        if len(data) != 4 + size[0] * size[1] * 3:
            raise DamagedSlideError("the bytes end early")
        tile = np.frombuffer(data[4:], np.uint8).reshape(size[1], size[0], 3)
        return box_average(tile, reduction)

    def close(self) -> None:
        pass


class FakeRegionReader:
    """The same, for a format that hides its tiles."""

    format = "fake"

    def __init__(self, pixels: Pixels, *, mpp: float = 0.25) -> None:
        self._pixels = pixels
        self.metadata = ScaleMetadata(mpp=(mpp, mpp), mpp_source="fake")
        self.levels = (Level(size=(pixels.shape[1], pixels.shape[0]), downsample=1.0),)

    def read_region(self, level: int, xy: tuple[int, int], size: tuple[int, int]) -> Pixels:
        (x, y), (width, height) = xy, size
        return self._pixels[y : y + height, x : x + width].copy()

    def close(self) -> None:
        pass
