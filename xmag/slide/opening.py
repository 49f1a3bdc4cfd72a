"""A path -> the reader for what lies there."""

from pathlib import Path

from xmag.errors import DamagedSlideError, SlideError, UnsupportedSlideError
from xmag.slide.reader import SlideReader
from xmag.slide.tiff import TiffReader

_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def open_reader(path: Path, region: int | None) -> SlideReader:
    """The reader for the slide at `path`; SlideError where there is none."""
    magic = _first_bytes(path)
    if magic.startswith(_TIFF_MAGIC):
        return TiffReader(path, region=region)
    raise UnsupportedSlideError(f"{path.name} is not a slide that xmag knows")


def _first_bytes(path: Path) -> bytes:
    """The first bytes of a file; SlideError where it is none, or empty."""
    try:
        with path.open("rb") as file:
            magic = file.read(16)
    except FileNotFoundError as error:
        raise SlideError(f"there is no file {path}; check the path") from error
    except IsADirectoryError as error:
        raise SlideError(
            f"{path} is a folder; expected a slide file (of a DICOM slide, any one of its files)"
        ) from error
    except OSError as error:
        raise SlideError(f"{path} cannot be opened: {error.strerror or error}") from error
    if not magic:
        raise DamagedSlideError(f"{path.name} is empty; copy it again")
    return magic
