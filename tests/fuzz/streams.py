"""Damage to the streams of tiles and plain images: markers, sizes, tables, coded data, bombs."""

import struct
import zlib
from collections.abc import Callable
from functools import cache
from random import Random

import imagecodecs

from fuzz.structure import jpeg2000_segments, jpeg_segments, png_chunks

SIDES = (0, 1, 2, 7, 8, 16, 127, 128, 129, 240, 255, 256, 4096, 30_000, 65_500, 65_535)
_JPEG_MARKERS = (*range(0xC0, 0xD0), *range(0xD8, 0xE1), 0xED, 0xEE, 0xFE, 0x01, 0x00)
_J2K_MARKERS = (
    0x4F,
    0x51,
    0x52,
    0x53,
    0x55,
    0x57,
    0x58,
    0x5C,
    0x5D,
    0x5E,
    0x5F,
    0x60,
    0x61,
    0x63,
    0x64,
    0x90,
    0x91,
    0x92,
    0x93,
    0xD9,
)
Damage = Callable[[bytes, Random], bytes]


def damaged_stream(stream: bytes, rng: Random) -> bytes:
    """A stream, damaged in one way that fits what it is, or in one that fits anything."""
    if rng.random() < 0.3:
        return rng.choice(_ANY)(stream, rng)
    if stream[:2] == b"\xff\xd8":
        return rng.choice(_JPEG)(stream, rng)
    if stream[:2] == b"\xff\x4f":
        return rng.choice(_J2K)(stream, rng)
    if stream[:4] == b"RIFF":
        return rng.choice(_WEBP)(stream, rng)
    if stream[:4] == b"\x89PNG":
        return rng.choice(_PNG)(stream, rng)
    return rng.choice((*_ANY, bomb))(stream, rng)


def flipped(stream: bytes, rng: Random) -> bytes:
    """A few bytes, anywhere, are others."""
    data = bytearray(stream)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        if data:
            data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


def filled(stream: bytes, rng: Random) -> bytes:
    """A stretch is all of one byte, as a lost sector is."""
    start = rng.randrange(len(stream) + 1)
    length = min(rng.choice((1, 16, 512, 4096, 1 << 20)), len(stream) - start)
    value = rng.choice((0, 0, 0xFF, 0x80, rng.randrange(256)))
    return stream[:start] + bytes([value]) * length + stream[start + length :]


def cut(stream: bytes, rng: Random) -> bytes:
    """The end is missing."""
    return stream[: rng.randrange(len(stream) + 1)]


def moved(stream: bytes, rng: Random) -> bytes:
    """A stretch is doubled, or gone."""
    a, b = sorted((rng.randrange(len(stream) + 1), rng.randrange(len(stream) + 1)))
    b = min(b, a + 600)
    return stream[:a] + stream[a:b] * rng.choice((0, 2, 3)) + stream[b:]


def tail(stream: bytes, rng: Random) -> bytes:
    """Something follows the end."""
    return stream + rng.randbytes(rng.choice((1, 3, 100, 5000)))


def nothing(stream: bytes, rng: Random) -> bytes:
    """Hardly anything is left."""
    return rng.choice(
        (b"", b"\0", stream[:2], stream[:3], stream[:4], b"\xff" * 9, rng.randbytes(99))
    )


def bomb(_: bytes, rng: Random) -> bytes:
    """Up to a MB that unpacks to hundreds of MB, in any of the packings."""
    return rng.choice(packed_bombs())


@cache
def packed_bombs() -> tuple[bytes, ...]:
    """Streams of deflate, Zstandard (whole, and two that claim 8 GB and 4 EB), LZW, PackBits."""
    pack = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = pack.compress(bytes(1 << 20)) + pack.flush(zlib.Z_FULL_FLUSH)
    frame = imagecodecs.zstd_encode(bytes(1 << 20))
    return (
        b"\x78\xda" + block * 1024,
        frame * 512,
        *(
            b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", claim) + bytes(9)
            for claim in (1 << 33, 1 << 62)
        ),
        imagecodecs.lzw_encode(bytes(1 << 24)),
        b"\x81\0" * (1 << 16),
    )


def _jpeg_frame(stream: bytes, rng: Random) -> bytes:
    """The frame header says something else: sizes, precision, components, sampling, process."""
    data = bytearray(stream)
    for marker, start, end in jpeg_segments(stream):
        if 0xC0 <= marker <= 0xC3 and end - start >= 10:
            match rng.randrange(6):
                case 0:
                    struct.pack_into(">H", data, start + rng.choice((5, 7)), rng.choice(SIDES))
                case 1:
                    struct.pack_into(">HH", data, start + 5, 65_500, 65_500)
                case 2:
                    data[start + 4] = rng.choice((0, 1, 2, 12, 16, 255))
                case 3:
                    data[start + 9] = rng.choice((0, 1, 2, 4, 5, 255))
                case 4:
                    data[rng.randrange(start + 10, end)] = rng.randrange(256)
                case _:
                    data[start + 1] = rng.choice(range(0xC0, 0xD0))
    return bytes(data)


def _jpeg_segment(stream: bytes, rng: Random) -> bytes:
    """A segment is another, is gone, is doubled, has another length or other content."""
    segments = list(jpeg_segments(stream))
    return _segment(stream, segments, _JPEG_MARKERS, rng)


def _jpeg_inserted(stream: bytes, rng: Random) -> bytes:
    """A marker with nothing, or with rubbish, before the scan or in it."""
    marker = bytes([0xFF, rng.choice(_JPEG_MARKERS)])
    segment = rng.choice((b"", b"\0\2", b"\0\0", b"\xff\xff", b"\0\x20" + rng.randbytes(30)))
    segments = list(jpeg_segments(stream)) or [(0, 2, 2)]
    at = rng.choice((segments[0][1], segments[-1][1], rng.randrange(2, max(3, len(stream)))))
    return stream[:at] + marker + segment + stream[at:]


def _jpeg_scans(stream: bytes, rng: Random) -> bytes:
    """The scan comes again and again, as in files made to take for ever."""
    last = list(jpeg_segments(stream))[-1:] or [(0, 2, 2)]
    scan = stream[last[0][1] : -2]
    return stream[: last[0][1]] + scan[:2000] * rng.choice((2, 50, 2000)) + stream[-2:]


def _j2k_size(stream: bytes, rng: Random) -> bytes:
    """SIZ says another size of image, tile or origin, other components, depths or samplings."""
    data = bytearray(stream)
    for marker, start, end in jpeg2000_segments(stream):
        if marker == 0x51 and end - start >= 40:
            if rng.random() < 0.6:
                side = rng.choice((*SIDES, 1 << 20, (1 << 31) - 1, (1 << 32) - 1))
                for _ in range(rng.choice((1, 1, 2))):
                    struct.pack_into(">I", data, start + 6 + 4 * rng.randrange(8), side)
            elif rng.random() < 0.3:
                struct.pack_into(">2I", data, start + 6, 65_500, 65_500)
                struct.pack_into(">2I", data, start + 22, 65_500, 65_500)
            elif rng.random() < 0.3:
                struct.pack_into(
                    ">H", data, start + 38, rng.choice((0, 1, 2, 4, 5, 16_384, 65_535))
                )
            else:
                data[rng.randrange(start + 40, end)] = rng.choice((0, 1, 2, 7, 15, 37, 128, 255))
    return bytes(data)


def _j2k_coding(stream: bytes, rng: Random) -> bytes:
    """COD, QCD or SOT say something else."""
    data = bytearray(stream)
    for marker, start, end in jpeg2000_segments(stream):
        if marker in (0x52, 0x5C, 0x90) and end > start + 4 and rng.random() < 0.6:
            data[rng.randrange(start + 4, end)] = rng.choice(
                (0, 1, 2, 5, 10, 32, 33, 127, 128, 255)
            )
    return bytes(data)


def _j2k_segment(stream: bytes, rng: Random) -> bytes:
    return _segment(stream, list(jpeg2000_segments(stream)), _J2K_MARKERS, rng)


def _j2k_body(stream: bytes, rng: Random) -> bytes:
    """The packets are damaged, both ends of the stream are not."""
    start = next((end for marker, _, end in jpeg2000_segments(stream) if marker == 0x90), 2)
    body = stream[start + 2 : -2]
    change = rng.choice((flipped, filled, moved, cut))
    return stream[: start + 2] + change(body, rng) + stream[-2:]


def _segment(
    stream: bytes, segments: list[tuple[int, int, int]], markers: tuple[int, ...], rng: Random
) -> bytes:
    if not segments:
        return stream
    _, start, end = rng.choice(segments)
    data = bytearray(stream)
    match rng.randrange(5):
        case 0:
            data[start + 1] = rng.choice(markers)
        case 1:
            del data[start:end]
        case 2:
            data[start:start] = stream[start:end] * rng.choice((1, 1, 300))
        case 3 if start + 4 <= len(data):
            struct.pack_into(">H", data, start + 2, rng.choice((0, 1, 2, 3, 255, 65_535)))
        case _:
            data[rng.randrange(start, end)] = rng.randrange(256)
    return bytes(data)


def _webp_size(stream: bytes, rng: Random) -> bytes:
    """The header of the image, or the chunk it is in, says something else."""
    data = bytearray(stream)
    data[rng.randrange(4, min(40, len(data)))] = rng.randrange(256)
    if rng.random() < 0.4 and len(data) > 25:
        data[21:25] = rng.choice((b"\xff\xff\xff\x0f", b"\xff" * 4, bytes(4), rng.randbytes(4)))
    return bytes(data)


def _webp_extended(stream: bytes, rng: Random) -> bytes:
    """An extended header that promises a large canvas, an animation, or nothing that is there."""
    size = rng.choice((b"\xff\x3f\0\xff\x3f\0", b"\xff" * 6, bytes(6), stream[24:30]))
    header = b"VP8X\x0a\0\0\0" + bytes([rng.randrange(256), 0, 0, 0]) + size
    body = b"WEBP" + header + stream[12:]
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _png_header(stream: bytes, rng: Random) -> bytes:
    """IHDR says something else; its checksum is right."""
    data = bytearray(stream)
    if rng.random() < 0.6:
        side = rng.choice((*SIDES, 1 << 20, (1 << 31) - 1, (1 << 32) - 1))
        struct.pack_into(">I", data, 16 + 4 * rng.randrange(2), side)
    else:
        data[24 + rng.randrange(5)] = rng.choice((0, 1, 2, 3, 4, 6, 8, 16, 255))
    return _png_summed(bytes(data[8:33]), bytes(data), 8, 33)


def _png_chunk(stream: bytes, rng: Random) -> bytes:
    """A chunk is gone, doubled, of another type or has other content; its checksum is right."""
    _, start, end = rng.choice(list(png_chunks(stream)))
    chunk = bytearray(stream[start:end])
    match rng.randrange(4):
        case 0:
            return stream[:start] + stream[end:]
        case 1:
            return stream[:start] + bytes(chunk) * 2 + stream[end:]
        case 2:
            chunk[4:8] = rng.choice((b"IDAT", b"PLTE", b"tRNS", b"acTL", b"fdAT", b"iCCP", b"IEND"))
        case _:
            if len(chunk) > 12:
                chunk[rng.randrange(8, len(chunk) - 4)] = rng.randrange(256)
    return _png_summed(bytes(chunk), stream, start, end)


def _png_inserted(stream: bytes, rng: Random) -> bytes:
    """A chunk that unpacks to a lot, or that makes no sense."""
    packed = packed_bombs()[0]
    kind, content = rng.choice(
        (
            (b"zTXt", b"a\0\0" + packed),
            (b"iCCP", b"a\0\0" + packed),
            (b"iTXt", b"a\0\1\0\0\0" + packed),
            (b"tRNS", rng.randbytes(rng.choice((0, 1, 6, 300)))),
            (b"gAMA", rng.randbytes(rng.choice((0, 4)))),
            (b"acTL", struct.pack(">II", rng.choice((0, 1, 1 << 31)), 0)),
            (b"eXIf", rng.randbytes(50)),
            (b"pHYs", rng.randbytes(rng.choice((0, 9)))),
        )
    )
    chunk = struct.pack(">I", len(content)) + kind + content + bytes(4)
    return _png_summed(chunk, stream, 33, 33)


def _png_summed(chunk: bytes, stream: bytes, start: int, end: int) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(chunk[4:-4]))
    return stream[:start] + chunk[:-4] + checksum + stream[end:]


_ANY: tuple[Damage, ...] = (flipped, filled, cut, moved, tail, nothing)
_JPEG: tuple[Damage, ...] = (_jpeg_frame, _jpeg_frame, _jpeg_segment, _jpeg_inserted, _jpeg_scans)
_J2K: tuple[Damage, ...] = (_j2k_size, _j2k_size, _j2k_coding, _j2k_segment, _j2k_body)
_WEBP: tuple[Damage, ...] = (_webp_size, _webp_extended)
_PNG: tuple[Damage, ...] = (_png_header, _png_chunk, _png_inserted)
