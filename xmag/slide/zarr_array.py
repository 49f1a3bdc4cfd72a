"""Arrays of zarr 2 and 3: their metadata, and the bytes and values of their chunks.

Without zarr, which shows a missing chunk as black in silence, takes memory for whatever a chunk
says it unpacks to, decodes in threads and an event loop of its own, which stay, and changes the
program's warning filters when it is imported.
"""

import json
import math
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from xmag.errors import SlideError, UnsupportedSlideError
from xmag.slide.integrity import LOST_BYTES, damaged
from xmag.slide.remote import RemoteFolder
from xmag.slide.tiff import LocalSource

_MAX_TEXT = 1 << 22
"""Most bytes of a metadata document; those of slides have some thousands."""
_MAX_CHUNK_BYTES = 1 << 28
_MAX_CHUNKS_OF_SHARD = 1 << 20
_MORE = 64
"""Bytes that unpacking may give beyond those of the pixels: checksums, or what is then an error."""
_SHORT = re.compile(r"[\w|<>]{1,20}", re.ASCII)
_COMPRESSORS = {"blosc", "zstd", "gzip", "zlib"}
_KNOWN_3 = {
    "zarr_format", "node_type", "shape", "data_type", "chunk_grid", "chunk_key_encoding", "codecs",
    "fill_value", "attributes", "dimension_names", "storage_transformers", "consolidated_metadata",
}  # fmt: skip
"""Fields of an array in zarr 3; what others there are must say that they may be left out."""
UNSTORED = 0xFFFF_FFFF_FFFF_FFFF
"""Offset and length, in the index of a shard, of a chunk that it does not hold (ZEP 2)."""


class LocalFolder:
    """Files below a folder of this machine, as `RemoteFolder` has those at a URL."""

    def __init__(self, path: Path) -> None:
        self._path, self.name = path, path.name

    def read_files(self, names: Sequence[str], most: int) -> list[bytes | None]:
        """The first `most` bytes of files; None for those that are not there."""
        return [self._read(name, most) for name in names]

    def size(self, name: str) -> int | None:
        """The length of a file; None where it is not there."""
        return None if self._read(name, 0) is None else (self._path / name).stat().st_size

    def read_parts(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Ranges of the bytes of a file that is there."""
        source = LocalSource(self._path / name)
        try:
            return source.read_many(ranges)
        finally:
            source.close()

    def _read(self, name: str, most: int) -> bytes | None:
        path = self._path / name
        try:
            facts = path.stat()
            if not stat.S_ISREG(facts.st_mode):
                raise damaged("something lies in it that is no file, where one should be")
            with path.open("rb") as file:
                return file.read(min(most, facts.st_size))
        except (FileNotFoundError, NotADirectoryError):
            return None
        # Without its cause, which names folders.
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise SlideError(f"a file of {self.name} cannot be read: {reason}; check it") from None

    def close(self) -> None:
        """Do nothing: no file stays open."""


Folder = LocalFolder | RemoteFolder


@dataclass(frozen=True, slots=True, kw_only=True)
class ZarrArray:
    """An array of 8-bit pixels: its chunks, the names of their files, and their coding.

    Shapes have a number for each of `axes`, such as "tczyx". `order` are the axes as a chunk stores
    them, and `codecs` what its bytes went through. `fill` is the value of what is not stored; None
    for any. `shard` is the shape of a file of several chunks: `index_first` says where its index
    lies, and `index_crc` whether a checksum follows that. `name_of` names the file of a chunk, or
    of a shard, by its place in the grid of those.
    """

    axes: str
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    order: tuple[int, ...]
    codecs: tuple[str, ...]
    fill: Any
    name_of: Callable[[tuple[int, ...]], str]
    shard: tuple[int, ...] | None = None
    index_first: bool = False
    index_crc: bool = False

    def side(self, axis: str) -> int:
        """Length along an axis; 1 along one that is not there."""
        return self.shape[self.axes.index(axis)] if axis in self.axes else 1

    def chunk_side(self, axis: str) -> int:
        """Length of a chunk along an axis."""
        return self.chunk[self.axes.index(axis)]

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of its pixels."""
        return self.side("x"), self.side("y")

    @property
    def declares_empties(self) -> bool:
        """Whether what is not there is white: 255 is no writer's default, as 0 and null are."""
        return not isinstance(self.fill, bool) and bool(self.fill == 255)

    @property
    def most_bytes(self) -> int:
        """Most bytes that a chunk may have as it is stored."""
        return 2 * math.prod(self.chunk) + (1 << 16)

    @property
    def per_shard(self) -> tuple[int, ...]:
        """Number of chunks of a shard along each axis."""
        pairs = zip(self.shard or self.chunk, self.chunk, strict=True)
        return tuple(whole // part for whole, part in pairs)

    def chunks_of_tile(self, row: int, column: int) -> list[tuple[int, ...]]:
        """Places of the chunks that hold the channels of a tile, in the order of these."""
        place = {"y": row, "x": column}
        return [
            tuple(block if axis == "c" else place.get(axis, 0) for axis in self.axes)
            for block in range(-(-self.side("c") // self.chunk_side("c")))
        ]

    def pixels(self, data: bytes | None) -> NDArray[np.uint8]:
        """The (height, width, channels) of a chunk; of None, of what is not stored.

        Raises ValueError or RuntimeError where the bytes do not hold what they should.
        """
        whole = math.prod(self.chunk)
        if data is None:
            values = np.broadcast_to(np.uint8(self.fill), self.chunk)
        else:
            for codec in reversed(self.codecs):
                data = _unpacked(codec, data, whole)
            if len(data) != whole:
                raise ValueError(f"it holds {len(data)} bytes of pixels, expected {whole}")
            stored = np.frombuffer(data, np.uint8)
            values = stored.reshape([self.chunk[axis] for axis in self.order])
            values = values.transpose(np.argsort(self.order))
        rest = [axis for axis in self.axes if axis in "yxc"]
        values = values[tuple(slice(None) if axis in rest else 0 for axis in self.axes)]
        return values.transpose([rest.index(axis) for axis in "yxc"])

    def index(self, folder: Folder, name: str) -> NDArray[np.uint64] | None:
        """(offset, length) of each chunk in a shard; None where that is not there."""
        size = folder.size(name)
        if size is None:
            return None
        length = 16 * math.prod(self.per_shard) + 4 * self.index_crc
        if size < length:
            raise damaged(f"a shard has {size} bytes, fewer than the {length} of its index")
        data = folder.read_parts(name, [(0 if self.index_first else size - length, length)])[0]
        if self.index_crc:
            try:
                data = _unpacked("crc32c", data, length)
            except ValueError:
                raise damaged("the index of a shard has another checksum than it says") from None
        index = np.frombuffer(data, "<u8").reshape(-1, 2)
        there = index[(index != UNSTORED).any(axis=1)]
        if (there > size).any() or (there.sum(axis=1) > size).any():
            raise damaged(f"the index of a shard leads beyond its {size} bytes")
        return index


def _unpacked(codec: str, data: bytes, whole: int) -> bytes:
    """The bytes that went into a codec, at most a few more than `whole`."""
    if codec == "crc32c":
        if len(data) < 4 or _crc32c(data[:-4]) != int.from_bytes(data[-4:], "little"):
            raise ValueError("its bytes have another checksum than they say")
        return data[:-4]
    # With the size of what comes out, so that a few bytes cannot unpack to gigabytes.
    if codec in ("gzip", "zlib"):
        unpack = imagecodecs.gzip_decode if codec == "gzip" else imagecodecs.zlib_decode
        return bytes(unpack(data, out=whole + _MORE))
    if codec == "zstd":
        raw = bytes(imagecodecs.zstd_decode(data, out=whole + _MORE))
    else:
        # c-blosc believes both lengths, and reads on behind the end.
        lengths = [int.from_bytes(data[at : at + 4], "little") for at in (4, 12)]
        if lengths != [whole, len(data)]:
            raise ValueError(
                f"its header says {lengths[1]} bytes that unpack to {lengths[0]}; there are"
                f" {len(data)}, for {whole}"
            )
        raw = bytes(imagecodecs.blosc_decode(data, numthreads=1, out=whole))
    # These two have no checksum, or seldom. Zeros in pixels are what they make less of.
    if bytes(LOST_BYTES) in data and bytes(LOST_BYTES) not in raw:
        raise ValueError(f"it has a stretch of {LOST_BYTES} zeros, as where bytes were lost")
    return raw


def _crc32c(data: bytes) -> int:
    try:
        from google_crc32c import value
    except ImportError:  # what zarr 3.0 brings
        from crc32c import crc32c

        return int(crc32c(data))
    return int(value(data))


def read_documents(folder: Folder, names: Sequence[str]) -> list[Mapping[str, Any] | None]:
    """The JSON objects in files; None for those that are not there. ValueError for no JSON."""
    found = list[Mapping[str, Any] | None]()
    for data in folder.read_files(names, _MAX_TEXT + 1):
        if data is not None and len(data) > _MAX_TEXT:
            raise damaged(f"a document of its metadata has more than {_MAX_TEXT} bytes")
        document = None if data is None else json.loads(data)
        if not isinstance(document, dict | None):
            raise ValueError("it is no JSON object")
        found.append(document)
    return found


def read_arrays(
    folder: Folder, names: Sequence[str], zarr_format: int, axes: str
) -> list[ZarrArray]:
    """The arrays of these names. Raises UnsupportedSlideError for others than of 8-bit pixels."""
    document = "zarr.json" if zarr_format == 3 else ".zarray"
    found = read_documents(folder, [f"{name}/{document}" for name in names])
    arrays = []
    for number, (name, fields) in enumerate(zip(names, found, strict=True)):
        if fields is None:
            raise damaged(f"the {document} of level {number} is not there")
        arrays.append(_parsed(fields, name, zarr_format, axes))
    return arrays


def _parsed(fields: Mapping[str, Any], name: str, zarr_format: int, axes: str) -> ZarrArray:
    kind = fields["dtype" if zarr_format == 2 else "data_type"]
    if kind not in ("|u1", "<u1", ">u1", "u1", "uint8"):
        shown = kind if isinstance(kind, str) and _SHORT.fullmatch(kind) else "of another kind"
        raise UnsupportedSlideError(
            f"its pixels are {shown}; xmag reads 8-bit RGB (brightfield) slides"
        )
    layout = (_layout_2 if zarr_format == 2 else _layout_3)(fields, len(axes))
    separator, first = layout.pop("separator"), ["c"] if layout.pop("prefixed") else []
    if separator not in (".", "/"):
        raise ValueError("the separator in the names of its chunks is none")
    array = ZarrArray(
        axes=axes,
        shape=_lengths(fields["shape"], len(axes)),
        fill=fields.get("fill_value"),
        name_of=lambda place: f"{name}/{separator.join([*first, *map(str, place)])}",
        **layout,
    )
    size, count = math.prod(array.chunk), math.prod(array.per_shard)
    if size > _MAX_CHUNK_BYTES or count > _MAX_CHUNKS_OF_SHARD:
        raise UnsupportedSlideError(
            f"its chunks have {size} bytes, and {count} are in a file; expected at most"
            f" {_MAX_CHUNK_BYTES} and {_MAX_CHUNKS_OF_SHARD}. Write it again in smaller chunks"
        )
    if array.shard and np.mod(array.shard, array.chunk).any():
        raise ValueError("its shards are not made of whole chunks")
    return array


def _lengths(values: object, count: int) -> tuple[int, ...]:
    """A length for each axis; ValueError where they are none."""
    listed = values if isinstance(values, list) else []
    if len(listed) != count or not all(type(n) is int and 0 < n < 1 << 40 for n in listed):
        raise ValueError("its shapes do not fit its axes")
    return tuple(listed)


def _layout_2(fields: Mapping[str, Any], ndim: int) -> dict[str, Any]:
    """The fields of an array, and of the names of its chunks, in a .zarray (zarr 2)."""
    compressor, order = fields["compressor"], tuple(range(ndim))
    codecs = [] if compressor is None else [compressor["id"]]
    if fields.get("filters") or not set(codecs) <= _COMPRESSORS:
        raise _unknown_codec("filters" if fields.get("filters") else codecs[0])
    return {
        "chunk": _lengths(fields["chunks"], ndim),
        "order": order[::-1] if fields["order"] == "F" else order,
        "codecs": tuple(codecs),
        "separator": fields.get("dimension_separator", "."),
        "prefixed": False,
    }


def _layout_3(fields: Mapping[str, Any], ndim: int) -> dict[str, Any]:
    """The fields of an array, and of the names of its chunks, in a zarr.json (zarr 3)."""
    grid, naming, codecs = (fields[key] for key in ("chunk_grid", "chunk_key_encoding", "codecs"))
    extra = [value for key, value in fields.items() if key not in _KNOWN_3]
    if (
        grid["name"] != "regular"
        or naming["name"] not in ("default", "v2")
        or fields.get("storage_transformers")
        or not all(isinstance(value, dict) and value["must_understand"] is False for value in extra)
    ):
        raise UnsupportedSlideError("it uses an extension of zarr 3 that xmag does not know")
    chunk, shard = _lengths(grid["configuration"]["chunk_shape"], ndim), None
    index = list[str]()
    if codecs[0]["name"] == "sharding_indexed":
        inner = codecs[0]["configuration"]
        index = [codec["name"] for codec in inner["index_codecs"]]
        endian = inner["index_codecs"][0]["configuration"]["endian"]
        if len(codecs) > 1 or index not in (["bytes"], ["bytes", "crc32c"]) or endian != "little":
            raise _unknown_codec("shards of another kind")
        chunk, shard = _lengths(inner["chunk_shape"], ndim), chunk
        first, codecs = inner.get("index_location", "end") == "start", inner["codecs"]
    order, names = tuple(range(ndim)), [codec["name"] for codec in codecs]
    if names[0] == "transpose":
        order, names = tuple(codecs[0]["configuration"]["order"]), names[1:]
    unknown = [name for name in names[1:] if name not in {*_COMPRESSORS, "crc32c"}]
    if unknown or names[0] != "bytes" or len(names) > 4 or sorted(order) != list(range(ndim)):
        raise _unknown_codec([*unknown, names[0]][0])
    if len(_COMPRESSORS & set(names)) > 1:
        raise _unknown_codec("several compressions in a row")
    return {
        "chunk": chunk,
        "shard": shard,
        "index_first": shard is not None and first,
        "index_crc": "crc32c" in index,
        "order": order,
        "codecs": tuple(names[1:]),
        "separator": naming.get("configuration", {}).get(
            "separator", "." if naming["name"] == "v2" else "/"
        ),
        "prefixed": naming["name"] == "default",
    }


def _unknown_codec(name: object) -> UnsupportedSlideError:
    shown = name if isinstance(name, str) and re.fullmatch(r"[\w ,.-]{1,40}", name) else "others"
    return UnsupportedSlideError(
        f"its chunks are coded with {shown}; xmag reads blosc, zstd, gzip, zlib and uncompressed"
        " ones, without filters. Write it again so"
    )
