"""Directories of a TIFF, checked before tifffile reads them.

tifffile follows a file wherever it leads, and goes on with defaults where a tag makes no sense. So
the directories are gone through first: where each lies, which tags it lists, how much they claim.
"""

import logging
import struct
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

from xmag.errors import DamagedSlideError, UnsupportedSlideError

_MAX_DIRECTORIES = 1_000
"""Most directories of a file: slides have some ten, stacks, which are not read, thousands."""
_MAX_TAGS = 1_000
"""Most tags of one directory; scanners write up to a hundred."""
_MAX_TILES = 1 << 22
"""Most tiles of one level: 240 Gpx in tiles of 240 px."""
_SPARE_BYTES = 1 << 20
_MAX_OFFSET = 1 << 42
"""Largest offset that is read: 4 TB, which no slide has."""

_SIZES = {
    1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8,
    18: 8,
}  # fmt: skip
"""Bytes of a value of each TIFF type."""
_SUB_IFDS = 330
_OFFSET_FORMATS = {4: "I", 13: "I", 16: "Q", 18: "Q"}
_NDPI_STARTS, _NDPI_STARTS_HIGH = 65426, 65432
_TILE_LISTS = {273, 279, 324, 325, _NDPI_STARTS}
_MAX_JPEG_HEADER = 1 << 20
"""Most bytes before an NDPI's first restart interval; scanners write fewer than 2,000."""
_WHOLE = {3, 4, 13, 16, 18}
_ONE_NUMBER = {254, 256, 257, 259, 262, 277, 284, 317, 322, 323}
_NUMBERS = {258, 273, 278, 279, 324, 325, 338, 339}
"""Tags that say how pixels are stored, in one whole number or in several."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """Format codes of offsets, tag counts and tags in a kind of TIFF."""

    order: str
    offset: str
    tag_count: str
    tag: str

    @property
    def inline(self) -> int:
        """Bytes of values that fit into the tag itself."""
        return 8 if self.tag == "HHQQ" else 4


@dataclass(frozen=True, slots=True)
class _Tag:
    code: int
    kind: int
    count: int
    value_at: int
    high: int = 0
    """Bits 32 to 63 of the value, or of its offset, which Hamamatsu adds."""

    @property
    def size(self) -> int:
        return self.count * _SIZES.get(self.kind, 0)


def walk(file: BinaryIO, *, is_ndpi: bool) -> Mapping[int, Set[int]]:
    """Tag codes of every directory, sub-directories too, by the offset of the directory.

    `is_ndpi` says that pointers to directories have 8 bytes, as Hamamatsu writes them. Raises
    DamagedSlideError where directories lie outside the file, form a loop, or claim more than the
    file holds, and UnsupportedSlideError where there are more than a slide has.
    """
    size = file.seek(0, 2)
    layout, at = _header(file, is_ndpi)
    found: dict[int, Set[int]] = {}
    claimed = 0
    while at:
        tags, following = _directory(file, layout, at, size, found)
        claimed += sum(tag.size for tag in tags if tag.size > layout.inline)
        for tag in tags:
            if tag.code != _SUB_IFDS:
                continue
            for below in _offsets(file, layout, tag, size):
                tags_below, _ = _directory(file, layout, below, size, found)
                claimed += sum(tag.size for tag in tags_below if tag.size > layout.inline)
        if claimed > 2 * size + _SPARE_BYTES:
            raise DamagedSlideError(
                f"its tags claim {claimed} bytes, and the whole file has {size}; it is damaged:"
                " copy it again"
            )
        at = following
    return found


def _header(file: BinaryIO, is_ndpi: bool) -> tuple[_Layout, int]:
    """The layout, and the offset of the first directory."""
    order = "<" if _read(file, 0, 2) == b"II" else ">"
    if _unpacked(file, 2, f"{order}H")[0] == 43:
        if _unpacked(file, 4, f"{order}HH") != (8, 0):
            raise DamagedSlideError("it begins like a BigTIFF, but goes on as none; copy it again")
        layout = _Layout(order, "Q", "Q", "HHQQ")
        return layout, _unpacked(file, 8, f"{order}Q")[0]
    layout = _Layout(order, "Q" if is_ndpi and order == "<" else "I", "H", "HHII")
    return layout, _unpacked(file, 4, order + layout.offset)[0]


def _directory(
    file: BinaryIO, layout: _Layout, at: int, size: int, found: dict[int, Set[int]]
) -> tuple[list[_Tag], int]:
    """The tags of a directory, and the offset of the next one; its codes are added to `found`."""
    if at >= size:
        raise DamagedSlideError(
            "it begins like a TIFF, but holds no image, or only beyond its end; it is truncated or"
            " damaged: copy it again"
            if not found
            else f"the directory after the {len(found)} found lies beyond the end of the file;"
            " it is truncated: copy it again"
        )
    if at in found:
        raise DamagedSlideError(
            f"its directories form a loop: the one after the {len(found)} found is one of them; it"
            " is damaged: copy it again"
        )
    if len(found) == _MAX_DIRECTORIES:
        raise UnsupportedSlideError(
            f"it holds more than {_MAX_DIRECTORIES} images; xmag reads slides, which have some ten."
            " Export one focal plane of a brightfield scan"
        )
    count = _unpacked(file, at, layout.order + layout.tag_count)[0]
    if not 0 < count <= _MAX_TAGS:
        raise DamagedSlideError(
            f"its directory {len(found)} lists {count} tags; expected 1 to {_MAX_TAGS}. It is"
            " damaged: copy it again"
        )
    first = at + struct.calcsize(layout.order + layout.tag_count)
    entry = layout.order + layout.tag
    length = struct.calcsize(entry)
    room = layout.inline
    entries = _read(file, first, count * length)
    high = _high_words(file, layout, first + count * length, count)
    tags = [
        _Tag(code, kind, values, first + number * length + length - room, high[number])
        for number, (code, kind, values, _) in enumerate(struct.iter_unpack(entry, entries))
    ]
    for tag in tags:
        _check_kind(tag, len(found))
        if tag.code in _TILE_LISTS and tag.count > _MAX_TILES:
            raise UnsupportedSlideError(
                f"it lists {tag.count} tiles for one level; expected at most {_MAX_TILES}. Convert"
                " it to larger tiles"
            )
        if tag.code in (_NDPI_STARTS, _NDPI_STARTS_HIGH):
            _check_starts(file, layout, tag)
    found[at] = frozenset(tag.code for tag in tags)
    # Some writers leave out the last pointer where the file ends.
    file.seek(first + count * length)
    pointer = file.read(struct.calcsize(layout.order + layout.offset))
    return tags, int.from_bytes(pointer, "little" if layout.order == "<" else "big")


def _high_words(file: BinaryIO, layout: _Layout, end: int, count: int) -> tuple[int, ...]:
    """The high half of each tag, which Hamamatsu writes behind the pointer after the tags."""
    if not (layout.offset == "Q" and layout.tag == "HHII"):
        return (0,) * count
    return _unpacked(file, end + 8, f"{layout.order}{count}I")


def _check_kind(tag: _Tag, directory: int) -> None:
    """Raise DamagedSlideError for a tag of the pixels without whole numbers, or with too many."""
    one = tag.code in _ONE_NUMBER
    if not (one or tag.code in _NUMBERS):
        return
    if tag.kind not in _WHOLE or tag.count < 1 or (one and tag.count != 1):
        raise DamagedSlideError(
            f"tag {tag.code} of its directory {directory} holds {tag.count} values of type"
            f" {tag.kind}; expected {'one whole number' if one else 'whole numbers'}. It is"
            " damaged: copy it again"
        )


def _check_starts(file: BinaryIO, layout: _Layout, tag: _Tag) -> None:
    """Raise DamagedSlideError where the header of an NDPI's JPEG would be megabytes long."""
    # tifffile takes even a single value for where it lies.
    at = _pointer(file, layout, tag)
    first = int.from_bytes(_read(file, at, _SIZES.get(tag.kind, 1)), "little")
    most = _MAX_JPEG_HEADER if tag.code == _NDPI_STARTS else 0
    if tag.kind not in _OFFSET_FORMATS or first > most:
        raise DamagedSlideError(
            f"the JPEG in it would begin with a header of {first} bytes; expected at most"
            f" {_MAX_JPEG_HEADER}. It is damaged: copy it again"
        )


def _offsets(file: BinaryIO, layout: _Layout, tag: _Tag, size: int) -> Iterator[int]:
    """Offsets of the directories that a tag points to."""
    kind = _OFFSET_FORMATS.get(tag.kind)
    if kind is None or tag.count > _MAX_DIRECTORIES:
        raise DamagedSlideError(
            f"its tag {tag.code}, which points to directories, holds {tag.count} values of type"
            f" {tag.kind}; it is damaged: copy it again"
        )
    at = tag.value_at if tag.size <= layout.inline else _pointer(file, layout, tag)
    if at + tag.size > size:
        raise DamagedSlideError(
            f"its tag {tag.code} lies beyond the end of the file; it is truncated: copy it again"
        )
    yield from _unpacked(file, at, f"{layout.order}{tag.count}{kind}")


def _pointer(file: BinaryIO, layout: _Layout, tag: _Tag) -> int:
    """Offset of a tag's values that are too many to lie in it."""
    at = _unpacked(file, tag.value_at, layout.order + ("Q" if layout.inline == 8 else "I"))[0]
    return at | tag.high << 32


def _read(file: BinaryIO, at: int, length: int) -> bytes:
    # File systems refuse to look further than they could store.
    data = b""
    if at <= _MAX_OFFSET:
        file.seek(at)
        data = file.read(length)
    if len(data) != length:
        raise DamagedSlideError(
            f"it ends after {len(data)} of {length} bytes of a directory at {at}; it is truncated"
            " or damaged: copy it again"
        )
    return data


def _unpacked(file: BinaryIO, at: int, format: str) -> tuple[int, ...]:
    return struct.unpack(format, _read(file, at, struct.calcsize(format)))


@contextmanager
def silent_tifffile() -> Iterator[None]:
    """Context in which tifffile does not complain on stderr, where the program does not log.

    logging writes there what nobody takes. What counts of it is found out here and raised.
    """
    logger, taker = logging.getLogger("tifffile"), logging.NullHandler()
    logger.addHandler(taker)
    try:
        yield
    finally:
        logger.removeHandler(taker)
