"""Tiles of TIFF slides: tifffile parses the directories, everything after that is ours."""

import os
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import BinaryIO, cast
from xml.etree import ElementTree

from tifffile import TIFF, TiffFile, TiffFileError, TiffPage

from xmag.errors import ClosedSlideError, UnsupportedSlideError, XmagError
from xmag.slide import codecs, directories, layouts
from xmag.slide.directories import TileTable
from xmag.slide.integrity import check_level, damaged, named
from xmag.slide.layouts import NeedsTiffslideError, PageLevel, TiffLayout, page_size
from xmag.slide.pixels import check_whole, read_whole
from xmag.slide.reader import Level, Pixels, ScaleMetadata, downsample
from xmag.slide.remote import OpenFile, RemoteSource

_MOST_GAP = 64
"""Bytes between tiles that are read along with them: some writers align tiles."""
_MOST_TOGETHER = 1 << 22
"""Bytes read at once."""

_PARSE_ERRORS = (
    TiffFileError, ValueError, LookupError, struct.error, OverflowError, MemoryError, TypeError,
    AttributeError, ZeroDivisionError, RuntimeError, ElementTree.ParseError, StopIteration,
)  # fmt: skip
"""Errors of tifffile on a directory that makes no sense."""


class LocalSource:
    """Byte ranges of a file on a local or mounted file system, from several threads at once."""

    def __init__(self, path: Path) -> None:
        self._name = path.name
        self._file = path.open("rb", buffering=0)
        self._lock = threading.Lock()

    def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of each (offset, length); DamagedSlideError where the file is too short."""
        if self._file.closed:
            raise ClosedSlideError(f"{self._name} is closed; open the slide again to read from it")
        chunks = list[bytes]()
        for group in _neighbours(ranges):
            start, last = group[0][0], group[-1]
            data = self._read(start, sum(last) - start)
            # Each read lets go of the GIL and waits for it, which slices do not.
            chunks += [data[offset - start : offset - start + size] for offset, size in group]
        for (offset, length), chunk in zip(ranges, chunks, strict=True):
            if len(chunk) != length:
                raise damaged(
                    f"{self._name} should hold {length} bytes at offset {offset}, but ends after"
                    f" {len(chunk)} of them"
                )
        return chunks

    def close(self) -> None:
        """Release the file. Closing twice is fine."""
        self._file.close()

    def _read_at(self, offset: int, length: int) -> bytes:
        return os.pread(self._file.fileno(), length, offset)

    def _seek_and_read(self, offset: int, length: int) -> bytes:
        with self._lock:
            self._file.seek(offset)
            return self._file.read(length)

    # Windows has no pread.
    _read = _read_at if hasattr(os, "pread") else _seek_and_read


def _neighbours(ranges: Sequence[tuple[int, int]]) -> Iterator[Sequence[tuple[int, int]]]:
    """The (offset, length) in groups that follow each other in the file."""
    first = 0
    for at in range(1, len(ranges) + 1):
        if at < len(ranges):
            gap = ranges[at][0] - sum(ranges[at - 1])
            if 0 <= gap <= _MOST_GAP and sum(ranges[at]) - ranges[first][0] <= _MOST_TOGETHER:
                continue
        yield ranges[first:at]
        first = at


class DecodingReader:
    """The half of a TileReader that decodes, with the decoder of each level."""

    _decoders: Sequence[codecs.Decoder]

    def decode(self, level: int, data: bytes, reduction: int) -> Pixels:
        """The pixels of one tile at 1/`reduction`, in full tile size."""
        return self._decoders[level](data, reduction)

    def decode_many(
        self, level: int, chunks: Sequence[object], reduction: int, row: Pixels
    ) -> list[bool]:
        """Decode tiles of a level into `row`, side by side; False for what `decode` has to do."""
        decoder = self._decoders[level]
        if isinstance(decoder, codecs.JpegDecoder):
            return decoder.many(chunks, reduction, row)
        return [False] * len(chunks)


class TiffReader(DecodingReader):
    """A TileReader over the pages of one TIFF file; it closes a remote source with itself."""

    def __init__(self, path: Path | RemoteSource | OpenFile, *, region: int | None = None) -> None:
        self._place, self._region = path, region
        with named(path.name):
            with self._parsed() as (_, layout, end):
                pass
            self._set(layout, end)
        self.source = LocalSource(path) if isinstance(path, Path) else path

    @contextmanager
    def _parsed(self) -> Iterator[tuple[list[TiffPage], TiffLayout, int]]:
        """The file's pages, pyramid and end, while it is open; what cannot be parsed is damage."""
        place, is_ndpi = self._place, self._place.name.endswith(".ndpi")
        # What goes wrong on the way to a remote file comes before all else.
        with place.open("rb") if isinstance(place, Path) else place.file() as opened:
            file = cast(BinaryIO, opened)
            codes, end = directories.walk(file, is_ndpi=is_ndpi), file.seek(0, 2)
            file.seek(0)
            try:
                # What counts of its warnings is found out here and raised.
                with directories.tifffile_unheard(), self._opened(file, is_ndpi=is_ndpi) as tiff:
                    pages = [page for page in tiff.pages if isinstance(page, TiffPage)]
                    if not pages:
                        raise damaged("it begins like a TIFF, but holds no image")
                    yield pages, _checked_layout(pages, self._region, codes), end
            except _PARSE_ERRORS as error:
                if isinstance(error, XmagError):
                    raise
                # Without the error itself, which may hold what the scanner wrote of the patient.
                raise damaged(
                    "it begins like a TIFF, but its directories make no sense"
                    f" ({type(error).__name__})"
                ) from None

    def _opened(self, file: BinaryIO, *, is_ndpi: bool) -> AbstractContextManager[TiffFile]:
        """The parser of a file."""
        return TiffFile(file, is_ndpi=is_ndpi)

    def _decoder(self, page: TiffPage, *, aperio: bool) -> codecs.Decoder:
        """The decoder for the tiles of a page; UnsupportedSlideError where there is none."""
        return codecs.decoder(_coding(page, aperio=aperio))

    def _set(self, layout: TiffLayout, end: int) -> None:
        self.format = layout.format
        self.metadata: ScaleMetadata = layout.metadata
        decoders, levels = list[codecs.Decoder](), list[Level]()
        self._tables = list[TileTable]()
        aperio = layout.format == "aperio"
        for number, stored in enumerate(layout.levels):
            page, decoder = stored.page, self._decoder(stored.page, aperio=aperio)
            size = tile_size(page)[:2]
            reductions = codecs.reductions(size)
            planes = page.samplesperpixel if page.planarconfig == 2 else 1
            level = Level(
                size=stored.size,
                downsample=stored.downsample or downsample(layout.levels[0].size, stored.size),
                tile_size=size,
                origin=stored.origin,
                stored_size=page_size(page),
                reductions=tuple(n for n in reductions if not any(o % n for o in stored.origin)),
                empty_tiles=page.databytecounts.count(0) // planes,
            )
            check_level(number, level)
            tiles = level.tiles_across * level.tiles_down * planes
            directories.check_table(f"level {number}", level.size, tiles, page)
            most = directories.most_bytes(*size, page.samplesperpixel)
            levels.append(level)
            decoders.append(decoder)
            self._tables.append(TileTable(number, page, most=most, end=end, is_aperio=aperio))
        self.levels, self._decoders = tuple(levels), decoders

    def read_tile_bytes(self, level: int, indices: Sequence[int]) -> list[bytes | None]:
        """The bytes of tiles, as stored; None for those that are declared empty."""
        table = self._tables[level]
        for index in indices:
            table.check(index)
        offsets, lengths, lead = table.offsets, table.lengths, table.lead
        stored = [i for i in indices if lengths[i]]
        chunks = self.source.read_many([(offsets[i] - lead, lengths[i] + lead) for i in stored])
        if lead:
            chunks = [table.behind_lead(*pair) for pair in zip(chunks, stored, strict=True)]
        following = iter(chunks)
        return [next(following) if lengths[i] else None for i in indices]

    def read_properties(self) -> Mapping[str, str]:
        """The text tags of the first level and of the first page, and Aperio's fields."""
        with named(self._place.name), self._parsed() as (pages, layout, _):
            return layouts.texts(pages, layout)

    def associated_images(self) -> Mapping[str, Callable[[], Pixels]]:
        """Functions that read the pages beside the scan: "label", "macro", "thumbnail", "other"."""
        with named(self._place.name), self._parsed() as (pages, layout, end):
            beside = layouts.associated_pages(pages, layout)
        return {kind: partial(self._page, kind, page, layout, end) for kind, page in beside.items()}

    def _page(self, kind: str, page: TiffPage, layout: TiffLayout, end: int) -> Pixels:
        """The pixels of a page that is no level."""
        with named(f"{self._place.name}, {kind}"):
            alone, level = copy(self), PageLevel(page=page, size=page_size(page))
            check_whole(level.size)
            alone._set(replace(layout, levels=(level,)), end)
            return read_whole(alone)

    def close(self) -> None:
        """Release the file. Closing twice is fine."""
        self.source.close()


def _checked_layout(
    pages: list[TiffPage], region: int | None, codes: Mapping[int, Set[int]]
) -> TiffLayout:
    """The layout of the slide in a file, all tags of which could be read."""
    try:
        layout = layouts.find_layout(pages, region)
    except layouts.NeedsOpenSlideError:
        for number, page in enumerate(pages):
            directories.check_tags(number, page, codes)
            directories.check_for_openslide(number, page, tile_size(page)[:2])
        raise
    for number, level in enumerate(layout.levels):
        directories.check_tags(number, level.page, codes)
    return layout


def _coding(page: TiffPage, *, aperio: bool) -> codecs.TileCoding:
    """Coding of the tiles of `page`; UnsupportedSlideError where they are not 8-bit RGB."""
    dtype = page.dtype
    if dtype is None or dtype.name != "uint8" or page.samplesperpixel not in (3, 4):
        raise UnsupportedSlideError(
            f"its pixels are {page.samplesperpixel} sample(s) of {dtype}, photometric"
            f" {page.photometric!r}; xmag reads 8-bit RGB (brightfield) slides"
        )
    if page.photometric not in (2, 6):
        raise UnsupportedSlideError(
            f"its pixels are stored as photometric {page.photometric!r}; xmag reads RGB, RGBA and"
            " YCbCr"
        )
    # 2 is alpha that the colours are not multiplied by.
    known_alpha = page.samplesperpixel == 3 or page.extrasamples == (2,)
    reversed_bits = page.fillorder != 1 and page.compression not in TIFF.IMAGE_COMPRESSIONS
    if page.planarconfig != 1 or not known_alpha or reversed_bits:
        raise NeedsTiffslideError(
            f"its pixels are stored as {page.photometric!r}, {page.planarconfig!r}, extra samples"
            f" {page.extrasamples}, fill order {page.fillorder}"
        )
    if not isinstance(page.jpegtables, bytes | None):
        raise damaged("its JPEG tables are no bytes")
    width, height, rows = tile_size(page)
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


def tile_size(page: TiffPage) -> tuple[int, int, int]:
    """(width, height, height of the last) tile; strips are tiles as wide as the image.

    Raises UnsupportedSlideError where decoding one would take too much memory.
    """
    if page.is_tiled or page.jpegheader is not None:
        width, height = page.tilewidth, page.tilelength
        last = height
    else:
        width, height = page.imagewidth, max(1, min(page.rowsperstrip, page.imagelength))
        last = page.imagelength % height or height
    codecs.check_tile((width, height), int(page.compression))
    return width, height, last
