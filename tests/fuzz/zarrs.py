"""Cases of damaged OME-Zarr slides, each packed as a zip file, which is unpacked to be read."""

import gzip
import io
import itertools
import json
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import numcodecs
from support.slides import texture
from support.zarr_slides import write_by_hand, write_zarr

from fuzz import slides, streams
from xmag.plan import plan_tiles
from xmag.slide import Slide
from xmag.tiles import read_tiles

FINE = "read"
THEIR_WARNINGS: tuple[type[Warning], ...] = ()
THEIR_PRINTS = r"^$"

_SIZE = (420, 300)
_WRITERS: dict[str, Callable[[Path], object]] = {
    "planar": lambda p: write_zarr(
        p, texture(*_SIZE), levels=2, compressors=numcodecs.Blosc(cname="lz4")
    ),
    "interleaved": lambda p: write_zarr(p, texture(*_SIZE), levels=2, axes="yxc", channels=3),
    "white": lambda p: write_zarr(p, texture(*_SIZE), levels=2, axes="cyx", fill=255),
    "shards": lambda p: write_zarr(
        p, texture(*_SIZE), levels=2, zarr_format=3, chunk=64, shard=128, channels=3
    ),
    "gzip": lambda p: write_by_hand(
        p, texture(*_SIZE), zarr_format=3, sharded=True, compressor="gzip", pack=gzip.compress
    ),
    "raw": lambda p: write_by_hand(p, texture(*_SIZE), compressor=None, pack=bytes),
}
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 255, 1 << 16, 1 << 31, 1 << 40, 10**30, 0.5, 1e308,
    float("nan"), float("inf"), "", ".", "..", "../0", "/etc", "labels", "c", "y", "x", "t", "a\0",
    "pickle", "gzip", "zstd", "blosc", "zlib", "crc32c", "bytes", "transpose", "sharding_indexed",
    "label", "micrometer", "meter", "start", "big", "F", "|O", "<u2", "\ud800", [], {}, [[]],
    {"name": "gzip"}, {"id": "pickle"}, {"must_understand": False}, [1, 1], [0] * 5, [1 << 20] * 5,
)  # fmt: skip


def seeds() -> dict[str, bytes]:
    """The undamaged slides."""
    return {f"{name}.zip": _seed(name) for name in _WRITERS}


@cache
def _seed(name: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "slide.zarr")
        _WRITERS[name](root)
        return _packed(
            {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        )


def _packed(files: Mapping[str, bytes]) -> bytes:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as archive:
        for name, content in sorted(files.items()):
            archive.writestr(zipfile.ZipInfo(name), content)
    return memory.getvalue()


def make(originals: Mapping[str, bytes], number: int, rng: Random) -> tuple[str, bytes]:
    """(name, content) of a slide with one or two damaged files, or some that are gone or moved."""
    name = rng.choice(sorted(originals))
    with zipfile.ZipFile(io.BytesIO(originals[name])) as archive:
        files = {member: archive.read(member) for member in archive.namelist()}
    texts = [member for member in files if member.rpartition("/")[2] in _DOCUMENTS]
    chunks = [member for member in files if member not in texts]
    for _ in range(rng.choice((1, 1, 2))):
        kind = rng.random()
        if kind < 0.5:
            member = rng.choice(texts)
            change = _other_value if rng.random() < 0.8 else streams.damaged_stream
            files[member] = change(files.get(member, b"{}"), rng)
        elif kind < 0.9:
            member = rng.choice(chunks)
            files[member] = streams.damaged_stream(files.get(member, b""), rng)
        elif kind < 0.95:
            files.pop(rng.choice([*texts, *chunks]), None)
        else:
            files[rng.choice(chunks)] = files.get(rng.choice(chunks), b"")
    return name, _packed(files)


_DOCUMENTS = (".zattrs", ".zarray", ".zgroup", "zarr.json")


def _other_value(text: bytes, rng: Random) -> bytes:
    """A document in which a value is another, is doubled, is gone, or lies very deep."""
    try:
        document = json.loads(text)
    except ValueError:
        return text
    places = list(_places(document))
    if not places:
        return b"[]"
    parent, key = rng.choice(places)
    kind = rng.random()
    if kind < 0.8:
        parent[key] = rng.choice(_VALUES)
    elif kind < 0.9:
        del parent[key]
    elif isinstance(parent, list):
        parent *= rng.choice((2, 1000))
    else:
        depth = rng.choice((10, 500, 100_000))
        parent[key] = "deep"
        return json.dumps(document).replace('"deep"', "[" * depth + "]" * depth).encode()
    return json.dumps(document).encode()


def _places(value: Any) -> Any:
    """(list or mapping, key) of all that lies in a document."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in list(items):
        yield value, key
        if isinstance(item, dict | list):
            yield from _places(item)


def outcome(path: Path) -> str:
    """What became of a slide, in a word; raises what is no XmagError."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(path) as archive:
        archive.extractall(Path(folder, "slide.zarr"))
        # Nothing is stacked. Where there are many tiles, more threads come upon damage earlier.
        with mock.patch.object(slides, "_read_tiles", _read_tiles):
            return slides.outcome(Path(folder, "slide.zarr"))


def _read_tiles(slide: Slide) -> None:
    tiles = read_tiles(slide, plan_tiles(slide, slides.SPEC), batch_size=16, threads=2)
    for _ in itertools.islice(tiles, 5):
        pass
