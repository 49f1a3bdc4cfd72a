"""Plain PNG and JPEG images as slides of one level; they never say their µm/px."""

import io
import struct
import threading
from collections.abc import Callable, Mapping, Set
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from xmag.errors import ClosedSlideError, DamagedSlideError, InputError, UnsupportedSlideError
from xmag.slide.codecs import over_white
from xmag.slide.integrity import check_jpeg, check_scans, segments
from xmag.slide.reader import Level, Pixels, ScaleMetadata

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
JPEG_MAGIC = b"\xff\xd8\xff"

_MAX_BYTES = 1 << 30
"""Most bytes of a plain image file; the image is held in memory as a whole."""
_PNG_CHUNKS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}
"""PNG chunks that the pixels need; texts, profiles and animations are left out."""
_PNG_TEXTS = {b"tEXt", b"zTXt", b"iTXt"}
_COM = 0xFE
_PNG_COLOURS = {0: "grey", 2: "RGB", 3: "palette", 4: "grey and alpha", 6: "RGBA"}


class ImageReader:
    """A RegionReader that decodes the image when pixels are first asked for, and keeps it."""

    metadata = ScaleMetadata()

    def __init__(self, path: Path, *, region: int | None = None) -> None:
        if region not in (None, 0):
            raise InputError(f"region={region!r} is not in {path.name}; it holds one image")
        self._path = path
        length = path.stat().st_size
        if length > _MAX_BYTES:
            raise UnsupportedSlideError(
                f"{path.name} has {length} bytes; xmag reads plain images of up to {_MAX_BYTES}"
                " bytes. Convert it to a tiled pyramid"
            )
        with path.open("rb") as file:
            head = file.read(26)
        self.format = "png" if head.startswith(PNG_MAGIC) else "jpeg"
        size = _png_size(head, path.name) if self.format == "png" else _jpeg_size(path)
        limit = Image.MAX_IMAGE_PIXELS
        if not (size[0] > 0 and size[1] > 0):
            raise DamagedSlideError(f"{path.name} has {size[0]}x{size[1]} px; copy it again")
        if limit is not None and size[0] * size[1] > limit:
            raise UnsupportedSlideError(
                f"{path.name} has {size[0]}x{size[1]} px, and Pillow's limit is {limit} px"
                " (PIL.Image.MAX_IMAGE_PIXELS). Convert it to a tiled pyramid, or raise the limit"
                " if you trust the file"
            )
        self.levels: tuple[Level, ...] = (Level(size=size, downsample=1.0),)
        self._pixels: Pixels | None = None
        self._closed, self._lock = False, threading.Lock()

    def read_region(self, level: int, xy: tuple[int, int], size: tuple[int, int]) -> Pixels:  # noqa: ARG002 (there is one level)
        """The pixels of a window wholly inside the image."""
        with self._lock:
            if self._closed:
                raise ClosedSlideError(f"{self._path.name} is closed; open the slide again")
            if self._pixels is None:
                self._pixels = self._decoded()
            pixels = self._pixels
        (x, y), (width, height) = xy, size
        return pixels[y : y + height, x : x + width].copy()

    def read_properties(self) -> Mapping[str, str]:
        """Texts of a PNG, and comments of a JPEG."""
        if self.format == "jpeg":
            data = self._path.read_bytes()
            # Not by Pillow, which logs what stands in the EXIF.
            comments = [data[at + 4 : end] for marker, at, end in segments(data) if marker == _COM]
            return (
                {"jpeg.comment": b"\n".join(comments).decode(errors="replace")} if comments else {}
            )
        try:
            kept = chunks_of_png(self._path.read_bytes(), _PNG_CHUNKS | _PNG_TEXTS)
            with Image.open(kept, formats=["PNG"]) as image:
                image.load()  # texts may follow the pixels
                return {f"png.{k}": str(v) for k, v in image.info.items() if isinstance(v, str)}
        except (OSError, ValueError, SyntaxError, struct.error) as error:
            raise DamagedSlideError(
                f"{self._path.name} is damaged ({type(error).__name__}); copy the file again"
            ) from None

    def associated_images(self) -> Mapping[str, Callable[[], Pixels]]:
        """Nothing: a plain image holds one."""
        return {}

    def close(self) -> None:
        """Release the pixels. Closing twice is fine."""
        with self._lock:
            self._closed = True
            self._pixels = None

    def _decoded(self) -> Pixels:
        try:
            if self.format == "jpeg":
                data = self._path.read_bytes()
                check_jpeg(data)
                pixels: Pixels = simplejpeg.decode_jpeg(data)
                return pixels
            # Not by imagecodecs, whose libpng complains on stderr.
            with Image.open(chunks_of_png(self._path.read_bytes()), formats=["PNG"]) as image:
                if image.mode == "RGB" and "transparency" in image.info:
                    return over_white(np.asarray(image.convert("RGBA")))
                array = np.asarray(image)
                return over_white(array) if image.mode == "RGBA" else array
        # Pillow raises SyntaxError and struct.error where a chunk makes no sense.
        except (OSError, ValueError, SyntaxError, struct.error, DamagedSlideError) as error:
            raise DamagedSlideError(
                f"{self._path.name} is damaged: {error}. Copy the file again"
            ) from error


def chunks_of_png(data: bytes, wanted: Set[bytes] = _PNG_CHUNKS) -> io.BytesIO:
    """The PNG as a file object, with the wanted chunks alone, by default those of its pixels."""
    kept, at = [PNG_MAGIC], len(PNG_MAGIC)
    while at + 8 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] in wanted:
            kept.append(data[at:end])
        at = end
    return io.BytesIO(b"".join(kept))


def _png_size(head: bytes, name: str) -> tuple[int, int]:
    """(width, height) from the IHDR chunk; UnsupportedSlideError where it is not 8-bit RGB."""
    if len(head) < 26 or head[12:16] != b"IHDR":
        raise DamagedSlideError(f"{name} begins like a PNG, and then ends; copy it again")
    bits, colour = head[24], head[25]
    if bits != 8 or colour not in (2, 6):
        raise UnsupportedSlideError(
            f"{name} is a PNG of {bits}-bit {_PNG_COLOURS.get(colour, 'unknown')} pixels; xmag"
            " reads 8-bit RGB. Convert it"
        )
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


def _jpeg_size(path: Path) -> tuple[int, int]:
    """(width, height) from the JPEG's header; UnsupportedSlideError where it is not colour."""
    try:
        data = path.read_bytes()
        check_scans(data)
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except (ValueError, DamagedSlideError) as error:
        raise DamagedSlideError(
            f"{path.name} begins like a JPEG, but its header makes no sense ({error});"
            " copy it again"
        ) from error
    if colours not in ("RGB", "YCbCr"):
        raise UnsupportedSlideError(
            f"{path.name} is a JPEG of {colours} pixels; xmag reads RGB. Convert it"
        )
    return width, height
