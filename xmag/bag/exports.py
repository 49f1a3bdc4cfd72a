"""Features in the layouts of other software: CLAM's .pt and STAMP's .h5, made and checked."""

import io
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from xmag.bag.formats import h5_bytes
from xmag.errors import BagError
from xmag.geometry import TileGeometry


def encode_clam(features: NDArray[np.float32]) -> bytes:
    """What CLAM loads as ``pt_files/<slide>.pt``: the features as a float32 tensor (N, D)."""
    import torch  # only here: processes that decode slides import this module, but never torch

    buffer = io.BytesIO()
    torch.save(torch.tensor(features), buffer)
    return buffer.getvalue()


def holds_clam(path: Path, features: NDArray[np.float32]) -> bool:
    """Whether the file reads back as these features, without running any code in it."""
    import torch  # only here: see encode_clam

    return np.array_equal(torch.load(path, weights_only=True).numpy(), features)


def encode_stamp(
    features: NDArray[np.float32], coords: NDArray[np.int64], tiles: TileGeometry, extractor: str
) -> bytes:
    """What STAMP loads for a slide: `feats` float16 and `coords` float32 in µm.

    STAMP takes the scale from the root attributes `unit`, `tile_size_um` and `tile_size_px`. Its
    `stamp_version` is left out, since STAMP refuses files of a version newer than its own. Raises
    BagError for a feature that float16 cannot hold.
    """

    def fill(file: h5py.File) -> None:
        file.create_dataset("feats", data=_half(features))
        file.create_dataset("coords", data=(coords * tiles.level0_mpp).astype(np.float32))
        file.attrs["extractor"] = extractor
        file.attrs["unit"] = "um"
        file.attrs["tile_size_um"] = tiles.size_px * tiles.mpp
        file.attrs["tile_size_px"] = tiles.size_px

    return h5_bytes(fill)


def holds_stamp(path: Path, features: NDArray[np.float32]) -> bool:
    """Whether the file reads back as these features, in half precision."""
    with h5py.File(path, "r") as file:
        return np.array_equal(file["feats"][()], _half(features))


def _half(features: NDArray[np.float32]) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):
        half = features.astype(np.float16)
    if not np.isfinite(half).all():
        row, column = np.argwhere(~np.isfinite(half))[0]
        raise BagError(
            f"features hold {features[row, column]} in row {row}; expected at most 65504, which is"
            " all that STAMP's float16 holds: scale the features, or use another layout"
        )
    return half
