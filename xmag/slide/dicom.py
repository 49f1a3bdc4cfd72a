"""DICOM whole-slide images: what their attributes say, and the levels that their frames make.

An image of a slide is a series of instances (DICOM PS3.3, A.32.8): each holds frames, the tiles of
a level, and says where they lie. Where the frames come from, files or a server, is not known here.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from xmag.errors import ClosedSlideError, UnsupportedSlideError
from xmag.slide import codecs
from xmag.slide.directories import most_bytes
from xmag.slide.integrity import check_level, damaged
from xmag.slide.reader import Level, Pixels, ScaleMetadata, choose_scan, downsample

Attributes = Mapping[str, Any]
"""Values of attributes by their keywords: a list of str or numbers, of Attributes in sequences."""

VOLUME = "VOLUME"
"""The kind of instances that hold levels."""
_BESIDE = {"LABEL": "label", "OVERVIEW": "macro", "THUMBNAIL": "thumbnail"}
"""Names of images beside the scan, by the third value of ImageType."""

_RAW = 1
_COMPRESSIONS = {
    "1.2.840.10008.1.2": _RAW,
    "1.2.840.10008.1.2.1": _RAW,
    "1.2.840.10008.1.2.4.50": codecs.JPEG,
    "1.2.840.10008.1.2.4.51": codecs.JPEG,
    "1.2.840.10008.1.2.4.90": codecs.JPEG_2000[-1],
    "1.2.840.10008.1.2.4.91": codecs.JPEG_2000[-1],
}
"""TIFF's numbers of the codings that are read, by transfer syntax; PS3.5, section 10."""
_NOT_READ = {
    "1.2.840.10008.1.2.4.57": "lossless JPEG", "1.2.840.10008.1.2.4.70": "lossless JPEG",
    "1.2.840.10008.1.2.4.80": "JPEG-LS", "1.2.840.10008.1.2.4.81": "JPEG-LS",
    "1.2.840.10008.1.2.4.110": "JPEG XL", "1.2.840.10008.1.2.4.111": "JPEG XL",
    "1.2.840.10008.1.2.4.112": "JPEG XL", "1.2.840.10008.1.2.4.201": "HTJ2K",
    "1.2.840.10008.1.2.4.202": "HTJ2K", "1.2.840.10008.1.2.4.203": "HTJ2K",
    "1.2.840.10008.1.2.5": "RLE",
}  # fmt: skip
_RGB, _YCBCR = 2, 6
_PHOTOMETRIC = {
    _RAW: {"RGB": _RGB},
    codecs.JPEG: {"RGB": _RGB, "YBR_FULL": _YCBCR, "YBR_FULL_422": _YCBCR},
    codecs.JPEG_2000[-1]: {
        "RGB": _RGB, "YBR_ICT": _RGB, "YBR_RCT": _RGB, "YBR_FULL": _YCBCR, "YBR_FULL_422": _YCBCR,
    },
}  # fmt: skip
"""How samples are meant, by coding and PhotometricInterpretation; JPEG 2000's own transforms are
undone by its decoder."""

_BRIGHTFIELD = {"111744", "111741"}
"""Codes of bright field and of transmitted light, as older converters have it; PS3.16, CID 8123."""
_ILLUMINATIONS = {
    "111742": "reflected light", "111743": "fluorescence", "111745": "dark field",
    "111746": "oblique light", "111747": "phase contrast", "111748": "interference contrast",
}  # fmt: skip
_SCAN = ("SeriesInstanceUID", "FrameOfReferenceUID", "PyramidUID")
"""What the instances of one scan share."""
_SHAPE = 0.02
"""Largest difference of the shapes of levels, by their sides."""
_MOST_TILES = 1 << 22
_MOST_ASSOCIATED_PX = 1 << 26


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """The image of one instance, by its attributes.

    `size` is the (width, height) of the whole image that its frames are tiles of. `first` is the
    number that its first frame has in a concatenation of `parts` instances (0 where that is not
    said), whose identity is `concatenation`. `spacing` is µm/px along (x, y).
    """

    uid: str
    size: tuple[int, int]
    coding: codecs.TileCoding
    frames: int
    concatenation: str = ""
    first: int = 0
    parts: int = 0
    spacing: tuple[float, float] | None = None
    power: float | None = None

    @property
    def grid(self) -> tuple[int, int]:
        """Columns and rows of tiles."""
        (width, height), (across, down) = self.size, self.coding.size
        return -(-width // across), -(-height // down)


class Source(Protocol):
    """An instance: its attributes, and its frames."""

    @property
    def head(self) -> Attributes:
        """The attributes that tell what it shows and what it belongs to."""
        ...

    @property
    def syntax(self) -> str:
        """Its transfer syntax."""
        ...

    @property
    def size(self) -> int:
        """Bytes that identify it."""
        ...

    @property
    def version(self) -> str | None:
        """Words that change when it is written; None where there are none."""
        ...

    def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Those of the bytes that identify it, by (offset, length)."""
        ...

    def texts(self) -> Mapping[str, str]:
        """All its texts by keyword, patients' names among them."""
        ...

    def read_attributes(self) -> Attributes:
        """All attributes that pixels need."""
        ...

    def positions(self, attributes: Attributes) -> NDArray[np.int64]:
        """(column, row) of each frame in the whole image, from 1; (frames, 2)."""
        ...

    def open(self, attributes: Attributes, frames: int, frame_bytes: int | None) -> None:
        """Find the `frames`; each has `frame_bytes` where pixels are stored as they are."""
        ...

    def read(self, frames: Sequence[int], most: int) -> list[bytes]:
        """The bytes of frames, each at most `most`; DamagedSlideError where they are damaged."""
        ...

    def close(self) -> None:
        """Release what it holds. Closing twice is fine."""
        ...


def number(attributes: Attributes, keyword: str, default: int | None = None) -> int:
    """The whole number of an attribute; DamagedSlideError where it has none and must."""
    try:
        value = (attributes.get(keyword) or [None])[0]
        if value in (None, "") and default is not None:
            return default
        return int(value)
    except (TypeError, ValueError, LookupError):
        raise damaged(f"its {keyword} is no number") from None


def text(attributes: Attributes, keyword: str) -> str:
    """The first text of an attribute; "" where it has none."""
    return str((attributes.get(keyword) or [""])[0])


def kind(head: Attributes) -> str:
    """The third value of ImageType, which says what an instance shows."""
    values = head.get("ImageType") or []
    return str(values[2]) if len(values) > 2 else ""


def parse(attributes: Attributes, syntax: str) -> Image:
    """The image that attributes describe; UnsupportedSlideError where it is not 8-bit colour."""
    size = _size(attributes)
    tile = (number(attributes, "Columns"), number(attributes, "Rows"))
    coding = _coding(attributes, syntax, tile)
    shared = (attributes.get("SharedFunctionalGroupsSequence") or [{}])[0]
    first = (attributes.get("FirstFrame") or [{}])[0]
    measures = (shared if "PixelMeasuresSequence" in shared else first).get("PixelMeasuresSequence")
    path = (attributes.get("OpticalPathSequence") or [{}])[0]
    image = Image(
        uid=text(attributes, "SOPInstanceUID"),
        size=size,
        coding=coding,
        frames=number(attributes, "NumberOfFrames", 1),
        concatenation=text(attributes, "ConcatenationUID"),
        first=number(attributes, "ConcatenationFrameOffsetNumber", 0),
        parts=number(attributes, "InConcatenationTotalNumber", 0),
        spacing=_spacing((measures or [{}])[0]),
        power=_floats(path, "ObjectiveLensPower", 1)[0],
    )
    if min(image.size) < 1 or image.grid[0] * image.grid[1] > _MOST_TILES:
        raise UnsupportedSlideError(
            f"it is {size[0]}x{size[1]} px in tiles of {tile[0]}x{tile[1]} px; expected at most"
            f" {_MOST_TILES} tiles"
        )
    if not 0 < image.frames <= _MOST_TILES or not 0 <= image.first < _MOST_TILES:
        raise damaged(f"it says that it has {image.frames} frames, from {image.first} on")
    return image


def _coding(attributes: Attributes, syntax: str, tile: tuple[int, int]) -> codecs.TileCoding:
    """The coding of the frames; UnsupportedSlideError where they are not 8-bit colour."""
    samples, bits = number(attributes, "SamplesPerPixel"), number(attributes, "BitsAllocated")
    if (samples, bits) != (3, 8):
        raise UnsupportedSlideError(
            f"its pixels are {samples} sample(s) of {bits} bits; xmag reads 8-bit RGB (brightfield)"
            " slides"
        )
    compression = _COMPRESSIONS.get(syntax)
    if compression is None:
        raise UnsupportedSlideError(
            f"its frames are stored as {_NOT_READ.get(syntax, 'something that no slide is')}; xmag"
            " reads JPEG, JPEG 2000 and uncompressed frames of DICOM. Convert it"
        )
    photometric = _PHOTOMETRIC[compression].get(text(attributes, "PhotometricInterpretation"))
    planar = compression == _RAW and number(attributes, "PlanarConfiguration", 0) != 0
    if photometric is None or planar:
        raise UnsupportedSlideError(
            "its pixels are in separate planes; xmag reads interleaved RGB. Convert it"
            if planar
            else "its PhotometricInterpretation is none of RGB or YCbCr for its coding; xmag reads"
            f" {', '.join(_PHOTOMETRIC[compression])}"
        )
    # Aperio's number for JPEG 2000 whose components are YCbCr, and its stream does not say so.
    in_ycbcr = compression != codecs.JPEG and photometric == _YCBCR
    codecs.check_tile(tile, compression)
    return codecs.TileCoding(
        compression=codecs.APERIO_J2K_YCBCR if in_ycbcr else compression,
        photometric=photometric,
        samples=samples,
        size=tile,
        last_height=tile[1],
        aperio=in_ycbcr,
    )


def _floats(attributes: Attributes, keyword: str, count: int) -> list[float | None]:
    """So many positive numbers of an attribute, None where there is none."""
    values = [*(attributes.get(keyword) or []), *[None] * count][:count]
    found = list[float | None]()
    for value in values:
        try:
            found.append(float(value) or None)
        except (TypeError, ValueError):
            found.append(None)
    return found


def _spacing(measures: Attributes) -> tuple[float, float] | None:
    """µm/px along (x, y), of the distances of rows and of columns in mm."""
    down, across = _floats(measures, "PixelSpacing", 2)
    return (across * 1e3, down * 1e3) if across and down else None


def check_brightfield(attributes: Attributes) -> None:
    """Raise UnsupportedSlideError where an image is not one plane of a brightfield scan."""
    paths = attributes.get("OpticalPathSequence") or []
    if max(len(paths), number(attributes, "NumberOfOpticalPaths", 1)) > 1:
        raise UnsupportedSlideError(
            "it was scanned along several optical paths; xmag reads one, of bright field"
        )
    codes = [
        text(code, "CodeValue")
        for path in paths
        for code in path.get("IlluminationTypeCodeSequence") or []
    ]
    if other := [code for code in codes if code not in _BRIGHTFIELD]:
        seen = _ILLUMINATIONS.get(other[0], "light of an unknown kind")
        raise UnsupportedSlideError(
            f"its optical path is {seen}; xmag reads brightfield scans in colour"
        )
    planes = number(attributes, "TotalPixelMatrixFocalPlanes", 1)
    if planes > 1:
        raise UnsupportedSlideError(
            f"it is a z-stack of {planes} focal planes; xmag reads one. Export one"
        )


class _Table:
    """Places of the tiles of a level: the source and the frame of each, -1 where it is empty."""

    def __init__(self, images: Sequence[tuple[Source, Image, Attributes]]) -> None:
        self.sources = [source for source, _, _ in images]
        self.image = images[0][1]
        across, down = self.image.grid
        self.source = np.full(across * down, -1, np.int16)
        self.frame = np.full(across * down, -1, np.int32)
        for number, (source, image, attributes) in enumerate(images):
            if image.coding != self.image.coding:
                raise UnsupportedSlideError(
                    "its instances store tiles of one level in several sizes or codings"
                )
            tiles = _tiles(source, image, attributes)
            if (self.source[tiles] >= 0).any() or len(np.unique(tiles)) != len(tiles):
                raise UnsupportedSlideError(
                    "it holds several frames for the same place, as a z-stack, several optical"
                    " paths or copies do; xmag reads one plane of a brightfield scan"
                )
            self.source[tiles], self.frame[tiles] = number, np.arange(image.frames)
        is_full = all(_is_full(attributes) for _, _, attributes in images)
        missing = int((self.source < 0).sum())
        if is_full and missing:
            raise damaged(
                f"a level of {self.image.size[0]}x{self.image.size[1]} px lacks {missing} of its"
                f" {across * down} tiles, and does not say that it is sparse"
            )
        self._check_parts([image for _, image, _ in images])

    @staticmethod
    def _check_parts(images: Sequence[Image]) -> None:
        """Raise DamagedSlideError where a part of a concatenation is not there."""
        by_uid: dict[str, list[Image]] = {}
        for image in images:
            if image.concatenation:
                by_uid.setdefault(image.concatenation, []).append(image)
        for parts in by_uid.values():
            parts.sort(key=lambda image: image.first)
            ends = [0, *(image.first + image.frames for image in parts)]
            whole = all(image.first == end for image, end in zip(parts, ends, strict=False))
            if not whole or parts[0].parts > len(parts):
                raise damaged("a part of its concatenated instances is not there")

    def read(self, tiles: Sequence[int]) -> list[bytes | None]:
        """The bytes of tiles; None for those that are declared empty."""
        frames, sources = self.frame[tiles].tolist(), self.source[tiles].tolist()
        found = list[bytes | None]([None] * len(frames))
        most = most_bytes(*self.image.coding.size, 3)
        for number in set(sources) - {-1}:
            at = [n for n, source in enumerate(sources) if source == number]
            chunks = self.sources[number].read([frames[n] for n in at], most)
            for n, chunk in zip(at, chunks, strict=True):
                found[n] = chunk
        return found


def _is_full(attributes: Attributes) -> bool:
    """Whether frames are all tiles, row by row; they may say so without a word (2016)."""
    organisation = text(attributes, "DimensionOrganizationType")
    placed = attributes.get("PerFrameFunctionalGroupsSequence") is not None
    if organisation == "TILED_SPARSE" and not placed:
        raise damaged("it is TILED_SPARSE, and does not say where its frames lie")
    return organisation == "TILED_FULL" or not placed


def _tiles(source: Source, image: Image, attributes: Attributes) -> NDArray[np.int64]:
    """The tiles that the frames of an instance are; row-major in the level."""
    across, down = image.grid
    if _is_full(attributes):
        if image.first + image.frames > across * down:
            raise damaged(
                f"it holds frames {image.first} to {image.first + image.frames - 1} of a level of"
                f" {across * down} tiles"
            )
        return image.first + np.arange(image.frames, dtype=np.int64)
    places = source.positions(attributes)
    if len(places) != image.frames:
        raise damaged(f"it says that it has {image.frames} frames, and places {len(places)}")
    cells, beside = np.divmod(places - 1, image.coding.size)
    if beside.any():
        raise UnsupportedSlideError(
            "its tiles overlap, or lie on no regular grid; xmag reads tiles side by side. Convert"
            " it to TILED_FULL"
        )
    if (cells < 0).any() or (cells >= (across, down)).any():
        raise damaged("its frames lie outside of the image that they are tiles of")
    return np.asarray(cells[:, 1] * across + cells[:, 0])


def _level(table: _Table, base: Image) -> Level:
    """The level that a table has the tiles of."""
    image = table.image
    stated = None
    if image.spacing and base.spacing:
        stated = max(1.0, image.spacing[0] / base.spacing[0])
    factor = downsample(base.size, image.size, stated)
    pairs = zip(base.size, image.size, strict=True)
    if any(abs(whole / factor - side) > 1 + _SHAPE * side for whole, side in pairs):
        raise UnsupportedSlideError(
            f"it holds images of {base.size[0]}x{base.size[1]} and of"
            f" {image.size[0]}x{image.size[1]} px, which are no levels of one scan"
        )
    return Level(
        size=image.size,
        downsample=factor,
        tile_size=image.coding.size,
        reductions=codecs.reductions(image.coding.size),
        empty_tiles=int((table.source < 0).sum()),
    )


def _chosen(volumes: Sequence[Source], region: int | None) -> list[Source]:
    """The instances of one scan: the only one, or that with the number `region`."""
    scans: dict[tuple[str, ...], list[Source]] = {}
    for source in volumes:
        scans.setdefault(tuple(text(source.head, keyword) for keyword in _SCAN), []).append(source)
    found = list(scans.values())
    if len(found) == 1 and region is None:
        return found[0]
    sizes = [max(_size(source.read_attributes()) for source in scan) for scan in found]
    return found[choose_scan(sizes, region)]


def _size(attributes: Attributes) -> tuple[int, int]:
    width, height = (number(attributes, f"TotalPixelMatrix{side}") for side in ("Columns", "Rows"))
    return width, height


def _open(source: Source, image: Image, attributes: Attributes) -> None:
    raw = image.coding.compression == _RAW
    source.open(attributes, image.frames, 3 * math.prod(image.coding.size) if raw else None)


class DicomReader:
    """A TileReader over the instances of one scan; it closes them with itself.

    `version` changes when one of them is written, and `content` is what identifies them.
    """

    format = "dicom"

    def __init__(self, sources: Sequence[Source], region: int | None = None) -> None:
        self._closed = False
        volumes = [source for source in sources if kind(source.head) == VOLUME]
        if not volumes:
            raise UnsupportedSlideError(
                "it holds no image of a slide, or nothing but labels and overviews of one"
            )
        found: dict[str, tuple[Source, Image, Attributes]] = {}
        for source in _chosen(volumes, region):
            attributes = source.read_attributes()
            check_brightfield(attributes)
            image = parse(attributes, source.syntax)
            found.setdefault(image.uid, (source, image, attributes))  # some lie beside their copies
        images = sorted(found.values(), key=lambda one: (one[1].size, one[1].uid), reverse=True)
        base = images[0][1]
        self._tables = [
            _Table(list(same)) for _, same in itertools.groupby(images, lambda one: one[1].size)
        ]
        self._decoders = [codecs.decoder(table.image.coding) for table in self._tables]
        self.levels: tuple[Level, ...] = tuple(_level(table, base) for table in self._tables)
        for number, level in enumerate(self.levels):
            check_level(number, level)
        self.metadata = ScaleMetadata(
            mpp=base.spacing,
            mpp_source="" if base.spacing is None else "DICOM PixelSpacing",
            objective_power=base.power,
        )
        self._sources = [source for source, _, _ in images]
        series = {source.head.get("SeriesInstanceUID", [""])[0] for source in self._sources}
        self._beside = [
            source
            for source in sources
            if source.head.get("SeriesInstanceUID", [""])[0] in series
            and kind(source.head) in _BESIDE
        ]
        try:
            for one in images:
                _open(*one)
        except BaseException:
            self.close()
            raise

    @property
    def content(self) -> "_Content":
        """All bytes of the instances, in an order of their own."""
        return _Content(self._sources)

    @property
    def version(self) -> str | None:
        """Sizes and times of change of the instances; None where they have none."""
        versions = [source.version for source in self._sources]
        return None if None in versions else "; ".join(map(str, versions))

    def read_tile_bytes(self, level: int, indices: Sequence[int]) -> list[bytes | None]:
        """The bytes of tiles, as stored; None for those that are declared empty."""
        if self._closed:
            raise ClosedSlideError("the slide is closed; open it again to read from it")
        return self._tables[level].read(indices)

    def decode(self, level: int, data: bytes, reduction: int) -> Pixels:
        """The pixels of one tile at 1/`reduction`, in full tile size."""
        return self._decoders[level](data, reduction)

    def decode_many(
        self, level: int, chunks: Sequence[object], reduction: int, row: Pixels
    ) -> list[bool]:
        """Decode tiles of a level into `row`, side by side; False for what `decode` has to do."""
        return codecs.decode_many(self._decoders[level], chunks, reduction, row)

    def read_properties(self) -> Mapping[str, str]:
        """The texts of the largest level's instance, by their keywords; "dicom.PatientName"."""
        return self._sources[0].texts()

    def associated_images(self) -> Mapping[str, Callable[[], Pixels]]:
        """Functions that read the label, the overview ("macro") and the thumbnail."""
        found: dict[str, Callable[[], Pixels]] = {}
        for source in self._beside:
            name = _BESIDE[kind(source.head)]
            same = sum(other.partition("-")[0] == name for other in found)
            found[f"{name}-{same + 1}" if same else name] = partial(_read_whole, source)
        return found

    def close(self) -> None:
        """Release the instances. Closing twice is fine."""
        self._closed = True
        for source in self._sources:
            source.close()


def _read_whole(source: Source) -> Pixels:
    """The pixels of an image beside the scan."""
    attributes = source.read_attributes()
    image = parse(attributes, source.syntax)
    if math.prod(image.size) > _MOST_ASSOCIATED_PX:
        raise UnsupportedSlideError(
            f"it is {image.size[0]}x{image.size[1]} px; expected at most {_MOST_ASSOCIATED_PX} px"
        )
    table, decode = _Table([(source, image, attributes)]), codecs.decoder(image.coding)
    (width, height), (across, down) = image.size, image.coding.size
    columns, rows = image.grid
    pixels = np.full((rows * down, columns * across, 3), 255, np.uint8)
    _open(source, image, attributes)
    try:
        for tile, data in enumerate(table.read(range(columns * rows))):
            y, x = tile // columns * down, tile % columns * across
            if data is not None:
                pixels[y : y + down, x : x + across] = decode(data, 1)
    finally:
        source.close()
    return pixels[:height, :width].copy()


class _Content:
    """The bytes of several instances, one after the other."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources
        self._ends = list(itertools.accumulate(source.size for source in sources))
        self.size = self._ends[-1]

    def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of each (offset, length)."""
        return [self._read(*span) for span in ranges]

    def _read(self, offset: int, length: int) -> bytes:
        parts, end = [], offset + length
        for source, stop in zip(self._sources, self._ends, strict=True):
            start = stop - source.size
            first, last = max(offset, start), min(end, stop)
            if first < last:
                parts += source.read_many([(first - start, last - first)])
        return b"".join(parts)
