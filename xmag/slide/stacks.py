"""Stacks of JPEG tiles: one stream whose image shows several tiles of a level under each other.

One call of the decoder for many tiles costs less, and holds the GIL less, than a call for each.
A tile becomes a restart interval of the stack (ITU-T T.81, E.1.4), so that nothing of a tile's
codes carries over into the next. Equal headers, and sides of whole MCUs, make its pixels equal.

A stack must not decode where one of its tiles alone would not. The decoder warns of what is wrong
within an interval, but bytes left over behind its last MCU, if they are few enough to have been
taken into its bit buffer, are only counted, and named when it next looks for a marker. So a row of
blank MCUs ends the last tile's interval too, and a comment behind it makes the decoder look.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from xmag.slide.integrity import BLANK, SOS, Header, limits, parse_header

_MOST_SIDE = 65_500
"""px that libjpeg takes; JPEG itself counts to 65,535."""
_MOST_BYTES = 1 << 15
"""Of a tile in a stack. Codes take a tenth longer to decode where there are restart intervals,
which is more than what a call of the decoder costs where there are many."""
_RESTARTS = [bytes([0xFF, 0xD0 + n]) for n in range(8)]
_EOI = b"\xff\xd9"
_END = b"\xff\xfe\x00\x02" + _EOI
"""An empty comment, and the end: two markers."""


@dataclass(frozen=True, slots=True)
class Stack:
    """Parts that make one stream of tiles with one header.

    `head` and `foot` are the stream's header before and after its height, in bytes; `height` and
    `mcu_height` are in px. `blank` are the codes of a row of blank MCUs, `zeros` as many zeros as
    no tile has in a row.
    """

    head: bytes
    foot: bytes
    height: int
    mcu_height: int
    blank: bytes
    zeros: bytes

    def join(self, chunks: Sequence[bytes], start: int) -> Iterator[tuple[list[int], bytes, int]]:
        """Stacks of tiles whose header is that of the first, up to `start`, and that are whole.

        (numbers of the tiles, stream, height of its image) each. Left out are tiles that do not end
        as JPEGs do, that hold more zeros in a row than the tables explain, or other markers.
        """
        head, scans = chunks[0][:start], dict[int, memoryview]()
        for number, chunk in enumerate(chunks):
            data = chunk.rstrip(b"\0")  # some writers pad
            is_whole = data.startswith(head) and data.endswith(_EOI)
            if is_whole and len(data) <= _MOST_BYTES and data.find(self.zeros, start) < 0:
                scans[number] = memoryview(data)[start:-2]
        numbers = list(scans)
        most = (_MOST_SIDE - self.mcu_height) // self.height
        for at in range(0, len(numbers), most):
            these = numbers[at : at + most]
            if len(these) == 1:
                continue
            height = len(these) * self.height + self.mcu_height
            header = self.head + height.to_bytes(2, "big") + self.foot
            parts: list[bytes | memoryview] = [header]
            for number, restart in zip(these, itertools.cycle(_RESTARTS)):
                parts += (scans[number], restart)
            stream = b"".join((*parts, self.blank, _END))
            # Without other markers in them. By numpy, which takes a tenth of what a regular
            # expression does, and without the GIL.
            codes = np.frombuffer(stream, np.uint8)[len(header) :]
            follows = codes[np.flatnonzero(codes[:-1] == 0xFF) + 1]
            if np.count_nonzero(follows) == len(these) + 2:
                yield these, stream, height


@lru_cache(maxsize=256)
def stack_of(header: bytes, size: tuple[int, int]) -> Stack | None:
    """The stack for tiles of `size` (width, height) that have this header; None where none can be.

    The header goes from the start of a whole stream to the codes of its first scan.
    """
    try:
        found = parse_header(header)
        blank = _blank_row(found)
    except (LookupError, ValueError, ArithmeticError):
        return None
    if not (_is_plain(header, found) and found.size == size):
        return None
    mcu_height = 8 * max(down for _, down in found.sampling.values())
    across, down = found.mcus
    fits = 2 * size[1] + mcu_height <= _MOST_SIDE and across * down < 1 << 16
    if size[1] % mcu_height or not fits:
        return None
    restart = b"\xff\xdd\x00\x04" + (across * down).to_bytes(2, "big")
    at = found.frame_at + 5
    return Stack(
        head=header[:2] + restart + header[2:at],
        foot=header[at + 2 :],
        height=size[1],
        mcu_height=mcu_height,
        blank=blank,
        zeros=limits(header)[1],
    )


def _is_plain(header: bytes, found: Header) -> bool:
    """Whether a header is that of a baseline colour JPEG in one scan, without restarts."""
    baseline = 0xC0
    others = {marker for marker in found.markers if not 0xE0 <= marker <= 0xEF}
    return (
        found.markers.count(baseline) == 1
        and others <= {baseline, 0xC4, SOS, 0xDB, 0xFE}
        and header[found.frame_at + 4] == 8
        and len(found.sampling) == 3
        and list(found.tables) == list(found.sampling)
        and header[-3:] == b"\x00\x3f\x00"
    )


def _blank_row(found: Header) -> bytes:
    """The codes of a row of MCUs without any coefficient; LookupError where there are none."""
    mcu = ""
    for component, (dc, ac) in found.tables.items():
        across, down = found.sampling[component]
        codes = found.codes[dc][BLANK], found.codes[0x10 | ac][BLANK]
        mcu += "".join(f"{code:0{length}b}" for length, code in codes) * (across * down)
    bits = mcu * found.mcus[0]
    bits += "1" * (-len(bits) % 8)
    return int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\x00")
