"""Reader of the formats that only OpenSlide knows, through the packages of `xmag[openslide]`."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from xmag.errors import (
    ClosedSlideError,
    DamagedSlideError,
    InputError,
    MissingExtraError,
    SlideError,
    UnsupportedSlideError,
)
from xmag.slide.codecs import over_white
from xmag.slide.integrity import check_level, named
from xmag.slide.pixels import check_whole
from xmag.slide.reader import Level, Pixels, ScaleMetadata, downsample
from xmag.urls import without_folder

SUFFIXES = frozenset({".bif", ".czi", ".mrxs", ".ndpi", ".scn", ".svslide", ".vms", ".vmu"})
"""Names of files that OpenSlide may know, whatever their first bytes."""


class OpenSlideReader:
    """A RegionReader over an OpenSlide handle."""

    def __init__(self, path: Path, *, region: int | None = None) -> None:
        try:
            # Optional, and a native library: loaded where a file needs it.
            import openslide
        except ImportError as error:
            raise MissingExtraError(
                f"{path.name} can only be read through OpenSlide, which is not installed; run"
                ' pip install "xmag[openslide]"'
            ) from error
        if region not in (None, 0):
            raise InputError(f"region={region!r} is not in {path.name}; OpenSlide shows it as one")
        self._path, self._name, self._closed = path, path.name, False
        self._errors = openslide.OpenSlideError
        try:
            self._slide = openslide.OpenSlide(path)
            with named(path.name):
                self._read_facts()
        # Without their causes: those name the folders, which do not belong into logs of cohorts.
        except openslide.OpenSlideUnsupportedFormatError:
            raise UnsupportedSlideError(
                f"{path.name} is not a slide that xmag or OpenSlide knows; docs/formats.md lists"
                " the formats"
            ) from None
        except openslide.OpenSlideError as error:
            raise DamagedSlideError(
                f"OpenSlide cannot open {path.name}: {without_folder(str(error), path)}. Copy the"
                " file again, with those that belong to it"
            ) from None
        except SlideError:
            self.close()
            raise

    def _read_facts(self) -> None:
        """Read levels, scale and vendor at once: after a failure OpenSlide answers nothing more."""
        properties = self._slide.properties
        check_brightfield(properties)
        self.format = str(properties.get("openslide.vendor", "openslide"))
        self._downsamples = self._slide.level_downsamples
        sizes = self._slide.level_dimensions
        self.levels = tuple(
            Level(size=size, downsample=downsample(sizes[0], size, stated))
            for size, stated in zip(sizes, self._downsamples, strict=True)
        )
        for number, level in enumerate(self.levels):
            check_level(number, level)
        names = ("mpp-x", "mpp-y", "objective-power")
        x, y, power = (float(properties.get(f"openslide.{name}") or 0) or None for name in names)
        self.metadata = ScaleMetadata(
            mpp=(x, y) if x and y else None,
            mpp_source="OpenSlide mpp-x, mpp-y" if x and y else "",
            objective_power=power,
        )

    def read_region(self, level: int, xy: tuple[int, int], size: tuple[int, int]) -> Pixels:
        """The pixels of a window wholly inside the level, what is transparent on white."""
        if self._closed:
            raise ClosedSlideError(f"{self._name} is closed; open the slide again to read from it")
        # OpenSlide wants the corner in level-0 px, and divides by a downsample of its own.
        corner = (round(xy[0] * self._downsamples[level]), round(xy[1] * self._downsamples[level]))
        try:
            region = self._slide.read_region(corner, level, size)
        except self._errors as error:
            raise DamagedSlideError(
                f"OpenSlide cannot read {size} px at {corner} of level {level} of {self._name}:"
                f" {without_folder(str(error), self._path)}. Copy the file again"
            ) from None
        return over_white(np.asarray(region))

    def read_properties(self) -> Mapping[str, str]:
        """OpenSlide's properties."""
        with self._told():
            return dict(self._slide.properties)

    def associated_images(self) -> Mapping[str, Callable[[], Pixels]]:
        """Functions that read OpenSlide's associated images, what is transparent on white."""
        with self._told():
            return {name: partial(self._associated, name) for name in self._slide.associated_images}

    def _associated(self, name: str) -> Pixels:
        if self._closed:
            raise ClosedSlideError(f"{self._name} is closed; open the slide again to read from it")
        with self._told(), named(f"{self._name}, an image beside the scan"):
            sides = (f"openslide.associated.{name}.{side}" for side in ("width", "height"))
            width, height = (int(self._slide.properties.get(side, 0)) for side in sides)
            check_whole((width, height))
            return over_white(np.asarray(self._slide.associated_images[name]))

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Turn errors of OpenSlide, also those of an earlier call, into one without their text."""
        try:
            yield
        except self._errors:
            raise DamagedSlideError(
                f"OpenSlide cannot read what is beside the scan of {self._name}; copy it again"
            ) from None

    def close(self) -> None:
        """Release the file. Closing twice is fine."""
        self._closed = True
        self._slide.close()


def check_brightfield(properties: Mapping[str, str]) -> None:
    """Raise UnsupportedSlideError where OpenSlide shows fluorescence as if it were colour."""
    if "FLUORESCENCE" in properties.get("mirax.GENERAL.SLIDE_TYPE", ""):
        raise UnsupportedSlideError(
            "its scanner says that it is fluorescence; xmag reads brightfield scans in colour"
        )
