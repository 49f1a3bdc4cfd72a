"""Checks of a TIFF's directories, before tifffile reads them, and of its tables of tiles.

tifffile follows a file wherever it leads, and goes on with defaults where a tag makes no sense. So
the directories are gone through first: where each lies, which tags it lists, how much they claim.
What lies in the tiles is checked in `integrity`.
"""

import logging
import struct
import threading
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

from tifffile import TiffPage

from xmag.errors import UnsupportedSlideError
from xmag.slide.integrity import MAX_LEVEL_PX, MAX_TILES, damaged

_MAX_DIRECTORIES = 1_000
"""Most directories of a file: slides have some ten, stacks, which are not read, thousands."""
_MAX_TAGS = 1_000
"""Most tags of one directory; scanners write up to a hundred."""
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
_NUMBERS = _ONE_NUMBER | {258, 273, 278, 279, 324, 325, 338, 339}
"""Tags that say how pixels are stored, in one whole number or in several."""
_ESSENTIAL_TAGS = _NUMBERS | {_SUB_IFDS, 347}
"""Tags without which tifffile would take the pixels for others than they are."""
_filtering = threading.Lock()


@contextmanager
def tifffile_unheard() -> Iterator[None]:
    """Context in which nothing that tifffile logs in this thread is heard.

    It logs the texts of tags that it cannot parse, in which a patient may be named.
    """
    logger, thread = logging.getLogger("tifffile"), threading.get_ident()

    def is_of_others(_: logging.LogRecord) -> bool:
        return threading.get_ident() != thread

    # A list is never changed: others may be going through it.
    with _filtering:
        logger.filters = [*logger.filters, is_of_others]
    try:
        yield
    finally:
        with _filtering:
            logger.filters = [each for each in logger.filters if each is not is_of_others]


def walk(file: BinaryIO, *, is_ndpi: bool) -> Mapping[int, Set[int]]:
    """Tag codes of every directory, sub-directories too, by the offset of the directory.

    `is_ndpi` says that pointers to directories have 8 bytes, as Hamamatsu writes them. Raises
    DamagedSlideError where directories lie outside the file, form a loop, or claim more than the
    file holds, and UnsupportedSlideError where there are more than a slide has.
    """
    return _Walk(file, is_ndpi).found


@dataclass(frozen=True, slots=True)
class _Tag:
    """A tag; its values lie at `place`, in it, or at `pointer` where they are too many for that."""

    code: int
    kind: int
    count: int
    place: int
    pointer: int

    @property
    def size(self) -> int:
        return self.count * _SIZES.get(self.kind, 0)


class _Walk:
    """A walk over the directories of a file, which fills `found`."""

    def __init__(self, file: BinaryIO, is_ndpi: bool) -> None:
        self._file, self._size = file, file.seek(0, 2)
        self.found: dict[int, Set[int]] = {}
        self._order = "<" if self._read(0, 2) == b"II" else ">"
        # Format codes of a tag, of how many there are, and of the pointer behind them.
        self._tag, self._count, self._next, self._room = "HHII", "H", "I", 4
        self._is_ndpi = is_ndpi and self._order == "<"
        if self._unpacked(2, "H")[0] == 43:
            if self._unpacked(4, "HH") != (8, 0):
                raise damaged("it begins like a BigTIFF, but goes on as none")
            self._tag, self._count, self._next, self._room = "HHQQ", "Q", "Q", 8
            self._is_ndpi = False
        elif self._is_ndpi:
            self._next = "Q"
        (at,) = self._unpacked(self._room, self._next)
        claimed = 0
        while at:
            tags, at = self._directory(at)
            for tag in [tag for tag in tags if tag.code == _SUB_IFDS]:
                kind = _OFFSET_FORMATS.get(tag.kind)
                if kind is None or tag.count > _MAX_DIRECTORIES:
                    raise damaged(
                        f"its tag {tag.code} lists {tag.count} directories as type {tag.kind}"
                    )
                place = tag.place if tag.size <= self._room else tag.pointer
                if place + tag.size > self._size:
                    raise damaged(f"its tag {tag.code} lies beyond the end of the file")
                for below in self._unpacked(place, f"{tag.count}{kind}"):
                    tags += self._directory(below)[0]
            claimed += sum(tag.size for tag in tags if tag.size > self._room)
            if claimed > 2 * self._size + (1 << 20):
                raise damaged(
                    f"its tags claim {claimed} bytes, and the whole file has {self._size}"
                )

    def _directory(self, at: int) -> tuple[list[_Tag], int]:
        """The tags of a directory, and the offset of the next one; its codes become found."""
        known = len(self.found)
        if at >= self._size and not known:
            raise damaged("it begins like a TIFF, but holds no image, or only beyond its end")
        if at >= self._size:
            raise damaged(f"the directory after the {known} found lies beyond the end of the file")
        if at in self.found:
            raise damaged(f"its directories form a loop: after the {known} found comes one of them")
        if known == _MAX_DIRECTORIES:
            raise UnsupportedSlideError(
                f"it holds more than {_MAX_DIRECTORIES} images; xmag reads slides, which have some"
                " ten. Export one focal plane of a brightfield scan"
            )
        (count,) = self._unpacked(at, self._count)
        if not 0 < count <= _MAX_TAGS:
            raise damaged(f"its directory {known} lists {count} tags; expected 1 to {_MAX_TAGS}")
        first, length = at + struct.calcsize(f"<{self._count}"), struct.calcsize(f"<{self._tag}")
        end = first + count * length
        entries = self._read(first, count * length)
        # Hamamatsu writes the bits 32 to 63 of each value or pointer behind the list.
        high = self._unpacked(end + 8, f"{count}I") if self._is_ndpi else (0,) * count
        tags = [
            _Tag(code, kind, values, first + (n + 1) * length - self._room, value | high[n] << 32)
            for n, (code, kind, values, value) in enumerate(
                struct.iter_unpack(self._order + self._tag, entries)
            )
        ]
        for tag in tags:
            self._check(tag)
        self.found[at] = frozenset(tag.code for tag in tags)
        # Some writers leave out the last pointer where the file ends.
        self._file.seek(end)
        pointer = self._file.read(struct.calcsize(f"<{self._next}"))
        return tags, int.from_bytes(pointer, "little" if self._order == "<" else "big")

    def _check(self, tag: _Tag) -> None:
        """Raise for a tag of the pixels without whole numbers, or with too many of them."""
        one = tag.code in _ONE_NUMBER
        if tag.code in _NUMBERS and (
            tag.kind not in _WHOLE or tag.count < 1 or (one and tag.count != 1)
        ):
            raise damaged(
                f"tag {tag.code} of its directory {len(self.found)} holds {tag.count} values of"
                f" type {tag.kind}; expected whole numbers, {'one' if one else 'at least one'}"
            )
        if tag.code in _TILE_LISTS and tag.count > MAX_TILES:
            raise UnsupportedSlideError(
                f"it lists {tag.count} tiles for one level; expected at most {MAX_TILES}. Convert"
                " it to larger tiles"
            )
        if tag.code in (_NDPI_STARTS, _NDPI_STARTS_HIGH):
            # tifffile takes even a single value for where it lies.
            start = int.from_bytes(self._read(tag.pointer, _SIZES.get(tag.kind, 1)), "little")
            most = _MAX_JPEG_HEADER if tag.code == _NDPI_STARTS else 0
            if tag.kind not in _OFFSET_FORMATS or start > most:
                raise damaged(
                    f"its JPEG begins with {start} bytes of header; expected at most {most}"
                )

    def _read(self, at: int, length: int) -> bytes:
        # File systems refuse to look further than they could store.
        data = b""
        if at <= _MAX_OFFSET:
            self._file.seek(at)
            data = self._file.read(length)
        if len(data) != length:
            raise damaged(f"it ends after {len(data)} of {length} bytes of a directory at {at}")
        return data

    def _unpacked(self, at: int, format: str) -> tuple[int, ...]:
        format = self._order + format
        return struct.unpack(format, self._read(at, struct.calcsize(format)))


def check_tags(number: int, page: TiffPage, codes: Mapping[int, Set[int]]) -> None:
    """Raise DamagedSlideError where tifffile left out a tag that it could not read."""
    lost = (codes.get(page.offset, frozenset()) & _ESSENTIAL_TAGS) - {tag.code for tag in page.tags}
    if lost:
        raise damaged(
            f"directory {number} of its levels has tags {sorted(lost)} of a type or a place that"
            " makes no sense"
        )


def check_table(place: str, size: tuple[int, int], expected: int, page: TiffPage) -> None:
    """Raise DamagedSlideError where the tiles listed are not those that the size calls for.

    And UnsupportedSlideError where it is that of no slide.
    """
    offsets, lengths = len(page.dataoffsets), len(page.databytecounts)
    if not offsets == lengths == expected:
        raise damaged(
            f"{place} of {size[0]}x{size[1]} px needs {expected} tiles, but the file lists"
            f" {offsets} offsets and {lengths} lengths"
        )
    if size[0] * size[1] > MAX_LEVEL_PX:
        raise UnsupportedSlideError(
            f"{place} is {size[0]}x{size[1]} px; expected at most {MAX_LEVEL_PX} px in all. Export"
            " the part with the tissue"
        )


def most_bytes(width: int, height: int, samples: int) -> int:
    """Most bytes that a tile of this size may have: a small one takes more than its pixels."""
    return 2 * width * height * samples + (1 << 16)


def check_for_openslide(number: int, page: TiffPage, tile: tuple[int, int]) -> None:
    """Raise DamagedSlideError where OpenSlide would read beside the list of tiles.

    Or where their bytes take so much memory that it ends the process.
    """
    if page.is_tiled:
        size = page.imagewidth, page.imagelength
        expected = -(-size[0] // tile[0]) * -(-size[1] // tile[1])
        expected *= page.samplesperpixel if page.planarconfig == 2 else 1
        check_table(f"page {number}", size, expected, page)
    most = most_bytes(*tile, page.samplesperpixel)
    for offset, length in zip(page.dataoffsets, page.databytecounts, strict=False):
        if length > most or (offset and not length):
            raise damaged(
                f"a tile of page {number} should have {length} bytes at offset {offset}; expected"
                f" at most {most}, and no offset without bytes"
            )


class TileTable:
    """Places of the tiles of a level, to be checked before one of them is followed.

    A tile has at most `most` bytes, and the file ends at `end`. `lead` are the bytes of the restart
    marker that is before each stretch of a JPEG but the first; 0 where tiles are whole streams.
    """

    def __init__(self, level: int, page: TiffPage, *, most: int, end: int, is_aperio: bool) -> None:
        self.offsets, self.lengths = page.dataoffsets, page.databytecounts
        self.lead = 0 if page.jpegheader is None else 2
        self._level, self._most, self._end, self._is_aperio = level, most, end, is_aperio

    def check(self, index: int) -> None:
        """Raise DamagedSlideError where the place that a tile is said to have makes no sense."""
        offset, length = self.offsets[index], self.lengths[index]
        if not 0 <= length <= self._most or offset + length > self._end:
            raise damaged(
                f"tile {index} of level {self._level} should have {length} bytes at offset"
                f" {offset}, but the file ends at {self._end}, and its pixels take {self._most} at"
                " most"
            )
        # The writers of Aperio alone are known to give an offset to tiles without bytes.
        if (length and not offset) or (offset and not length and not self._is_aperio):
            raise damaged(
                f"tile {index} of level {self._level} has {length} bytes at offset {offset}, where"
                " an empty one has neither: a part of the file's table of tiles is lost"
            )

    def behind_lead(self, data: bytes, index: int) -> bytes:
        """A stretch of a JPEG without the marker before it, which says that all of it is there."""
        if index and not (data[0] == 0xFF and 0xD0 <= data[1] <= 0xD7):
            raise damaged(f"tile {index} of level {self._level} lacks the restart marker before it")
        return data[self.lead :]
