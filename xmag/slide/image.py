"""Plain PNG and JPEG images as slides of one level; they never say their µm/px."""

import threading
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from xmag.errors import ClosedSlideError, DamagedSlideError, InputError, UnsupportedSlideError
from xmag.slide.codecs import over_white
from xmag.slide.reader import Level, Pixels, ScaleMetadata

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
JPEG_MAGIC = b"\xff\xd8\xff"

_PNG_COLOURS = {0: "grey", 2: "RGB", 3: "palette", 4: "grey and alpha", 6: "RGBA"}


class ImageReader:
    """A RegionReader that decodes the image when pixels are first asked for, and keeps it."""

    metadata = ScaleMetadata()

    def __init__(self, path: Path, *, region: int | None = None) -> None:
        if region not in (None, 0):
            raise InputError(f"region={region!r} is not in {path.name}; it holds one image")
        self._path = path
        self._is_png = _is_png(path)
        self.format = "png" if self._is_png else "jpeg"
        size = _png_size(path) if self._is_png else _jpeg_size(path)
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and size[0] * size[1] > limit:
            raise UnsupportedSlideError(
                f"{path.name} has {size[0]}x{size[1]} px, and Pillow's limit is {limit} px"
                " (PIL.Image.MAX_IMAGE_PIXELS). Convert it to a tiled pyramid, or raise the limit"
                " if you trust the file"
            )
        self.levels = (Level(size=size, downsample=1.0),)
        self._pixels: Pixels | None = None
        self._closed = False
        self._lock = threading.Lock()

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

    def close(self) -> None:
        """Release the pixels. Closing twice is fine."""
        with self._lock:
            self._closed = True
            self._pixels = None

    def _decoded(self) -> Pixels:
        try:
            if not self._is_png:
                pixels: Pixels = simplejpeg.decode_jpeg(self._path.read_bytes())
                return pixels
            with Image.open(self._path) as image:
                return _on_white(image)
        except (OSError, ValueError, SyntaxError) as error:
            raise DamagedSlideError(
                f"{self._path.name} is damaged: {error}. Copy the file again"
            ) from error

    def __reduce__(self) -> tuple[type["ImageReader"], tuple[Path]]:
        return ImageReader, (self._path,)


def _on_white(image: Image.Image) -> Pixels:
    """The pixels of an RGB or RGBA image, what is transparent in it on a white ground."""
    if image.mode == "RGB" and "transparency" in image.info:
        image = image.convert("RGBA")
    array = np.asarray(image)
    return over_white(array) if image.mode == "RGBA" else array


def _is_png(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(PNG_MAGIC)) == PNG_MAGIC


def _png_size(path: Path) -> tuple[int, int]:
    """(width, height) from the IHDR chunk; UnsupportedSlideError where it is not 8-bit RGB."""
    with path.open("rb") as file:
        head = file.read(26)
    if len(head) < 26 or head[12:16] != b"IHDR":
        raise DamagedSlideError(f"{path.name} begins like a PNG, and then ends; copy it again")
    bits, colour = head[24], head[25]
    if bits != 8 or colour not in (2, 6):
        raise UnsupportedSlideError(
            f"{path.name} is a PNG of {bits}-bit {_PNG_COLOURS.get(colour, 'unknown')} pixels; xmag"
            " reads 8-bit RGB. Convert it"
        )
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


def _jpeg_size(path: Path) -> tuple[int, int]:
    """(width, height) from the JPEG's header; UnsupportedSlideError where it is not colour."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(path.read_bytes())
    except ValueError as error:
        raise DamagedSlideError(
            f"{path.name} begins like a JPEG, but its header makes no sense ({error});"
            " copy it again"
        ) from error
    if colours not in ("RGB", "YCbCr"):
        raise UnsupportedSlideError(
            f"{path.name} is a JPEG of {colours} pixels; xmag reads RGB. Convert it"
        )
    return width, height
