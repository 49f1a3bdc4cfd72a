"""Every kind of finding, once, as small as it can be: what the fuzzer found must not come back."""

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

import h5py
import numpy as np

from fuzz import bags, checkpoints, slides
from fuzz.streams import packed_bombs
from fuzz.structure import SIZES, chunks_of
from fuzz.tiffs import Editor

FINE = "fine"
THEIR_WARNINGS = checkpoints.THEIR_WARNINGS
THEIR_PRINTS = slides.THEIR_PRINTS

_PAGE, _TILE = 0, 0


def make(originals: Mapping[str, bytes], number: int, rng: Random) -> tuple[str, bytes]:
    """(name, content) of a case; what it is made from depends on no random number."""
    name, change = CASES[list(CASES)[number]]
    return name, change(originals[name])


def outcome(path: Path) -> str:
    """What became of a case, in a word; raises what is no XmagError."""
    if path.name in checkpoints.seeds():
        return _fine(checkpoints.outcome(path), checkpoints.FINE)
    if path.name in bags.seeds():
        return _fine(bags.outcome(path), bags.FINE)
    return _fine(slides.outcome(path, beside=False), slides.FINE)


def _fine(word: str, fine: str) -> str:
    return FINE if word == fine else word


Change = Callable[[bytes], bytes]


def _tag(
    code: int, *, kind: int | None = None, count: int | None = None, value: int | None = None
) -> Change:
    """Another type, count or (where it lies in the tag itself) value of a tag of the first page."""

    def change(data: bytes) -> bytes:
        editor = Editor(data)
        entry = next(e for e in editor.map.directories[_PAGE].entries if e.code == code)
        room = 8 if editor.map.big else 4
        if kind is not None:
            editor.put(entry.at + 2, 2, kind)
        if count is not None:
            editor.put(entry.at + 4, room, count)
        if value is not None:
            editor.put(entry.at + 4 + room, room, value)
        return bytes(editor.data)

    return change


def _element(code: int, index: int, value: int) -> Change:
    """Another value in a tag that lists several."""

    def change(data: bytes) -> bytes:
        editor = Editor(data)
        entry = next(e for e in editor.map.directories[_PAGE].entries if e.code == code)
        editor.put(entry.value_at + index * SIZES[entry.kind], SIZES[entry.kind], value)
        return bytes(editor.data)

    return change


def _text(old: str, new: str) -> Change:
    """Another word in the description of the first page, as long as the old one."""
    assert len(old) == len(new)
    return lambda data: data.replace(old.encode(), new.encode(), 1)


def _tile(change_stream: Callable[[bytes], bytes]) -> Change:
    """Other bytes for the first tile of every page."""

    def change(data: bytes) -> bytes:
        editor = Editor(data)
        for directory in editor.map.directories:
            chunk = chunks_of(data, editor.map, directory)[_TILE]
            editor.replace(chunk, change_stream(data[chunk.offset : chunk.offset + chunk.length]))
        return bytes(editor.data)

    return change


def _loop(data: bytes) -> bytes:
    editor = Editor(data)
    first, second = editor.map.directories[:2]
    editor.put(second.next_at, 4, first.at)
    return bytes(editor.data)


def _count(data: bytes, count: int) -> bytes:
    editor = Editor(data)
    editor.put(editor.map.directories[_PAGE].at, 2, count)
    return bytes(editor.data)


def _sub_ifd_loop(data: bytes) -> bytes:
    editor = Editor(data)
    first = editor.map.directories[0]
    entry = next(e for e in first.entries if e.code == 330)
    editor.put(entry.value_at, entry.item_size, first.at)
    return bytes(editor.data)


def _many_scans(stream: bytes) -> bytes:
    scan = stream[stream.index(b"\xff\xda") : -2]
    return stream[:-2] + scan[:60] * 5000 + stream[-2:]


def _png_with(*chunks: tuple[bytes, bytes]) -> Change:
    def change(data: bytes) -> bytes:
        packed = b"".join(
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
            for kind, content in chunks
        )
        return data[:33] + packed + data[33:]

    return change


def _bag(header: Mapping[str, str]) -> Change:
    """A well-formed bag with a checksum that fits, and a header that does not."""
    features, coords = np.zeros((3, 4), np.float32), np.zeros((3, 2), np.int64)
    return lambda _: bags.hostile_safetensors(features, coords, header)


def _h5(fill: Callable[[Any], object]) -> Change:
    def change(_: bytes) -> bytes:
        buffer = io.BytesIO()
        with h5py.File(buffer, "w", libver="latest") as file:
            fill(file)
            file["coords"] = np.zeros((3, 2), np.int64)
        return buffer.getvalue()

    return change


def _virtual(file: Any) -> None:
    layout = h5py.VirtualLayout(shape=(3, 2), dtype="f4")
    layout[:] = h5py.VirtualSource("/etc/other.h5", "x", shape=(3, 2))
    file.create_virtual_dataset("features", layout)


def _bomb(file: Any) -> None:
    shape = (1 << 14, 1 << 14)
    file.create_dataset("features", shape=shape, chunks=shape, dtype="f4", compression="gzip")
    pack = zlib.compressobj(9)
    packed = b"".join(pack.compress(bytes(1 << 20)) for _ in range(1 << 10)) + pack.flush()
    file["features"].id.write_direct_chunk((0, 0), packed)


def _short_chunk(file: Any) -> None:
    shape = (3, 4)
    file.create_dataset("features", shape=shape, chunks=shape, dtype="f4", fletcher32=True)
    file["features"].id.write_direct_chunk((0, 0), b"\0\0")


def _json(**changes: Any) -> Change:
    return lambda data: json.dumps({**json.loads(data), **changes}).encode()


def _json_vit(**changes: Any) -> Change:
    return lambda data: _json(vit={**json.loads(data)["vit"], **changes})(data)


def _zip(change: Callable[[dict[str, bytes]], object], packing: int = zipfile.ZIP_STORED) -> Change:
    def changed(data: bytes) -> bytes:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            records = {info.filename: archive.read(info) for info in archive.infolist()}
        change(records)
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", packing) as archive:
            for name, content in records.items():
                archive.writestr(name, content)
        return out.getvalue()

    return changed


def _pickle(old: bytes, new: bytes) -> Change:
    def change(records: dict[str, bytes]) -> None:
        name = next(name for name in records if name.endswith("data.pkl"))
        assert old in records[name]
        records[name] = records[name].replace(old, new)

    return _zip(change)


def _inflate(records: dict[str, bytes]) -> None:
    name = next(name for name in records if "/data/" in name)
    records[name] = bytes(1 << 26)


_REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"

CASES: dict[str, tuple[str, Change]] = {
    "a width of two values": ("generic-raw.tif", _tag(256, count=2)),
    "a width in bytes": ("aperio-big.svs", _tag(256, kind=1)),
    "a compression in bytes": ("packbits.tif", _tag(259, kind=7)),
    "a tile width as a fraction": ("ome.tif", _tag(322, kind=5)),
    "tile places as floats": ("generic-j2k-rgb.tif", _tag(324, kind=11)),
    "a photometric that is none": ("aperio-rgb444.svs", _tag(262, value=32_103)),
    "a planar configuration that is none": ("big-endian.tif", _tag(284, value=0xFFFF_FFFF)),
    "a predictor of no type": ("generic-deflate.tif", _tag(317, kind=129)),
    "a tile of 2^28 px": ("generic-raw.tif", _tag(322, value=1 << 28)),
    "a JPEG 2000 tile of 2^25 px": ("aperio-j2k-rgb.svs", _tag(322, value=1 << 18)),
    "OpenSlide, a tile of 2^28 px": ("trestle.tif", _tag(322, value=1 << 28)),
    "OpenSlide, a tile of 3 GB": ("trestle.tif", _element(325, 0, 3_000_000_000)),
    "OpenSlide, a JPEG without its start": ("trestle.tif", _tile(lambda s: s[:300])),
    "OpenSlide, a stitched slide with such": ("ventana-overlap.bif", _tile(lambda s: s[:300])),
    "a strip of 3 GB": ("strips.tif", _element(279, 0, 3_000_000_000)),
    "a tile beyond 2^63": ("sparse.tif", _element(324, 0, (1 << 63) + 5)),
    "a tile of 2^64 bytes": ("sparse.tif", _element(325, 0, (1 << 64) - 1)),
    "restart markers in a wrong order": ("hamamatsu.ndpi", _element(65_426, 3, 0)),
    "a JPEG header of 4 GB": ("hamamatsu.ndpi", _element(65_426, 0, 0xFFFF_FFFF)),
    "restart markers of 8 bytes": ("hamamatsu.ndpi", _tag(65_426, kind=16)),
    "restart markers before the start": ("hamamatsu.ndpi", _tag(65_426, kind=9)),
    "a Leica image without a view": ("leica.scn", _text("<view ", "<veiw ")),
    "directories in a loop": ("aperio-ycbcr420.svs", _loop),
    "sub-directories in a loop": ("ome.tif", _sub_ifd_loop),
    "65,535 tags": ("generic-lzw.tif", lambda d: _count(d, 65_535)),
    "px spacings 100 times apart": ("philips.tiff", _text("0.000500000", "0.900000000")),
    "a JPEG that ends with 0xFF": ("generic-ycbcr420.tif", _tile(lambda _: b"\xff\xd8\xff")),
    "a JPEG of 5,000 scans": ("generic-ycbcr420.tif", _tile(_many_scans)),
    "a JPEG image of 5,000 scans": ("progressive.jpg", _many_scans),
    "a deflate bomb": ("generic-deflate.tif", _tile(lambda _: packed_bombs()[0])),
    "a Zstandard bomb": ("generic-zstd.tif", _tile(lambda _: packed_bombs()[1])),
    "a Zstandard frame of 4 EB": ("generic-zstd.tif", _tile(lambda _: packed_bombs()[3])),
    "an LZW bomb": ("generic-lzw.tif", _tile(lambda _: packed_bombs()[4])),
    "a PackBits bomb": ("packbits.tif", _tile(lambda _: packed_bombs()[5])),
    "a profile without an end": ("plain.png", _png_with((b"iCCP", b"no end"))),
    "an animation of no frames": ("plain-rgba.png", _png_with((b"acTL", bytes(8)))),
    "a text of a GB": ("plain.png", _png_with((b"zTXt", b"a\0\0" + packed_bombs()[0]))),
    "tiles that are no JSON": ("a.safetensors", _bag({"tiles": "{"})),
    "tiles without a size": ("a.safetensors", _bag({"tiles": "{}"})),
    "tiles that are a number": ("a.safetensors", _bag({"tiles": "1"})),
    "tiles nested for ever": ("a.safetensors", _bag({"tiles": "[" * 100_000})),
    "provenance nested for ever": ("a.safetensors", _bag({"provenance": '{"a":' * 50_000})),
    "features in another file": ("a.h5", _h5(_virtual)),
    "features that are not HDF5": (
        "a.h5",
        _h5(
            lambda f: f.create_dataset("features", (8, 4), "f4", external=[("/etc/passwd", 0, 128)])
        ),
    ),
    "a link to another file": (
        "a.h5",
        _h5(lambda f: f.__setitem__("features", h5py.ExternalLink("/tmp/b.h5", "/x"))),
    ),
    "features that are texts": (
        "a.h5",
        _h5(lambda f: f.create_dataset("features", data=["a", "b"], dtype=h5py.string_dtype())),
    ),
    "features of an EB": (
        "a.h5",
        _h5(lambda f: f.create_dataset("features", (1 << 40, 1 << 18), "f4", chunks=(1, 4))),
    ),
    "features that unpack to a GB": ("a.h5", _h5(_bomb)),
    "a chunk shorter than its checksum": ("a.h5", _h5(_short_chunk)),
    "a mean that is a text": ("config.json", _json(mean=["a", "b", "c"])),
    "a deviation of NaN": ("config.json", _json(std=[float("nan")] * 3)),
    "a width beyond 64 bits": ("config.json", _json_vit(width=1 << 70)),
    "a size that is true": ("config.json", _json_vit(hidden=True)),
    "a configuration nested for ever": ("config.json", lambda _: b"[" * 100_000),
    "a tensor rebuilt as a parameter": (
        "model.pth",
        _pickle(_REBUILD, b"ctorch._utils\n_rebuild_parameter\n"),
    ),
    "a tensor rebuilt as a counter": ("model.pth", _pickle(_REBUILD, b"ccollections\nCounter\n")),
    "a storage that is no type": (
        "model.pth",
        _pickle(b"ctorch\nFloatStorage\n", b"ccollections\nCounter\n"),
    ),
    "weights that unpack to 64 MB": ("model.pth", _zip(_inflate, zipfile.ZIP_DEFLATED)),
    "a text of 4 GB": ("legacy.pt", lambda _: b"\x80\x02X\xff\xff\xff\xffabc"),
}
"""By what is wrong: the file that it is wrong with, and how it is made so."""
