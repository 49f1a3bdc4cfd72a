"""FeatureBag: the embeddings of a slide, where their tiles lie, and what made them.

Its files are laid out in memory and written by `xmag.files`. An .h5 is what readers of CLAM and
TRIDENT expect: `features` and `coords`, with the geometry of the tiles as attributes of `coords`.
What xmag adds stands at the root, since TRIDENT copies the attributes of `coords` into files made
with other models, which must not inherit our provenance.
"""

import io
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from xmag.errors import BagError, InputError, OutputError, XmagError
from xmag.files import write_bytes
from xmag.geometry import TileGeometry
from xmag.provenance import Provenance

SCHEMA_VERSION = 1
"""Of the files; changes when an older xmag could no longer read them."""

_FORMAT = "xmag.FeatureBag"
_HEADER_KEYS = ("format", "schema_version", "provenance", "tiles")

Layout = Literal["clam", "stamp"]


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class FeatureBag:
    """The embeddings of one slide: row i of `features` belongs to the tile at `coords[i]`.

    Attributes:
        features: float32 (N, D), finite.
        coords: int64 (N, 2), top-left corner (x, y) of each tile, level-0 px.
        provenance: What made the features; None for a file of other software.
        tiles: Size and scale of the tiles; None where a file does not say.

    The arrays are read-only copies. Other dtypes are converted where nothing is lost. Raises
    BagError for shapes that do not fit, and for values that are not finite or would change.
    ``numpy.asarray(bag)`` is `features`, ``len(bag)`` is N.
    """

    features: NDArray[np.float32]
    coords: NDArray[np.int64]
    provenance: Provenance | None = None
    tiles: TileGeometry | None = None

    def __post_init__(self) -> None:
        features = _lossless(self.features, np.dtype(np.float32), "features")
        coords = _lossless(self.coords, np.dtype(np.int64), "coords")
        if coords.shape != (len(features), 2):
            raise BagError(
                f"a bag has features of shape {features.shape} and coords of shape {coords.shape};"
                " expected (N, D) and (N, 2) with the same N"
            )
        for array in (features, coords):
            array.flags.writeable = False
        object.__setattr__(self, "features", features)
        object.__setattr__(self, "coords", coords)

    def __len__(self) -> int:
        return len(self.features)

    def __array__(
        self, dtype: np.dtype[Any] | None = None, copy: bool | None = None
    ) -> NDArray[Any]:
        return np.array(self.features, dtype=dtype, copy=copy)

    def __repr__(self) -> str:
        return f"<FeatureBag of {len(self)} tiles, {self.features.shape[1]} features each>"

    def __reduce__(self) -> tuple[type["FeatureBag"], tuple[Any, ...]]:
        # Arrays come out of a pickle writable; going through the constructor mends that.
        return FeatureBag, (self.features, self.coords, self.provenance, self.tiles)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the whole bag to `path`, by its suffix as ``.h5`` or ``.safetensors``.

        The file is read back and compared before it gets its name; the same bag gives the same
        bytes. Raises InputError for another suffix and OutputError where it cannot be written.
        """
        read = _reader(path)
        encode = _encode_h5 if read is _read_h5 else _encode_safetensors

        def same(temp: Path) -> bool:
            return _same(self, _bag(read(temp)))

        _write(path, encode(self, _slide_name(self, path)), same)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "FeatureBag":
        """The bag in an ``.h5`` or ``.safetensors`` file: one that `save` wrote, or a foreign one.

        A foreign file has the datasets `features`, (N, D) or (1, N, D), and `coords`, as CLAM and
        TRIDENT write them; its bag has neither provenance nor tiles. Raises InputError for another
        suffix, and BagError for a file that is damaged, incomplete, or of a newer schema.
        """
        read = _reader(path)
        if not Path(path).is_file():
            raise BagError(f"there is no file {os.fspath(path)!r}; give the path of a feature file")
        try:
            return _bag(read(Path(path)))
        except XmagError as error:
            raise BagError(f"{os.fspath(path)}: {error}") from error

    def export(self, path: str | os.PathLike[str], *, layout: Layout) -> None:
        """Write what other software reads; unlike `save`, it does not keep everything.

        Layout "clam" is a ``.pt`` with the features as a float32 tensor (N, D), which CLAM looks
        for as ``pt_files/<slide>.pt``. Layout "stamp" is an ``.h5`` with `feats` in float16 and
        `coords` in µm. Raises InputError for another suffix or layout, BagError where the bag lacks
        tiles or a feature exceeds float16, and OutputError where it cannot be written.
        """
        suffixes = {"clam": ".pt", "stamp": ".h5"}
        if layout not in suffixes:
            raise InputError(f"layout is {layout!r}; expected one of {sorted(suffixes)}")
        if Path(path).suffix != suffixes[layout]:
            raise InputError(
                f"cannot export layout {layout!r} to {os.fspath(path)!r}; expected a path that ends"
                f" in {suffixes[layout]!r}"
            )
        if layout == "clam":
            _write(path, _encode_clam(self), lambda temp: _same_clam(self, temp))
        else:
            _write(path, _encode_stamp(self), lambda temp: _same_stamp(self, temp))


@dataclass(frozen=True, slots=True)
class _Content:
    """What a feature file holds, as it stands there; `header` is what xmag adds."""

    features: NDArray[Any]
    coords: NDArray[Any]
    header: Mapping[str, Any]


def _lossless(values: Any, dtype: np.dtype[Any], name: str) -> NDArray[Any]:
    """A copy of `values` in `dtype`; BagError where that would change one, or one is not finite."""
    array = np.asarray(values)
    if array.dtype.kind not in "iuf" or array.ndim != 2:
        raise BagError(
            f"{name} are an array of {array.dtype} with shape {array.shape}; expected {dtype} with"
            " one row for each tile"
        )
    _require_rows(np.isfinite(array), array, name, "finite values; make the features again")
    with np.errstate(over="ignore", invalid="ignore"):
        converted = np.array(array, dtype=dtype, order="C")
        exact = converted == array
    remedy = f"what {dtype} can hold; round with .astype('{dtype}') if that is meant"
    _require_rows(exact, array, name, remedy)
    return converted


def _require_rows(fits: NDArray[np.bool_], array: NDArray[Any], name: str, expected: str) -> None:
    if not fits.all():
        row, column = np.argwhere(~fits)[0]
        raise BagError(
            f"{name} hold {array[row, column]} in row {row} ({np.count_nonzero(~fits)} such values"
            f" in all); expected {expected}"
        )


def _reader(path: str | os.PathLike[str]) -> Callable[[Path], _Content]:
    suffix = Path(path).suffix
    if suffix == ".h5":
        return _read_h5
    if suffix == ".safetensors":
        return _read_safetensors
    raise InputError(
        f"{os.fspath(path)!r} ends in {suffix!r}; expected '.h5' or '.safetensors' (for other"
        " layouts there is export)"
    )


def _write(path: str | os.PathLike[str], data: bytes, same: Callable[[Path], bool]) -> None:
    def validate(temp: Path) -> None:
        if not same(temp):
            raise OutputError(
                f"what was written to {os.fspath(path)} does not read back the same; the disk or"
                " the memory of this machine fails: write elsewhere"
            )

    write_bytes(path, data, validate=validate)


def _same(bag: FeatureBag, other: FeatureBag) -> bool:
    return (
        np.array_equal(bag.features, other.features)
        and np.array_equal(bag.coords, other.coords)
        and bag.provenance == other.provenance
        and bag.tiles == other.tiles
    )


def _slide_name(bag: FeatureBag, path: str | os.PathLike[str]) -> str:
    """The slide's file name without its suffix, as TRIDENT names slides."""
    slide = bag.provenance.record.get("slide") if bag.provenance else None
    name = slide.get("name") if isinstance(slide, Mapping) else None
    return Path(str(name or path)).stem


def _header(bag: FeatureBag) -> dict[str, Any]:
    header: dict[str, Any] = {"format": _FORMAT, "schema_version": SCHEMA_VERSION}
    if bag.provenance is not None:
        header["provenance"] = bag.provenance.to_json()
    if bag.tiles is not None:
        header["tiles"] = json.dumps(bag.tiles.to_dict(), sort_keys=True, allow_nan=False)
    return header


def _bag(content: _Content) -> FeatureBag:
    header, features, coords = content.header, content.features, content.coords
    if header.get("format") != _FORMAT:
        if features.ndim == 3 and len(features) == 1:
            features = features[0]
        if coords.ndim == 3 and len(coords) == 1:
            coords = coords[0]
        return FeatureBag(features, coords)
    _require_known_schema(str(header.get("schema_version")))
    provenance, tiles = header.get("provenance"), header.get("tiles")
    return FeatureBag(
        features,
        coords,
        provenance=None if provenance is None else Provenance.from_json(provenance),
        tiles=None if tiles is None else _tiles(tiles),
    )


def _require_known_schema(version: str) -> None:
    if not version.isdecimal():
        raise _damaged(ValueError(f"schema_version is {version!r}"))
    if int(version) > SCHEMA_VERSION:
        raise BagError(
            f"the file has schema_version {version}, and this xmag reads up to {SCHEMA_VERSION};"
            " upgrade it: pip install --upgrade xmag"
        )


def _tiles(text: str) -> TileGeometry:
    try:
        return TileGeometry.from_dict(json.loads(text))
    except (ValueError, TypeError, KeyError) as error:
        raise BagError(
            f"the geometry of the tiles is damaged ({error!r}); make the file again"
        ) from error


def _damaged(error: Exception) -> BagError:
    return BagError(
        f"the file is truncated, damaged, or something else than its suffix says ({error});"
        " make it again, or copy it again"
    )


def _h5_bytes(fill: Callable[[h5py.File], None]) -> bytes:
    """The bytes of an HDF5 file without time stamps, laid out in memory."""
    with h5py.File("in-memory", "w", driver="core", backing_store=False) as file:
        fill(file)
        file.flush()
        image: bytes = file.id.get_file_image()
        return image


def _encode_h5(bag: FeatureBag, name: str) -> bytes:
    def fill(file: h5py.File) -> None:
        file.create_dataset("features", data=bag.features)
        coords = file.create_dataset("coords", data=bag.coords)
        file.attrs.update(_header(bag))
        if bag.tiles is not None:
            coords.attrs.update(_tile_attributes(bag.tiles, name))

    return _h5_bytes(fill)


def _tile_attributes(tiles: TileGeometry, name: str) -> dict[str, Any]:
    """What TRIDENT writes on `coords`; magnifications are 10 / mpp, and not rounded."""
    width, height = tiles.level0_size
    return {
        "patch_size": tiles.size_px,
        "patch_size_level0": tiles.size_level0,
        "level0_magnification": 10 / tiles.level0_mpp,
        "target_magnification": 10 / tiles.mpp,
        "overlap": tiles.overlap_px,
        "name": name,
        "savetodir": "",  # a folder of whoever made the file, which is nobody's business
        "level0_width": width,
        "level0_height": height,
    }


def _read_h5(path: Path) -> _Content:
    try:
        with h5py.File(path, "r") as file:
            header = {key: file.attrs[key] for key in _HEADER_KEYS if key in file.attrs}
            return _Content(_dataset(file, "features"), _dataset(file, "coords"), header)
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise _damaged(error) from error


def _dataset(file: h5py.File, name: str) -> NDArray[Any]:
    dataset = file.get(name)
    if not isinstance(dataset, h5py.Dataset):
        raise _missing(name, list(file))
    values: NDArray[Any] = dataset[()]
    return values


def _missing(name: str, found: list[str]) -> BagError:
    return BagError(
        f"the file has no dataset {name!r}; found {sorted(found)}, expected 'features' and 'coords'"
    )


def _encode_safetensors(bag: FeatureBag, name: str) -> bytes:
    del name  # it only serves TRIDENT, which reads .h5
    metadata = {key: str(value) for key, value in _header(bag).items()}
    arrays: dict[str, NDArray[Any]] = {"features": bag.features, "coords": bag.coords}
    return _sorted_header(safetensors.numpy.save(arrays, metadata=metadata))


def _sorted_header(data: bytes) -> bytes:
    """A safetensors file with its header in order: the library writes it in a random one.

    A file is the header's length (8 bytes, little-endian), the header as JSON padded with spaces to
    a multiple of 8, and the arrays, which the header locates relative to its own end.
    """
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[end:]


def _read_safetensors(path: Path) -> _Content:
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            arrays: dict[str, NDArray[Any]] = {}
            for name in ("features", "coords"):
                if name not in file.keys():  # noqa: SIM118, it is not a mapping
                    raise _missing(name, list(file.keys()))
                arrays[name] = file.get_tensor(name)
            return _Content(header=file.metadata() or {}, **arrays)
    except (OSError, safetensors.SafetensorError, ValueError, TypeError) as error:
        raise _damaged(error) from error


def _encode_clam(bag: FeatureBag) -> bytes:
    import torch  # only here: processes that decode slides import this module, but never torch

    buffer = io.BytesIO()
    torch.save(torch.tensor(bag.features), buffer)
    return buffer.getvalue()


def _same_clam(bag: FeatureBag, path: Path) -> bool:
    import torch  # only here: see _encode_clam

    return np.array_equal(bag.features, torch.load(path, weights_only=True).numpy())


def _encode_stamp(bag: FeatureBag) -> bytes:
    tiles = bag.tiles
    if tiles is None:
        raise BagError(
            "the bag does not know the size of its tiles, which STAMP needs in µm; export a bag"
            " that xmag made, or give FeatureBag(..., tiles=)"
        )
    model = bag.provenance.record.get("model") if bag.provenance else None
    name = model.get("name") if isinstance(model, Mapping) else None

    def fill(file: h5py.File) -> None:
        file.create_dataset("feats", data=_half(bag.features))
        file.create_dataset("coords", data=(bag.coords * tiles.level0_mpp).astype(np.float32))
        file.attrs["extractor"] = str(name or "unknown")
        file.attrs["unit"] = "um"
        file.attrs["tile_size_um"] = tiles.size_px * tiles.mpp
        file.attrs["tile_size_px"] = tiles.size_px

    return _h5_bytes(fill)


def _half(features: NDArray[np.float32]) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):
        half = features.astype(np.float16)
    _require_rows(
        np.isfinite(half), features, "features", "at most 65504, which is all STAMP's float16 holds"
    )
    return half


def _same_stamp(bag: FeatureBag, path: Path) -> bool:
    with h5py.File(path, "r") as file:
        return np.array_equal(file["feats"][()], _half(bag.features))
