"""Signs of lost bytes in coded pixels, for decoders that make pixels of whatever bits they get."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from xmag.errors import DamagedSlideError

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
    header = stream[:start]
    if not _has_one_scan(header):
        check_scans(stream)
    if start >= len(stream):
        return  # the decoder says what is wrong with it
    zeros = unexplained_zeros(header)
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


@lru_cache(maxsize=256)
def _has_one_scan(header: bytes) -> bool:
    """Whether decoders take no second scan: the first has all components, and all of each."""
    try:
        found = parse_header(header)
    except (LookupError, ValueError, ArithmeticError):
        return False
    return found.frame in _SEQUENTIAL and found.tables.keys() == found.sampling.keys()


def _is_of_dc(stream: bytes, at: int) -> bool:
    """Whether a place lies in a scan of the DC alone, as progressive JPEGs have (T.81, annex G).

    That may be a bit a block: it has any number of zeros where the image is flat.
    """
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
    def mcus(self) -> tuple[int, int]:
        """MCUs of all components together, across and down."""
        across, down = (max(steps) for steps in zip(*self.sampling.values(), strict=True))
        if len(self.sampling) == 1:
            across = down = 1
        return -(-self.size[0] // (8 * across)), -(-self.size[1] // (8 * down))


@lru_cache(maxsize=256)
def unexplained_zeros(header: bytes) -> bytes:
    """As many zeros as no encoder writes in a row after this header."""
    try:
        found = parse_header(header)
        bits = _most_zero_bits(found)
    except (LookupError, ValueError, ArithmeticError):  # the decoder says what is wrong with it
        bits = None
    # One byte more for the rest of a byte, and one for the zero that follows each 0xFF.
    return bytes(LOST_BYTES if bits is None else max(_LEAST_BYTES, bits // 8 + 2))


def _most_zero_bits(header: Header) -> int | None:
    """Most zero bits in a row that the tables explain; None where they alone cannot tell.

    Zeros are the first code of each table again and again. A block of them is either blank (no step
    in DC, end of block), of which a flat image has any number; or a flat one a step darker, of
    which there may be a row, but no more, as they would get darker and darker; or has the same
    value in each coefficient, which no image gives. Of the last there is never a whole one.
    """
    if header.frame not in _SEQUENTIAL or header.tables.keys() != header.sampling.keys():
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
    """(length, code) of each symbol of the tables in a DHT segment, in the order of codes.

    By class and number of the table; ITU-T T.81, annex C.
    """
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
