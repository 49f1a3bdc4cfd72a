"""Checks of coded pixels and sizes before a decoder takes them: the wall against damaged files.

Decoders make pixels of whatever bits they get, take memory for whatever size a stream says it has,
and time for whatever it asks for. What a TIFF says of itself is checked in `directories`.
"""

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from xmag.errors import DamagedSlideError
from xmag.slide.reader import Level

LOST_BYTES = 512
"""A sector: so many zeros in a row are not in coded pixels, but in files that were copied badly."""

_LEAST_BYTES = 64
"""Fewer zeros are let pass, whatever the tables say: a sector is eight times as long."""

_SOI, _EOI, _SCAN = b"\xff\xd8", b"\xff\xd9", b"\xff\xda"
_DHT, _SOS = 0xC4, 0xDA
_SEQUENTIAL = (0xC0, 0xC1)
_NO_FRAMES = (_DHT, 0xC8, 0xCC)
BLANK, _ZERO_RUN = 0x00, 0xF0
"""The symbol of no difference in DC, and of the end of a block in AC; and of 16 zeros in AC."""
_MAX_SCANS = 200
"""Of a JPEG; progressive ones have some ten, and each is a pass over all pixels."""
_EACH_SCAN = re.compile(_SCAN)
"""bytes.count takes four times as long."""
_COEFFICIENTS = 63
"""Of a block, without the first, which has codes of its own."""

_J2K_COD, _J2K_SOD, _J2K_EOC = b"\xff\x52", b"\xff\x93", b"\xff\xd9"
_J2K_LEVELS, _J2K_PRECINCTS = 9, 14
"""Offsets in COD of the wavelet levels, and of the sizes of precincts where it lists them."""
_J2K_SIZ_END = 42
_J2K_NO_PACKET = re.compile(rb"\xff[\x90-\xff]")
_J2K_MAX_TILES = 4096
_J2K_MAX_COMPONENTS = 4
_J2K_CHROMA_STEPS = {(1, 1), (2, 1), (2, 2)}
"""Chroma subsampling factors (x, y) that OpenJPEG converts to RGB."""
_J2K_MOST_ZEROS, _J2K_SPARE_ZEROS = 4096, 128

_WEBP_ZEROS = 8
"""A WebP ends in fewer: what pads the last bits, and a byte to make the length even."""

_MAX_SIDE = 1 << 32
"""px; TIFF counts no further."""


def damaged(seen: str) -> DamagedSlideError:
    """The error for what was seen in a file, with its remedy."""
    return DamagedSlideError(f"{seen}; it is truncated or damaged: copy it again")


def check_level(number: int, level: Level) -> None:
    """Raise DamagedSlideError where the sizes of a level make no sense."""
    sides = (*level.size, *level.stored, *(abs(o) + 1 for o in level.origin))
    if not (
        all(0 < side < _MAX_SIDE for side in sides)
        and math.isfinite(level.downsample)
        and level.downsample >= 1
    ):
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
    has_one_scan, zeros = scan_facts(stream[:start])
    if not has_one_scan:
        check_scans(stream)
    check_codes(stream, start, zeros)


def check_codes(stream: bytes, start: int, zeros: bytes) -> None:
    """Raise DamagedSlideError where the codes of a JPEG, from `start`, hold so many zeros."""
    at = stream.find(zeros, start)
    while at >= 0 and _is_of_dc(stream, at):
        following = stream.find(_SCAN, at)
        at = stream.find(zeros, following) if following >= 0 else -1
    # Some writers pad tiles behind their end.
    if at >= 0 and stream.find(_EOI, start, at) < 0:
        raise _lost("JPEG", len(zeros))


def check_scans(stream: bytes) -> None:
    """Raise DamagedSlideError where a JPEG has so many scans that it was made to take for ever."""
    scans = len(_EACH_SCAN.findall(stream))
    if scans > _MAX_SCANS:
        raise DamagedSlideError(f"its JPEG has {scans} scans; expected at most {_MAX_SCANS}")


def _is_of_dc(stream: bytes, at: int) -> bool:
    """Whether a place lies in a scan of the DC alone: that has any number of zeros (T.81, G)."""
    scan = stream.rfind(_SCAN, 0, at)
    end = scan + 2 + int.from_bytes(stream[scan + 2 : scan + 4], "big")
    return stream[end - 3 : end - 1] == b"\0\0"  # from the first to the first coefficient


def end_of_header(stream: bytes) -> int:
    """Offset at which the data of the first scan begin; the end where there are none."""
    at = len(_SOI)
    while stream[at : at + 1] == b"\xff":
        marker = stream[at + 1 : at + 2]
        if marker == b"\xff":  # markers may have more than one 0xFF before them
            at += 1
            continue
        at += 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
        if marker == _SCAN[1:]:
            return at
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
    def has_one_scan(self) -> bool:
        """Whether decoders take no second scan: the first has all components, and all of each."""
        return self.frame in _SEQUENTIAL and self.tables.keys() == self.sampling.keys()

    @property
    def mcus(self) -> tuple[int, int]:
        """MCUs of all components together, across and down."""
        across, down = (max(steps) for steps in zip(*self.sampling.values(), strict=True))
        if len(self.sampling) == 1:
            across = down = 1
        return -(-self.size[0] // (8 * across)), -(-self.size[1] // (8 * down))


def unexplained_zeros(header: bytes) -> bytes:
    """As many zeros as no encoder writes in a row after this header."""
    return scan_facts(header)[1]


@lru_cache(maxsize=256)
def scan_facts(header: bytes) -> tuple[bool, bytes]:
    """(whether decoders take no scan but the first, zeros that no encoder writes after it)."""
    has_one_scan, bits = False, None
    try:
        found = parse_header(header)
        has_one_scan = found.has_one_scan
        bits = _most_zero_bits(found)
    except (LookupError, ValueError, ArithmeticError):
        pass  # the decoder says what is wrong with it
    # One byte more for the rest of a byte, and one for the zero that follows each 0xFF.
    return has_one_scan, bytes(LOST_BYTES if bits is None else max(_LEAST_BYTES, bits // 8 + 2))


def _most_zero_bits(header: Header) -> int | None:
    """Most zero bits in a row that the tables explain; None where they alone cannot tell.

    Zeros are the first code of each table again and again. A block of them is either blank (no step
    in DC, end of block), of which a flat image has any number; or a flat one a step darker, of
    which there may be a row, but no more, as they would get darker and darker; or has the same
    value in each coefficient, which no image gives. Of the last there is never a whole one.
    """
    if not header.has_one_scan:
        return None
    one = len(header.sampling) == 1
    total, longest, steps = 0, 0, 0
    for component, (dc, ac) in header.tables.items():
        across, down = header.sampling[component]
        blocks = 1 if one else across * down
        length, step = _first_code(header.codes[dc])
        more, is_flat = _zero_coefficients(_first_code(header.codes[0x10 | ac]))
        bits = length + step + more
        total += blocks * bits
        steps += step if is_flat else 0
        longest = max(longest, 0 if is_flat else bits)
    if longest:
        return total + longest
    columns, rows = header.mcus
    return total * (columns + 1 if steps else columns * rows)


def _zero_coefficients(first_code: tuple[int, int]) -> tuple[int, bool]:
    """Bits of the coefficients of a block of zeros, and whether they are the end of the block."""
    length, symbol = first_code
    if symbol == BLANK:
        return length, True
    skipped, size = symbol >> 4, symbol & 0xF
    codes = -(-_COEFFICIENTS // (skipped + 1)) if size or symbol == _ZERO_RUN else 1
    return codes * (length + size), False


def parse_header(header: bytes) -> Header:
    """A parsed header. Raises LookupError where it ends too early."""
    found, at = Header(), len(_SOI)
    while at < len(header):
        marker = header[at + 1]
        if marker == 0xFF:
            at += 1
            continue
        found.markers.append(marker)
        end = at + 2 + int.from_bytes(header[at + 2 : at + 4], "big")
        part = header[at + 4 : end]
        if marker == _DHT:
            found.codes |= _codes(part)
        elif marker == _SOS:
            for n in range(1, 1 + 2 * part[0], 2):
                found.tables[part[n]] = (part[n + 1] >> 4, part[n + 1] & 0xF)
        elif 0xC0 <= marker <= 0xCF and marker not in _NO_FRAMES:
            found.frame, found.frame_at = marker, at
            height, width = (int.from_bytes(part[n : n + 2], "big") for n in (1, 3))
            found.size = (width, height)
            for n in range(6, 6 + 3 * part[5], 3):
                found.sampling[part[n]] = (part[n + 1] >> 4, part[n + 1] & 0xF)
        at = end
    return found


def _codes(part: bytes) -> Mapping[int, dict[int, tuple[int, int]]]:
    """(length, code) by table and symbol in a DHT segment, in their order; T.81, annex C."""
    found: dict[int, dict[int, tuple[int, int]]] = {}
    at = 0
    while at < len(part):
        table: dict[int, tuple[int, int]] = {}
        code, symbols = 0, at + 17
        counts = part[at + 1 : symbols]
        for length, count in enumerate(counts, 1):
            for symbol in part[symbols : symbols + count]:
                table.setdefault(symbol, (length, code))
                code += 1
            symbols += count
            code <<= 1
        if not table:
            break
        found[part[at]] = table
        at = symbols
    return found


def _first_code(table: Mapping[int, tuple[int, int]]) -> tuple[int, int]:
    """(length, symbol) of the code of a table that is all zeros."""
    symbol, (length, _) = next(iter(table.items()))
    return length, symbol


def check_jpeg2000_size(stream: bytes, size: tuple[int, int]) -> None:
    """Raise DamagedSlideError where a stream says that it is more than a tile of `size` can be.

    OpenJPEG takes memory for what it says.
    """
    if len(stream) < _J2K_SIZ_END:
        raise DamagedSlideError("its JPEG 2000 stream is truncated")
    x, y, left, top, tile_x, tile_y, tile_left, tile_top, count = struct.unpack_from(
        ">8IH", stream, 8
    )
    width, height = x - left, y - top
    fits = 0 < width <= size[0] and 0 < height <= size[1] and 0 < count <= _J2K_MAX_COMPONENTS
    if not (fits and tile_x and tile_y):
        raise DamagedSlideError(
            f"its JPEG 2000 is {width}x{height} px of {count} components in tiles of"
            f" {tile_x}x{tile_y} px, the tile {size[0]}x{size[1]} px"
        )
    if len(stream) < _J2K_SIZ_END + 3 * count:
        raise DamagedSlideError("its JPEG 2000 stream is truncated")
    steps = [
        tuple(stream[at + 1 : at + 3]) for at in range(_J2K_SIZ_END, _J2K_SIZ_END + 3 * count, 3)
    ]
    chroma = steps[1:3]
    if (
        {steps[0], *steps[3:]} != {(1, 1)}
        or len(set(chroma)) > 1
        or set(chroma) - _J2K_CHROMA_STEPS
    ):
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
    end = stream.rfind(_J2K_EOC)
    if start < 0:
        raise DamagedSlideError("its JPEG 2000 stream holds no data")
    most = _most_zeros(stream[:start])
    if _J2K_NO_PACKET.search(stream, start + 2, end) and stream.count(_J2K_SOD) == 1:
        raise DamagedSlideError("its JPEG 2000 stream holds markers where there are none")
    if stream.find(bytes(most), start, end) >= 0:
        raise _lost("JPEG 2000 stream", most)


def _most_zeros(header: bytes) -> int:
    """Longest run of zeros that is allowed: one a packet, and some; ISO/IEC 15444-1, A.6.1, B.6."""
    cod = header.find(_J2K_COD, 4)
    if cod < 0 or len(header) < cod + _J2K_PRECINCTS:
        return _J2K_MOST_ZEROS
    width, height = struct.unpack_from(">2I", header, 8)
    layers = int.from_bytes(header[cod + 6 : cod + 8], "big")
    levels, sizes = header[cod + _J2K_LEVELS], header[cod + _J2K_PRECINCTS :]
    precincts = 0
    for resolution in range(levels + 1):
        size = sizes[resolution] if header[cod + 4] & 1 and sizes[resolution:] else 255
        shrink = levels - resolution
        across, down = (
            -(-side // (1 << shrink + exponent))
            for side, exponent in ((width, size & 15), (height, size >> 4))
        )
        precincts += across * down
    packets = layers * precincts * _J2K_MAX_COMPONENTS
    return min(packets + _J2K_SPARE_ZEROS, _J2K_MOST_ZEROS)


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
    # It ends without a marker, and says itself where; what follows pads.
    if data[: 8 + int.from_bytes(data[4:8], "little")].endswith(bytes(_WEBP_ZEROS)):
        raise DamagedSlideError("its WebP ends in zeros, as where bytes were lost")
