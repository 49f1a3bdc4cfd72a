"""Checks of coded pixels and sizes before a decoder takes them: the wall against damaged files.

Decoders make pixels of whatever bits they get, take memory for whatever size a stream says it has,
and time for whatever it asks for. What a TIFF says of itself is checked in `directories`.
"""

import math
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache

from xmag.errors import DamagedSlideError, XmagError
from xmag.slide.reader import Level

MAX_TILES = 1 << 22
"""Most tiles of one level: 240 Gpx in tiles of 240 px."""
MAX_LEVEL_PX = 1 << 40
"""A square of a million px; the largest scans are a tenth of that."""
LOST_BYTES = 512
"""A sector: so many zeros in a row are not in coded pixels, but in files that were copied badly."""
_LEAST_BYTES = 64
"""Fewer zeros are let pass, whatever the tables say: a sector is eight times as long."""

_DHT, SOS = 0xC4, 0xDA
FRAMES = frozenset(range(0xC0, 0xD0)) - {_DHT, 0xC8, 0xCC}
"""Markers of the segments of a JPEG that say how large it is, and of which components."""
_SCAN = b"\xff\xda"
_EACH_SCAN = re.compile(_SCAN)
"""bytes.count takes four times as long."""
_MAX_SCANS = 200
"""Of a JPEG; progressive ones have some ten, and each is a pass over all pixels."""
BLANK, _ZERO_RUN = 0x00, 0xF0
"""The symbol of no difference in DC, and of the end of a block in AC; and of 16 zeros in AC."""

_J2K_COD, _J2K_SOD = b"\xff\x52", b"\xff\x93"
_J2K_SIZ_END = 42
_J2K_NO_PACKET = re.compile(rb"\xff[\x90-\xff]")
_J2K_MAX_TILES = 4096
_J2K_MAX_COMPONENTS = 4
_J2K_CHROMA_STEPS = ((1, 1), (2, 1), (2, 2))
"""Chroma subsampling factors (x, y) that OpenJPEG converts to RGB."""
_J2K_MOST_ZEROS = 4096

_JXL_BOXES = b"\0\0\0\x0cJXL \r\n\x87\n"
_JXL_RATIOS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))
_JXL_HEADER_BYTES = 64
"""More than what is read of a header takes."""


def damaged(seen: str) -> DamagedSlideError:
    """The error for what was seen in a file, with its remedy."""
    return DamagedSlideError(f"{seen}; it is truncated or damaged: copy it again")


@contextmanager
def named(name: str) -> Iterator[None]:
    """Put a name before the errors of a file."""
    try:
        yield
    except XmagError as error:
        again = type(error)(f"{name}: {error}")
        vars(again).update(vars(error))
        raise again from error.__cause__


def check_level(number: int, level: Level) -> None:
    """Raise DamagedSlideError where the sizes of a level make no sense."""
    sides = (*level.size, *level.stored, *(abs(o) + 1 for o in level.origin))
    # TIFF counts no further.
    if not (all(0 < side < 1 << 32 for side in sides) and 1 <= level.downsample < math.inf):
        raise damaged(
            f"level {number} is {level.size[0]}x{level.size[1]} px,"
            f" {level.stored[0]}x{level.stored[1]} px of it stored at {level.origin},"
            f" {level.downsample:g} times smaller than the first"
        )


def check_zeros(data: bytes, coding: str) -> None:
    """Raise DamagedSlideError where a sector of zeros lies in data that a coding would not leave.

    Zeros in pixels are what any coding makes less of.
    """
    if bytes(LOST_BYTES) in data:
        raise _lost(coding, LOST_BYTES)


def _lost(coding: str, count: int) -> DamagedSlideError:
    return DamagedSlideError(
        f"its {coding} has a stretch of {count} zeros, as where bytes were lost"
    )


def check_jpeg(stream: bytes) -> None:
    """Raise DamagedSlideError where a JPEG holds more zeros in a row than its tables explain.

    Or too many scans. Zeros are codes like others, so that a lost sector becomes some blocks of
    wrong pixels, and all that follows is shifted. Costs a walk over the header, and a search of a
    microsecond or two.
    """
    start = end_of_header(stream)
    has_one_scan, zeros = limits(stream[:start])
    if not has_one_scan:
        check_scans(stream)
    check_codes(stream, start, zeros)


def check_codes(stream: bytes, start: int, zeros: bytes) -> None:
    """Raise DamagedSlideError where the codes of a JPEG, from `start`, hold so many zeros."""
    at = stream.find(zeros, start)
    while at >= 0:
        scan = stream.rfind(_SCAN, 0, at)
        end = scan + 2 + int.from_bytes(stream[scan + 2 : scan + 4], "big")
        # A scan of the first coefficient alone has any number of zeros (ITU-T T.81, G).
        if stream[end - 3 : end - 1] != b"\0\0":
            break
        following = stream.find(_SCAN, at)
        at = stream.find(zeros, following) if following >= 0 else -1
    # Some writers pad tiles behind their end.
    if at >= 0 and stream.find(b"\xff\xd9", start, at) < 0:
        raise _lost("JPEG", len(zeros))


def check_scans(stream: bytes) -> None:
    """Raise DamagedSlideError where a JPEG has so many scans that it was made to take for ever."""
    scans = len(_EACH_SCAN.findall(stream))
    if scans > _MAX_SCANS:
        raise DamagedSlideError(f"its JPEG has {scans} scans; expected at most {_MAX_SCANS}")


def segments(stream: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start, end) of each segment in the header of a JPEG or a JPEG 2000 stream."""
    at = 2
    while stream[at : at + 1] == b"\xff" and at + 1 < len(stream):
        marker = stream[at + 1]
        if marker == 0xFF:  # markers may have more than one 0xFF before them
            at += 1
            continue
        end = at + 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
        yield marker, at, end
        if marker == SOS:
            return
        at = end


def end_of_header(stream: bytes) -> int:
    """Offset at which the data of the first scan begin; the end where there are none."""
    for marker, _, end in segments(stream):
        if marker == SOS:
            return end
    return len(stream)


@dataclass(slots=True)
class Header:
    """Frame, size and Huffman codes of a JPEG, from its header; ITU-T T.81, annex B.2.

    `markers` are those of its segments, and `frame_at` is where the frame's begins. `codes` are
    (length, code) of each symbol, by class and number of the table, in the order of codes.
    `sampling` are the blocks of each component in an MCU, across and down, and `tables` the
    numbers of its tables in the first scan, DC and AC.
    """

    markers: list[int] = field(default_factory=list)
    frame: int = 0
    frame_at: int = 0
    size: tuple[int, int] = (0, 0)
    codes: dict[int, dict[int, tuple[int, int]]] = field(default_factory=dict)
    sampling: dict[int, tuple[int, int]] = field(default_factory=dict)
    tables: dict[int, tuple[int, int]] = field(default_factory=dict)

    @property
    def mcus(self) -> tuple[int, int]:
        """MCUs of all components together, across and down."""
        across, down = (max(steps) for steps in zip(*self.sampling.values(), strict=True))
        if len(self.sampling) == 1:
            across = down = 1
        return -(-self.size[0] // (8 * across)), -(-self.size[1] // (8 * down))


def parse_header(header: bytes) -> Header:
    """A parsed header. Raises LookupError where a segment of it ends too early."""
    found = Header()
    for marker, at, end in segments(header):
        found.markers.append(marker)
        part = header[at + 4 : end]
        if marker == _DHT:
            _read_codes(part, found.codes)
        elif marker == SOS:
            for n in range(1, 1 + 2 * part[0], 2):
                found.tables[part[n]] = (part[n + 1] >> 4, part[n + 1] & 0xF)
        elif marker in FRAMES:
            found.frame, found.frame_at = marker, at
            found.size = (int.from_bytes(part[3:5], "big"), int.from_bytes(part[1:3], "big"))
            for n in range(6, 6 + 3 * part[5], 3):
                found.sampling[part[n]] = (part[n + 1] >> 4, part[n + 1] & 0xF)
    return found


def _read_codes(part: bytes, found: dict[int, dict[int, tuple[int, int]]]) -> None:
    """Add (length, code) by table and symbol of a DHT segment, in their order; T.81, annex C."""
    at = 0
    while at < len(part):
        table: dict[int, tuple[int, int]] = {}
        code, symbols = 0, at + 17
        for length, count in enumerate(part[at + 1 : at + 17], 1):
            for symbol in part[symbols : symbols + count]:
                table.setdefault(symbol, (length, code))
                code += 1
            symbols += count
            code <<= 1
        if not table:
            break
        found[part[at]] = table
        at = symbols


@lru_cache(maxsize=256)
def limits(header: bytes) -> tuple[bool, bytes]:
    """(whether decoders take no scan but the first, zeros that no encoder writes in a row)."""
    has_one_scan, bits = False, None
    try:
        found = parse_header(header)
        # The first has all components, and all of each.
        has_one_scan = found.frame in (0xC0, 0xC1) and found.tables.keys() == found.sampling.keys()
        bits = _most_zero_bits(found) if has_one_scan else None
    except (LookupError, ValueError, ArithmeticError):
        pass  # the decoder says what is wrong with it
    # One byte more for the rest of a byte, and one for the zero that follows each 0xFF.
    return has_one_scan, bytes(LOST_BYTES if bits is None else max(_LEAST_BYTES, bits // 8 + 2))


def _most_zero_bits(header: Header) -> int:
    """Most zero bits in a row that the tables of a JPEG of one scan explain.

    Zeros are the first code of each table again and again. A block of them is either blank (no step
    in DC, end of block), of which a flat image has any number; or a flat one a step darker, of
    which there may be a row, but no more, as they would get darker and darker; or has the same
    value in each coefficient, which no image gives. Of the last there is never a whole one.
    """
    total, longest, gets_darker = 0, 0, False
    for component, (dc, ac) in header.tables.items():
        across, down = header.sampling[component]
        step, (length, _) = next(iter(header.codes[dc].items()))
        symbol, (more, _) = next(iter(header.codes[0x10 | ac].items()))
        skipped, size = symbol >> 4, symbol & 0xF
        # 63 coefficients: the first of a block has codes of its own.
        codes = -(-63 // (skipped + 1)) if size or symbol == _ZERO_RUN else 1
        bits = length + step + codes * (more + size)
        total += bits * (1 if len(header.sampling) == 1 else across * down)
        if symbol != BLANK:
            longest = max(longest, bits)
        elif step:
            gets_darker = True
    if longest:
        return total + longest
    columns, rows = header.mcus
    return total * (columns + 1 if gets_darker else columns * rows)


def check_jpeg2000_size(stream: bytes, size: tuple[int, int]) -> None:
    """Raise DamagedSlideError where a stream says that it is more than a tile of `size` can be.

    OpenJPEG takes memory for what it says.
    """
    count = int.from_bytes(stream[_J2K_SIZ_END - 2 : _J2K_SIZ_END], "big")
    known = min(count, _J2K_MAX_COMPONENTS)
    if len(stream) < _J2K_SIZ_END + 3 * known:
        raise DamagedSlideError("its JPEG 2000 stream is truncated")
    x, y, left, top, tile_x, tile_y, tile_left, tile_top = struct.unpack_from(">8I", stream, 8)
    width, height = x - left, y - top
    fits = 0 < width <= size[0] and 0 < height <= size[1] and 0 < count == known
    if not (fits and tile_x and tile_y):
        raise DamagedSlideError(
            f"its JPEG 2000 is {width}x{height} px of {count} components in tiles of"
            f" {tile_x}x{tile_y} px, the tile {size[0]}x{size[1]} px"
        )
    places = range(_J2K_SIZ_END + 1, _J2K_SIZ_END + 3 * count, 3)
    steps = [(stream[at], stream[at + 1]) for at in places]
    chroma = set(steps[1:3])
    known_chroma = len(chroma) < 2 and chroma.issubset(_J2K_CHROMA_STEPS)
    if {steps[0], *steps[3:]} != {(1, 1)} or not known_chroma:
        raise DamagedSlideError(f"its JPEG 2000 has components with a sample every {steps} px")
    across, down = -(-(x - tile_left) // tile_x), -(-(y - tile_top) // tile_y)
    if not 0 < across * down <= _J2K_MAX_TILES:
        raise DamagedSlideError(
            f"its JPEG 2000 is cut into {across}x{down} tiles; expected at most {_J2K_MAX_TILES}"
        )


def check_jpeg2000(stream: bytes) -> None:
    """Raise DamagedSlideError where a JPEG 2000 stream holds what no encoder writes.

    OpenJPEG decodes whatever it gets. But packets never hold 0xFF before a byte above 0x8F
    (ISO/IEC 15444-1, annex A.3), and long runs of zeros only where packets are empty, a byte each.
    """
    start = stream.find(_J2K_SOD)
    end = stream.rfind(b"\xff\xd9")
    if start < 0:
        raise DamagedSlideError("its JPEG 2000 stream holds no data")
    if _J2K_NO_PACKET.search(stream, start + 2, end) and stream.count(_J2K_SOD) == 1:
        raise DamagedSlideError("its JPEG 2000 stream holds markers where there are none")
    most = _most_zeros(stream[:start])
    if stream.find(bytes(most), start, end) >= 0:
        raise _lost("JPEG 2000 stream", most)


def _most_zeros(header: bytes) -> int:
    """Longest run of zeros that is allowed: one a packet, and some; ISO/IEC 15444-1, A.6.1, B.6."""
    cod = header.find(_J2K_COD, 4)
    if cod < 0 or len(header) < cod + 14:
        return _J2K_MOST_ZEROS
    width, height = struct.unpack_from(">2I", header, 8)
    layers, levels, sizes = int.from_bytes(header[cod + 6 : cod + 8], "big"), header[cod + 9], b""
    if header[cod + 4] & 1:  # it lists the sizes of precincts
        sizes = header[cod + 14 :]
    precincts = 0
    for shrink in range(levels, -1, -1):
        size = sizes[levels - shrink] if sizes[levels - shrink :] else 255
        across = -(-width // (1 << shrink + (size & 15)))
        precincts += across * -(-height // (1 << shrink + (size >> 4)))
    return min(layers * precincts * _J2K_MAX_COMPONENTS + 128, _J2K_MOST_ZEROS)


def check_webp(data: bytes, size: tuple[int, int]) -> None:
    """Raise DamagedSlideError where a WebP is larger than `size`, or ends in zeros.

    Its header is in RFC 9649, sections 2.5 to 2.7.
    """
    kind, width, height = data[12:16], 0, 0
    if kind == b"VP8X":
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
    elif kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif kind == b"VP8 ":
        width, height = (int.from_bytes(data[at : at + 2], "little") & 0x3FFF for at in (26, 28))
    if not (0 < width <= size[0] and 0 < height <= size[1]):
        raise DamagedSlideError(f"its WebP is {width}x{height} px, the tile {size[0]}x{size[1]} px")
    check_zeros(data, "WebP")
    # It ends without a marker, and says itself where; what follows pads. Fewer than 8 zeros pad
    # the last bits, and make the length even.
    if data[: 8 + int.from_bytes(data[4:8], "little")].endswith(bytes(8)):
        raise DamagedSlideError("its WebP ends in zeros, as where bytes were lost")


def jpeg_xl_size(stream: bytes) -> tuple[int, int]:
    """(width, height) that a JPEG XL says it has; ISO/IEC 18181-1, annex D, and -2 for its boxes.

    Raises DamagedSlideError where it is none, or more than one image: animated, with a preview, or
    with more channels than alpha.
    """
    at = 0
    if stream.startswith(_JXL_BOXES):
        while stream[at + 4 : at + 8] not in (b"jxlc", b"jxlp"):
            length = int.from_bytes(stream[at : at + 4], "big")
            if length < 8 or at + length > len(stream):
                raise DamagedSlideError("its JPEG XL holds no image")
            at += length
        at += 12 if stream[at + 4 : at + 8] == b"jxlp" else 8
    if stream[at : at + 2] != b"\xff\x0a":
        raise DamagedSlideError("its bytes do not begin like a JPEG XL")
    header = _Bits(stream[at + 2 : at + 2 + _JXL_HEADER_BYTES])
    size = header.size()
    if not header.take(1):  # all else is as it is by default
        if header.take(1):
            turned = header.take(3)
            if header.take(1):
                header.size()
            if turned or header.take(1) or header.take(1):
                raise DamagedSlideError("its JPEG XL is turned, animated, or has a preview")
        if header.take(1):
            raise DamagedSlideError("its JPEG XL holds floats")
        header.choice((8, 0), (10, 0), (12, 0), (1, 6))  # bits a sample
        header.take(1)  # whether 16 bits are enough to decode it
        if header.choice((0, 0), (1, 0), (2, 4), (1, 12)) > 1:
            raise DamagedSlideError("its JPEG XL has more channels than colours and alpha")
    return size


class _Bits:
    """Bits of a JPEG XL header, the lowest first."""

    def __init__(self, data: bytes) -> None:
        self._value = int.from_bytes(data, "little")

    def take(self, count: int) -> int:
        taken = self._value & (1 << count) - 1
        self._value >>= count
        return taken

    def choice(self, *kinds: tuple[int, int]) -> int:
        """A number of one of four kinds: what is added to it, and its bits."""
        added, bits = kinds[self.take(2)]
        return added + self.take(bits)

    def size(self) -> tuple[int, int]:
        """(width, height); the width may be a ratio of the height."""
        small = self.take(1)
        height = self._side(small)
        ratio = self.take(3)
        if not ratio:
            return self._side(small), height
        across, down = _JXL_RATIOS[ratio - 1]
        return height * across // down, height

    def _side(self, small: int) -> int:
        return 8 * (1 + self.take(5)) if small else self.choice((1, 9), (1, 13), (1, 18), (1, 30))
