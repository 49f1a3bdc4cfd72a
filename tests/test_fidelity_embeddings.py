"""What speed does to embeddings, as a fraction of the distance between neighbouring tiles.

`benchmarks/fidelity.py` measures the same on large slides with real texture.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from xmag.demo import write_demo_slide
from xmag.encoder import Encoder, load_model
from xmag.plan import plan_tiles
from xmag.slide import Slide
from xmag.slide.pixels import read_level
from xmag.tiles import read_tiles

COLUMNS, ROWS, SIDE = 5, 4, 224
MOST = 0.02
"""The largest median error, as a fraction of the median distance between neighbours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A slide's level 1 decoded in full, and its embeddings in float32 after box averages."""

    path: Path
    full: NDArray[np.uint8]
    encoder: Encoder
    embeddings: NDArray[np.float32]

    def error(self, embeddings: NDArray[np.float32]) -> float:
        """The median distance to the reference, over that between tiles that share an edge."""
        grid = self.embeddings.reshape(ROWS, COLUMNS, -1)
        between = [np.linalg.norm(np.diff(grid, axis=axis), axis=-1).ravel() for axis in (0, 1)]
        apart = np.linalg.norm(embeddings - self.embeddings, axis=1)
        return float(np.median(apart) / np.median(np.concatenate(between)))


def cut(pixels: NDArray) -> NDArray[np.uint8]:
    """The tiles of pixels at 2.0 µm/px, row by row."""
    rows = pixels.reshape(ROWS, SIDE, COLUMNS, SIDE, 3)
    return np.ascontiguousarray(rows.swapaxes(1, 2).reshape(-1, SIDE, SIDE, 3).astype(np.uint8))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    size = (COLUMNS * SIDE * 8, ROWS * SIDE * 8)
    path = write_demo_slide(tmp_path_factory.mktemp("fidelity") / "slide.svs", size=size)
    with Slide(path, mpp=0.25) as slide:  # as if at 40x: its level 1 is decoded at 1/2
        full = read_level(slide.reader, 1, 1, (0, 0), (COLUMNS * SIDE * 2, ROWS * SIDE * 2))
    encoder = load_model("xmag-mini", device="cpu")
    boxes = full.reshape(ROWS * SIDE, 2, COLUMNS * SIDE, 2, 3).mean(axis=(1, 3))
    embeddings = encoder.embed(cut(np.rint(boxes))).numpy()
    return Reference(path=path, full=full, encoder=encoder, embeddings=embeddings)


def test_scaled_decoding_is_as_good_as_averaging_what_was_decoded_in_full(
    reference: Reference,
) -> None:
    with Slide(reference.path, mpp=0.25) as slide:
        plan = plan_tiles(slide, reference.encoder.tile_spec)
        assert (plan.scale.level, plan.scale.reduction) == (1, 2)
        ((_, tiles),) = read_tiles(slide, plan)
    assert reference.error(reference.encoder.embed(tiles).numpy()) <= MOST


def test_bfloat16_is_as_good_as_float32(reference: Reference) -> None:
    half = load_model("xmag-mini", device="cpu", dtype="bfloat16")
    boxes = reference.full.reshape(ROWS * SIDE, 2, COLUMNS * SIDE, 2, 3).mean(axis=(1, 3))
    found = half.embed(cut(np.rint(boxes))).numpy()
    assert 0 < reference.error(found) <= MOST


def test_pixels_left_out_instead_of_averaged_would_be_noticed(reference: Reference) -> None:
    wrong = cut(reference.full[::2, ::2])
    assert reference.error(reference.encoder.embed(wrong).numpy()) > 2 * MOST
