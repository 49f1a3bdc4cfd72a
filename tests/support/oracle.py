"""What OpenSlide shows, for comparison."""

from pathlib import Path

import numpy as np
import pytest

openslide = pytest.importorskip("openslide")


def level_pixels(path: Path, size: tuple[int, int]):
    """The whole level of this size, on white, and its alpha channel: uint8 (h, w, 3), (h, w)."""
    with openslide.OpenSlide(path) as slide:
        level = slide.level_dimensions.index(size)
        return on_white(slide.read_region((0, 0), level, size))


def on_white(image):
    """(pixels on white, alpha) of an RGBA image."""
    rgba = np.asarray(image).astype(np.uint16)
    alpha = rgba[..., 3:]
    white = (rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255
    return white.astype(np.uint8), rgba[..., 3].astype(np.uint8)


def difference(one, other):
    """Absolute differences as ints."""
    return np.abs(one.astype(int) - other.astype(int))
