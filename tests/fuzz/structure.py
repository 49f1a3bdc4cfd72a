"""Where things lie in a TIFF and in the streams of its tiles: where structured damage starts."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

SIZES = {
    1: 1,
    2: 1,
    3: 2,
    4: 4,
    5: 8,
    6: 1,
    7: 1,
    8: 2,
    9: 4,
    10: 8,
    11: 4,
    12: 8,
    13: 4,
    16: 8,
    17: 8,
    18: 8,
}
"""Bytes of a value of each TIFF type."""

_OFFSETS, _COUNTS = (324, 273), (325, 279)
_SUB_IFDS = 330


@dataclass(frozen=True, slots=True)
class Entry:
    """A tag: where its entry begins, what it says, where its values lie."""

    at: int
    code: int
    kind: int
    count: int
    value_at: int

    @property
    def item_size(self) -> int:
        return SIZES.get(self.kind, 1)


@dataclass(slots=True)
class Directory:
    """A directory: where it begins, its tags, where its pointer to the next one lies."""

    at: int
    entries: list[Entry]
    next_at: int


@dataclass(slots=True)
class TiffMap:
    """All directories of a TIFF, those below others too, as they are in an undamaged file."""

    order: str
    big: bool
    directories: list[Directory] = field(default_factory=list)

    @property
    def word(self) -> str:
        """The format of an offset."""
        return self.order + ("Q" if self.big else "I")

    @property
    def entry_size(self) -> int:
        return 20 if self.big else 12


def map_tiff(data: bytes) -> TiffMap:
    """The map of a valid TIFF or BigTIFF."""
    order = "<" if data[:2] == b"II" else ">"
    big = struct.unpack_from(order + "H", data, 2)[0] == 43
    tiff = TiffMap(order, big)
    at = struct.unpack_from(tiff.word, data, 8 if big else 4)[0]
    while at:
        directory = _map_directory(data, tiff, at)
        at = struct.unpack_from(tiff.word, data, directory.next_at)[0]
    return tiff


def _map_directory(data: bytes, tiff: TiffMap, at: int) -> Directory:
    count = struct.unpack_from(tiff.order + ("Q" if tiff.big else "H"), data, at)[0]
    first, room = at + (8 if tiff.big else 2), 8 if tiff.big else 4
    directory = Directory(at, [], first + count * tiff.entry_size)
    tiff.directories.append(directory)
    for number in range(count):
        place = first + number * tiff.entry_size
        code, kind = struct.unpack_from(tiff.order + "HH", data, place)
        values = struct.unpack_from(tiff.word, data, place + 4)[0]
        value_at = place + tiff.entry_size - room
        if values * SIZES[kind] > room:
            value_at = struct.unpack_from(tiff.word, data, value_at)[0]
        entry = Entry(place, code, kind, values, value_at)
        directory.entries.append(entry)
        if code == _SUB_IFDS:
            for sub in integers(data, tiff, entry):
                _map_directory(data, tiff, sub)
    return directory


def integers(data: bytes, tiff: TiffMap, entry: Entry) -> list[int]:
    """The values of a tag of whole numbers."""
    letter = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}[entry.kind]
    return list(struct.unpack_from(f"{tiff.order}{entry.count}{letter}", data, entry.value_at))


@dataclass(frozen=True, slots=True)
class Chunk:
    """A tile or strip: where its bytes lie, and where the file says so."""

    offset: int
    length: int
    offset_at: int
    length_at: int
    offset_size: int
    length_size: int


def chunks_of(data: bytes, tiff: TiffMap, directory: Directory) -> list[Chunk]:
    """The tiles or strips of a directory that are stored."""
    tags = {entry.code: entry for entry in directory.entries}
    offsets = next(tags[code] for code in _OFFSETS if code in tags)
    counts = next(tags[code] for code in _COUNTS if code in tags)
    pairs = zip(integers(data, tiff, offsets), integers(data, tiff, counts), strict=True)
    return [
        Chunk(
            offset,
            length,
            offsets.value_at + i * offsets.item_size,
            counts.value_at + i * counts.item_size,
            offsets.item_size,
            counts.item_size,
        )
        for i, (offset, length) in enumerate(pairs)
        if length
    ]


def jpeg_segments(stream: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start, end) of each segment of a JPEG; start is at the 0xFF, the last is SOS."""
    at = 2
    while at + 4 <= len(stream) and stream[at] == 0xFF:
        end = at + 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
        yield stream[at + 1], at, min(end, len(stream))
        if stream[at + 1] == 0xDA:
            return
        at = end


def jpeg2000_segments(stream: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start, end) of each segment of a JPEG 2000 main header; the last is SOT."""
    at = 2
    while at + 4 <= len(stream) and stream[at] == 0xFF:
        end = at + 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
        yield stream[at + 1], at, min(end, len(stream))
        if stream[at + 1] == 0x90:
            return
        at = end


def png_chunks(stream: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(type, start, end) of each chunk of a PNG, with its length and checksum."""
    at = 8
    while at + 12 <= len(stream):
        end = at + 12 + int.from_bytes(stream[at : at + 4], "big")
        yield stream[at + 4 : at + 8], at, min(end, len(stream))
        at = end
