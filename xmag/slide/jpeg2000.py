"""JPEG 2000 streams of tiles: colour, and reduced scales that are box averages.

OpenJPEG, as imagecodecs offers it, decodes every resolution of a stream and takes its components
as they are stored. It does what we want when the header says so, and rewriting that costs a
thousandth of the decoding: without its finest wavelet level, a stream is one of half the size.

That half is not an average: the wavelet's low-pass is sharper, and lies half a px further up and
left. Averages at 1/4 can be had from it, on a real slide within 1 grey level of the full tile's.
Averages at 1/2 need the finest level, without which they are 3 grey levels off.
"""

import struct
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from xmag.errors import DamagedSlideError
from xmag.slide.integrity import check_jpeg2000_size
from xmag.slide.reader import Pixels

_SOC, _SIZ, _COD, _QCD = b"\xff\x4f", b"\xff\x51", b"\xff\x52", b"\xff\x5c"
_COM, _SOT, _SOD, _EOC = b"\xff\x64", b"\xff\x90", b"\xff\x93", b"\xff\xd9"
_PROGRESSION, _LAYERS, _TRANSFORM, _LEVELS, _WAVELET = 5, slice(6, 8), 8, 9, 13
"""Offsets in COD of packet order, quality layers, colour transform, wavelet levels and kind."""
_LRCP, _RLCP, _RPCL = 0, 1, 2
_9_7 = 0
_OWN_PRECINCTS = 1

_QUARTER_TAPS = np.array([-0.0372, 0.3894, 0.5600, 0.1106, -0.0228], np.float32)
"""Weights of px 2i-1 to 2i+3 at 1/2 in the average of px 4i to 4i+3 of the full tile.

That is a 9/7 synthesis step (ISO/IEC 15444-1, annex F) with the finer bands zero, then the mean.
"""


def decode(
    stream: bytes, *, size: tuple[int, int], ycbcr: bool, rounded: bool = False
) -> NDArray[Any]:
    """Decoded pixels of a JPEG 2000 stream, as OpenJPEG has them: (height, width, components).

    It may not be larger than `size` (width, height). With `ycbcr`, components are YCbCr without the
    stream saying so, and become RGB: from YCbCr `rounded` to 8 bits first, as OpenSlide does it, or
    faster inside the decoder, which is up to 2 grey levels off that. A stream that names a colour
    transform is RGB all the same. Raises DamagedSlideError where the stream is cut, and what
    imagecodecs raises.
    """
    # A cut stream may decode, with what it lacks left grey; a whole one has both ends.
    if not stream.startswith(_SOC + _SIZ) or _EOC not in stream[-16:]:
        raise DamagedSlideError("its JPEG 2000 stream is truncated, or none")
    check_jpeg2000_size(stream, size)
    # OpenJPEG turns YCbCr into RGB by itself where chroma has fewer samples (XRsiz, YRsiz in SIZ).
    if not ycbcr or stream[46:48] != b"\1\1" or _is_transformed(stream):
        return imagecodecs.jpeg2k_decode(stream)
    transformed = None if rounded else _with_colour_transform(stream)
    if transformed is None:
        return _ycbcr_to_rgb(imagecodecs.jpeg2k_decode(stream))
    return imagecodecs.jpeg2k_decode(transformed)


def without_finest_level(stream: bytes, size: tuple[int, int]) -> bytes | None:
    """The stream of an 8-bit RGB tile of `size` without its finest level: a tile of half the size.

    None where there is none: more than one tile, another wavelet, or packets in such an order that
    those of the finest level do not come last.
    """
    parsed = _parsed(stream)
    if parsed is None:
        return None
    header, data = parsed
    cod, qcd = header[_COD], header[_QCD]
    finest_last = cod[_PROGRESSION] in (_RLCP, _RPCL) or (
        cod[_PROGRESSION] == _LRCP and cod[_LAYERS] == b"\0\1"
    )
    if (
        header[_SIZ][6:] != _extent(*size)
        or not finest_last
        or cod[_WAVELET] != _9_7
        or cod[_LEVELS] == 0
    ):
        return None
    cod[_LEVELS] -= 1
    if cod[4] & _OWN_PRECINCTS:
        _shorten(cod, 1)
    if qcd[4] & 0x1F == 2:  # a step size for each band, not one for all
        _shorten(qcd, 6)
    header[_SIZ][6:] = _extent(size[0] // 2, size[1] // 2)
    # The packets left over are not looked at.
    return _SOC + b"".join(header.values()) + data


def quarter(half: NDArray[Any]) -> Pixels:
    """The averages over 4x4 px of a full tile, from its pixels at 1/2; sides are even."""
    down = _reduced(half.astype(np.float32))
    both = _reduced(down.swapaxes(0, 1)).swapaxes(0, 1)
    pixels: Pixels = np.clip(np.rint(both), 0, 255).astype(np.uint8)
    return pixels


def _reduced(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Averages in half as many rows. Beyond the ends, the wavelet mirrors full px, not these."""
    extended = np.concatenate([rows[1:2], rows, rows[:-3:-1]])
    total = np.zeros((len(rows) // 2, *rows.shape[1:]), np.float32)
    for tap, weight in enumerate(_QUARTER_TAPS):
        total += weight * extended[tap : tap + len(rows) : 2]
    return total


def _parsed(stream: bytes) -> tuple[dict[bytes, bytearray], bytes] | None:
    """Segments of the main header, and all that follows; None where a stream is not ordinary.

    Ordinary is one tile in one part, coded and quantised alike in all components.
    """
    header: dict[bytes, bytearray] = {}
    at = len(_SOC)
    while (marker := stream[at : at + 2]) in (_SIZ, _COD, _QCD, _COM):
        end = at + 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
        if marker != _COM:
            header[marker] = bytearray(stream[at:end])
        at = end
    one_part = stream[at + 10 : at + 14] == b"\0\1" + _SOD
    ordinary = marker == _SOT and one_part and header.keys() == {_SIZ, _COD, _QCD}
    if not ordinary or len(header[_COD]) <= _WAVELET or len(header[_QCD]) < 11:
        return None
    return header, stream[at:]


def _extent(width: int, height: int) -> bytes:
    """The last bytes of SIZ for one tile of three 8-bit components of this size."""
    return struct.pack(">8IH", width, height, 0, 0, width, height, 0, 0, 3) + b"\7\1\1" * 3


def _shorten(segment: bytearray, count: int) -> None:
    """Take bytes off the end of a segment, and off its length."""
    del segment[-count:]
    segment[2:4] = struct.pack(">H", len(segment) - 2)


def _with_colour_transform(stream: bytes) -> bytes | None:
    """The stream that decodes to RGB where this holds YCbCr (JFIF's, with 9/7); None where none."""
    parsed = _parsed(stream)
    if parsed is None:
        return None
    header, data = parsed
    cod = header[_COD]
    if cod[_WAVELET] != _9_7 or cod[_TRANSFORM]:
        return None
    cod[_TRANSFORM] = 1
    return _SOC + b"".join(header.values()) + data


def _is_transformed(stream: bytes) -> bool:
    """Whether COD in the main header names a colour transform, which OpenJPEG undoes."""
    at = len(_SOC)
    while len(stream) > at + _TRANSFORM and stream[at : at + 2] not in (_COD, _SOT):
        at += 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
    return stream[at : at + 2] == _COD and stream[at + _TRANSFORM : at + _TRANSFORM + 1] != b"\0"


def _ycbcr_to_rgb(ycbcr: NDArray[Any]) -> Pixels:
    """Full-range ITU-R BT.601 YCbCr as RGB (JFIF 1.02)."""
    y, cb, cr = (ycbcr[..., i].astype(np.float32) for i in range(3))
    cb -= 128
    cr -= 128
    rgb = np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], axis=-1)
    pixels: Pixels = np.clip(np.rint(rgb), 0, 255).astype(np.uint8)
    return pixels
