"""Reader of the TIFFs that the fast one refuses, through tiffslide; and of its open slides.

tiffslide opens the file, and its tifffile decodes the tiles. Its arrays are not used: they show a
tile that is missing as black. Whatever a tile has to pass before it is decoded, it passes here, and
codings whose decoders show lost bytes as pixels, without an error, are refused.
"""

import struct
import sys
import zlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tifffile import TiffFile, TiffPage

from xmag.errors import ClosedSlideError, DamagedSlideError, InputError, UnsupportedSlideError
from xmag.slide import codecs
from xmag.slide.image import PNG_MAGIC, chunks_of_png
from xmag.slide.integrity import check_zeros, damaged, jpeg_xl_size
from xmag.slide.layouts import NeedsTiffslideError
from xmag.slide.reader import Pixels
from xmag.slide.remote import OpenFile
from xmag.slide.tiff import TiffReader, tile_size

_RGB = 2
_ZSTD, _PNG = 50000, 34933
_JPEG_XL = (50002, 52546)
_DECODED = frozenset({1, 5, 8, 32773, 32946, _ZSTD, 50013, _PNG, *_JPEG_XL})
"""TIFF compressions of which each sector that is lost is an error, of the decoder or of ours."""
_SILENT = {
    6: "JPEG", 7: "JPEG", 33007: "JPEG", 34892: "JPEG", 22610: "JPEG XR", 34934: "JPEG XR",
    33003: "JPEG 2000", 33004: "JPEG 2000", 33005: "JPEG 2000", 34712: "JPEG 2000",
    34927: "WebP", 50001: "WebP",
}  # fmt: skip
_STRAIGHT_ALPHA = (2,)
_TOLERANCE = 8
"""Grey levels that a colour may be above its alpha: coding with loss moves both."""


class TiffSlideReader(TiffReader):
    """A TileReader over the pages that tiffslide finds; levels of the fast reader stay fast."""

    def _opened(self, file: BinaryIO, *, is_ndpi: bool) -> AbstractContextManager[TiffFile]:
        # It brings zarr and fsspec: loaded where a file needs it.
        from tiffslide import TiffSlide

        return TiffSlide(cast(Any, file), tifffile_options={"is_ndpi": is_ndpi}).ts_tifffile

    def _decoder(self, page: TiffPage, *, aperio: bool) -> codecs.Decoder:
        try:
            return super()._decoder(page, aperio=aperio)
        except NeedsTiffslideError as error:
            seen = str(error)
        compression = int(page.compression)
        if (coding := _SILENT.get(compression)) is not None:
            raise UnsupportedSlideError(
                f"its tiles are {coding} (TIFF compression {compression}, {page.planarconfig!r},"
                f" extra samples {page.extrasamples}), and the decoder for such shows lost bytes as"
                " pixels, without an error. Convert it to a tiled JPEG TIFF"
            )
        if page.photometric != _RGB or compression not in _DECODED or page.predictor not in (1, 2):
            raise UnsupportedSlideError(f"{seen}. Convert it to a tiled JPEG TIFF")
        return _TileDecoder(page)

    def read_tile_bytes(self, level: int, indices: Sequence[int]) -> list[bytes | None]:
        """The bytes of tiles, behind their number and lengths; None for those declared empty."""
        if not isinstance(self._decoders[level], _TileDecoder):
            return super().read_tile_bytes(level, indices)
        shape, table = self.levels[level], self._tables[level]
        tiles = shape.tiles_across * shape.tiles_down
        parts = [range(index, len(table.lengths), tiles) for index in indices]
        flat = super().read_tile_bytes(level, [number for planes in parts for number in planes])
        chunks = list[bytes | None]()
        following = iter(flat)
        for index, planes in zip(indices, parts, strict=True):
            found = [next(following) for _ in planes]
            stored = [part for part in found if part is not None]
            if len(stored) not in (0, len(found)):
                raise damaged(
                    f"tile {index} of level {level} has {len(stored)} of its {len(found)} planes"
                )
            head = struct.pack(f"<{1 + len(stored)}I", index, *map(len, stored))
            chunks.append(head + b"".join(stored) if stored else None)
        return chunks


class _TileDecoder:
    """Tiles as tifffile decodes them, planes put together, what is transparent on white."""

    def __init__(self, page: TiffPage) -> None:
        self._compression = int(page.compression)
        try:
            self._decode = page.decode
        except (ArithmeticError, ValueError, TypeError, LookupError, NotImplementedError) as error:
            raise damaged(
                f"its tags of how tiles are stored make no sense ({type(error).__name__})"
            ) from None
        self._size, self._image = tile_size(page)[:2], (page.imagewidth, page.imagelength)
        self._planes = page.samplesperpixel if page.planarconfig == 2 else 1
        self._samples = page.samplesperpixel // self._planes
        self._extra = tuple(page.extrasamples)

    def __call__(self, data: bytes, reduction: int) -> Pixels:
        index, *lengths = struct.unpack_from(f"<{1 + self._planes}I", data)
        at, planes = 4 * (1 + self._planes), list[NDArray[Any]]()
        for length in lengths:
            planes.append(self._plane(data[at : at + length], index))
            at += length
        samples = planes[0] if len(planes) == 1 else np.concatenate(planes, axis=2)
        pixels = self._on_white(samples) if samples.shape[2] == 4 else samples
        below, beside = self._size[1] - pixels.shape[0], self._size[0] - pixels.shape[1]
        if below or beside:
            pixels = np.pad(pixels, ((0, below), (0, beside), (0, 0)), constant_values=255)
        return codecs.box_average(np.ascontiguousarray(pixels), reduction)

    def _plane(self, data: bytes, index: int) -> NDArray[Any]:
        """One plane of a tile, or all of it: uint8 (height, width, samples)."""
        expected = self._extent(index)
        self._check(data, expected)
        try:
            # Not by tifffile, under which libpng complains on stderr.
            array = _decode_png(data) if self._compression == _PNG else self._decode(data, index)[0]
        # Each codec of imagecodecs has an error of its own, a RuntimeError.
        except (
            RuntimeError, ValueError, LookupError, TypeError, MemoryError, OSError, SyntaxError,
            struct.error,
        ) as error:  # fmt: skip
            raise DamagedSlideError(f"its bytes cannot be decoded: {error}") from error
        shapes = {(*size[::-1], self._samples) for size in (self._size, expected)}
        if array is None or array.shape[1:] not in shapes or array.dtype != np.uint8:
            seen = "nothing" if array is None else f"{array.shape[1:]} samples of {array.dtype}"
            raise DamagedSlideError(f"it decodes to {seen}, expected one of {sorted(shapes)}")
        return cast(NDArray[Any], array[0])

    def _extent(self, index: int) -> tuple[int, int]:
        """(width, height) of what a tile has of the image: less than a tile at the edges."""
        across = -(-self._image[0] // self._size[0])
        row, column = divmod(index, across)
        left, top = column * self._size[0], row * self._size[1]
        width, height = self._image[0] - left, self._image[1] - top
        return min(self._size[0], width), min(self._size[1], height)

    def _check(self, data: bytes, extent: tuple[int, int]) -> None:
        """Raise DamagedSlideError where a tile lacks a sector, or says that it is larger."""
        if self._compression == _ZSTD:
            check_zeros(data, "Zstandard")
        if self._compression == _PNG:
            if data[:8] != PNG_MAGIC or data[12:16] != b"IHDR" or len(data) < 33:
                raise DamagedSlideError("its bytes do not begin like a PNG")
            said = struct.unpack_from(">2I", data, 16)
        elif self._compression in _JPEG_XL:
            said = jpeg_xl_size(data)
        else:
            return
        if said not in (self._size, extent):
            raise DamagedSlideError(
                f"it says that it is {said[0]}x{said[1]} px, the tile is"
                f" {self._size[0]}x{self._size[1]} px"
            )

    def _on_white(self, samples: NDArray[np.uint8]) -> Pixels:
        """RGBA on white; colours are multiplied by alpha unless that cannot be, or is denied."""
        colour, alpha = samples[..., :3], samples[..., 3:]
        straight = self._extra == _STRAIGHT_ALPHA
        if not straight and (colour > alpha.astype(np.int16) + _TOLERANCE).any():
            if self._extra == (1,) or not alpha.any():
                raise DamagedSlideError(
                    "its colours are brighter than their alpha, by which the file says that they"
                    " are multiplied"
                    if self._extra == (1,)
                    else "its fourth sample is 0 everywhere, which hides all of its colours, and"
                    " the file does not say that it is alpha"
                )
            straight = True
        if straight:
            return codecs.over_white(samples)
        # Neither sum is above 255, but for what coding with loss has moved.
        white: Pixels = np.minimum(colour.astype(np.uint16) + (255 - alpha), 255).astype(np.uint8)
        return white


def _decode_png(data: bytes) -> NDArray[Any]:
    """The samples of a PNG, (1, height, width, samples), each chunk of it checked by its sum."""
    at = len(PNG_MAGIC)
    while at < len(data) and data[at - 8 : at - 4] != b"IEND":
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if zlib.crc32(data[at + 4 : end - 4]).to_bytes(4, "big") != data[end - 4 : end]:
            raise ValueError("a chunk of the PNG is cut, or not what its sum is of")
        at = end
    with Image.open(chunks_of_png(data), formats=["PNG"]) as image:
        if "transparency" in image.info:
            raise ValueError("the PNG says which of its colours is transparent")
        array = np.asarray(image)
    return array.reshape(1, *array.shape[:2], -1)


def file_of(slide: Any) -> Any:
    """The path of an open TiffSlide or OpenSlide; OpenFile where that has none; else `slide`."""
    if isinstance(slide, _class("openslide", "OpenSlide")):
        return slide._filename
    if not isinstance(slide, _class("tiffslide", "TiffSlide")):
        return slide
    try:
        handle = slide.ts_tifffile.filehandle
    except (RuntimeError, NotImplementedError, AttributeError):
        raise InputError(
            "the TiffSlide has no TIFF of its own; open a Slide by the path of its file"
        ) from None
    if handle.closed:
        raise ClosedSlideError("the TiffSlide is closed; open it again, or a Slide by its path")
    path = Path(handle.path)
    is_file = path.is_absolute() and path.is_file() and path.stat().st_size == handle.size
    return path if is_file else OpenFile(handle)


def _class(module: str, name: str) -> Any:
    """A class of a package that whoever has an instance of it has imported; or no class."""
    return getattr(sys.modules.get(module), name, ())
