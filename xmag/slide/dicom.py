"""DICOM whole-slide images: what their attributes say, and the levels that their frames make.

An image of a slide is a series of instances (DICOM PS3.3, A.32.8): each holds frames, the tiles of
a level, and says where they lie. Whether they are files or on a server is not known here.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from copy import copy
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from xmag.errors import ClosedSlideError, MissingExtraError, UnsupportedSlideError
from xmag.slide import codecs
from xmag.slide.directories import most_bytes
from xmag.slide.integrity import MAX_TILES, check_level, damaged, named
from xmag.slide.pixels import read_whole
from xmag.slide.reader import Level, Pixels, ScaleMetadata, choose_scan, downsample
from xmag.slide.tiff import DecodingReader

Attributes = Mapping[str, Any]
"""Values of attributes by their keywords: a list of str or numbers, of Attributes in sequences."""

VOLUME = "VOLUME"
"""The kind of instances that hold levels."""
_BESIDE = {"LABEL": "label", "OVERVIEW": "macro", "THUMBNAIL": "thumbnail"}
"""Names of images beside the scan, by their kind."""
SERIES = "SeriesInstanceUID"
_SCAN = (SERIES, "FrameOfReferenceUID", "PyramidUID")
"""Attributes that the instances of one scan share."""

_RAW, _J2K = 1, codecs.JPEG_2000[-1]
RAW_SYNTAX, JPEG_SYNTAX, J2K_SYNTAX = (f"1.2.840.10008.1.2.{end}" for end in ("1", "4.50", "4.90"))
_COMPRESSIONS = {
    "1.2.840.10008.1.2": _RAW, RAW_SYNTAX: _RAW, JPEG_SYNTAX: codecs.JPEG,
    "1.2.840.10008.1.2.4.51": codecs.JPEG, J2K_SYNTAX: _J2K, "1.2.840.10008.1.2.4.91": _J2K,
}  # fmt: skip
"""TIFF's numbers of the codings that are read, by transfer syntax; PS3.5, section 10."""
_RGB, _YCBCR = 2, 6
_PHOTOMETRIC = {
    "RGB": _RGB, "YBR_ICT": _RGB, "YBR_RCT": _RGB, "YBR_FULL": _YCBCR, "YBR_FULL_422": _YCBCR,
}  # fmt: skip
"""TIFF's numbers of PhotometricInterpretation; the decoder undoes JPEG 2000's own transforms."""
_BRIGHTFIELD = {"111744", "111741"}
"""Codes of bright field, and of transmitted light, as older files have it; PS3.16, CID 8123."""
_ILLUMINATIONS = {
    "111742": "reflected light", "111743": "fluorescence", "111745": "dark field",
    "111746": "oblique light", "111747": "phase contrast", "111748": "interference contrast",
}  # fmt: skip
_SHAPE = 0.02
"""Largest difference of the shapes of levels, as a part of their sides."""


class _Instance(Protocol):
    """An instance of a series, whose frames are read when they are asked for; see `InstanceFile`.

    `head` are the attributes that tell what it shows and what it belongs to, `size` the number of
    bytes that identify it, which `read_many` reads. `version` changes when it is written, if known.
    """

    head: Attributes
    size: int
    version: str | None

    @property
    def syntax(self) -> str: ...
    @property
    def attributes(self) -> Attributes: ...
    def positions(self) -> NDArray[np.int64]: ...
    def open(self, frames: int, frame_bytes: int | None) -> None: ...
    def read(self, frames: Sequence[int], most: int) -> list[bytes]: ...
    def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]: ...
    def texts(self) -> Iterable[tuple[int, str]]: ...
    def close(self) -> None: ...


def number(attributes: Attributes, keyword: str, default: int | None = None) -> int:
    """The whole number of an attribute; DamagedSlideError where it has none and must."""
    value = (attributes.get(keyword) or [None])[0]
    if default is not None and value in (None, ""):
        return default
    try:
        return int(value)
    except (TypeError, ValueError):
        raise damaged(f"its {keyword} is no number") from None


def text(attributes: Attributes, keyword: str) -> str:
    """The first text of an attribute; "" where it has none."""
    return str((attributes.get(keyword) or [""])[0])


def kind(head: Attributes) -> str:
    """The kind of an instance: the third value of ImageType."""
    return str([*(head.get("ImageType") or []), "", "", ""][2])


def _floats(attributes: Attributes, keyword: str) -> list[float | None]:
    """Two positive numbers of an attribute, None for those that are none."""
    found = list[float | None]()
    for value in [*(attributes.get(keyword) or []), None, None][:2]:
        try:
            found.append(float(value) or None)
        except (TypeError, ValueError):
            found.append(None)
    return found


def _size(attributes: Attributes) -> tuple[int, int]:
    """(width, height) of the image that frames are tiles of."""
    width, height = (number(attributes, f"TotalPixelMatrix{side}") for side in ("Columns", "Rows"))
    return width, height


@dataclass(frozen=True, slots=True)
class _Image:
    """The image in an instance: (width, height) of all that its frames are tiles of, their coding.

    `first` is the number of its first frame among those of its `concatenation`.
    """

    instance: _Instance
    size: tuple[int, int]
    coding: codecs.TileCoding
    frames: int
    first: int
    concatenation: str

    @property
    def grid(self) -> tuple[int, int]:
        """Columns and rows of tiles."""
        (width, height), (across, down) = self.size, self.coding.size
        return -(-width // across), -(-height // down)

    @property
    def spacing(self) -> tuple[float, float] | None:
        """µm/px along (x, y): the distances of rows and of columns in mm, of all frames or one."""
        for groups in ("SharedFunctionalGroupsSequence", "FirstFrame"):
            for group in self.instance.attributes.get(groups) or []:
                for measures in group.get("PixelMeasuresSequence") or []:
                    down, across = _floats(measures, "PixelSpacing")
                    return (across * 1e3, down * 1e3) if across and down else None
        return None

    @property
    def is_full(self) -> bool:
        """Whether its frames are all tiles, row by row; older files need not say so."""
        said = text(self.instance.attributes, "DimensionOrganizationType")
        placed = self.instance.attributes.get("PerFrameFunctionalGroupsSequence") is not None
        if said == "TILED_SPARSE" and not placed:
            raise damaged("it is TILED_SPARSE, and does not say where its frames lie")
        return said == "TILED_FULL" or not placed

    def tiles(self) -> NDArray[np.int64]:
        """The tiles that its frames are; row-major in the level."""
        across, down = self.grid
        if self.is_full:
            if self.first + self.frames > across * down:
                raise damaged(f"it holds more frames than the {across * down} tiles of its level")
            return self.first + np.arange(self.frames, dtype=np.int64)
        places = self.instance.positions()
        if len(places) != self.frames:
            raise damaged(f"it says that it has {self.frames} frames, and places {len(places)}")
        cells, beside = np.divmod(places - 1, self.coding.size)
        if beside.any():
            raise UnsupportedSlideError(
                "its tiles overlap, or lie on no regular grid; xmag reads tiles side by side."
                " Convert it to TILED_FULL"
            )
        if (cells < 0).any() or (cells >= (across, down)).any():
            raise damaged("its frames lie outside of the image that they are tiles of")
        return np.asarray(cells[:, 1] * across + cells[:, 0])


def _parse(instance: _Instance) -> _Image:
    """The image in an instance; UnsupportedSlideError where it is not 8-bit colour."""
    attributes = instance.attributes
    size = _size(attributes)
    image = _Image(
        instance=instance,
        size=size,
        coding=_coding(attributes, instance.syntax),
        frames=number(attributes, "NumberOfFrames", 1),
        first=number(attributes, "ConcatenationFrameOffsetNumber", 0),
        concatenation=text(attributes, "ConcatenationUID"),
    )
    if not 0 < math.prod(image.grid) <= MAX_TILES:
        raise UnsupportedSlideError(
            f"it is {size[0]}x{size[1]} px; expected 1 to {MAX_TILES} tiles of"
            f" {image.coding.size[0]}x{image.coding.size[1]} px"
        )
    if not (0 < image.frames <= MAX_TILES and 0 <= image.first < MAX_TILES):
        raise damaged(f"it says that it has {image.frames} frames, from {image.first} on")
    return image


def _coding(attributes: Attributes, syntax: str) -> codecs.TileCoding:
    """The coding of the frames; UnsupportedSlideError where they are not 8-bit colour."""
    samples, bits = number(attributes, "SamplesPerPixel"), number(attributes, "BitsAllocated")
    compression = _COMPRESSIONS.get(syntax)
    photometric = _PHOTOMETRIC.get(text(attributes, "PhotometricInterpretation"))
    if (samples, bits) != (3, 8):
        raise UnsupportedSlideError(
            f"its pixels are {samples} sample(s) of {bits} bits; xmag reads 8-bit RGB (brightfield)"
            " slides"
        )
    if compression is None:
        raise UnsupportedSlideError(
            f"its frames are coded as {re.sub('[^0-9.]', '?', syntax)[:64]}; xmag reads JPEG, JPEG"
            " 2000 and uncompressed frames of DICOM. Convert it"
        )
    is_planar = compression == _RAW and number(attributes, "PlanarConfiguration", 0)
    if photometric is None or is_planar or (compression == _RAW and photometric == _YCBCR):
        raise UnsupportedSlideError(
            "its pixels are in separate planes, or neither RGB nor YCbCr as its coding has them;"
            " xmag reads interleaved RGB, and YCbCr in JPEG and JPEG 2000. Convert it"
        )
    tile = (number(attributes, "Columns"), number(attributes, "Rows"))
    codecs.check_tile(tile, compression)
    # Aperio's number for JPEG 2000 whose components are YCbCr, and its stream does not say so.
    in_ycbcr = (compression, photometric) == (_J2K, _YCBCR)
    return codecs.TileCoding(
        compression=codecs.APERIO_J2K_YCBCR if in_ycbcr else compression,
        photometric=photometric,
        samples=samples,
        size=tile,
        last_height=tile[1],
        aperio=in_ycbcr,
    )


def _check_brightfield(attributes: Attributes) -> None:
    """Raise UnsupportedSlideError where an image is not one plane of a brightfield scan."""
    paths = attributes.get("OpticalPathSequence") or []
    for path in paths:
        for code in path.get("IlluminationTypeCodeSequence") or []:
            if (value := text(code, "CodeValue")) not in _BRIGHTFIELD:
                seen = _ILLUMINATIONS.get(value, "light of an unknown kind")
                raise UnsupportedSlideError(
                    f"its optical path is {seen}; xmag reads brightfield scans in colour"
                )
    several = {
        "optical paths": max(len(paths), number(attributes, "NumberOfOpticalPaths", 1)),
        "focal planes": number(attributes, "TotalPixelMatrixFocalPlanes", 1),
    }
    for what, count in several.items():
        if count > 1:
            raise UnsupportedSlideError(
                f"it holds {count} {what}; xmag reads one plane of a brightfield scan. Export one"
            )


def _place(image: _Image) -> tuple[str, int, str]:
    return image.concatenation, image.first, text(image.instance.head, "SOPInstanceUID")


class _Tiles:
    """The tiles of a level: the instance and the frame of each, -1 where it is empty."""

    def __init__(self, images: Sequence[_Image]) -> None:
        self.images, self.coding = images, images[0].coding
        across, down = images[0].grid
        if any(image.coding != self.coding for image in images):
            raise UnsupportedSlideError("its tiles of one level have several sizes or codings")
        self.source = np.full(across * down, -1, np.int16)
        self.frame = np.full(across * down, -1, np.int32)
        for number, image in enumerate(images):
            tiles = image.tiles()
            if (self.source[tiles] >= 0).any() or len(np.unique(tiles)) != len(tiles):
                raise UnsupportedSlideError(
                    "it holds several frames for the same place, as a z-stack, several optical"
                    " paths or copies do; xmag reads one plane of a brightfield scan"
                )
            self.source[tiles], self.frame[tiles] = number, np.arange(image.frames)
        self.empty = int((self.source < 0).sum())
        if self.empty and all(image.is_full for image in images):
            raise damaged(
                f"its level of {images[0].size[0]}x{images[0].size[1]} px lacks {self.empty} of"
                f" {across * down} tiles, and does not say that it is sparse"
            )
        parts = sorted((i for i in images if i.concatenation), key=_place)
        for _, group in groupby(parts, lambda image: image.concatenation):
            self._check_parts(list(group))

    @staticmethod
    def _check_parts(parts: Sequence[_Image]) -> None:
        """Raise DamagedSlideError where a part of a concatenation is not there."""
        ends = np.cumsum([0, *(part.frames for part in parts)])[:-1].tolist()
        total = number(parts[0].instance.attributes, "InConcatenationTotalNumber", 0)
        if [part.first for part in parts] != ends or total > len(parts):
            raise damaged("a part of its concatenated instances is not there")

    def read(self, tiles: Sequence[int]) -> list[bytes | None]:
        """The bytes of tiles; None for those that are declared empty."""
        frames, sources = self.frame[tiles].tolist(), self.source[tiles].tolist()
        most, found = most_bytes(*self.coding.size, 3), dict[int, bytes]()
        for number in set(sources) - {-1}:
            at = [n for n, source in enumerate(sources) if source == number]
            chunks = self.images[number].instance.read([frames[n] for n in at], most)
            found.update(zip(at, chunks, strict=True))
        return [found.get(n) for n in range(len(frames))]


def _level(tiles: _Tiles, base: _Image) -> Level:
    """The level that is made of tiles."""
    size, here, there = tiles.images[0].size, tiles.images[0].spacing, base.spacing
    factor = downsample(base.size, size, max(1.0, here[0] / there[0]) if here and there else None)
    pairs = zip(base.size, size, strict=True)
    if any(abs(whole / factor - side) > 1 + _SHAPE * side for whole, side in pairs):
        raise UnsupportedSlideError(
            f"it holds images of {base.size[0]}x{base.size[1]} and of {size[0]}x{size[1]} px, which"
            " are no levels of one scan"
        )
    return Level(
        size=size,
        downsample=factor,
        tile_size=tiles.coding.size,
        reductions=codecs.reductions(tiles.coding.size),
        empty_tiles=tiles.empty,
    )


def _chosen(volumes: Sequence[_Instance], region: int | None) -> list[_Instance]:
    """The instances of one scan: the only one, or that with the number `region`."""
    scans: dict[tuple[str, ...], list[_Instance]] = {}
    for instance in volumes:
        scans.setdefault(tuple(text(instance.head, key) for key in _SCAN), []).append(instance)
    found = list(scans.values())
    if len(found) == 1 and region is None:
        return found[0]
    sizes = [max(_size(instance.attributes) for instance in scan) for scan in found]
    return found[choose_scan(sizes, region)]


class DicomReader(DecodingReader):
    """A TileReader over the instances of one scan, `sources`, which it closes with itself.

    `version` changes when one of them is written; it is None where they do not tell. `server` is
    where they come from, if they are no files.
    """

    format = "dicom"
    server: Any = None

    def __init__(
        self, instances: Sequence[_Instance], region: int | None = None, *, of: str = VOLUME
    ) -> None:
        volumes = [instance for instance in instances if kind(instance.head) == of]
        if not volumes:
            raise UnsupportedSlideError(
                "it holds no image of a slide, or nothing but labels and overviews of one"
            )
        images: dict[str, _Image] = {}
        for instance in _chosen(volumes, region):
            image = _parse(instance)
            if of == VOLUME:
                _check_brightfield(instance.attributes)
            # Some files lie beside their copies.
            images.setdefault(text(instance.head, "SOPInstanceUID"), image)
        ordered = sorted(images.values(), key=lambda image: (image.size, *_place(image)))[::-1]
        base = ordered[0]
        self._tiles = [_Tiles(list(same)) for _, same in groupby(ordered, lambda i: i.size)]
        self._decoders = [codecs.decoder(tiles.coding) for tiles in self._tiles]
        self.levels: tuple[Level, ...] = tuple(_level(tiles, base) for tiles in self._tiles)
        for number, level in enumerate(self.levels):
            check_level(number, level)
        mpp, paths = base.spacing, base.instance.attributes.get("OpticalPathSequence") or [{}]
        self.metadata = ScaleMetadata(
            mpp=mpp,
            mpp_source="DICOM PixelSpacing" if mpp else "",
            objective_power=_floats(paths[0], "ObjectiveLensPower")[0],
        )
        self.sources, self._closed = [image.instance for image in ordered], False
        series = text(self.sources[0].head, SERIES)
        self._beside = [i for i in instances if text(i.head, SERIES) == series]
        try:
            for image in ordered:
                raw = image.coding.compression == _RAW
                image.instance.open(image.frames, 3 * math.prod(image.coding.size) if raw else None)
        except BaseException:
            self.close()
            raise

    @property
    def version(self) -> str | None:
        """Versions of all instances."""
        versions = [instance.version for instance in self.sources]
        return None if None in versions else "; ".join(map(str, versions))

    def read_tile_bytes(self, level: int, indices: Sequence[int]) -> list[bytes | None]:
        """The bytes of tiles, as stored; None for those that are declared empty."""
        if self._closed:
            raise ClosedSlideError("the slide is closed; open it again to read from it")
        return self._tiles[level].read(indices)

    def read_properties(self) -> Mapping[str, str]:
        """The texts of the first level's instance, by their keywords: "dicom.PatientName"."""
        try:
            from pydicom.datadict import keyword_for_tag
        except ImportError as error:
            raise MissingExtraError(
                "the names of attributes of DICOM need pydicom, which is not installed; run"
                ' pip install "xmag[dicom]"'
            ) from error
        texts = self.sources[0].texts()
        return {f"dicom.{keyword_for_tag(tag) or f'{tag:08X}'}": value for tag, value in texts}

    def associated_images(self) -> Mapping[str, Callable[[], Pixels]]:
        """Functions that read the label, the overview ("macro") and the thumbnail."""
        found: dict[str, Callable[[], Pixels]] = {}
        for instance in self._beside:
            if (name := _BESIDE.get(kind(instance.head))) is not None:
                same = sum(other.partition("-")[0] == name for other in found)
                found[f"{name}-{same + 1}" if same else name] = partial(_read_whole, instance)
        return found

    def close(self) -> None:
        """Release the instances. Closing twice is fine."""
        self._closed = True
        for instance in self.sources:
            instance.close()


def _read_whole(instance: _Instance) -> Pixels:
    """The pixels of an image beside the scan."""
    # A copy, as others may read it at the same time.
    of = kind(instance.head)
    with named(_BESIDE[of]), closing(DicomReader([copy(instance)], of=of)) as reader:
        return read_whole(reader)
