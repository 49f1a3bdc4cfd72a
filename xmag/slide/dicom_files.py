"""DICOM files: a parser of the attributes that pixels need, and the frames that lie in a file.

pydicom would take the memory that a length claims, and warns, with the value in its warning, of
what ordinary slides hold; only settings of the whole process keep it from that. So this parser
goes from tag to tag, takes what is asked for, and never reads any other value (DICOM PS3.5,
sections 7 and A.4).
"""

import itertools
import os
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from xmag.errors import MissingExtraError, SlideError, UnsupportedSlideError, XmagError
from xmag.slide.dicom import VOLUME, Attributes, DicomReader, kind, text
from xmag.slide.integrity import damaged
from xmag.slide.tiff import LocalSource

_WANTED: dict[int, tuple[str, str]] = {
    0x0008_0008: ("ImageType", "text"),
    0x0008_0018: ("SOPInstanceUID", "text"),
    0x0008_0019: ("PyramidUID", "text"),
    0x0008_0100: ("CodeValue", "text"),
    0x0020_000E: ("SeriesInstanceUID", "text"),
    0x0020_0052: ("FrameOfReferenceUID", "text"),
    0x0020_9161: ("ConcatenationUID", "text"),
    0x0020_9163: ("InConcatenationTotalNumber", "H"),
    0x0020_9228: ("ConcatenationFrameOffsetNumber", "I"),
    0x0020_9311: ("DimensionOrganizationType", "text"),
    0x0022_0016: ("IlluminationTypeCodeSequence", "items"),
    0x0028_0002: ("SamplesPerPixel", "H"),
    0x0028_0004: ("PhotometricInterpretation", "text"),
    0x0028_0006: ("PlanarConfiguration", "H"),
    0x0028_0008: ("NumberOfFrames", "text"),
    0x0028_0010: ("Rows", "H"),
    0x0028_0011: ("Columns", "H"),
    0x0028_0030: ("PixelSpacing", "text"),
    0x0028_0100: ("BitsAllocated", "H"),
    0x0028_9110: ("PixelMeasuresSequence", "items"),
    0x0048_0006: ("TotalPixelMatrixColumns", "I"),
    0x0048_0007: ("TotalPixelMatrixRows", "I"),
    0x0048_0105: ("OpticalPathSequence", "items"),
    0x0048_0112: ("ObjectiveLensPower", "text"),
    0x0048_021A: ("PlanePositionSlideSequence", "items"),
    0x0048_021E: ("ColumnPositionInTotalImagePixelMatrix", "i"),
    0x0048_021F: ("RowPositionInTotalImagePixelMatrix", "i"),
    0x0048_0302: ("NumberOfOpticalPaths", "I"),
    0x0048_0303: ("TotalPixelMatrixFocalPlanes", "I"),
    0x5200_9229: ("SharedFunctionalGroupsSequence", "items"),
    0x5200_9230: ("PerFrameFunctionalGroupsSequence", "place"),
    0x7FE0_0001: ("ExtendedOffsetTable", "Q"),
    0x7FE0_0010: ("PixelData", "place"),
}
_LAST_OF_HEAD = 0x0020_0052
"""The last attribute that tells which files belong together."""
_PIXELS = 0x7FE0_0000
_CLASS, _TRANSFER_SYNTAX = 0x0002_0002, 0x0002_0010
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFE_E000, 0xFFFE_E00D, 0xFFFE_E0DD
_ITEM_BYTES = b"\xfe\xff\x00\xe0"
_LONG = {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"}
"""Value representations with a length of four bytes."""
_TEXTS = {
    b"AE", b"AS", b"CS", b"DA", b"DS", b"DT", b"IS", b"LO", b"LT", b"PN", b"SH", b"ST", b"TM",
    b"UC", b"UI", b"UR", b"UT",
}  # fmt: skip
_UNDEFINED = 0xFFFF_FFFF
_START = 132
"""Bytes before the first attribute: a preamble, and "DICM"."""
_IMPLICIT = "1.2.840.10008.1.2"
_ENCODED = {"1.2.840.10008.1.2.1.99": "deflated", "1.2.840.10008.1.2.2": "big-endian"}
_DEEPEST = 16
"""Sequences within each other; those of slides are at most six deep."""
_MOST_VALUE_BYTES = 1 << 16
_MOST_TABLE_BYTES = 8 << 22
_MOST_ITEMS = 1 << 10
"""Items of a sequence that is read as a whole."""
_MOST_FRAMES_BYTES = 1 << 28
"""Bytes of the groups of all frames; each has some 300."""
_POSITION, _IMPLICIT_POSITION = (
    re.compile(rb"H\0\x1e\x02%b(.{4})H\0\x1f\x02%b(.{4})" % (head, head), re.DOTALL)
    for head in (rb"SL\x04\0", rb"\x04\0\0\0")
)
"""Column and row of a frame, which stand side by side. A walk over the groups of all frames of a
large slide would take many seconds."""
_DTYPES = {"H": "<u2", "I": "<u4", "i": "<i4", "Q": "<u8"}
_WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
_MOST_FILES = 20_000
"""Files of a folder that are looked at."""


class _Parser:
    """A walk over the attributes of an open file, from tag to tag."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.size = file, file.seek(0, 2)

    def header(self, at: int, explicit: bool) -> tuple[int, bytes, int, int | None]:
        """(tag, value representation, start of the value, its length or None) of an element."""
        head = self.read(at, min(12, max(8, self.size - at)))
        group, number, length = struct.unpack_from("<HHI", head)
        representation, start = head[4:6], at + 8
        if group == 0xFFFE or not explicit:
            representation = b""
        elif representation in _LONG:
            if len(head) < 12:
                raise self._cut(at)
            (length,), start = struct.unpack_from("<I", head, 8), at + 12
        elif representation.isalpha() and representation.isupper():
            length >>= 16
        else:
            raise damaged(f"its attributes make no sense at byte {at}")
        defined = length != _UNDEFINED
        if defined and start + length > self.size:
            raise self._cut(start)
        return group << 16 | number, representation, start, length if defined else None

    def read(self, at: int, length: int) -> bytes:
        """So many bytes; DamagedSlideError where the file ends before."""
        if at + length > self.size:
            raise self._cut(at)
        self._file.seek(at)
        data = self._file.read(length)
        if len(data) != length:
            raise self._cut(at)
        return data

    def _cut(self, at: int) -> SlideError:
        return damaged(f"an attribute at byte {at} goes on behind its end at {self.size}")

    def elements(
        self, at: int, end: int | None, explicit: bool, depth: int = 0
    ) -> Iterator[tuple[int, bytes, int, int | None]]:
        """The elements, as `header` has them, until `end` or the mark of an item's end."""
        while at < (self.size if end is None else end):
            tag, representation, start, length = self.header(at, explicit)
            if tag == _ITEM_END:
                return
            yield tag, representation, start, length
            if length is None:
                at = self._end_of_sequence(start, explicit and representation != b"UN", depth + 1)
            else:
                at = start + length

    def items(
        self, at: int, end: int | None, explicit: bool, depth: int = 0
    ) -> Iterator[tuple[int, int]]:
        """(start, end) of the items of a sequence that begins at `at`."""
        while end is None or at < end:
            tag, _, start, length = self.header(at, explicit)
            if tag == _SEQUENCE_END:
                return
            if tag != _ITEM:
                raise damaged(f"a sequence of its attributes holds no item at byte {at}")
            at = self._end_of_item(start, explicit, depth) if length is None else start + length
            yield start, at

    def _end_of_sequence(self, at: int, explicit: bool, depth: int) -> int:
        if depth > _DEEPEST:
            raise damaged(f"its attributes lie more than {_DEEPEST} deep within each other")
        for _, end in self.items(at, None, explicit, depth):
            at = end
        return at + 8

    def _end_of_item(self, at: int, explicit: bool, depth: int) -> int:
        while True:
            tag, representation, start, length = self.header(at, explicit)
            if tag == _ITEM_END:
                return start
            if length is None:
                at = self._end_of_sequence(start, explicit and representation != b"UN", depth + 1)
            else:
                at = start + length

    def attributes(
        self, at: int, end: int | None, explicit: bool, *, last: int = 0xFFFF_FFFF, depth: int = 0
    ) -> Attributes:
        """The values of those attributes that are wanted, up to the tag `last`."""
        found: dict[str, Any] = {}
        for tag, representation, start, length in self.elements(at, end, explicit, depth):
            if tag > last:
                break
            keyword, kind = _WANTED.get(tag, ("", ""))
            below = explicit and representation != b"UN"
            if kind == "place":
                found[keyword] = (start, None if length is None else start + length, below)
                if keyword == "PixelData":
                    break
            elif kind == "items":
                if depth > _DEEPEST:
                    raise damaged("its sequences lie too deep within each other")
                stop = None if length is None else start + length
                spans = list(
                    itertools.islice(self.items(start, stop, below, depth + 1), _MOST_ITEMS)
                )
                found[keyword] = [self.attributes(*span, below, depth=depth + 1) for span in spans]
            elif kind:
                most = _MOST_TABLE_BYTES if kind == "Q" else _MOST_VALUE_BYTES
                if length is None or length > most:
                    raise damaged(f"its {keyword} is {length} bytes long; expected at most {most}")
                found[keyword] = _values(self.read(start, length), kind)
        return found


def _values(data: bytes, kind: str) -> Sequence[Any]:
    if kind == "text":
        return [part.strip(" \0") for part in data.decode("latin-1").split("\\")]
    size = struct.calcsize(f"<{kind}")
    values: list[int] = np.frombuffer(data[: len(data) // size * size], _DTYPES[kind]).tolist()
    return values


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


class InstanceFile:
    """The attributes of one file of a DICOM slide, and its frames, which are read when asked for.

    `head` are the attributes that tell which files belong together, and what an image shows;
    they alone are read until `open`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            self.size = found.st_size
            self.version = f"{found.st_size} bytes at {found.st_mtime_ns} ns"
            parser = _Parser(file)
            self._start, self.syntax, class_ = _meta(parser)
            self.is_slide = class_ == _WHOLE_SLIDE
            if self.is_slide and self.syntax in _ENCODED:
                raise UnsupportedSlideError(
                    f"its attributes are {_ENCODED[self.syntax]}; xmag reads little-endian DICOM."
                    " Convert it to explicit VR little endian"
                )
            self.head: Attributes = {}
            if self.is_slide:
                self.head = parser.attributes(self._start, None, self._explicit, last=_LAST_OF_HEAD)
        self._source: LocalSource | None = None

    @property
    def _explicit(self) -> bool:
        return self.syntax != _IMPLICIT

    def read_attributes(self) -> Attributes:
        """All attributes that pixels need."""
        with self.path.open("rb") as file:
            parser = _Parser(file)
            found = dict(parser.attributes(self._start, None, self._explicit))
            if (place := found.get("PerFrameFunctionalGroupsSequence")) is not None:
                start, end, explicit = place
                first = next(parser.items(start, end, explicit), None)
                found["FirstFrame"] = [parser.attributes(*first, explicit)] if first else []
            return found

    def positions(self, attributes: Attributes) -> NDArray[np.int64]:
        """(column, row) of each frame in the whole image, from 1; (frames, 2)."""
        start, end, explicit = attributes["PerFrameFunctionalGroupsSequence"]
        with self.path.open("rb") as file:
            parser = _Parser(file)
            if end is None:
                end = max((stop for _, stop in parser.items(start, None, explicit)), default=start)
            if end - start > _MOST_FRAMES_BYTES:
                raise damaged(f"its groups of frames are {end - start} bytes long")
            data = parser.read(start, end - start)
        found = (_POSITION if explicit else _IMPLICIT_POSITION).findall(data)
        return np.frombuffer(b"".join(map(b"".join, found)), "<i4").reshape(-1, 2).astype(np.int64)

    def open(self, attributes: Attributes, frames: int, frame_bytes: int | None) -> None:
        """Find the `frames`; each has `frame_bytes` where pixels are stored as they are."""
        place = attributes.get("PixelData")
        if place is None:
            raise damaged("it holds no pixels")
        start, end, _ = place
        if frame_bytes is not None:
            if end is None or end - start < frames * frame_bytes:
                raise damaged(
                    f"its {frames} frames need {frames * frame_bytes} bytes, and it holds fewer"
                )
            self._starts = start + np.arange(frames, dtype=np.int64) * frame_bytes
            self._ends = self._starts + frame_bytes
        else:
            if end is not None:
                raise damaged("its frames are said to be compressed, and lie in no fragments")
            with self.path.open("rb") as file:
                table = attributes.get("ExtendedOffsetTable", ())
                self._starts, self._ends = _find_frames(_Parser(file), start, frames, table)
        self._encapsulated = frame_bytes is None
        self._source = LocalSource(self.path)

    def read(self, frames: Sequence[int], most: int) -> list[bytes]:
        """The bytes of frames, each at most `most`; DamagedSlideError where they are damaged."""
        assert self._source is not None
        starts, ends = self._starts[frames].tolist(), self._ends[frames].tolist()
        spans = [(start, end - start) for start, end in zip(starts, ends, strict=True)]
        for frame, (_, length) in zip(frames, spans, strict=True):
            if length > most:
                raise damaged(f"frame {frame} has {length} bytes; expected at most {most}")
        chunks = self._source.read_many(spans)
        if not self._encapsulated:
            return chunks
        return [_joined(*pair) for pair in zip(chunks, frames, strict=True)]

    def texts(self) -> Mapping[str, str]:
        """All texts of the file by keyword, patients' names among them."""
        try:
            from pydicom.datadict import keyword_for_tag
        except ImportError as error:
            raise MissingExtraError(
                "names of the attributes of DICOM files need pydicom, which is not installed; run"
                ' pip install "xmag[dicom]"'
            ) from error
        found: dict[str, str] = {}
        with self.path.open("rb") as file:
            parser = _Parser(file)
            elements = parser.elements(self._start, None, self._explicit)
            for tag, representation, start, length in elements:
                if tag >= _PIXELS:
                    break
                if representation in _TEXTS and length is not None and length <= _MOST_VALUE_BYTES:
                    data = parser.read(start, length)
                    name = keyword_for_tag(tag) or f"{tag >> 16:04X},{tag & 0xFFFF:04X}"
                    found[f"dicom.{name}"] = _decoded(data).strip(" \0")
        return found

    def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of each (offset, length) of the file."""
        assert self._source is not None
        return self._source.read_many(ranges)

    def close(self) -> None:
        """Release the file. Closing twice is fine."""
        if self._source is not None:
            self._source.close()


def _meta(parser: _Parser) -> tuple[int, str, str]:
    """(end of a file's meta information, its transfer syntax, the class of what it holds)."""
    at, texts = _START, {_TRANSFER_SYNTAX: "", _CLASS: ""}
    while parser.read(at, 2) == b"\2\0":
        tag, _, start, length = parser.header(at, explicit=True)
        if length is None or length > _MOST_VALUE_BYTES:
            raise damaged("its meta information makes no sense")
        if tag in texts:
            texts[tag] = parser.read(start, length).decode("latin-1").strip(" \0")
        at = start + length
    return at, texts[_TRANSFER_SYNTAX], texts[_CLASS]


def _find_frames(
    parser: _Parser, start: int, frames: int, extended: Sequence[int]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(start, end) of the fragments of each frame, by the table of offsets, or by walking there."""
    tag, _, at, length = parser.header(start, explicit=True)
    if tag != _ITEM or length is None:
        raise damaged("its pixels do not begin with a table of offsets")
    base = at + length
    if len(extended):
        offsets = np.array(extended, "<u8")
    else:
        if length > _MOST_TABLE_BYTES:
            raise damaged(f"its table of offsets is {length} bytes long")
        offsets = np.frombuffer(parser.read(at, length // 4 * 4), "<u4")
    if not len(offsets):
        places = itertools.islice(parser.items(base, None, explicit=True), frames + 1)
        offsets = np.array([first - 8 - base for first, _ in places if frames > 1] or [0])
    if len(offsets) != frames:
        raise damaged(
            f"it says that it has {frames} frames, and holds {len(offsets)} or more in fragments of"
            " their own or by its table of offsets"
        )
    starts = base + offsets.astype(np.int64)
    # Each has the head of a fragment, which is 8 bytes long.
    if offsets[0] != 0 or (np.diff(starts) < 8).any() or starts[-1] + 8 > parser.size:
        raise damaged("its table of offsets makes no sense")
    end = max(stop for _, stop in parser.items(int(starts[-1]), None, explicit=True))
    return starts, np.append(starts[1:], end)


def _joined(chunk: bytes, frame: int) -> bytes:
    """The fragments of a frame without their heads."""
    parts, at = list[bytes](), 0
    while at < len(chunk):
        first = at + 8
        at = first + int.from_bytes(chunk[at + 4 : first], "little")
        if chunk[first - 8 : first - 4] != _ITEM_BYTES or at > len(chunk):
            raise damaged(f"frame {frame} does not lie where its table of offsets says")
        parts.append(chunk[first:at])
    return parts[0] if len(parts) == 1 else b"".join(parts)


def files_of(path: Path) -> list[InstanceFile]:
    """The images of slides in a folder, or of the series that a file is part of; by name.

    Raises DamagedSlideError where a DICOM file of the folder cannot be understood.
    """
    given = None if path.is_dir() else _instance(path)
    folder = path if given is None else path.parent
    found = []
    for entry in sorted(folder.iterdir()):
        file = given if given is not None and entry.name == path.name else None
        if file is None and not entry.name.startswith(".") and is_dicom(entry):
            file = _instance(entry)
        if file is not None and file.is_slide:
            found.append(file)
        if len(found) > _MOST_FILES:
            raise UnsupportedSlideError(
                f"there are more than {_MOST_FILES} DICOM files beside each other; put those of a"
                " slide into a folder of their own"
            )
    if given is not None:
        found = [file for file in found if given.is_slide and series_of(file) == series_of(given)]
    return found


def series_below(folder: Path) -> list[Path]:
    """A path for each DICOM slide in a folder and the folders below it; by names in ".dcm".

    That is the folder that it is alone in, or the first file of its levels where a folder holds
    several. A folder whose files cannot be understood is one as well: opening it says why.
    """
    found = list[Path]()
    for place in sorted({file.parent for file in folder.rglob("*.[dD][cC][mM]")}):
        slides: dict[str, Path] = {}
        try:
            for file in files_of(place):
                if kind(file.head) == VOLUME:
                    slides.setdefault(series_of(file), file.path)
        except (SlideError, OSError):
            slides = {"": place}
        found += [place] if len(slides) == 1 else slides.values()
    return found


def series_of(file: InstanceFile) -> str:
    """The identity of the series of a file."""
    return text(file.head, "SeriesInstanceUID")


def open_series(path: Path, region: int | None = None) -> DicomReader:
    """The reader of a scan: of a folder, or of the series that a file is part of.

    Raises SlideErrors for what cannot be read, and SeveralScansError where one must be chosen.
    """
    try:
        try:
            return DicomReader(files_of(path), region)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise SlideError(f"it cannot be read: {reason}; check its rights") from None
    except XmagError as error:
        named = type(error)(f"{path.name}: {error}")
        vars(named).update(vars(error))
        raise named from None


def is_dicom(path: Path) -> bool:
    """Whether a file begins as DICOM does."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(_START)[_START - 4 :] == b"DICM"
    except OSError:
        return False


def is_dicom_folder(path: Path) -> bool:
    """Whether a path is a folder with a DICOM file in it."""
    try:
        return path.is_dir() and any(map(is_dicom, path.iterdir()))
    except OSError:
        return False


def _instance(path: Path) -> InstanceFile:
    try:
        return InstanceFile(path)
    except SlideError as error:
        raise type(error)(f"{path.name}: {error}") from None
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise SlideError(f"{path.name} cannot be opened: {reason}; check its rights") from None
