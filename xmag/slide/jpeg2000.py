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
from xmag.slide.integrity import check_jpeg2000_size, segments
from xmag.slide.reader import Pixels

_SOC, _EOC = b"\xff\x4f", b"\xff\xd9"
_SIZ, _COD, _QCD, _COM, _SOT = 0x51, 0x52, 0x5C, 0x64, 0x90
_PROGRESSION, _LAYERS, _TRANSFORM, _LEVELS, _WAVELET = 5, slice(6, 8), 8, 9, 13
"""Offsets in COD of packet order, quality layers, colour transform, wavelet levels and kind."""
_LRCP, _RLCP, _RPCL = 0, 1, 2
_9_7 = 0

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
    if not stream.startswith(_SOC + b"\xff\x51") or _EOC not in stream[-16:]:
        raise DamagedSlideError("its JPEG 2000 stream is truncated, or none")
    check_jpeg2000_size(stream, size)
    # OpenJPEG turns YCbCr into RGB by itself where chroma has fewer samples (XRsiz, YRsiz in SIZ).
    if not ycbcr or stream[46:48] != b"\1\1" or _is_transformed(stream):
        return imagecodecs.jpeg2k_decode(stream)
    parsed = None if rounded else _parsed(stream)
    if parsed is None or parsed[0][_COD][_WAVELET] != _9_7:
        return _ycbcr_to_rgb(imagecodecs.jpeg2k_decode(stream))
    header, data = parsed
    header[_COD][_TRANSFORM] = 1  # JFIF's
    return imagecodecs.jpeg2k_decode(_SOC + b"".join(header.values()) + data)


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
    one_layer = cod[_LAYERS] == b"\0\1"
    finest_last = cod[_PROGRESSION] in (_RLCP, _RPCL, *([_LRCP] if one_layer else []))
    whole = header[_SIZ][6:] == _extent(*size)
    if not (whole and finest_last and cod[_WAVELET] == _9_7 and cod[_LEVELS]):
        return None
    cod[_LEVELS] -= 1
    if cod[4] & 1:  # a precinct size for each resolution
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


def _parsed(stream: bytes) -> tuple[dict[int, bytearray], bytes] | None:
    """Segments of the main header, and what follows; None for several tiles, parts or codings."""
    header, marker, at = dict[int, bytearray](), 0, 0
    for marker, at, end in segments(stream):
        if marker not in (_SIZ, _COD, _QCD, _COM):
            break
        if marker != _COM:
            header[marker] = bytearray(stream[at:end])
    one_part = marker == _SOT and stream[at + 10 : at + 14] == b"\0\1\xff\x93"
    ordinary = one_part and header.keys() == {_SIZ, _COD, _QCD}
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


def _is_transformed(stream: bytes) -> bool:
    """Whether COD in the main header names a colour transform, which OpenJPEG undoes."""
    for marker, at, _ in segments(stream):
        if marker in (_COD, _SOT):
            return marker == _COD and stream[at + _TRANSFORM : at + _TRANSFORM + 1] != b"\0"
    return False


def _ycbcr_to_rgb(ycbcr: NDArray[Any]) -> Pixels:
    """Full-range ITU-R BT.601 YCbCr as RGB (JFIF 1.02)."""
    y, cb, cr = (ycbcr[..., i].astype(np.float32) for i in range(3))
    cb -= 128
    cr -= 128
    rgb = np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], axis=-1)
    pixels: Pixels = np.clip(np.rint(rgb), 0, 255).astype(np.uint8)
    return pixels
