"""Features in the layouts of other software: CLAM's .pt and STAMP's .h5, made and checked.

Also reads the tiles that files of CLAM, TRIDENT, STAMP and slide2vec record.
"""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from xmag.bag.formats import Content, ForeignBagError, h5_bytes
from xmag.errors import BagError
from xmag.geometry import TileGeometry


def encode_clam(features: NDArray[np.float32]) -> bytes:
    """Features as CLAM loads them from ``pt_files/<slide>.pt``: a float32 tensor (N, D)."""
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
    """Features as STAMP loads them: `feats` float16 and `coords` float32 in µm.

    STAMP takes the scale from the root attributes `unit`, `tile_size_um` and `tile_size_px`. Its
    `stamp_version` is left out, since STAMP refuses files of a version newer than its own. The
    attribute `tiles` is ours, and says what STAMP's leave out. Raises BagError for a feature that
    float16 cannot hold.
    """

    def fill(file: h5py.File) -> None:
        file.create_dataset("feats", data=_half(features))
        file.create_dataset("coords", data=(coords * tiles.level0_mpp).astype(np.float32))
        file.attrs["extractor"] = extractor
        file.attrs["unit"] = "um"
        file.attrs["tile_size_um"] = tiles.size_px * tiles.mpp
        file.attrs["tile_size_px"] = tiles.size_px
        file.attrs["tiles"] = np.bytes_(json.dumps(tiles.to_dict(), sort_keys=True).encode())

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


_STAMP_UM, _STAMP_PX = 256.0, 224
"""Side in µm and px of the tiles in STAMP's oldest files, which do not record it."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MicrometreTiles:
    """Tile coordinates in µm, from a file that does not record the scale of the slide.

    Attributes:
        coords: float64 (N, 2), top-left corner (x, y) of each tile, µm.
        size_um: Side of a tile.
        size_px: Side of a tile in output px; None where the file does not say.
    """

    coords: NDArray[np.float64]
    size_um: float
    size_px: int | None


ForeignParts = tuple[NDArray[Any], NDArray[Any] | None, TileGeometry | None, MicrometreTiles | None]
"""Features, coords in level-0 px, tiles and places in µm, as far as a file has them."""


def read_foreign(content: Content, tiles: TileGeometry | None) -> ForeignParts:
    """The parts of a bag in a file that CLAM, TRIDENT, STAMP or slide2vec wrote.

    `tiles` are those of our own export for STAMP. Raises ForeignBagError for STAMP's file of one
    embedding for a whole slide or patient.
    """
    if "encoder" in content.attributes:
        raise ForeignBagError(
            "the file holds STAMP's embedding of a whole slide or patient; expected a row for each"
            " tile: give the file that the tiles' features are in"
        )
    features = _narrow(_without_batch_axis(content.features))
    if content.coords is None:
        return features, None, None, None
    coords = _without_batch_axis(content.coords)
    stamp = content.attributes
    if content.features_name == "features" and not {"unit", "tile_size_um"} & set(stamp):
        return features, coords, _trident_tiles(content.coords_attributes), None
    in_um = _micrometres(coords, stamp)
    if tiles is None or in_um is None:
        return features, None, None, in_um
    return features, np.rint(in_um.coords / tiles.level0_mpp), tiles, None


def _without_batch_axis(array: NDArray[Any]) -> NDArray[Any]:
    """The array without the leading axis of length 1 that some tools write."""
    return array[0] if array.ndim == 3 and len(array) == 1 else array


def _narrow(features: NDArray[Any]) -> NDArray[Any]:
    """Features rounded to float32, where they are finer and fit."""
    if features.dtype.kind != "f" or features.dtype.itemsize <= 4:
        return features
    with np.errstate(over="ignore"):
        narrow = features.astype(np.float32)
    return narrow if np.isfinite(narrow).all() else features


def _trident_tiles(attributes: Mapping[str, float | None]) -> TileGeometry | None:
    """The geometry that TRIDENT writes on `coords`; None where it is not all there.

    Its magnifications are 10 / mpp, and as a rule rounded: a slide of 0.4993 µm/px is "20", and
    its tiles of 256 px at "10" are 512 px of level 0. So µm/px are approximate, and px exact.
    """
    try:
        size_px, size_level0, width, height = (
            _whole(attributes[key])
            for key in ("patch_size", "patch_size_level0", "level0_width", "level0_height")
        )
        mpp, level0_mpp = (
            10 / float(attributes[key] or 0)
            for key in ("target_magnification", "level0_magnification")
        )
        fields = {
            "size_px": size_px, "mpp": mpp, "size_level0": size_level0, "level0_mpp": level0_mpp,
            "overlap_px": _whole(attributes.get("overlap", 0)), "level0_size": (width, height),
        }  # fmt: skip
        tiles = TileGeometry.from_dict(fields)
    except (KeyError, TypeError, ValueError, ArithmeticError):
        return None
    fits = abs(size_px * mpp / level0_mpp - size_level0) < 1 and size_level0 > 0
    return tiles if fits else None


def _whole(value: float | None) -> int:
    if value is None or value != int(value):
        raise ValueError(value)
    return int(value)


def _micrometres(
    coords: NDArray[Any], attributes: Mapping[str, float | None]
) -> MicrometreTiles | None:
    """Coords of STAMP in µm, by its own rules (modeling/data.py, get_coords); None without a unit.

    It has written `tile_size_um`; `tile_size` with the unit "um"; and before that neither, with
    tiles of 256 µm in steps of 224.
    """
    if coords.ndim != 2 or coords.dtype.kind not in "iuf" or not np.isfinite(coords).all():
        raise ForeignBagError(
            f"coords are an array of {coords.dtype} with shape {coords.shape}; expected a finite"
            " (x, y) for each tile"
        )
    size_um, px = attributes.get("tile_size_um"), attributes.get("tile_size_px")
    if size_um is None and "unit" in attributes:
        size_um = attributes.get("tile_size")
    values = np.asarray(coords, np.float64)
    if size_um is None and "unit" not in attributes:
        steps = [d for axis in values.T for d in np.diff(np.unique(axis)).tolist()]
        if round(attributes.get("tile_size") or min(steps, default=0)) != _STAMP_PX:
            return None
        values, size_um, px = values / _STAMP_PX * _STAMP_UM, _STAMP_UM, _STAMP_PX
    if size_um is None or not 0 < size_um < float("inf"):
        return None
    size_px = int(px) if px is not None and 0 < px == px // 1 < float("inf") else None
    return MicrometreTiles(coords=values, size_um=size_um, size_px=size_px)
