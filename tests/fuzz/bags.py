"""Cases of damaged feature files, and what is done with each of them."""

import hashlib
import io
import json
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import h5py
import numpy as np
import safetensors.numpy

from fuzz.streams import cut, filled, flipped, moved, nothing, tail
from xmag.bag import FeatureBag
from xmag.bag.formats import Content, encode
from xmag.geometry import TileGeometry
from xmag.provenance import Provenance

FINE = "loaded"
THEIR_PRINTS = r"(?!)"
THEIR_WARNINGS: tuple[type[Warning], ...] = ()
_ANY = (flipped, filled, cut, moved, tail, nothing)
_NUMBERS = (
    0,
    1,
    2,
    7,
    8,
    127,
    128,
    255,
    256,
    65_535,
    1 << 20,
    (1 << 31) - 1,
    (1 << 32) - 1,
    (1 << 63) - 1,
    (1 << 64) - 1,
)
_TEXTS = (
    "", "{}", "[]", "null", "NaN", "1e999", "[" * 100_000, '{"a":' * 50_000, '"\\ud800"', "\0",
    "é" * 70_000,
    '{"fingerprint": {}, "record": {}}', '{"fingerprint": [], "record": 1}', "xmag.FeatureBag",
    "1", "2",
    "99999999999999999999999", "-1", "²", '{"size_px": 224}',
)  # fmt: skip


def seeds() -> dict[str, bytes]:
    """Small valid feature files: ours in both formats, and those of other tools."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(30, 16)).astype(np.float32)
    coords = rng.integers(0, 9000, (30, 2))
    tiles = TileGeometry(
        size_px=224,
        mpp=2.0,
        size_level0=896,
        overlap_px=0,
        level0_mpp=0.5,
        level0_size=(9000, 8000),
    )
    provenance = Provenance({"weights_sha256": "0" * 64}, {"slide": {"name": "a.svs"}})
    bag = FeatureBag(features, coords, provenance, tiles)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("a.h5", "a.safetensors"):
            bag.save(Path(folder, name))
            found[name] = Path(folder, name).read_bytes()
    for name, options in (
        ("clam.h5", {}),
        (
            "chunked.h5",
            {"chunks": (8, 16), "compression": "gzip", "shuffle": True, "fletcher32": True},
        ),
    ):
        buffer = io.BytesIO()
        with h5py.File(buffer, "w") as file:
            file.create_dataset(
                "features", data=features[None] if name == "clam.h5" else features, **options
            )
            file.create_dataset("coords", data=coords)
            file["coords"].attrs["patch_size"] = 224
        found[name] = buffer.getvalue()
    for name, array, attributes, of_coords in (
        ("trident.h5", "features", {}, {
            "patch_size": 224, "patch_size_level0": 896, "level0_magnification": 20.0,
            "target_magnification": 5, "overlap": 0, "name": "a", "level0_width": 9000,
            "level0_height": 8000,
        }),
        ("stamp.h5", "feats", {"unit": "um", "tile_size_um": 448.0, "tile_size_px": 224}, {}),
    ):  # fmt: skip
        buffer = io.BytesIO()
        with h5py.File(buffer, "w") as file:
            file[array], file["coords"] = features, coords.astype(np.float32)
            file.attrs.update(attributes)
            file["coords"].attrs.update(of_coords)
        found[name] = buffer.getvalue()
    buffer = io.BytesIO()
    np.savez_compressed(buffer, features=features, tile_index=np.arange(30))
    found["slide2vec.npz"] = buffer.getvalue()
    found["foreign.safetensors"] = safetensors.numpy.save({"features": features, "coords": coords})
    return found


def make(originals: Mapping[str, bytes], number: int, rng: Random) -> tuple[str, bytes]:
    """(name, content) of a damaged feature file."""
    name = rng.choice(sorted(originals))
    data = originals[name]
    if name.endswith(".npz"):
        return name, rng.choice(_ANY)(data, rng)
    if rng.random() < 0.25:
        return name, _hostile(name, rng)
    if name.endswith(".h5"):
        return name, _damaged_h5(data, rng)
    return name, _damaged_safetensors(data, rng)


def outcome(path: Path) -> str:
    """What became of a feature file, in a word; raises what is no XmagError."""
    bag = FeatureBag.load(path)
    assert bag.features.dtype == np.float32
    assert bag.coords is None or bag.coords.shape == (len(bag), 2)
    assert np.isfinite(bag.features).all()
    return "loaded"


_SIGNATURES = (
    b"OHDR",
    b"OCHK",
    b"TREE",
    b"HEAP",
    b"SNOD",
    b"BTHD",
    b"FRHP",
    b"FHDB",
    b"GCOL",
    b"FSSE",
    b"FADB",
    b"FAHD",
)


def _damaged_h5(data: bytes, rng: Random) -> bytes:
    """An HDF5 file, damaged anywhere or in its structure: superblock, headers, trees, heaps."""
    if rng.random() < 0.3:
        return rng.choice(_ANY)(data, rng)
    out = bytearray(data)
    blocks = [0]
    for signature in _SIGNATURES:
        at = data.find(signature)
        while at >= 0:
            blocks.append(at)
            at = data.find(signature, at + 1)
    for _ in range(rng.choice((1, 1, 2, 4))):
        start = rng.choice(blocks) + rng.randrange(300)
        size = rng.choice((1, 1, 2, 4, 8))
        if start + size > len(out):
            continue
        value = rng.choice((*_NUMBERS, rng.choice(blocks), rng.randrange(1 << 64), len(out)))
        out[start : start + size] = (value % (1 << 8 * size)).to_bytes(size, "little")
    if rng.random() < 0.7:
        _mend_checksums(out, data)
    return bytes(out)


def _mend_checksums(out: bytearray, data: bytes) -> None:
    """Give the headers that have a checksum the right one, so that the damage gets past it."""
    at = data.find(b"OHDR")
    while at >= 0:
        end = _end_of_header(data, at)
        if end is not None and end + 4 <= len(out):
            out[end : end + 4] = struct.pack("<I", _lookup3(bytes(out[at:end])))
        at = data.find(b"OHDR", at + 1)


def _end_of_header(data: bytes, at: int) -> int | None:
    """Where the checksum of a version 2 object header is (HDF5 file format 3.0, IV.A.1.b)."""
    if at + 6 > len(data) or data[at + 4] != 2:
        return None
    flags = data[at + 5]
    place = at + 6 + (16 if flags & 0x20 else 0) + (4 if flags & 0x10 else 0)
    width = 1 << (flags & 3)
    size = int.from_bytes(data[place : place + width], "little")
    return place + width + size


def _lookup3(key: bytes) -> int:
    """Bob Jenkins' lookup3 (hashlittle), which HDF5 takes for metadata."""
    mask = 0xFFFFFFFF

    def rot(x: int, k: int) -> int:
        return ((x << k) | (x >> (32 - k))) & mask

    a = b = c = (0xDEADBEEF + len(key)) & mask
    at, length = 0, len(key)
    while length > 12:
        x, y, z = struct.unpack_from("<III", key, at)
        a, b, c = (a + x) & mask, (b + y) & mask, (c + z) & mask
        a = ((a - c) & mask) ^ rot(c, 4)
        c = (c + b) & mask
        b = ((b - a) & mask) ^ rot(a, 6)
        a = (a + c) & mask
        c = ((c - b) & mask) ^ rot(b, 8)
        b = (b + a) & mask
        a = ((a - c) & mask) ^ rot(c, 16)
        c = (c + b) & mask
        b = ((b - a) & mask) ^ rot(a, 19)
        a = (a + c) & mask
        c = ((c - b) & mask) ^ rot(b, 4)
        b = (b + a) & mask
        at, length = at + 12, length - 12
    if length:
        x, y, z = struct.unpack("<III", key[at:].ljust(12, b"\0"))
        a, b, c = (a + x) & mask, (b + y) & mask, (c + z) & mask
        c = ((c ^ b) - rot(b, 14)) & mask
        a = ((a ^ c) - rot(c, 11)) & mask
        b = ((b ^ a) - rot(a, 25)) & mask
        c = ((c ^ b) - rot(b, 16)) & mask
        a = ((a ^ c) - rot(c, 4)) & mask
        b = ((b ^ a) - rot(a, 14)) & mask
        c = ((c ^ b) - rot(b, 24)) & mask
    return c


def _damaged_safetensors(data: bytes, rng: Random) -> bytes:
    """A safetensors file, damaged anywhere, or with a header that says something else."""
    if rng.random() < 0.4:
        return rng.choice(_ANY)(data, rng)
    return damaged_safetensors_header(data, rng)


def damaged_safetensors_header(data: bytes, rng: Random) -> bytes:
    """A safetensors file whose header says something else."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    if rng.random() < 0.15:
        return rng.choice(_NUMBERS).to_bytes(8, "little") + data[8:]
    names = [name for name in header if name != "__metadata__"]
    entry = header[rng.choice(names)]
    match rng.randrange(6):
        case 0:
            entry["shape"] = rng.choice(
                ([], [0], [1 << 40, 1 << 40], [-1, 2], [2.5], entry["shape"][::-1], [1] * 99)
            )
        case 1:
            entry["dtype"] = rng.choice(
                (
                    "F64",
                    "BF16",
                    "F16",
                    "I8",
                    "BOOL",
                    "F8_E4M3",
                    "F8_E5M2",
                    "C64",
                    "U64",
                    "F4",
                    "X",
                    "",
                )
            )
        case 2:
            entry["data_offsets"] = rng.choice(([0, 0], [0, 1 << 62], [9, 3], [-4, 8], [0], [0, 8]))
        case 3:
            header["__metadata__"] = rng.choice(
                (None, [], {"format": 1}, {"a": "b" * 999}, {"format": "xmag.FeatureBag"})
            )
        case 4:
            del header[rng.choice(names)]
        case _:
            header[rng.choice(("__metadata__x", "", "features ", "a.b"))] = dict(entry)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[end:]


def _hostile(name: str, rng: Random) -> bytes:
    """A well-formed file that was made to harm: its checksum is right, what it says is not."""
    return _hostile_h5(rng) if name.endswith(".h5") else _hostile_safetensors(rng)


def _hostile_arrays(rng: Random) -> tuple[Any, Any]:
    features = rng.choice(
        (
            np.zeros((3, 4), np.float32), np.full((3, 4), np.nan, np.float32),
            np.zeros((0, 4), np.float32),
            np.zeros((3, 4), np.float64), np.full((3, 4), 1e300), np.zeros(3, np.float32),
            np.zeros((2, 3, 4), np.float32), np.zeros((1, 3, 4), np.float32),
            np.zeros((), np.float32),
            np.zeros((3, 4), np.int8), np.zeros((3, 4), np.bool_), np.zeros((3, 4), np.float16),
            np.zeros((3, 4), np.uint64) + (1 << 63), np.zeros((3, 0), np.float32),
        )
    )  # fmt: skip
    coords = rng.choice(
        (
            np.zeros((3, 2), np.int64), np.zeros((0, 2), np.int64), np.full((3, 2), 0.5),
            np.zeros((3, 3)),
            np.full((3, 2), 1e30), np.zeros((1, 3, 2), np.int32), np.zeros((3, 2), np.uint64) - 1,
        )
    )  # fmt: skip
    return features, coords


def _hostile_header(features: Any, coords: Any, rng: Random) -> dict[str, str]:
    header = {"format": "xmag.FeatureBag", "schema_version": "1"}
    for key in ("provenance", "tiles", "schema_version", "format"):
        if rng.random() < 0.5:
            header[key] = rng.choice(_TEXTS)
    return _with_digest(features, coords, header)


def _with_digest(features: Any, coords: Any, header: Mapping[str, str]) -> dict[str, str]:
    """The header with the checksum that such a bag has."""
    digest = hashlib.sha256()
    for array in (features, coords):
        digest.update(f"{array.shape} {array.dtype.str}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    digest.update(json.dumps({k: header[k] for k in sorted(header)}).encode())
    return {**header, "bag_sha256": digest.hexdigest()}


def hostile_safetensors(features: Any, coords: Any, header: Mapping[str, str]) -> bytes:
    """A bag of xmag's with these texts in its header, and a checksum that fits."""
    ours = {"format": "xmag.FeatureBag", "schema_version": "1", **header}
    whole = _with_digest(features, coords, ours)
    return encode(Content(features=features, coords=coords, header=whole), ".safetensors")


def _hostile_safetensors(rng: Random) -> bytes:
    features, coords = _hostile_arrays(rng)
    header = _hostile_header(features, coords, rng)
    return encode(Content(features=features, coords=coords, header=header), ".safetensors")


def _hostile_h5(rng: Random) -> bytes:
    features, coords = _hostile_arrays(rng)
    buffer = io.BytesIO()
    kind = rng.randrange(9)
    libver = "latest" if kind == 3 else rng.choice(("earliest", "latest", ("v108", "v108")))
    with h5py.File(buffer, "w", libver=libver) as file:
        shape = rng.choice(((1 << 40, 1 << 20), (1 << 20, 1 << 12), (3, 4), (1 << 16, 2048)))
        if kind == 0:  # a whole dataset of the fill value in chunks that do not exist
            file.create_dataset("features", shape=shape, chunks=(1, 4), dtype="f4")
        elif kind == 1:
            file.create_dataset(
                "features",
                shape=(1 << 16, 1 << 10),
                chunks=(1 << 16, 1 << 10),
                dtype="u1",
                compression="gzip",
            )
            file["features"].id.write_direct_chunk((0, 0), b"\x78\xda" + bytes(300))
        elif kind == 2:
            file.create_dataset(
                "features", shape=(8, 4), dtype="f4", external=[("/etc/passwd", 0, 128)]
            )
        elif kind == 3:
            layout = h5py.VirtualLayout(shape=(3, 4), dtype="f4")
            layout[:] = h5py.VirtualSource("/tmp/other.h5", "x", shape=(3, 4))
            file.create_virtual_dataset("features", layout)
        elif kind == 4:
            file["features"] = rng.choice(
                (h5py.ExternalLink("/tmp/other.h5", "/x"), h5py.SoftLink("/features"))
            )
        elif kind == 5:
            file.create_dataset(
                "features",
                data=np.array(["a", "b"] * 3, dtype=object).reshape(3, 2),
                dtype=h5py.string_dtype(),
            )
        elif kind == 6:
            file.create_dataset(
                "features", data=np.zeros((3, 2), np.dtype([("a", "f4"), ("b", "i8")]))
            )
        else:
            file["features"] = features
        file["coords"] = coords
        for key, text in _hostile_header(features, coords, rng).items():
            value = np.bytes_(text.encode("utf-8", "replace"))
            if len(value) < 60_000:
                file.attrs[key] = value if rng.random() < 0.9 else text.replace("\0", "")
    return buffer.getvalue()
