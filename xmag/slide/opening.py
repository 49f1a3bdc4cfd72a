"""Reader of a slide, chosen by the first bytes and the name of the file at a path or URL."""

from pathlib import Path

from xmag.errors import DamagedSlideError, MissingExtraError, SlideError, UnsupportedSlideError
from xmag.files import refuse_special
from xmag.slide import openslide
from xmag.slide.image import JPEG_MAGIC, PNG_MAGIC, ImageReader
from xmag.slide.layouts import NeedsOpenSlideError
from xmag.slide.openslide import OpenSlideReader
from xmag.slide.reader import SlideReader
from xmag.slide.remote import RemoteSource
from xmag.slide.tiff import TiffReader
from xmag.urls import Place, Url

_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_DICOM_MAGIC_AT_128 = b"DICM"

_SLIDE_SUFFIXES = (openslide.SUFFIXES - {".dcm"}) | {".svs", ".tif", ".tiff", ".btf", ".vsi"}


def is_slide_path(path: Place) -> bool:
    """Whether a file in a folder looks like a slide by its name.

    Plain images are as often thumbnails, and a DICOM slide is many files: both have to be named.
    """
    return path.suffix.lower() in _SLIDE_SUFFIXES and not path.name.startswith(".")


def open_reader(path: Place, region: int | None) -> SlideReader:
    """The reader for the slide at `path`.

    Raises SlideError where nothing can be read, MissingExtraError where OpenSlide could read it
    but is not installed, InputError for a wrong `region`.
    """
    if isinstance(path, Url):
        return _open_remote(path, region)
    head = _first_bytes(path)
    if head.startswith(_TIFF_MAGIC):
        try:
            return TiffReader(path, region=region)
        except NeedsOpenSlideError:
            return OpenSlideReader(path, region=region)
    # A .mrxs file is a JPEG.
    for_openslide = path.suffix.lower() in openslide.SUFFIXES or _DICOM_MAGIC_AT_128 in head[128:]
    if head.startswith((PNG_MAGIC, JPEG_MAGIC)) and not for_openslide:
        return ImageReader(path, region=region)
    try:
        return OpenSlideReader(path, region=region)
    except MissingExtraError as error:
        if for_openslide:
            raise
        raise UnsupportedSlideError(
            f"{path.name} is not a slide that xmag knows: neither TIFF, PNG nor JPEG. If it is one"
            ' that OpenSlide reads, run pip install "xmag[openslide]"'
        ) from error


def _open_remote(url: Url, region: int | None) -> SlideReader:
    source = RemoteSource(url)
    try:
        if source.head.startswith(_TIFF_MAGIC):
            return TiffReader(source, region=region)
        reason = "it is no TIFF"
    except NeedsOpenSlideError:
        reason = "only OpenSlide reads its kind of TIFF"
    except BaseException:
        source.close()
        raise
    source.close()
    raise UnsupportedSlideError(
        f"{url} cannot be read by byte ranges: {reason}. Download it, and open the local file"
    )


def _first_bytes(path: Path) -> bytes:
    """The first bytes of a file; SlideError where it is none, or empty."""
    refuse_special(path, UnsupportedSlideError)
    try:
        with path.open("rb") as file:
            head = file.read(132)
    # Without their causes: those name the folders, which do not belong into logs of cohorts.
    except FileNotFoundError:
        raise SlideError(
            f"there is no file {path.name} at the path that was given; check the path"
        ) from None
    except IsADirectoryError:
        raise SlideError(
            f"{path.name} is a folder; expected a slide file (of a DICOM slide, any one of its"
            " files)"
        ) from None
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise SlideError(f"{path.name} cannot be opened: {reason}; check its rights") from None
    if not head:
        raise DamagedSlideError(f"{path.name} is empty; copy it again")
    return head
