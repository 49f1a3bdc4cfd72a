"""Tiles of TIFF slides: tifffile parses the directories, everything after that is ours."""

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, cast
from xml.etree import ElementTree

from tifffile import TiffFile, TiffFileError, TiffPage

from xmag.errors import DamagedSlideError, UnsupportedSlideError, XmagError
from xmag.slide import codecs
from xmag.slide.layouts import PageLevel, TiffLayout, find_layout, page_size, whole_factor
from xmag.slide.reader import Level, Pixels, ScaleMetadata
from xmag.slide.remote import RemoteSource
from xmag.slide.source import ByteSource, LocalSource

_MAX_TILE_PX = 1 << 26
"""Tiles and strips above this are not decoded: a file that asks for gigabytes at once is broken."""

_UNASSOCIATED_ALPHA = 2

_PARSE_ERRORS = (
    TiffFileError, ValueError, LookupError, struct.error, OverflowError, MemoryError, TypeError,
    AttributeError, ZeroDivisionError,
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
        layout = _read_layout(path, region)
        self.format = layout.format
        self.metadata: ScaleMetadata = layout.metadata
        codings = [_coding(stored.page) for stored in layout.levels]
        self.levels: tuple[Level, ...] = tuple(
            _level(stored, layout.levels[0].size, coding)
            for stored, coding in zip(layout.levels, codings, strict=True)
        )
        self._decoders = [codecs.decoder(coding) for coding in codings]
        self._offsets = [stored.page.dataoffsets for stored in layout.levels]
        self._lengths = [stored.page.databytecounts for stored in layout.levels]
        for number, level in enumerate(self.levels):
            _check_tiles(number, level, len(self._offsets[number]), len(self._lengths[number]))
        self.source: ByteSource = LocalSource(path) if isinstance(path, Path) else path

    def read_tile_bytes(self, level: int, indices: Sequence[int]) -> list[bytes | None]:
        """The bytes of tiles, as stored; None for those without any."""
        offsets, lengths = self._offsets[level], self._lengths[level]
        chunks = iter(
            self.source.read_many([(offsets[i], lengths[i]) for i in indices if lengths[i]])
        )
        return [next(chunks) if lengths[i] else None for i in indices]

    def decode(self, level: int, data: bytes, reduction: int) -> Pixels:
        """The pixels of one tile at 1/`reduction`, in full tile size."""
        return self._decoders[level](data, reduction)

    def close(self) -> None:
        """Release the file. Closing twice is fine."""
        self.source.close()


def _read_layout(path: Path | RemoteSource, region: int | None) -> TiffLayout:
    """The pages of the slide in the file, which is closed again."""
    if isinstance(path, Path):
        return _parse(path, region)
    file = path.file()
    try:
        return _parse(cast(BinaryIO, file), region)
    finally:
        if file.failure is not None:
            raise file.failure


def _parse(file: Path | BinaryIO, region: int | None) -> TiffLayout:
    try:
        with TiffFile(file) as tiff:
            pages = [page for page in tiff.pages if isinstance(page, TiffPage)]
            if not pages:
                raise DamagedSlideError(
                    "it begins like a TIFF, but holds no image, or only beyond its end; it is"
                    " truncated or damaged: copy it again"
                )
            _check_chain(tiff)
            return find_layout(pages, region)
    except _PARSE_ERRORS as error:
        if isinstance(error, XmagError):
            raise
        raise DamagedSlideError(
            f"it begins like a TIFF, but its directories make no sense ({error!r}); it is truncated"
            " or damaged: copy it again"
        ) from error


def _check_chain(tiff: TiffFile) -> None:
    """Raise DamagedSlideError where directories are lost: tifffile goes on with those it found."""
    at = tiff.pages.next_page_offset
    if at is None:
        return
    tiff.filehandle.seek(at)
    if any(tiff.filehandle.read(tiff.tiff.offsetsize)):
        raise DamagedSlideError(
            f"the directory after the {len(tiff.pages)} found lies beyond the end of the file; it"
            " is truncated: copy it again"
        )


def _coding(page: TiffPage) -> codecs.TileCoding:
    """How the tiles of `page` are stored; UnsupportedSlideError where they are not 8-bit RGB."""
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
    width, height, rows = _tile_size(page)
    if not 0 < width * height <= _MAX_TILE_PX:
        raise UnsupportedSlideError(
            f"its tiles are {width}x{height} px; expected at most {_MAX_TILE_PX} px each."
            " Convert it to a tiled pyramid"
        )
    return codecs.TileCoding(
        compression=int(page.compression),
        photometric=int(page.photometric),
        samples=page.samplesperpixel,
        size=(width, height),
        last_height=rows,
        predictor=int(page.predictor),
        jpeg_tables=page.jpegtables,
        jpeg_header=page.jpegheader,
    )


def _tile_size(page: TiffPage) -> tuple[int, int, int]:
    """(width, height, height of the last) tile; strips are tiles as wide as the image."""
    if page.is_tiled or page.jpegheader is not None:
        return page.tilewidth, page.tilelength, page.tilelength
    rows = min(page.rowsperstrip, page.imagelength)
    return page.imagewidth, rows, page.imagelength % rows or rows if rows else 0


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
    )


def _downsample(base: tuple[int, int], size: tuple[int, int]) -> float:
    """Level-0 px per px: whole where the sizes allow it, as they are rounded."""
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
