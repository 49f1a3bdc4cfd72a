"""Cases of lost sectors: runs of zeros in tile tables and tiles; whatever is read is compared.

Zeros are what a disk or a download that lost a sector leaves. Pixels have to be those of the
undamaged slide, or the slide is refused, or it says that tiles are missing. Codings without any
redundancy (raw pixels, LZW in part) are left out: nothing can tell their zeros from black.
"""

import tempfile
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from random import Random

import numpy as np
from support.encoders import ColourEncoder

from fuzz.seeds import NAMES, seed
from fuzz.structure import Entry, chunks_of, map_tiff
from xmag.errors import InputError, XmagError, XmagWarning
from xmag.extract import extract_features
from xmag.geometry import TileSpec
from xmag.slide import Slide

FINE = "equal"
THEIR_WARNINGS: tuple[type[Warning], ...] = ()
THEIR_PRINTS = r"OpenSlide-WARNING"

_SECTOR = 512
_TABLES = (273, 279, 324, 325)
_COMPARED = tuple(
    name
    for name in NAMES
    if name not in {"generic-raw.tif", "generic-lzw.tif", "rgba.tif", "strips.tif", "packbits.tif"}
    and not name.startswith(("plain", "progressive", "ventana-overlap", "trestle"))
)


def seeds() -> dict[str, bytes]:
    """The undamaged slides."""
    return {name: seed(name) for name in _COMPARED}


def make(originals: Mapping[str, bytes], number: int, rng: Random) -> tuple[str, bytes]:
    """(name, content) of a slide with a sector of zeros, or the part of one, in a table or tile."""
    name = rng.choice(sorted(originals))
    data = bytearray(originals[name])
    tiff = map_tiff(originals[name])
    directory = rng.choice(tiff.directories)
    tables = [entry for entry in directory.entries if entry.code in _TABLES and entry.count > 1]
    if tables and rng.random() < 0.4:
        low, high = _extent(rng.choice(tables))
    else:
        chunk = rng.choice(chunks_of(originals[name], tiff, directory))
        low, high = chunk.offset, chunk.offset + chunk.length
    start = rng.randrange(low - _SECTOR + 1, high)
    begin, end = max(low, start), min(high, start + _SECTOR)
    data[begin:end] = bytes(end - begin)
    return name, bytes(data)


def _extent(table: Entry) -> tuple[int, int]:
    return table.value_at, table.value_at + table.count * table.item_size


class _Recorder(ColourEncoder):
    """Keeps the tiles that it embeds."""

    def __init__(self, mpp: float) -> None:
        super().__init__(spec=TileSpec(mpp=mpp, size_px=32))
        self.tiles: list[np.ndarray] = []

    def embed(self, tiles):
        self.tiles.append(np.array(tiles))
        return super().embed(tiles)


def _read(path: Path) -> tuple[list[object], bool]:
    """Coords and tiles at two scales, or the errors; whether the slide says that tiles miss."""
    found: list[object] = []
    missing = False
    for mpp in (0.5, 1.0):
        recorder = _Recorder(mpp)
        try:
            options = {"region": 0} if path.name in ("ome-two.tif", "leica.scn") else {}
            with Slide(path, **options) as slide, warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                bag = extract_features(slide, model=recorder, tissue=None, progress=False)
            missing |= bool((bag.provenance.record["source_tiles"] or {}).get("empty"))
            missing |= any(issubclass(w.category, XmagWarning) for w in caught)
            found.append((bag.coords, np.concatenate(recorder.tiles) if recorder.tiles else None))
        except XmagError as error:
            if isinstance(error, InputError):
                raise
            found.append(error)
    return found, missing


@cache
def _expected(name: str) -> list[object]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(seed(name))
        return _read(path)[0]


def outcome(path: Path) -> str:
    """Whether a slide is "equal", or "missing" tiles and says so; raises its error otherwise."""
    found, missing = _read(path)
    for seen, right in zip(found, _expected(path.name), strict=True):
        if isinstance(seen, XmagError):
            raise seen
        assert not isinstance(right, XmagError)
        if not (np.array_equal(seen[0], right[0]) and np.array_equal(seen[1], right[1])):
            assert missing, "other pixels, and nothing says so"
            return "missing"
    return FINE
