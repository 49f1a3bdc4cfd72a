"""FeatureBag: the embeddings of a slide, where their tiles lie, and what made them."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from xmag.bag.exports import encode_clam, encode_stamp, holds_clam, holds_stamp
from xmag.bag.formats import (
    Content,
    ForeignBagError,
    UnreadableBagError,
    damaged,
    decode_h5,
    decode_safetensors,
    encode_h5,
    encode_safetensors,
)
from xmag.errors import BagError, InputError, OutputError, XmagError
from xmag.files import local_copy, write_bytes
from xmag.geometry import TileGeometry
from xmag.provenance import Provenance
from xmag.urls import Place, Url, place_of

SCHEMA_VERSION = 1
"""Of the files; changes when an older xmag could no longer read them."""

_FORMAT = "xmag.FeatureBag"
_CODECS = {
    ".h5": (encode_h5, decode_h5),
    ".safetensors": (encode_safetensors, decode_safetensors),
}
_EXPORT_SUFFIXES = {"clam": ".pt", "stamp": ".h5"}

Layout = Literal["clam", "stamp"]


class NewerBagError(BagError):
    """A bag that a newer xmag wrote: it is whole, but this one cannot read it."""


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

    @property
    def coverage(self) -> float | None:
        """The share of the slide's tissue under tiles, 0 to 1; None where none is recorded."""
        tissue = self.provenance.record.get("tissue") if self.provenance else None
        share = tissue.get("coverage") if isinstance(tissue, Mapping) else None
        return None if share is None else float(share)

    def save(self, path: str | os.PathLike[str] | Url) -> None:
        """Write the whole bag to `path`, by its suffix as ``.h5`` or ``.safetensors``.

        The file is read back and compared before it gets its name; the same bag gives the same
        bytes. `path` may be a URL, such as "s3://bucket/slide.h5". Raises InputError for another
        suffix and OutputError where it cannot be written.
        """
        save_bag(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str] | Url) -> "FeatureBag":
        """The bag in an ``.h5`` or ``.safetensors`` file: one that `save` wrote, or a foreign one.

        A foreign file has the datasets `features`, (N, D) or (1, N, D), and `coords`, as CLAM and
        TRIDENT write them; its bag has neither provenance nor tiles. Raises InputError for another
        suffix, and BagError for a file that is damaged, incomplete, or of a newer schema.
        """
        place = place_of(path)
        _, decode = _codec(place)
        if isinstance(place, Path) and not place.is_file():
            raise BagError(f"there is no file {str(place)!r}; give the path of a feature file")
        with local_copy(place, UnreadableBagError) as local:
            is_ours = True
            try:
                content = decode(local)
                is_ours = "format" in content.header
                return _bag(content)
            except XmagError as error:
                kind = type(error) if isinstance(error, BagError) else BagError
                raise (kind if is_ours else ForeignBagError)(f"{place}: {error}") from error

    def export(self, path: str | os.PathLike[str] | Url, *, layout: Layout) -> None:
        """Write what other software reads; unlike `save`, it does not keep everything.

        Layout "clam" is a ``.pt`` with the features as a float32 tensor (N, D), which CLAM looks
        for as ``pt_files/<slide>.pt``. Layout "stamp" is an ``.h5`` with `feats` in float16 and
        `coords` in µm. Raises InputError for another suffix or layout, BagError where the bag lacks
        tiles or a feature exceeds float16, and OutputError where it cannot be written.
        """
        if layout not in _EXPORT_SUFFIXES:
            raise InputError(f"layout is {layout!r}; expected one of {sorted(_EXPORT_SUFFIXES)}")
        place = place_of(path)
        if place.suffix != _EXPORT_SUFFIXES[layout]:
            raise InputError(
                f"cannot export layout {layout!r} to {str(place)!r}; expected a path that ends"
                f" in {_EXPORT_SUFFIXES[layout]!r}"
            )
        if layout == "clam":
            data, holds = encode_clam(self.features), holds_clam
        else:
            data, holds = _stamp(self), holds_stamp
        _write(place, data, lambda temp: holds(temp, self.features))


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


def _codec(
    path: Place,
) -> tuple[Callable[[Content], bytes], Callable[[Path], Content]]:
    suffix = path.suffix
    if suffix not in _CODECS:
        raise InputError(
            f"{str(path)!r} ends in {suffix!r}; expected '.h5' or '.safetensors' (for other"
            " layouts there is export)"
        )
    return _CODECS[suffix]


def save_bag(
    bag: FeatureBag,
    path: str | os.PathLike[str] | Url,
    *,
    check: Callable[[], object] = lambda: None,
) -> None:
    """Save a bag; `check` is called just before the file gets its name, and may raise instead."""
    place = place_of(path)
    encode, decode = _codec(place)
    data = encode(_content(bag, place))
    _write(place, data, lambda temp: _same(bag, _bag(decode(temp))), check)


def _write(
    path: Place,
    data: bytes,
    holds: Callable[[Path], bool],
    check: Callable[[], object] = lambda: None,
) -> None:
    def validate(temp: Path) -> None:
        check()
        try:
            if holds(temp):
                return
            reason = "other values"
        except (XmagError, OSError, RuntimeError, ValueError) as error:
            reason = str(error)
        raise OutputError(
            f"what was written to {path} does not read back the same ({reason}); the"
            " disk or the memory of this machine fails: write elsewhere"
        )

    write_bytes(path, data, validate=validate)


def _same(bag: FeatureBag, other: FeatureBag) -> bool:
    return (
        np.array_equal(bag.features, other.features)
        and np.array_equal(bag.coords, other.coords)
        and bag.provenance == other.provenance
        and bag.tiles == other.tiles
    )


def _content(bag: FeatureBag, path: Place) -> Content:
    header = {"format": _FORMAT, "schema_version": str(SCHEMA_VERSION)}
    if bag.provenance is not None:
        header["provenance"] = bag.provenance.to_json()
    if bag.tiles is not None:
        header["tiles"] = json.dumps(bag.tiles.to_dict(), sort_keys=True, allow_nan=False)
    header["bag_sha256"] = _digest(bag.features, bag.coords, header)
    return Content(
        features=bag.features,
        coords=bag.coords,
        header=header,
        coords_attributes=_trident_attributes(bag, path),
    )


def _digest(features: NDArray[Any], coords: NDArray[Any], header: Mapping[str, str]) -> str:
    """SHA-256 of all that makes a bag; neither format would notice a value that changed."""
    digest = hashlib.sha256()
    for array in (features, coords):
        digest.update(f"{array.shape} {array.dtype.str}".encode())
        digest.update(np.ascontiguousarray(array).data)
    digest.update(json.dumps({k: header[k] for k in sorted(header) if k != "bag_sha256"}).encode())
    return digest.hexdigest()


def _trident_attributes(bag: FeatureBag, path: Place) -> dict[str, Any]:
    """What TRIDENT writes on `coords`; magnifications are 10 / mpp, and not rounded."""
    tiles = bag.tiles
    if tiles is None:
        return {}
    width, height = tiles.level0_size
    slide_name = _recorded(bag, "slide") or path.name
    return {
        "patch_size": tiles.size_px,
        "patch_size_level0": tiles.size_level0,
        "level0_magnification": 10 / tiles.level0_mpp,
        "target_magnification": 10 / tiles.mpp,
        "overlap": tiles.overlap_px,
        "name": Path(slide_name).stem.encode(errors="replace").decode(),
        "savetodir": "",  # a folder of whoever made the file, which is nobody's business
        "level0_width": width,
        "level0_height": height,
    }


def _recorded(bag: FeatureBag, what: str) -> str | None:
    """The name of the "slide" or the "model" in the record."""
    entry = bag.provenance.record.get(what) if bag.provenance else None
    name = entry.get("name") if isinstance(entry, Mapping) else None
    return None if name is None else str(name)


def _bag(content: Content) -> FeatureBag:
    header, features, coords = content.header, content.features, content.coords
    if header.get("format") != _FORMAT and "bag_sha256" not in header:
        return FeatureBag(_without_batch_axis(features), _without_batch_axis(coords))
    version = header.get("schema_version", "")
    if version.isdecimal() and int(version) > SCHEMA_VERSION:
        raise NewerBagError(
            f"the file has schema_version {version}, and this xmag reads up to {SCHEMA_VERSION};"
            " upgrade it: pip install --upgrade xmag"
        )
    if header.get("bag_sha256") != _digest(features, coords, header):
        raise damaged("its content does not have the checksum that it had when it was written")
    provenance, tiles = header.get("provenance"), header.get("tiles")
    return FeatureBag(
        features,
        coords,
        provenance=None if provenance is None else Provenance.from_json(provenance),
        tiles=None if tiles is None else _geometry(tiles),
    )


def _geometry(text: str) -> TileGeometry:
    try:
        return TileGeometry.from_dict(json.loads(text))
    except (json.JSONDecodeError, RecursionError) as error:
        raise damaged("its tiles are no JSON") from error


def _without_batch_axis(array: NDArray[Any]) -> NDArray[Any]:
    """Without the leading axis of length 1 that some tools write."""
    return array[0] if array.ndim == 3 and len(array) == 1 else array


def _stamp(bag: FeatureBag) -> bytes:
    if bag.tiles is None:
        raise BagError(
            "the bag does not know the size of its tiles, which STAMP needs in µm; export a bag"
            " that xmag made, or give FeatureBag(..., tiles=)"
        )
    extractor = _recorded(bag, "model") or "unknown"
    return encode_stamp(bag.features, bag.coords, bag.tiles, extractor)
