"""A slide: its size, its scale, its pixels; the reader for it is chosen by its first bytes."""

import math
import operator
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

from PIL import Image

from xmag.errors import (
    ClosedSlideError,
    DamagedSlideError,
    InputError,
    MissingExtraError,
    SlideError,
    UnsupportedSlideError,
)
from xmag.files import refuse_special
from xmag.geometry import ReadScale, TileSpec, choose_scale
from xmag.notebook import PICTURE_PX, Shown
from xmag.provenance import content_fingerprint, file_fingerprint
from xmag.slide import dicom_files, dicomweb, openslide
from xmag.slide.dicom import DicomReader
from xmag.slide.image import JPEG_MAGIC, PNG_MAGIC, ImageReader
from xmag.slide.layouts import NeedsOpenSlideError, NeedsTiffslideError
from xmag.slide.omezarr import OmeZarrReader, is_omezarr
from xmag.slide.pixels import read_box, read_level
from xmag.slide.reader import DescribedReader, Pixels, SlideReader, Unshown
from xmag.slide.remote import OpenFile, RemoteFolder, RemoteSource
from xmag.slide.scale import check_area, checked_mpp, checked_scale, judge, known_mpp
from xmag.slide.tiff import TiffReader
from xmag.slide.tiffslide import TiffSlideReader, file_of
from xmag.urls import Place, Url, place_of, readable

if TYPE_CHECKING:
    from openslide import OpenSlide
    from tiffslide import TiffSlide

_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_SLIDE_SUFFIXES = openslide.SUFFIXES | {".svs", ".tif", ".tiff", ".btf", ".vsi", ".zarr"}
_ROUNDING = 1e-6
_SHOWN_PX = 100_000_000
"""Px of the coarsest level up to which a notebook shows a thumbnail: about a second's work."""

_Source = tuple[Place, int | None]
"""Place of a file, and the scan in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlideFacts:
    """Facts about a slide for the record of results; each is the attribute of Slide by that name.

    All but `version`, which changes when the file is written: its size and time of change, or the
    ETag that a store has for it. It may tell when a patient was scanned, and belongs into no
    result.
    """

    name: str
    format: str
    mpp: float | None
    mpp_source: str
    fingerprint: Mapping[str, Any] | None
    version: str | None = field(default=None, repr=False)


class Slide(Shown):
    """A view of a slide file: it reads pixels and knows their scale, and nothing else.

    Coordinates are level-0 px from the top-left corner of the full canvas, as in OpenSlide. A
    Slide never changes, may be used from several threads at once, and pickles by opening the file
    again.

    Args:
        path: the slide file (of a DICOM slide, any one, or their folder), or the URL of one
            ("https://...", "s3://..."), which is then read by byte ranges and not copied. Or an
            open `tiffslide.TiffSlide` or `openslide.OpenSlide`, which tells which file to open, and
            stays yours.
        mpp: µm per level-0 px; overrides what the file says.
        region: which scan, where a file holds several.

    Raises:
        SlideError: there is no such file, or it cannot be opened.
        UnsupportedSlideError: its format, pixel type or layout is not read.
        DamagedSlideError: its content is broken.
        SlideScaleError: the file's scale differs between x and y, and `mpp` is not given.
        InputError: `mpp` or `region` make no sense, or `region` must be given.
        MissingExtraError: the format needs an optional package.
    """

    _version: str | None = None

    def __init__(
        self,
        path: "str | os.PathLike[str] | Url | TiffSlide | OpenSlide",
        *,
        mpp: float | None = None,
        region: int | None = None,
    ) -> None:
        given = checked_mpp(mpp)
        file = file_of(path)
        if isinstance(file, OpenFile):
            self._set(_tiff_reader(file, region), file.name, given, None)
            return
        place = place_of(file)
        place = place.absolute() if isinstance(place, Path) else place
        # Before it is read: what is written to it from now on is another version.
        version = _version(place)
        reader = open_reader(place, region)
        try:
            self._set(reader, place.name, given, (place, region))
        except BaseException:
            reader.close()
            raise
        self._version = self._remote.version if self._remote else version
        if isinstance(reader, DicomReader):
            self._version = reader.version

    @classmethod
    def from_reader(cls, reader: SlideReader, *, name: str, mpp: float | None = None) -> Self:
        """The slide that `reader` offers, without a file of its own."""
        slide = cls.__new__(cls)
        slide._set(reader, name, checked_mpp(mpp), None)
        return slide

    def _set(
        self, reader: SlideReader, name: str, mpp: float | None, source: _Source | None
    ) -> None:
        self._mpp, self._mpp_source = judge(reader.metadata, mpp, name)
        self._reader, self._source, self._name = reader, source, readable(name)
        self._closed = False

    @property
    def name(self) -> str:
        """Base name of the file."""
        return self._name

    @property
    def format(self) -> str:
        """Short lower-case name of the format, such as "aperio" or "ome-tiff"."""
        return self._reader.format

    @property
    def reader(self) -> SlideReader:
        """The reader, for code that wants compressed tiles; ClosedSlideError after close()."""
        if self._closed:
            raise ClosedSlideError(
                f"{self._name} is closed; use it inside its `with` block, or open it again"
            )
        return self._reader

    @property
    def mpp(self) -> float | None:
        """µm per level-0 px; None where neither the file nor the caller gives any that can be."""
        return self._mpp

    @property
    def mpp_source(self) -> str:
        """Source of `mpp`, such as "Aperio MPP", "given" or "objective power"."""
        return self._mpp_source

    def known_mpp(self) -> float:
        """`mpp`; SlideScaleError, with what the file says, where it is None."""
        return known_mpp(self._mpp, self._reader.metadata, self._name)

    @property
    def dimensions(self) -> tuple[int, int]:
        """(width, height) of the canvas in level-0 px."""
        return self._reader.levels[0].size

    @property
    def level_dimensions(self) -> tuple[tuple[int, int], ...]:
        """(width, height) of each level in its own px, finest first."""
        return tuple(level.size for level in self._reader.levels)

    @property
    def level_downsamples(self) -> tuple[float, ...]:
        """Level-0 px per px of each level; whole wherever the sizes of the levels allow it."""
        return tuple(level.downsample for level in self._reader.levels)

    @cached_property
    def fingerprint(self) -> dict[str, Any] | None:
        """Identity of the file (name, size, content hash); None without a file.

        A scan that is not the file's first has its `region` in it.
        """
        if self._source is None:
            return None
        path, region = self._source
        if isinstance(self._reader, OmeZarrReader):
            found = self._reader.fingerprint()
        elif isinstance(there := self._remote, RemoteSource):
            found = content_fingerprint(there.name, there.size, there.read_many)
        elif isinstance(self._reader, DicomReader):
            base = self._reader.sources[0]
            found = content_fingerprint(self._name, base.size, base.read_many)
        else:
            found = file_fingerprint(cast(Path, path))
        return found | ({"region": region} if region else {})

    @property
    def bytes_fetched(self) -> int | None:
        """Bytes that came over the network so far; None for a file of this machine."""
        there = getattr(self._reader, "server", self._remote)
        return None if there is None else int(there.bytes_fetched)

    @property
    def _remote(self) -> RemoteSource | RemoteFolder | None:
        source = getattr(self._reader, "source", None)
        return source if isinstance(source, RemoteSource | RemoteFolder) else None

    @property
    def facts(self) -> SlideFacts:
        """Facts about the slide for the record of results; unlike the slide, a plain value."""
        return SlideFacts(
            name=self.name,
            format=self.format,
            mpp=self.mpp,
            mpp_source=self.mpp_source,
            fingerprint=self.fingerprint,
            version=self._version,
        )

    def scale_for(self, spec: TileSpec) -> ReadScale:
        """Level, reduction and resampling that read pixels of the scale that `spec` asks for.

        Raises SlideScaleError where the slide's own scale is unknown, or too coarse.
        """
        mpp = self.known_mpp()
        check_area(self.dimensions, mpp, self._name)
        return self._scale_for(spec, mpp)

    def _scale_for(self, spec: TileSpec, mpp: float) -> ReadScale:
        levels = self._reader.levels
        mpps = [mpp * level.downsample for level in levels]
        return choose_scale(mpps, [level.reductions for level in levels], spec)

    def read_region(
        self, xy: tuple[int, int], size: tuple[int, int], *, mpp: float | None = None
    ) -> Pixels:
        """The pixels of a rectangle; uint8 (height, width, 3).

        `xy` is its top-left corner in level-0 px, `size` its (width, height) in output px: px of
        `mpp` µm, area-averaged to exactly that scale, or level-0 px as they are without it.
        Raises InputError where it is not wholly on the slide, SlideScaleError where `mpp` cannot
        be had, DamagedSlideError where the file is broken.
        """
        reader = self.reader
        (x, y), (width, height) = _whole("xy", xy), _whole("size", size)
        if width < 1 or height < 1:
            raise InputError(f"size is {size}; expected a width and height of at least 1 px")
        ratio = 1.0 if mpp is None else checked_scale(mpp) / self.known_mpp()
        box = (x, y, x + width * ratio, y + height * ratio)
        edges = self.dimensions
        if x < 0 or y < 0 or any(box[2 + i] > edges[i] * (1 + _ROUNDING) for i in (0, 1)):
            raise InputError(
                f"the region from {xy} to ({box[2]:.6g}, {box[3]:.6g}) in level-0 px is not wholly"
                f" on the slide, which has {edges[0]}x{edges[1]} px; move or shrink it"
            )
        if mpp is None:
            return read_level(reader, 0, 1, (x, y), (width, height))
        scale = self.scale_for(TileSpec(mpp=mpp, mpp_tolerance=0))
        level = reader.levels[scale.level]
        reduction = scale.reduction
        if any(edge % (level.downsample * reduction) for edge in (x, y)):
            # Off their grid, px of the wanted size would be averaged with their neighbours.
            reduction = max((n for n in level.reductions if 2 * n <= reduction), default=reduction)
        return read_box(reader, scale.level, reduction, box, (width, height))

    def thumbnail(self, *, max_px: int = 1024) -> Image.Image:
        """The whole slide as a PIL image whose longer side has at most `max_px` px.

        Raises InputError where that is less than 1, DamagedSlideError where the file is broken.
        """
        if max_px < 1:
            raise InputError(f"max_px is {max_px!r}; expected at least 1")
        reader = self.reader
        width, height = self.dimensions
        downsample = max(1.0, max(width, height) / max_px)
        scale = self._scale_for(TileSpec(mpp=downsample, mpp_tolerance=0), 1.0)
        size = (max(1, round(width / downsample)), max(1, round(height / downsample)))
        box = (0, 0, width, height)
        return Image.fromarray(read_box(reader, scale.level, scale.reduction, box, size))

    @property
    def properties(self) -> Mapping[str, str]:
        """Texts of the file by their names, as it has them; read when asked for, and not kept.

        Patients may be named in them: they stand in no result, and the mapping's repr only counts
        them; ``dict(slide.properties)`` shows them. Empty for formats that have none. Raises
        DamagedSlideError where they are broken.
        """
        reader = self.reader
        found = reader.read_properties() if isinstance(reader, DescribedReader) else {}
        return Unshown(self._name, "properties", dict(found), str)

    @property
    def associated_images(self) -> Mapping[str, Image.Image]:
        """Images in the file beside the scan, such as "label" and "macro", by their names; RGB.

        Each is read when it is looked up, and not kept. Patients may be named on them. Empty for
        formats that have none. Raises DamagedSlideError where they are broken.
        """
        reader = self.reader
        found = reader.associated_images() if isinstance(reader, DescribedReader) else {}
        return Unshown(
            self._name, "associated images", dict(found), lambda read: Image.fromarray(read())
        )

    def close(self) -> None:
        """Release the file. Closing twice is fine; reading afterwards raises ClosedSlideError."""
        self._closed = True
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        width, height = self.dimensions
        scale = "unknown" if self._mpp is None else f"{self._mpp:.4g}"
        closed = ", closed" if self._closed else ""
        return f"<Slide {self._name!r} {self.format} {width}x{height} px, {scale} µm/px{closed}>"

    def _picture(self) -> Image.Image | None:
        level = self._reader.levels[-1]
        # Without a small level a thumbnail may take minutes, which nobody has asked for.
        small = math.prod(level.size) <= _SHOWN_PX
        return self.thumbnail(max_px=PICTURE_PX) if small and not self._closed else None

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__ | {"_reader": self.reader}
        # The file is opened again, and may be another one by then.
        again = {"_version", "fingerprint"} | ({"_reader"} if self._source else set())
        return {name: value for name, value in state.items() if name not in again}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._source is not None:
            self._reader = open_reader(*self._source)


def _version(path: Place) -> str | None:
    """The size and the time of change of a file of this machine; None where there is none."""
    try:
        found = path.stat() if isinstance(path, Path) else None
    except OSError:
        return None  # opening it says why
    if found is None or stat.S_ISDIR(found.st_mode):
        return None  # a folder does not change with what is written to the files in it
    return f"{found.st_size} bytes at {found.st_mtime_ns} ns"


def _whole(name: str, pair: tuple[int, int]) -> tuple[int, int]:
    """Two whole numbers of any int type; InputError for others: half a px is not guessed at."""
    try:
        first, second = (operator.index(value) for value in pair)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{name} is {pair!r}; expected two whole numbers of px: round them first"
        ) from error
    return first, second


def checked_region(region: int | None) -> int | None:
    """The number of a scan in its file; InputError where it is none, from 0 on."""
    is_whole = isinstance(region, int) and not isinstance(region, bool)
    if region is not None and not (is_whole and region >= 0):
        raise InputError(f"region is {region!r}; expected a whole number from 0 on, or None")
    return region


def scan_stem(stem: str, region: int | None) -> str:
    """File name, less its suffix, for results of a scan: the file's, and which scan but the first.

    So results of one file's scans never take each other's place.
    """
    return f"{stem}-region{region}" if region else stem


def is_slide_path(path: Place) -> bool:
    """Whether a file in a folder, or a folder (OME-Zarr), looks like a slide by its name.

    Plain images are as often thumbnails, and have to be named. A DICOM slide is many files, which
    `dicom_files.series_below` puts together.
    """
    return path.suffix.lower() in _SLIDE_SUFFIXES and not path.name.startswith(".")


def open_reader(path: Place, region: int | None) -> SlideReader:
    """The reader for the slide at `path`.

    Raises SlideError where nothing can be read, MissingExtraError where OpenSlide could read it
    but is not installed, InputError for a wrong `region`.
    """
    if is_omezarr(path):
        return OmeZarrReader(path, region=region)
    if isinstance(path, Url):
        return _open_remote(path, region)
    if dicom_files.is_dicom(path):
        return dicom_files.open_series(path, region)
    return _open_file(path, region)


def _open_file(path: Path, region: int | None) -> SlideReader:
    head = _first_bytes(path)
    if head.startswith(_TIFF_MAGIC):
        try:
            return _tiff_reader(path, region)
        except NeedsOpenSlideError:
            return openslide.OpenSlideReader(path, region=region)
    # A .mrxs file is a JPEG.
    for_openslide = path.suffix.lower() in openslide.SUFFIXES
    if head.startswith((PNG_MAGIC, JPEG_MAGIC)) and not for_openslide:
        return ImageReader(path, region=region)
    try:
        return openslide.OpenSlideReader(path, region=region)
    except MissingExtraError as error:
        if for_openslide:
            raise
        raise UnsupportedSlideError(
            f"{path.name} is not a slide that xmag knows: neither TIFF, PNG nor JPEG. If it is one"
            ' that OpenSlide reads, run pip install "xmag[openslide]"'
        ) from error


def _tiff_reader(place: Path | RemoteSource | OpenFile, region: int | None) -> TiffReader:
    """The reader of a TIFF: the fast one, or the one of what that refuses."""
    try:
        return TiffReader(place, region=region)
    except NeedsTiffslideError:
        return TiffSlideReader(place, region=region)


def _open_remote(url: Url, region: int | None) -> SlideReader:
    if dicomweb.is_series(url):
        return dicomweb.open_series(url, region)
    source = RemoteSource(url)
    try:
        if source.head.startswith(_TIFF_MAGIC):
            return _tiff_reader(source, region)
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
            head = file.read(16)
    # Without their causes: those name the folders, which do not belong into logs of cohorts.
    except FileNotFoundError:
        raise SlideError(
            f"there is no file {path.name} at the path that was given; check the path"
        ) from None
    except IsADirectoryError:
        raise SlideError(
            f"{path.name} is a folder; expected a slide file, or the folder of an OME-Zarr, or with"
            " the files of a DICOM slide"
        ) from None
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise SlideError(f"{path.name} cannot be opened: {reason}; check its rights") from None
    if not head:
        raise DamagedSlideError(f"{path.name} is empty; copy it again")
    return head
