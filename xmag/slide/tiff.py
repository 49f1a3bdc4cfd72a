"""Tiles of TIFF slides: tifffile parses the directories, everything after that is ours."""

import math
import struct
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast
from xml.etree import ElementTree

from tifffile import TiffFile, TiffFileError, TiffPage

from xmag.errors import DamagedSlideError, UnsupportedSlideError, XmagError
from xmag.slide import codecs, directories
from xmag.slide.layouts import (
    NeedsOpenSlideError,
    PageLevel,
    TiffLayout,
    find_layout,
    page_size,
    whole_factor,
)
from xmag.slide.reader import Level, Pixels, ScaleMetadata, check_size
from xmag.slide.remote import RemoteSource
from xmag.slide.source import ByteSource, LocalSource

_MAX_TILE_PX = 1 << 26
"""Tiles and strips above this are not decoded: a file that asks for gigabytes at once is broken."""
_MAX_JPEG_2000_TILE_PX = 1 << 24
"""OpenJPEG takes 24 bytes a px."""
_SPARE_TILE_BYTES = 1 << 16
"""What the bytes of a small tile may take beyond twice its pixels."""
_MAX_LEVEL_PX = 1 << 40
"""A square of a million px; the largest scans are a tenth of that."""

_ESSENTIAL_TAGS = frozenset(
    {
        254, 256, 257, 258, 259, 262, 273, 277, 278, 279, 284, 317, 322, 323, 324, 325, 330, 338,
        339, 347,
    }
)  # fmt: skip
"""Tags without which tifffile would take the pixels for others than they are."""

_APERIO = "aperio"
"""The one format whose writers are known to give an offset to tiles without bytes."""
_MARKER_BYTES = 2

_UNASSOCIATED_ALPHA = 2
_SEPARATE_PLANES = 2

_PARSE_ERRORS = (
    TiffFileError, ValueError, LookupError, struct.error, OverflowError, MemoryError, TypeError,
    AttributeError, ZeroDivisionError,
    RuntimeError,
    ElementTree.ParseError, StopIteration,
)  # fmt: skip
"""What tifffile may raise on a directory that makes no sense."""


class TiffReader:
    """A TileReader over the pages of one TIFF file; it closes a remote source with itself."""

    def __init__(self, path: Path | RemoteSource, *, region: int | None = None) -> None:
        try:
            self._open(path, region)
        except XmagError as error:
            raise type(error)(f"{path.name}: {error}") from error

    def _open(self, path: Path | RemoteSource, region: int | None) -> None:
        with _opened(path) as file:
            self._size = file.seek(0, 2)
            layout = _read_layout(file, region, is_ndpi=path.name.endswith(".ndpi"))
        self.format = layout.format
        self.metadata: ScaleMetadata = layout.metadata
        self._is_aperio = layout.format == _APERIO
        codings = [_coding(stored.page, aperio=self._is_aperio) for stored in layout.levels]
        self.levels: tuple[Level, ...] = tuple(
            _level(stored, layout.levels[0].size, coding)
            for stored, coding in zip(layout.levels, codings, strict=True)
        )
        self._tile_bytes = [coding.size[0] * coding.size[1] * coding.samples for coding in codings]
        self._decoders = [codecs.decoder(coding) for coding in codings]
        self._offsets = [stored.page.dataoffsets for stored in layout.levels]
        self._lengths = [stored.page.databytecounts for stored in layout.levels]
        # Each stretch of a JPEG but the first has a restart marker before it.
        self._leads = [0 if coding.jpeg_header is None else _MARKER_BYTES for coding in codings]
        for number, level in enumerate(self.levels):
            check_size(number, level)
            _check_tiles(number, level, len(self._offsets[number]), len(self._lengths[number]))
        self.source: ByteSource = LocalSource(path) if isinstance(path, Path) else path

    def read_tile_bytes(self, level: int, indices: Sequence[int]) -> list[bytes | None]:
        """The bytes of tiles, as stored; None for those that are declared empty."""
        offsets, lengths, lead = self._offsets[level], self._lengths[level], self._leads[level]
        for index in indices:
            self._check_entry(level, index)
        stored = [i for i in indices if lengths[i]]
        chunks = self.source.read_many([(offsets[i] - lead, lengths[i] + lead) for i in stored])
        if lead:
            pairs = zip(chunks, stored, strict=True)
            chunks = [_behind_marker(chunk, level, index) for chunk, index in pairs]
        following = iter(chunks)
        return [next(following) if lengths[i] else None for i in indices]

    def _check_entry(self, level: int, index: int) -> None:
        """Raise DamagedSlideError where the place that a tile is said to have makes no sense."""
        offset, length = self._offsets[level][index], self._lengths[level][index]
        most = 2 * self._tile_bytes[level] + _SPARE_TILE_BYTES
        if not 0 <= length <= most or offset + length > self._size:
            raise DamagedSlideError(
                f"tile {index} of level {level} should have {length} bytes at offset {offset}, but"
                f" the file ends at {self._size}, and the pixels of a tile take {most} at most; it"
                " is truncated or damaged: copy it again"
            )
        if (length and not offset) or (offset and not length and not self._is_aperio):
            raise DamagedSlideError(
                f"tile {index} of level {level} has {length} bytes at offset {offset}, where one"
                " that is declared empty has neither; a part of the file's table of tiles is lost:"
                " copy it again"
            )

    def decode(self, level: int, data: bytes, reduction: int) -> Pixels:
        """The pixels of one tile at 1/`reduction`, in full tile size."""
        return self._decoders[level](data, reduction)

    def decode_many(
        self, level: int, chunks: Sequence[object], reduction: int, row: Pixels
    ) -> list[bool]:
        """Decode tiles of a level into `row`, side by side; False for what `decode` has to do."""
        return codecs.decode_many(self._decoders[level], chunks, reduction, row)

    def close(self) -> None:
        """Release the file. Closing twice is fine."""
        self.source.close()


def _behind_marker(data: bytes, level: int, index: int) -> bytes:
    """A stretch of a JPEG without the marker before it, which says that all of it is there."""
    if index and not (data[0] == 0xFF and 0xD0 <= data[1] <= 0xD7):
        raise DamagedSlideError(
            f"tile {index} of level {level} has no restart marker before it, where one has to be;"
            " the file is damaged: copy it again"
        )
    return data[_MARKER_BYTES:]


@contextmanager
def _opened(path: Path | RemoteSource) -> Iterator[BinaryIO]:
    """The file as a stream; what went wrong on the way to a remote one comes before all else."""
    if isinstance(path, Path):
        with path.open("rb") as local:
            yield local
        return
    remote = path.file()
    try:
        yield cast(BinaryIO, remote)
    finally:
        if remote.failure is not None:
            raise remote.failure


def _read_layout(file: BinaryIO, region: int | None, *, is_ndpi: bool) -> TiffLayout:
    """The pages of the slide in the file."""
    codes = directories.walk(file, is_ndpi=is_ndpi)
    file.seek(0)
    try:
        with directories.silent_tifffile(), TiffFile(file, is_ndpi=is_ndpi) as tiff:
            pages = [page for page in tiff.pages if isinstance(page, TiffPage)]
            if not pages:
                raise DamagedSlideError(
                    "it begins like a TIFF, but holds no image; it is truncated or damaged: copy it"
                    " again"
                )
            try:
                layout = find_layout(pages, region)
            except NeedsOpenSlideError:
                for number, page in enumerate(pages):
                    _check_tags(number, page, codes)
                    _check_memory(number, page)
                raise
            for number, level in enumerate(layout.levels):
                _check_tags(number, level.page, codes)
            return layout
    except _PARSE_ERRORS as error:
        if isinstance(error, XmagError):
            raise
        # Without the error itself, which may hold some of what the scanner wrote of the patient.
        raise DamagedSlideError(
            f"it begins like a TIFF, but its directories make no sense ({type(error).__name__});"
            " it is truncated or damaged: copy it again"
        ) from None


def _check_tags(number: int, page: TiffPage, codes: Mapping[int, Set[int]]) -> None:
    """Raise DamagedSlideError where tifffile left out a tag that it could not read."""
    lost = (codes.get(page.offset, frozenset()) & _ESSENTIAL_TAGS) - {tag.code for tag in page.tags}
    if lost:
        raise DamagedSlideError(
            f"directory {number} of its levels has tags {sorted(lost)} of a type or a place that"
            " makes no sense; it is damaged: copy it again"
        )


def _coding(page: TiffPage, *, aperio: bool) -> codecs.TileCoding:
    """Coding of the tiles of `page`; UnsupportedSlideError where they are not 8-bit RGB."""
    dtype = page.dtype
    if dtype is None or dtype.name != "uint8" or page.samplesperpixel not in (3, 4):
        raise UnsupportedSlideError(
            f"its pixels are {page.samplesperpixel} sample(s) of {dtype}, photometric"
            f" {page.photometric!r}; xmag reads 8-bit RGB (brightfield) slides"
        )
    transparent = page.samplesperpixel == 4
    if (
        page.photometric not in (2, 6)
        or page.planarconfig != 1
        or (transparent and page.extrasamples != (_UNASSOCIATED_ALPHA,))
    ):
        raise UnsupportedSlideError(
            f"its pixels are stored as photometric {page.photometric!r}, {page.planarconfig!r},"
            f" extra samples {page.extrasamples}; xmag reads RGB, RGBA and YCbCr with interleaved"
            " samples"
        )
    if not isinstance(page.jpegtables, bytes | None):
        raise DamagedSlideError("its JPEG tables are no bytes; it is damaged: copy it again")
    width, height, rows = _tile_size(page)
    return codecs.TileCoding(
        compression=int(page.compression),
        photometric=int(page.photometric),
        samples=page.samplesperpixel,
        size=(width, height),
        last_height=rows,
        predictor=int(page.predictor),
        jpeg_tables=page.jpegtables,
        jpeg_header=page.jpegheader,
        aperio=aperio,
    )


def _tile_size(page: TiffPage) -> tuple[int, int, int]:
    """(width, height, height of the last) tile; strips are tiles as wide as the image.

    Raises UnsupportedSlideError where decoding one would take too much memory.
    """
    if page.is_tiled or page.jpegheader is not None:
        width, height = page.tilewidth, page.tilelength
        last = height
    else:
        width, height = page.imagewidth, max(1, min(page.rowsperstrip, page.imagelength))
        last = page.imagelength % height or height
    most = _MAX_JPEG_2000_TILE_PX if page.compression in codecs.JPEG_2000 else _MAX_TILE_PX
    if not (width > 0 and height > 0 and width * height <= most):
        raise UnsupportedSlideError(
            f"its tiles are {width}x{height} px; expected at most {most} px each. Convert it to a"
            " tiled pyramid"
        )
    return width, height, last


def _check_memory(number: int, page: TiffPage) -> None:
    """Raise where tiles are too large for OpenSlide: it ends the process where memory is short.

    Or where there are fewer or more of them than the page has room for: it reads beside the list.
    """
    width, height, _ = _tile_size(page)
    if page.is_tiled:
        expected = -(-page.imagewidth // width) * -(-page.imagelength // height)
        expected *= page.samplesperpixel if page.planarconfig == _SEPARATE_PLANES else 1
        if not len(page.dataoffsets) == len(page.databytecounts) == expected:
            raise DamagedSlideError(
                f"page {number} of {page.imagewidth}x{page.imagelength} px needs {expected} tiles,"
                f" but lists {len(page.dataoffsets)} offsets and {len(page.databytecounts)}"
                " lengths; it is damaged: copy it again"
            )
    if any(
        at and not size for at, size in zip(page.dataoffsets, page.databytecounts, strict=False)
    ):
        raise DamagedSlideError(
            f"tiles of page {number} have an offset, but no bytes; a part of the file's table of"
            " tiles is lost: copy it again"
        )
    most = 2 * width * height * page.samplesperpixel + _SPARE_TILE_BYTES
    if max(page.databytecounts, default=0) > most:
        raise DamagedSlideError(
            f"a tile of page {number} should have {max(page.databytecounts)} bytes, but its pixels"
            f" take {most} at most; it is damaged: copy it again"
        )


def _level(stored: PageLevel, base: tuple[int, int], coding: codecs.TileCoding) -> Level:
    reductions = tuple(
        n for n in codecs.reductions(coding.size) if all(o % n == 0 for o in stored.origin)
    )
    return Level(
        size=stored.size,
        downsample=stored.downsample or _downsample(base, stored.size),
        tile_size=coding.size,
        origin=stored.origin,
        stored_size=page_size(stored.page),
        reductions=reductions,
        empty_tiles=stored.page.databytecounts.count(0),
    )


def _downsample(base: tuple[int, int], size: tuple[int, int]) -> float:
    """Level-0 px per px: whole where the sizes allow it, as they are rounded."""
    if min(*base, *size) < 1:
        return math.nan
    factor = whole_factor(base, size)
    return float(factor or (base[0] / size[0] + base[1] / size[1]) / 2)


def _check_tiles(number: int, level: Level, offsets: int, lengths: int) -> None:
    """Raise DamagedSlideError where the tiles listed are not those that the size calls for."""
    expected = level.tiles_across * level.tiles_down
    if offsets != expected or lengths != expected:
        raise DamagedSlideError(
            f"level {number} of {level.size[0]}x{level.size[1]} px needs {expected} tiles, but the"
            f" file lists {offsets} offsets and {lengths} lengths; it is damaged: copy it again"
        )
    if level.size[0] * level.size[1] > _MAX_LEVEL_PX:
        raise UnsupportedSlideError(
            f"level {number} is {level.size[0]}x{level.size[1]} px; expected at most"
            f" {_MAX_LEVEL_PX} px in all. Export the part with the tissue"
        )
