"""Feature files as bytes: .h5 as readers of CLAM and TRIDENT expect it, .safetensors, .pt and .npz.

A file of ours holds the arrays `features` and `coords`, and a header of short texts. Files are laid
out in memory and written by `xmag.files`, so that a full disk is met there, and in one way only.
"""

import errno
import io
import json
import math
import os
import threading
import zipfile
import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from xmag.errors import BagError, WeightsError

if TYPE_CHECKING:  # processes that decode slides import this module, but never torch
    from torch import Tensor

_MOST_UNPACKED = 50
"""Most bytes unpacked from one: features take 1 to 3 times their bytes, coords up to 10 times."""
_CHECKSUM_BYTES = 4
_MOST_BESIDE = 32
"""Attributes of a dataset that are kept in its header."""
_HDF5 = threading.RLock()
"""Held for a whole file: h5py's own lock, which it takes at each call, would go from thread to
thread in the middle, and each time wait for the GIL."""
_SPARE_BYTES = 1 << 24

_NOT_READ = {errno.EACCES, errno.EPERM, errno.EAGAIN, errno.EIO, errno.ESTALE, errno.ETIMEDOUT}
"""Errors of the system on files that may be whole: closed to us, locked, out of reach."""
_BROKEN = (
    OSError, RuntimeError, LookupError, ValueError, TypeError, ArithmeticError, EOFError,
    SyntaxError, safetensors.SafetensorError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
"""Errors that the libraries raise on a file that makes no sense."""

_HEADER = ("format", "schema_version", "provenance", "tiles", "bag_sha256")
_FEATURES = ("features", "feats", "patch_embeddings")
"""Names of the features in files of other software; the last two are STAMP's."""
_ROOT_ATTRIBUTES = ("tile_size_um", "tile_size_px", "tile_size", "unit", "encoder")
_COORDS_ATTRIBUTES = (
    "patch_size", "patch_size_level0", "level0_magnification", "target_magnification", "overlap",
    "level0_width", "level0_height",
)  # fmt: skip


class NewerBagError(BagError):
    """A bag that a newer xmag wrote: it is whole, but this one cannot read it."""


class ForeignBagError(BagError):
    """A whole file that another program wrote, and that is no bag."""


class UnreadableBagError(BagError):
    """A file that may hold a whole bag, but that cannot be read now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """Content of a feature file, unchecked.

    `header` has the texts of xmag that are there. `attributes`, of the root of an .h5, and
    `coords_attributes` are written as they are; of a foreign file those that tell where tiles lie
    are read: numbers, and None for what is there and no number. Of our own none are read: they
    repeat in TRIDENT's words what the header says exactly.
    """

    features: NDArray[Any]
    coords: NDArray[Any] | None = None
    header: Mapping[str, str] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    coords_attributes: Mapping[str, Any] = field(default_factory=dict)
    features_name: str = "features"


def encode(content: Content, suffix: str) -> bytes:
    """The bytes of a file with this content; equal content gives equal bytes."""
    return _ENCODERS[suffix](content)


def decode(path: Path, suffix: str) -> Content:
    """The content of a file, ours or a foreign one; no code in it is run.

    Raises BagError where it is damaged, UnreadableBagError where the system does not let anyone
    read it now, and ForeignBagError for a whole file of something else.
    """
    try:
        return _DECODERS[suffix](path)
    except _BROKEN as error:
        if isinstance(error, OSError) and error.errno in _NOT_READ:
            raise UnreadableBagError(
                f"the file cannot be read ({os.strerror(error.errno)}); see who may read it, and"
                " who has it open"
            ) from error
        raise damaged(error) from error


def damaged(reason: object) -> BagError:
    """The error for a file that does not hold what it should."""
    return BagError(
        f"the file is truncated, damaged, or something else than its suffix says ({reason});"
        " make it again, or copy it again"
    )


def _content_of(
    names: Collection[str],
    read: Callable[[str], NDArray[Any]],
    header: Mapping[str, str] = MappingProxyType({}),
) -> Content:
    """The arrays among those of a file: by name of ours, else by one of the known names."""
    is_ours = "format" in header
    wanted = ("features",) if is_ours else _FEATURES
    name = next((name for name in wanted if name in names), None)
    has_coords = "coords" in names
    if name is None or (is_ours and not has_coords):
        raise _missing("features" if name is None else "coords", names, is_ours=is_ours)
    return Content(
        features=read(name),
        coords=read("coords") if has_coords else None,
        header=header,
        features_name=name,
    )


def _missing(name: str, found: Collection[str], *, is_ours: bool) -> BagError:
    kind = BagError if is_ours else ForeignBagError
    return kind(
        f"the file has no dataset {name!r}; found {sorted(found)}, expected 'features' (or STAMP's"
        " 'feats') and, where the tiles are to be found again, 'coords'"
    )


def _encode_h5(content: Content) -> bytes:
    """An HDF5 file in the layout of HDF5 1.8 (2008), without time stamps.

    It has checksums, and no limit on the size of an attribute. The header stands at the root and
    not on `coords`: TRIDENT copies the attributes of `coords` into what it makes with other models,
    and those must not inherit it.
    """
    buffer = io.BytesIO()
    creation, access = map(h5py.h5p.create, (h5py.h5p.FILE_CREATE, h5py.h5p.FILE_ACCESS))
    creation.set_obj_track_times(False)  # h5py.File does that from h5py 3.15 on alone
    access.set_libver_bounds(h5py.h5f.LIBVER_V18, h5py.h5f.LIBVER_V18)
    access.set_fileobj_driver(h5py.h5fd.fileobj_driver, buffer)
    # In place, and not in a heap and a tree of their own, which eight or more get.
    beside = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    beside.set_attr_phase_change(_MOST_BESIDE, 0)
    kind = h5py.h5f.ACC_TRUNC
    with _HDF5, h5py.File(h5py.h5f.create(b"bag", kind, creation, access)) as file:
        file.create_dataset(content.features_name, data=content.features)
        coords = file.create_dataset("coords", data=content.coords, dcpl=beside)
        for key, value in content.coords_attributes.items():
            coords.attrs.create(key, value)
        # As bytes a text has a fixed length and lies where the checksums are; see _text.
        texts = {key: np.bytes_(text.encode()) for key, text in content.header.items()}
        for key, value in {**content.attributes, **texts}.items():
            file.attrs.create(key, value)
    return buffer.getvalue()


def _decode_h5(path: Path) -> Content:
    with _HDF5, h5py.File(path, "r") as file:
        attributes = file.attrs
        header = {key: _text(attributes, key) for key in _HEADER if key in attributes}
        is_ours = "format" in header
        known = [n for n in (*_FEATURES, "coords") if file.get(n, getlink=True) is not None]
        most = _MOST_UNPACKED * path.stat().st_size + _SPARE_BYTES
        content = _content_of(
            known or list(file), lambda name: _dataset(file, name, most, is_ours=is_ours), header
        )
        if is_ours:
            return content
        places = {} if content.coords is None else _numbers(file["coords"], _COORDS_ATTRIBUTES)
        root = _numbers(file, _ROOT_ATTRIBUTES)
        return replace(content, attributes=root, coords_attributes=places)


def _text(attributes: h5py.AttributeManager, key: str) -> str:
    """Text that xmag wrote; "" for other types: HDF5 may hang or crash on damaged ones."""
    attribute = attributes.get_id(key)
    if attribute.shape != () or attribute.dtype.kind != "S":
        return ""
    value = np.empty((), attribute.dtype)
    attribute.read(value)
    return str(value.item().decode())


def _numbers(place: h5py.Group | h5py.Dataset, keys: Collection[str]) -> dict[str, float | None]:
    """Attributes that are one number; None for those that are something else: see _text."""
    found: dict[str, float | None] = {}
    for key in keys:
        if key in place.attrs:
            attribute = place.attrs.get_id(key)
            is_number = attribute.shape == () and attribute.dtype.kind in "iuf"
            found[key] = place.attrs[key].item() if is_number else None
    return found


def _dataset(file: h5py.File, name: str, most: int, *, is_ours: bool) -> NDArray[Any]:
    """The values of a dataset that lies in this file and takes at most `most` bytes."""
    link = file.get(name, getlink=True)
    if not (link is None or isinstance(link, h5py.HardLink)):
        raise ValueError(f"{name!r} lies in another file or under another name")
    dataset = file.get(name)
    if not isinstance(dataset, h5py.Dataset):
        raise _missing(name, file, is_ours=is_ours)
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
    return np.asarray(dataset[()])


def _is_whole(dataset: h5py.Dataset) -> bool:
    """Whether all of a dataset is in the file: where nothing was written, HDF5 would read zeros.

    It would read beside a chunk that has no room for its checksum.
    """
    if dataset.chunks is None:
        return bool(dataset.id.get_storage_size() == dataset.nbytes)
    grid = (-(-size // chunk) for size, chunk in zip(dataset.shape, dataset.chunks, strict=True))
    sizes: list[int] = []
    dataset.id.chunk_iter(lambda chunk: sizes.append(chunk.size))
    least = _CHECKSUM_BYTES if dataset.fletcher32 else 0
    return len(sizes) == math.prod(grid) and min(sizes, default=1) > least


def _encode_safetensors(content: Content) -> bytes:
    """A safetensors file with its header in order: the library writes it in a random one.

    A file is the header's length (8 bytes, little-endian), the header as JSON padded with spaces to
    a multiple of 8, and the arrays, which the header locates relative to its own end.
    """
    arrays = {"features": content.features, "coords": np.asarray(content.coords)}
    data = safetensors.numpy.save(arrays, metadata=dict(content.header))
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[end:]


def _decode_safetensors(path: Path) -> Content:
    with safetensors.safe_open(path, framework="numpy") as file:
        header = {k: v for k, v in (file.metadata() or {}).items() if k in _HEADER}
        return _content_of(list(file.keys()), file.get_tensor, header)


def _decode_npz(path: Path) -> Content:
    """The arrays of an .npz, such as slide2vec's, in no more memory than the file can hold."""
    with zipfile.ZipFile(path) as archive:
        most = _MOST_UNPACKED * path.stat().st_size + _SPARE_BYTES
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        return _content_of(names, lambda name: _npy(archive, name, most))


def _npy(archive: zipfile.ZipFile, name: str, most: int) -> NDArray[Any]:
    """The numbers of an array in an .npz; NumPy's reader takes the memory that the header asks."""
    info = archive.getinfo(f"{name}.npy")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name!r} is compressed in another way than NumPy does")
    with archive.open(info) as file:
        if (version := np.lib.format.read_magic(file)) != (1, 0):  # its header is at most 64 kB
            raise ValueError(f"{name!r} is an array of version {version}; expected (1, 0)")
        shape, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
        size = math.prod(shape) * dtype.itemsize
        if dtype.kind not in "iuf" or size > min(most, info.file_size):
            raise ValueError(
                f"{name!r} are {dtype} of shape {shape}, {size} bytes; expected numbers, and at"
                f" most {min(most, info.file_size)} bytes in a file of this size"
            )
        values = np.frombuffer(file.read(size), dtype)
        if file.read(1):  # at the end the checksum is compared
            raise ValueError(f"{name!r} has more bytes than numbers")
    return values.reshape(shape, order="F" if by_columns else "C")


def _encode_pt(content: Content) -> bytes:
    import torch  # only here: see TYPE_CHECKING

    buffer = io.BytesIO()
    torch.save(torch.tensor(content.features), buffer)
    return buffer.getvalue()


def _decode_pt(path: Path) -> Content:
    """A tensor, as CLAM's and slide2vec's, or a dictionary of them."""
    from xmag.hub.weights import read_tensors  # only here: it imports torch

    try:
        tensors = read_tensors(path)
    except WeightsError as error:
        raise ForeignBagError(
            f"{error}. Features are read from a tensor: torch.save(torch.as_tensor(features), path)"
        ) from error
    if "" in tensors:  # the file is a tensor
        tensors["features"] = tensors[""]
    if not tensors.keys() & set(_FEATURES):
        raise ForeignBagError(
            f"the file holds {sorted(tensors)}; expected a tensor (N, D), or one called 'features'"
        )
    most = path.stat().st_size
    return _content_of(tensors, lambda name: dense(tensors[name], most))


def dense(tensor: "Tensor", most: int | None = None) -> NDArray[Any]:
    """The numbers of a tensor in an array, bfloat16 and the like as float32.

    Raises ForeignBagError for what is sparse, complex, quantized or without values, and for one
    that takes more than `most` bytes: a view may repeat one number as often as it likes.
    """
    import torch  # only here: see TYPE_CHECKING

    is_strided = tensor.layout == torch.strided and not tensor.is_nested
    if not is_strided or tensor.is_complex() or tensor.is_quantized or tensor.is_meta:
        raise ForeignBagError(
            f"it is a tensor of {tensor.dtype}, {tensor.layout}; expected dense floats"
        )
    if most is not None and tensor.numel() * tensor.element_size() > most:
        raise ForeignBagError(
            f"a tensor of shape {tuple(tensor.shape)} lies in a file of {most} bytes; expected one"
            " that is as large as it says: save it again, with tensor.contiguous()"
        )
    values = tensor.detach().cpu().resolve_neg()
    narrow = values.is_floating_point() and values.element_size() < 8
    return np.asarray((values.float() if narrow else values).numpy())


_ENCODERS: dict[str, Callable[[Content], bytes]] = {
    ".h5": _encode_h5, ".safetensors": _encode_safetensors, ".pt": _encode_pt,
}  # fmt: skip
_DECODERS: dict[str, Callable[[Path], Content]] = {
    ".h5": _decode_h5, ".safetensors": _decode_safetensors, ".pt": _decode_pt,
    ".npz": _decode_npz,
}  # fmt: skip
SUFFIXES = tuple(_DECODERS)
