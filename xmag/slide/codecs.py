"""Tile bytes -> RGB pixels, at full or reduced scale.

A decoder is made once for a level and called for its tiles, from any thread. JPEG is decoded at
1/2, 1/4 and 1/8 by libjpeg-turbo's scaled inverse transforms, which are box averages; JPEG 2000 at
1/4 and 1/8 from half its resolution; all else is decoded in full and averaged.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import imagecodecs
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from xmag.errors import DamagedSlideError, UnsupportedSlideError
from xmag.slide import integrity, jpeg2000
from xmag.slide.integrity import end_of_header, segments
from xmag.slide.layouts import NeedsTiffslideError
from xmag.slide.reader import Pixels
from xmag.slide.stacks import stack_of

JPEG = 7
APERIO_J2K_YCBCR = 33003
JPEG_2000 = (APERIO_J2K_YCBCR, 33004, 33005, 34712)
_ZSTD, _WEBP = 50000, 50001
MAX_TILE_PX = 1 << 26
"""Tiles and strips above this are not decoded: a file that asks for gigabytes at once is broken."""
_MAX_JPEG_2000_TILE_PX = 1 << 24
"""OpenJPEG takes 24 bytes a px."""
_PHOTOMETRIC_RGB = 2
_APPLICATION = {*range(0xE0, 0xF0), 0xFE}
"""Markers of application segments and comments of a JPEG."""
_CHROMA_LAG = {"422": 2, "440": 2, "411": 4, "441": 4}
"""Where chroma is subsampled along one side only, libjpeg-turbo reduces it as much as luma, so that
it has too few samples at the end. It is decoded by so much less, and then averaged."""

Decoder = Callable[[bytes, int], Pixels]
"""Tile bytes, n -> the pixels of the tile at 1/n, in full tile size.

DamagedSlideError where the bytes are not a tile.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TileCoding:
    """Coding of the tiles of a level, in the terms of TIFF.

    `size` is the (width, height) of a tile. `last_height` is less where tiles are strips, the
    last of which ends with the image. `jpeg_tables` are the shared tables of abbreviated JPEG
    streams; `jpeg_header` comes before each tile that is only a stretch of a JPEG stream. `aperio`
    says that the file is one of Aperio, whose codes and tags have a meaning of their own.
    """

    compression: int
    photometric: int
    samples: int
    size: tuple[int, int]
    last_height: int
    predictor: int = 1
    jpeg_tables: bytes | None = None
    jpeg_header: bytes | None = None
    aperio: bool = False


def reductions(size: tuple[int, int]) -> tuple[int, ...]:
    """The n for which tiles of this (width, height) can be had at 1/n."""
    return tuple(n for n in (1, 2, 4, 8) if size[0] % n == 0 and size[1] % n == 0)


def check_tile(size: tuple[int, int], compression: int) -> None:
    """Raise UnsupportedSlideError where decoding a tile of this size would take too much memory."""
    most = _MAX_JPEG_2000_TILE_PX if compression in JPEG_2000 else MAX_TILE_PX
    if not (min(size) > 0 and size[0] * size[1] <= most):
        raise UnsupportedSlideError(
            f"its tiles are {size[0]}x{size[1]} px; expected at most {most} px each. Convert it"
            " to a tiled pyramid"
        )


def decoder(coding: TileCoding) -> Decoder:
    """The decoder for tiles stored like this; UnsupportedSlideError where there is none."""
    if coding.compression in (JPEG, 33007):
        return JpegDecoder(coding)
    if coding.compression in JPEG_2000:
        return _jpeg2000(coding)
    if coding.photometric != _PHOTOMETRIC_RGB:
        raise UnsupportedSlideError(
            f"its tiles are YCbCr in TIFF compression {coding.compression}; xmag reads YCbCr in"
            " JPEG and Aperio's JPEG 2000. Convert it to a tiled JPEG TIFF"
        )
    webp = coding.compression == _WEBP
    return _in_full(coding, partial(_webp, size=coding.size) if webp else _lossless(coding))


def box_average(pixels: Pixels, factor: int) -> Pixels:
    """The means of `factor` x `factor` blocks, rounded; both sides are multiples of it."""
    if factor == 1:
        return pixels
    # Pillow's reduce is this average in C, with the GIL released.
    return np.asarray(Image.fromarray(pixels).reduce(factor))


@dataclass(frozen=True, slots=True)
class _Start:
    """Header of a JPEG tile, as it is `stored` and whole, its (width, height), and its checks."""

    stored: bytes
    header: bytes
    size: tuple[int, int]
    subsampling: str
    zeros: bytes


class JpegDecoder:
    """Tiles in JPEG, whole or without their tables."""

    def __init__(self, coding: TileCoding) -> None:
        self._tagged_ycbcr = coding.photometric != _PHOTOMETRIC_RGB
        self._aperio = coding.aperio
        self._size = coding.size
        self._heights = {coding.size[1], coding.last_height}
        self._header = coding.jpeg_header
        self._last: _Start | None = None
        shared = coding.jpeg_tables or b""
        self._tables = b"".join(
            shared[start:end]
            for marker, start, end in segments(shared)
            if marker != 0xD9 and marker not in _APPLICATION
        )

    def __call__(self, data: bytes, reduction: int) -> Pixels:
        """The pixels of a tile; see `Decoder`."""
        try:
            stream, start = self._started(data)
            pixels = _decode_jpeg(stream, start.size, start.subsampling, reduction)
        except ValueError as error:
            raise DamagedSlideError(f"its JPEG cannot be decoded: {error}") from error
        except KeyError:
            raise DamagedSlideError("its JPEG has chroma in an order that no scanner has") from None
        return _padded(pixels, self._size[1] // reduction)

    def _started(self, data: bytes) -> tuple[bytes, "_Start"]:
        """(a tile's bytes as a whole JPEG, what its header says), checked against lost bytes."""
        start = self._last  # tiles of a level begin alike
        if start is not None and data.startswith(start.stored):
            stream = start.header + data[len(start.stored) :]
            integrity.check_codes(stream, len(start.header), start.zeros)
            return stream, start
        stream, expected = self._complete(data)
        integrity.check_jpeg(stream)
        height, width, colorspace, subsampling = simplejpeg.decode_jpeg_header(stream)
        if width != self._size[0] or height not in self._heights:
            raise DamagedSlideError(
                f"its JPEG is {width}x{height} px, the tile {self._size[0]}x{self._size[1]} px"
            )
        if colorspace != expected:
            raise DamagedSlideError(f"its JPEG is {colorspace}, where the file promises {expected}")
        header = stream[: end_of_header(stream)]
        has_one_scan, zeros = integrity.limits(header)
        stored = data[: len(data) - len(stream) + len(header)]
        start = _Start(stored, header, (width, height), subsampling, zeros)
        if has_one_scan and self._header is None:
            self._last = start
        return stream, start

    def many(self, chunks: Sequence[object], reduction: int, row: Pixels) -> list[bool]:
        """Decode tiles into `row`, side by side and equal to each alone; False for the others.

        What makes any of them differ from the others, or not a tile, is said where it is alone.
        """
        done = [False] * len(chunks)
        numbers = [n for n, chunk in enumerate(chunks) if isinstance(chunk, bytes)]
        stored = [chunk for chunk in chunks if isinstance(chunk, bytes)]
        if len(stored) < 2 or self._header is not None:
            return done
        try:
            start = self._started(stored[0])[1]
        except (DamagedSlideError, ValueError, KeyError):
            return done
        # At full scale chroma is interpolated, over the seam of two tiles as well.
        apart = start.subsampling == "444" or reduction > 1
        stack = stack_of(start.header, self._size)
        if stack is None or not apart:
            return done
        width, height = self._size[0] // reduction, self._size[1] // reduction
        places = row.reshape(height, len(chunks), width, 3)
        for members, joined, rows in stack.join(stored, len(start.stored)):
            try:
                pixels = _decode_jpeg(joined, (self._size[0], rows), start.subsampling, reduction)
            except ValueError:
                continue
            tiles = pixels[: len(members) * height].reshape(-1, height, width, 3).swapaxes(0, 1)
            at = [numbers[n] for n in members]
            # A slice is copied at once, and without the GIL.
            whole = at[-1] - at[0] + 1 == len(at)
            places[:, slice(at[0], at[-1] + 1) if whole else at] = tiles
            for n in at:
                done[n] = True
        return done

    def _complete(self, data: bytes) -> tuple[bytes, str]:
        """(`data` with the tables it shares and a marker of its colour space, that space).

        The tag of the TIFF counts, as in libtiff; a marker alone does not. But converters tag as
        RGB what a JPEG library made YCbCr of: RGB never has less chroma, and outside of Aperio's
        files a stream is believed whose components have the names of RGB, or a marker and the
        names of YCbCr (JFIF 1.02).
        """
        if self._header is not None:
            if not re.search(rb"\xff[\xd0-\xd9]", data[-16:]):
                raise DamagedSlideError("its stretch of a JPEG does not end with a marker")
            # A stretch that ends with a restart marker lacks the end; the last has one already.
            data = self._header + data + b"\xff\xd9"
        if data[:2] != b"\xff\xd8":
            raise DamagedSlideError("its bytes do not begin like a JPEG")
        start, says_ycbcr, components = 2, False, b""
        for marker, at, end in segments(data):
            if at == start and marker in _APPLICATION:
                said, start = data[at + 4 : end], end
                says_ycbcr |= said[:5] == b"JFIF\0" or (
                    said[:5] == b"Adobe" and said[11:12] == b"\1"
                )
            elif marker in integrity.FRAMES:
                components = data[at + 10 : end]
                break
        subsampled = len(set(components[1::3])) > 1
        ycbcr = subsampled or self._tagged_ycbcr
        if not (subsampled or self._aperio):
            names = components[::3]
            ycbcr = names != b"RGB" and (ycbcr or (says_ycbcr and names == b"\1\2\3"))
        # Adobe's segment states the colour transform: 0 for none, 1 for YCbCr.
        adobe_segment = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes([ycbcr])
        stream = b"\xff\xd8" + adobe_segment + self._tables + data[start:]
        return stream, "YCbCr" if ycbcr else "RGB"


def _decode_jpeg(stream: bytes, size: tuple[int, int], subsampling: str, reduction: int) -> Pixels:
    """The pixels of a JPEG of this (width, height) at 1/`reduction`; ValueError for damage."""
    scale = max(1, reduction // _CHROMA_LAG.get(subsampling, 1))
    pixels: Pixels = simplejpeg.decode_jpeg(
        stream,
        fastupsample=scale != reduction,
        min_factor=scale,
        min_width=size[0] // scale,
        min_height=size[1] // scale,
    )
    return box_average(pixels, reduction // scale)


def _in_full(coding: TileCoding, decode: Callable[[bytes], NDArray[Any]]) -> Decoder:
    """A decoder of tiles that are decoded in full, then averaged."""
    width, height = coding.size

    def decoded(data: bytes, reduction: int) -> Pixels:
        try:
            array = decode(data)
        except (RuntimeError, ValueError, MemoryError) as error:
            raise DamagedSlideError(f"its bytes cannot be decoded: {error}") from error
        heights = (height, coding.last_height)
        if array.ndim != 3 or array.shape[0] not in heights or array.shape[1] != width:
            raise DamagedSlideError(
                f"it decodes to an array of shape {array.shape}, expected ({height}, {width}, 3)"
            )
        if array.dtype != np.uint8 or array.shape[2] not in (3, 4):
            raise UnsupportedSlideError(
                f"its pixels are {array.shape[2]} samples of {array.dtype}; xmag reads 8-bit RGB"
            )
        pixels = over_white(array) if array.shape[2] == 4 else array
        return box_average(_padded(pixels, height), reduction)

    return decoded


def _jpeg2000(coding: TileCoding) -> Decoder:
    """The decoder of JPEG 2000: in full, or at 1/4 and less without the finest wavelet level."""
    # Elsewhere the code stands for JPEG 2000 of any kind, and no tag tells RGB from YCbCr.
    ycbcr = coding.aperio and coding.compression == APERIO_J2K_YCBCR
    decode = partial(jpeg2000.decode, ycbcr=ycbcr)
    width, height = coding.size
    # At full scale px are those of OpenSlide; averages do not show how YCbCr was rounded.
    native = _in_full(coding, partial(decode, size=coding.size, rounded=True))
    full = _in_full(coding, partial(decode, size=coding.size))
    quarter = _in_full(
        replace(coding, size=(width // 4, height // 4), last_height=height // 4),
        lambda half: jpeg2000.quarter(decode(half, size=(width // 2, height // 2))),
    )

    def decoded(data: bytes, reduction: int) -> Pixels:
        integrity.check_jpeg2000(data)
        if reduction == 1:
            return native(data, reduction)
        half = jpeg2000.without_finest_level(data, coding.size) if reduction >= 4 else None
        return full(data, reduction) if half is None else quarter(half, reduction // 4)

    return decoded


def over_white(rgba: NDArray[np.uint8]) -> Pixels:
    """RGBA pixels (not premultiplied) as they look on a white ground."""
    pixels = np.empty((*rgba.shape[:2], 3), np.uint8)
    # In bands, as what lies between takes eight times the memory.
    step = max(1, (1 << 20) // max(1, rgba.shape[1]))
    for top in range(0, len(rgba), step):
        band = rgba[top : top + step].astype(np.uint16)
        colour, alpha = band[..., :3], band[..., 3:]
        pixels[top : top + step] = (colour * alpha + 255 * (255 - alpha) + 127) // 255
    return pixels


def _padded(pixels: Pixels, height: int) -> Pixels:
    """`pixels` in the full height of a tile: the last strip of an image may be short."""
    missing = height - len(pixels)
    if missing <= 0:
        return pixels
    return np.pad(pixels, ((0, missing), (0, 0), (0, 0)), constant_values=255)


def _webp(data: bytes, *, size: tuple[int, int]) -> NDArray[Any]:
    integrity.check_webp(data, size)
    return imagecodecs.webp_decode(data)


def _lossless(coding: TileCoding) -> Callable[[bytes], NDArray[Any]]:
    """The decoder of a general-purpose compression, followed by undoing the predictor."""
    unpackers: dict[int, Callable[..., bytes | bytearray]] = {
        1: lambda data, out: data[: out - 1],  # some writers pad
        5: imagecodecs.lzw_decode,
        8: imagecodecs.zlib_decode,
        32946: imagecodecs.zlib_decode,
        32773: imagecodecs.packbits_decode,
        _ZSTD: imagecodecs.zstd_decode,
    }
    unpack = unpackers.get(coding.compression)
    if unpack is None or coding.predictor not in (1, 2):
        raise NeedsTiffslideError(
            f"its tiles are stored with TIFF compression {coding.compression} and predictor"
            f" {coding.predictor}, which xmag does not read"
        )
    row = coding.size[0] * coding.samples
    whole = row * coding.size[1]

    def decode(data: bytes) -> NDArray[Any]:
        if coding.compression == _ZSTD:  # most writers leave its checksum out
            integrity.check_zeros(data, "Zstandard")
        # With the size of what comes out, so that a few bytes cannot unpack to gigabytes.
        raw = np.frombuffer(unpack(data, out=whole + 1), np.uint8)
        if raw.size > whole:
            raise DamagedSlideError(f"it unpacks to more than the {whole} bytes of its pixels")
        if raw.size % row:
            raise DamagedSlideError(
                f"it holds {raw.size} bytes of pixels, expected {whole}; the file is truncated"
            )
        array = raw.reshape(-1, coding.size[0], coding.samples)
        return np.cumsum(array, axis=1, dtype=np.uint8) if coding.predictor == 2 else array

    return decode
