"""Feature files as bytes: the .h5 that readers of CLAM and TRIDENT expect, and .safetensors.

Both hold the arrays `features` and `coords`, and a header of short texts. Files are laid out in
memory and written by `xmag.files`, so that a full disk is met there, and in one way only.
"""

import errno
import io
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from xmag.errors import BagError

_MOST_UNPACKED = 50
"""Features of compressed files take 1 to 3 times their bytes, coords up to 10 times."""
_CHECKSUM_BYTES = 4
_SPARE_BYTES = 1 << 24

_NOT_READ = {errno.EACCES, errno.EPERM, errno.EAGAIN, errno.EIO, errno.ESTALE, errno.ETIMEDOUT}
"""What the system answers about files that may be whole: closed to us, locked, out of reach."""

HEADER_KEYS = ("format", "schema_version", "provenance", "tiles", "bag_sha256")


class ForeignBagError(BagError):
    """A whole file that another program wrote, and that is no bag."""


class UnreadableBagError(BagError):
    """A file that may hold a whole bag, but that cannot be read now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """What a feature file holds, unchecked.

    `header` has those of HEADER_KEYS that are there. `coords_attributes` are only written, and
    only to .h5: they repeat in TRIDENT's words what the header says exactly.
    """

    features: NDArray[Any]
    coords: NDArray[Any]
    header: Mapping[str, str]
    coords_attributes: Mapping[str, Any] = field(default_factory=dict)


def encode_h5(content: Content) -> bytes:
    """The content as an HDF5 file; equal content gives equal bytes.

    The header stands at the root and not on `coords`: TRIDENT copies the attributes of `coords`
    into what it makes with other models, and those must not inherit it.
    """

    def fill(file: h5py.File) -> None:
        file.create_dataset("features", data=content.features)
        coords = file.create_dataset("coords", data=content.coords)
        coords.attrs.update(content.coords_attributes)
        for key, text in content.header.items():
            # As bytes it has a fixed length and lies where the checksums are; see _attribute.
            file.attrs[key] = np.bytes_(text.encode())

    return h5_bytes(fill)


def h5_bytes(fill: Callable[[h5py.File], None]) -> bytes:
    """The HDF5 file that `fill` fills, without time stamps.

    In the layout of HDF5 1.8 (2008): it has checksums, and no limit on the size of an attribute.
    """
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", libver=("v108", "v108")) as file:
        fill(file)
    return buffer.getvalue()


def decode_h5(path: Path) -> Content:
    """The content of an HDF5 file, ours or a foreign one; BagError where it is damaged."""
    try:
        with h5py.File(path, "r") as file:
            header = {key: _attribute(file, key) for key in HEADER_KEYS if key in file.attrs}
            most = _MOST_UNPACKED * path.stat().st_size + _SPARE_BYTES
            return Content(
                features=_dataset(file, "features", most, is_ours="format" in header),
                coords=_dataset(file, "coords", most, is_ours="format" in header),
                header=header,
            )
    except (OSError, RuntimeError, LookupError, ValueError, TypeError, OverflowError) as error:
        raise _kept_from(error) or damaged(error) from error


def _attribute(file: h5py.File, key: str) -> str:
    """What xmag wrote; "" for other types, of which HDF5 may hang or crash on damaged ones."""
    attribute = file.attrs.get_id(key)
    if attribute.shape != () or attribute.dtype.kind != "S":
        return ""
    text: str = file.attrs[key].decode()
    return text


def _dataset(file: h5py.File, name: str, most: int, *, is_ours: bool) -> NDArray[Any]:
    """The values of a dataset that lies in this file and takes at most `most` bytes."""
    link = file.get(name, getlink=True)
    if not (link is None or isinstance(link, h5py.HardLink)):
        raise ValueError(f"{name!r} lies in another file or under another name")
    dataset = file.get(name)
    if not isinstance(dataset, h5py.Dataset):
        raise _missing(name, list(file), is_ours=is_ours)
    if dataset.is_virtual or dataset.external:
        raise ValueError(f"the values of {name!r} lie in other files")
    if dataset.dtype.kind not in "iuf":
        raise ValueError(f"{name!r} are {dataset.dtype}, and no numbers")
    if dataset.nbytes > most:
        raise ValueError(
            f"{name!r} would take {dataset.nbytes} bytes, and a file of this size holds"
            f" {most} at most"
        )
    if not _is_whole(dataset):
        raise ValueError(f"a part of {name!r} was never written")
    values: NDArray[Any] = dataset[()]
    return values


def _is_whole(dataset: h5py.Dataset) -> bool:
    """Whether all of it is in the file: where nothing was written, HDF5 would read zeros.

    It would read beside a chunk that has no room for its checksum.
    """
    if dataset.chunks is None:
        return bool(dataset.id.get_storage_size() == dataset.nbytes)
    grid = (-(-size // chunk) for size, chunk in zip(dataset.shape, dataset.chunks, strict=True))
    sizes: list[int] = []
    dataset.id.chunk_iter(lambda chunk: sizes.append(chunk.size))
    least = _CHECKSUM_BYTES if dataset.fletcher32 else 0
    return len(sizes) == math.prod(grid) and min(sizes, default=1) > least


def encode_safetensors(content: Content) -> bytes:
    """The content as a safetensors file, header as metadata; equal content gives equal bytes."""
    arrays: dict[str, NDArray[Any]] = {"features": content.features, "coords": content.coords}
    return _sorted_header(safetensors.numpy.save(arrays, metadata=dict(content.header)))


def _sorted_header(data: bytes) -> bytes:
    """A safetensors file with its header in order: the library writes it in a random one.

    A file is the header's length (8 bytes, little-endian), the header as JSON padded with spaces to
    a multiple of 8, and the arrays, which the header locates relative to its own end.
    """
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[end:]


def decode_safetensors(path: Path) -> Content:
    """The content of a safetensors file, ours or a foreign one; BagError where it is damaged."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            names, header = list(file.keys()), file.metadata() or {}
            for name in ("features", "coords"):
                if name not in names:
                    raise _missing(name, names, is_ours="format" in header)
            return Content(
                features=file.get_tensor("features"),
                coords=file.get_tensor("coords"),
                header={k: v for k, v in header.items() if k in HEADER_KEYS},
            )
    except (OSError, safetensors.SafetensorError, LookupError, ValueError, TypeError) as error:
        raise _kept_from(error) or damaged(error) from error


def damaged(reason: object) -> BagError:
    """The error for a file that does not hold what it should."""
    return BagError(
        f"the file is truncated, damaged, or something else than its suffix says ({reason});"
        " make it again, or copy it again"
    )


def _kept_from(error: Exception) -> UnreadableBagError | None:
    """The error for a file that the system does not let anyone read now; None for any other."""
    if not isinstance(error, OSError) or error.errno not in _NOT_READ:
        return None
    return UnreadableBagError(
        f"the file cannot be read ({os.strerror(error.errno)}); see who may read it, and who has it"
        " open"
    )


def _missing(name: str, found: list[str], *, is_ours: bool) -> BagError:
    kind = BagError if is_ours else ForeignBagError
    return kind(
        f"the file has no dataset {name!r}; found {sorted(found)}, expected 'features' and 'coords'"
    )
