"""DICOM files: the attributes that pixels need, the frames in a file, the files of a slide.

pydicom would take the memory that a length claims, and warns, with the value in its warning, of
what ordinary slides hold; only settings of the whole process keep it from that. This parser goes
from tag to tag, and reads no value that is not asked for (DICOM PS3.5, sections 7 and A.4).
"""

import os
import re
import struct
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from xmag.errors import SlideError, UnsupportedSlideError
from xmag.slide.dicom import SERIES, VOLUME, Attributes, DicomReader, kind, text
from xmag.slide.integrity import damaged, named
from xmag.slide.tiff import LocalSource

WANTED: dict[int, tuple[str, str]] = {
    0x0002_0002: ("MediaStorageSOPClassUID", "text"),
    0x0002_0010: ("TransferSyntaxUID", "text"),
    0x0008_0008: ("ImageType", "text"),
    0x0008_0018: ("SOPInstanceUID", "text"),
    0x0008_0019: ("PyramidUID", "text"),
    0x0008_0100: ("CodeValue", "text"),
    0x0008_3002: ("AvailableTransferSyntaxUID", "text"),
    0x0020_000E: (SERIES, "text"),
    0x0020_0052: ("FrameOfReferenceUID", "text"),
    0x0020_9161: ("ConcatenationUID", "text"),
    0x0020_9163: ("InConcatenationTotalNumber", "<u2"),
    0x0020_9228: ("ConcatenationFrameOffsetNumber", "<u4"),
    0x0020_9311: ("DimensionOrganizationType", "text"),
    0x0022_0016: ("IlluminationTypeCodeSequence", "items"),
    0x0028_0002: ("SamplesPerPixel", "<u2"),
    0x0028_0004: ("PhotometricInterpretation", "text"),
    0x0028_0006: ("PlanarConfiguration", "<u2"),
    0x0028_0008: ("NumberOfFrames", "text"),
    0x0028_0010: ("Rows", "<u2"),
    0x0028_0011: ("Columns", "<u2"),
    0x0028_0030: ("PixelSpacing", "text"),
    0x0028_0100: ("BitsAllocated", "<u2"),
    0x0028_9110: ("PixelMeasuresSequence", "items"),
    0x0048_0006: ("TotalPixelMatrixColumns", "<u4"),
    0x0048_0007: ("TotalPixelMatrixRows", "<u4"),
    0x0048_0105: ("OpticalPathSequence", "items"),
    0x0048_0112: ("ObjectiveLensPower", "text"),
    0x0048_0302: ("NumberOfOpticalPaths", "<u4"),
    0x0048_0303: ("TotalPixelMatrixFocalPlanes", "<u4"),
    0x5200_9229: ("SharedFunctionalGroupsSequence", "items"),
    0x5200_9230: ("PerFrameFunctionalGroupsSequence", "place"),
    0x7FE0_0001: ("ExtendedOffsetTable", "<u8"),
    0x7FE0_0010: ("PixelData", "place"),
}
"""Keyword and kind of value of the attributes that are read, by tag; "place" is where it lies."""
_GROUP_LENGTH, _END_OF_HEAD, _PIXELS = 0x0002_0000, 0x0020_0053, 0x7FE0_0000
"""Tags: the length of the meta information, the end of what tells which files belong together, and
the begin of pixels and their tables."""
_ITEM, _ENDS, _ITEM_BYTES = 0xFFFE_E000, (0xFFFE_E00D, 0xFFFE_E0DD), b"\xfe\xff\x00\xe0"
_LONG = {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"}
"""Value representations with a length of four bytes."""
TEXTS = {
    b"AE", b"AS", b"CS", b"DA", b"DS", b"DT", b"IS", b"LO", b"LT", b"PN", b"SH", b"ST", b"TM",
    b"UC", b"UI", b"UR", b"UT",
}  # fmt: skip
_START = 132
"""Bytes before the first attribute: a preamble, and "DICM"."""
_IMPLICIT = "1.2.840.10008.1.2"
_ENCODED = {"1.2.840.10008.1.2.1.99": "deflated", "1.2.840.10008.1.2.2": "big-endian"}
_WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
_POSITION, _IMPLICIT_POSITION = (
    re.compile(rb"H\0\x1e\x02%b(.{4})H\0\x1f\x02%b(.{4})" % (head, head), re.DOTALL)
    for head in (rb"SL\x04\0", rb"\x04\0\0\0")
)
"""Column and row of a frame, which stand side by side: a walk over the groups of all frames of a
large slide would take many seconds."""
_DEEPEST = 16
"""Sequences within each other; those of slides are at most six deep."""
_DEEPEST_WANTED = 2
_MOST_ITEMS = 64
_MOST_VALUE_BYTES = 1 << 16
_MOST_TABLE_BYTES = 1 << 25
_MOST_FRAMES_BYTES = 1 << 28
"""Bytes of the groups of all frames; each has some 300."""
_MOST_FILES = 20_000

_Element = tuple[int, bytes, int, int | None]
"""Tag, value representation, start of the value, its length or None."""


class _Parser:
    """A walk over the attributes of an open file, from tag to tag."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.size = file, file.seek(0, 2)

    def read(self, at: int, length: int) -> bytes:
        """So many bytes; DamagedSlideError where the file ends before."""
        self._file.seek(at)
        data = self._file.read(length) if at + length <= self.size else b""
        if len(data) != length:
            raise damaged(f"its attributes go on at byte {at}, and it ends at {self.size}")
        return data

    def element(self, at: int, explicit: bool) -> _Element:
        head = self.read(at, 8)
        group, number, length = struct.unpack("<HHI", head)
        representation, start = head[4:6], at + 8
        if group == 0xFFFE or not explicit:
            representation = b""
        elif representation in _LONG:
            length, start = int.from_bytes(self.read(start, 4), "little"), start + 4
        elif representation.isalpha() and representation.isupper():
            length >>= 16
        else:
            raise damaged(f"its attributes make no sense at byte {at}")
        return group << 16 | number, representation, start, None if length == 0xFFFFFFFF else length

    def _end(self, at: int, explicit: bool) -> int:
        """End of what has no length, and of all that lies in it."""
        around = [explicit]
        while around:
            tag, representation, start, length = self.element(at, around[-1])
            at = start + (length or 0)
            if tag in _ENDS:
                around.pop()
            elif length is None:
                around.append(around[-1] and representation != b"UN")
            if len(around) > _DEEPEST:
                raise damaged(f"its attributes lie more than {_DEEPEST} deep within each other")
        return at

    def elements(self, at: int, end: int | None, explicit: bool) -> Iterator[_Element]:
        """The elements up to `end`, or to the mark of an item's end."""
        while at < (self.size if end is None else end):
            tag, representation, start, length = self.element(at, explicit)
            if tag in _ENDS:
                return
            yield tag, representation, start, length
            inner = explicit and representation != b"UN"
            at = self._end(start, inner) if length is None else start + length

    def items(self, at: int, end: int | None, explicit: bool) -> Iterator[tuple[int, int]]:
        """(start, end) of the items of a sequence that begins at `at`."""
        while end is None or at < end:
            tag, _, start, length = self.element(at, explicit)
            if tag in _ENDS:
                return
            if tag != _ITEM:
                raise damaged(f"a sequence of its attributes holds no item at byte {at}")
            at = self._end(start, explicit) if length is None else start + length
            yield start, at

    def attributes(
        self, at: int, end: int | None, explicit: bool, *, stop: int = 1 << 32, depth: int = 0
    ) -> dict[str, Any]:
        """The values of those attributes before the tag `stop` that are wanted."""
        found: dict[str, Any] = {}
        for tag, representation, start, length in self.elements(at, end, explicit):
            if tag >= stop:
                break
            keyword, kind = WANTED.get(tag, ("", ""))
            inner = explicit and representation != b"UN"
            last = None if length is None else start + length
            if kind == "place":
                found[keyword] = (start, last, inner)
            elif kind == "items" and depth < _DEEPEST_WANTED:
                found[keyword] = [
                    self.attributes(*item, inner, depth=depth + 1)
                    for item in islice(self.items(start, last, inner), _MOST_ITEMS)
                ]
            elif kind != "items" and kind:
                most = _MOST_TABLE_BYTES if kind == "<u8" else _MOST_VALUE_BYTES
                if length is None or length > most:
                    raise damaged(f"its {keyword} is {length} bytes long; expected at most {most}")
                found[keyword] = _values(self.read(start, length), kind)
            if keyword == "PixelData":
                break
        return found


def _values(data: bytes, kind: str) -> list[Any]:
    if kind == "text":
        return [part.strip(" \0") for part in data.decode("latin-1").split("\\")]
    whole = len(data) // int(kind[-1]) * int(kind[-1])
    values: list[Any] = np.frombuffer(data[:whole], kind).tolist()
    return values


class InstanceFile:
    """A file of a DICOM slide; more of it than its `head` is read when it is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            self.size = found.st_size
            self.version: str | None = f"{found.st_size} bytes at {found.st_mtime_ns} ns"
            parser = _Parser(file)
            tag, _, at, _ = parser.element(_START, explicit=True)
            if tag != _GROUP_LENGTH:
                raise damaged("it begins like DICOM, and not with its meta information")
            self._start = at + 4 + int.from_bytes(parser.read(at, 4), "little")
            meta = parser.attributes(at + 4, self._start, explicit=True)
            self.syntax = text(meta, "TransferSyntaxUID")
            self._explicit = self.syntax != _IMPLICIT
            self.is_slide = text(meta, "MediaStorageSOPClassUID") == _WHOLE_SLIDE
            if self.is_slide and self.syntax in _ENCODED:
                raise UnsupportedSlideError(
                    f"its attributes are {_ENCODED[self.syntax]}; xmag reads little-endian DICOM."
                    " Convert it to explicit VR little endian"
                )
            self.head: Attributes = {}
            if self.is_slide:
                self.head = parser.attributes(self._start, None, self._explicit, stop=_END_OF_HEAD)
        self._source: LocalSource | None = None

    @cached_property
    def attributes(self) -> Attributes:
        """All attributes that pixels need; those of the first frame as "FirstFrame"."""
        with self.path.open("rb") as file:
            parser = _Parser(file)
            found = parser.attributes(self._start, None, self._explicit)
            if (place := found.get("PerFrameFunctionalGroupsSequence")) is not None:
                first = islice(parser.items(*place), 1)
                found["FirstFrame"] = [parser.attributes(*item, place[2]) for item in first]
            return found

    def positions(self) -> NDArray[np.int64]:
        """(column, row) of each frame in the whole image, from 1; (frames, 2)."""
        start, end, explicit = self.attributes["PerFrameFunctionalGroupsSequence"]
        with self.path.open("rb") as file:
            parser = _Parser(file)
            if end is None:
                end = max((stop for _, stop in parser.items(start, None, explicit)), default=start)
            if end - start > _MOST_FRAMES_BYTES:
                raise damaged(f"what it says of its frames takes {end - start} bytes")
            data = parser.read(start, end - start)
        found = (_POSITION if explicit else _IMPLICIT_POSITION).findall(data)
        return np.frombuffer(b"".join(map(b"".join, found)), "<i4").reshape(-1, 2).astype(np.int64)

    def open(self, frames: int, frame_bytes: int | None) -> None:
        """Find the `frames`; each has `frame_bytes` where pixels are stored as they are."""
        start, end, _ = self.attributes.get("PixelData") or (0, 0, False)
        if frame_bytes is None:
            if end is not None:
                raise damaged("it holds no pixels, or none in fragments")
            with self.path.open("rb") as file:
                table = self.attributes.get("ExtendedOffsetTable") or ()
                self._starts, self._ends = _find_frames(_Parser(file), start, frames, table)
        else:
            if end is None or min(end, self.size) - start < frames * frame_bytes:
                raise damaged(f"its {frames} frames of {frame_bytes} bytes are not there")
            self._starts = start + np.arange(frames, dtype=np.int64) * frame_bytes
            self._ends = self._starts + frame_bytes
        self._in_fragments = frame_bytes is None
        self._source = LocalSource(self.path)

    def read(self, frames: Sequence[int], most: int) -> list[bytes]:
        """The bytes of frames, each at most `most`; DamagedSlideError where they are damaged."""
        starts = self._starts[frames]
        lengths = self._ends[frames] - starts
        if lengths.max(initial=0) > most:
            raise damaged(f"one of its frames has {lengths.max()} bytes; expected at most {most}")
        chunks = self.read_many(list(zip(starts.tolist(), lengths.tolist(), strict=True)))
        return list(map(_joined, chunks, frames)) if self._in_fragments else chunks

    def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of each (offset, length) of the file."""
        assert self._source is not None
        return self._source.read_many(ranges)

    def texts(self) -> Iterator[tuple[int, str]]:
        """All texts of the file by tag, patients' names among them; not where VRs are implicit."""
        with self.path.open("rb") as file:
            parser = _Parser(file)
            for tag, form, start, length in parser.elements(self._start, None, self._explicit):
                if tag >= _PIXELS:
                    break
                if form in TEXTS and length is not None and length <= _MOST_VALUE_BYTES:
                    yield tag, parser.read(start, length).decode("utf-8", "replace").strip(" \0")

    def close(self) -> None:
        """Release the file. Closing twice is fine."""
        if self._source is not None:
            self._source.close()


def _find_frames(
    parser: _Parser, start: int, frames: int, extended: Sequence[int]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(starts, ends) of the fragments of frames, by a table of offsets, or by walking there."""
    tag, _, at, length = parser.element(start, explicit=True)
    if tag != _ITEM or length is None or length > _MOST_TABLE_BYTES:
        raise damaged("its pixels do not begin with a table of offsets")
    base = at + length
    offsets = np.array(extended, "<u8")
    if not len(offsets):
        offsets = np.frombuffer(parser.read(at, length // 4 * 4), "<u4")
    if not len(offsets):
        places = islice(parser.items(base, None, explicit=True), frames + 1)
        offsets = np.array([first - 8 - base for first, _ in places if frames > 1] or [0])
    starts = base + offsets.astype(np.int64)
    # Each begins with the head of a fragment, which is 8 bytes long.
    order = np.diff(np.append(starts, parser.size))
    if len(starts) != frames or starts[0] != base or order.min(initial=8) < 8:
        raise damaged(
            f"it says that it has {frames} frames, and {len(starts)} are in its table of offsets,"
            " or lie there; expected one after the other"
        )
    *_, end = (stop for _, stop in parser.items(int(starts[-1]), None, explicit=True))
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


def is_dicom(path: Path) -> bool:
    """Whether a file begins as DICOM does, or a folder holds such a file."""
    try:
        if path.is_dir():
            return any(not file.is_dir() and is_dicom(file) for file in path.iterdir())
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(_START)[_START - 4 :] == b"DICM"
    except OSError:
        return False


def open_series(path: Path, region: int | None = None) -> DicomReader:
    """The reader of a scan: of a folder, or of the series that a file is part of.

    Raises SlideErrors for what cannot be read, and SeveralScansError where one must be chosen.
    """
    with named(path.name):
        files = _images(path if path.is_dir() else path.parent)
        if path.is_file():
            given = [file for file in files if file.path.name == path.name]
            series = {text(file.head, SERIES) for file in given}
            files = [file for file in files if text(file.head, SERIES) in series]
        return DicomReader(files, region)


def _images(folder: Path) -> list[InstanceFile]:
    """The images of slides in a folder, by name; SlideError where a DICOM file is damaged."""
    found = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.is_dir():
            continue
        if not is_dicom(path):
            # Without it, a slide would have other levels.
            if path.suffix.lower() == ".dcm":
                raise damaged(f"{path.name} does not begin as DICOM files do")
            continue
        with named(path.name):
            file = InstanceFile(path)
        if file.is_slide:
            found.append(file)
        if len(found) > _MOST_FILES:
            raise UnsupportedSlideError(
                f"more than {_MOST_FILES} DICOM files lie there; give each slide a folder"
            )
    return found


def series_below(folder: Path) -> list[Path]:
    """A path for each DICOM slide in a folder and those below it, of files called ".dcm".

    That is the folder in which it is alone, or the first file of its levels where there are
    several. A folder whose files are damaged is one as well: opening it says why.
    """
    found = list[Path]()
    for place in sorted({file.parent for file in folder.rglob("*.[dD][cC][mM]")}):
        slides: dict[str, Path] = {}
        try:
            for file in _images(place):
                if kind(file.head) == VOLUME:
                    slides.setdefault(text(file.head, SERIES), file.path)
        except (SlideError, OSError):
            slides = {"": place}
        found += [place] if len(slides) == 1 else slides.values()
    return found
