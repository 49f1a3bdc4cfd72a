"""Cases of damaged DICOM slides: frames, lengths, offset tables, functional groups, lost files.

A slide is several files, and a case one: a tar archive, which is unpacked before it is opened.
"""

import io
import struct
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random

from fuzz.slides import use
from fuzz.streams import damaged_stream
from xmag.errors import InputError, SeveralScansError
from xmag.slide.dicom_files import WANTED

FINE = "read"
THEIR_WARNINGS: tuple[type[Warning], ...] = ()
THEIR_PRINTS = r"(?!)"
_PLACES = (0x0048_021E, 0x0048_021F)
_TAGS = [*WANTED, *_PLACES, 0x0048_021A, 0x0020_9111, 0xFFFE_E000, 0xFFFE_E00D, 0xFFFE_E0DD]
_NUMBERS = (
    0,
    1,
    2,
    3,
    7,
    63,
    64,
    127,
    128,
    129,
    255,
    4096,
    65_535,
    1 << 20,
    (1 << 31) - 1,
    1 << 31,
)
_LENGTHS = (*_NUMBERS, 0xFFFFFFFE, 0xFFFFFFFF)
_TEXTS = (
    b"", b"0", b"-1", b"1e999", b"nan", b"99999999999999999999", b"TILED_FULL", b"TILED_SPARSE",
    b"YBR_FULL", b"RGB", b"YBR_RCT", b"MONOCHROME2", b"1.2.840.10008.1.2", b"1.2.840.10008.1.2.5",
    b"1.2.840.10008.1.2.4.50", b"1.2.840.10008.1.2.4.90", b"111743", b"0.1\\0.3", b"\xff\xfe",
    b"ORIGINAL\\PRIMARY\\LABEL\\NONE", b"\\\\\\",
)  # fmt: skip
_Damage = Callable[[bytes, Random], bytes]


def seeds() -> dict[str, bytes]:
    """Small slides in each coding, kind of offset table and organisation."""
    from support.dicom_slides import make_sparse, pyramid, volumes, write_dicom
    from support.slides import texture
    from wsidicom import ConcatenationByFrames

    pixels, found = texture(420, 300), {}
    cases = {
        "bot": ("ycbcr420", {}), "eot": ("rgb444", {"offset_table": "eot"}),
        "empty": ("ycbcr444", {"offset_table": "empty"}), "j2k": ("j2k-rgb", {}),
        "raw": ("raw", {}), "parts": ("ycbcr422", {"concatenation": ConcatenationByFrames(5)}),
        "sparse": ("ycbcr420", {}), "undefined": ("j2k-ycbcr", {}),
    }  # fmt: skip
    for name, (color, options) in cases.items():
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / "s"
            write_dicom(place, pyramid(pixels, tile=(128, 128), color=color), **options)
            if name in ("sparse", "undefined"):
                undefined = name == "undefined"
                make_sparse(volumes(place)[0], undefined=undefined, fragments=1 + undefined)
            files = [*volumes(place), *sorted({*place.iterdir()} - {*volumes(place)})]
            found[f"{name}.tar"] = _packed([file.read_bytes() for file in files])
    return found


def _packed(files: list[bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for number, content in enumerate(files):
            entry = tarfile.TarInfo(f"{number}.dcm")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def _unpacked(data: bytes) -> list[bytes]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return [archive.extractfile(entry).read() for entry in archive]


def make(originals: Mapping[str, bytes], number: int, rng: Random) -> tuple[str, bytes]:
    """(name, content) of a damaged slide; its first level is damaged most."""
    name = rng.choice(sorted(originals))
    files = _unpacked(originals[name])
    at = min(rng.choice((0, 0, 0, 0, 1, 2)), len(files) - 1)
    if rng.random() < 0.03:
        del files[at]
    elif rng.random() < 0.03:
        files.append(files[at])
    else:
        for _ in range(rng.choice((1, 1, 2))):
            files[at] = rng.choice(_DAMAGES)(files[at], rng)
    return name, _packed(files)


def _element(data: bytes, rng: Random) -> int | None:
    """Where one of the elements that are read lies."""
    tag = rng.choice(_TAGS)
    pattern = struct.pack("<HH", tag >> 16, tag & 0xFFFF)
    found, at = [], data.find(pattern)
    while at >= 0 and len(found) < 50:
        found.append(at)
        at = data.find(pattern, at + 1)
    return rng.choice(found) if found else None


def _header(data: bytes, rng: Random) -> bytes:
    """An element is another, of another representation, or has another length."""
    at, out = _element(data, rng), bytearray(data)
    if at is None:
        return data
    match rng.randrange(5):
        case 0:
            struct.pack_into("<I", out, at + 4, rng.choice(_LENGTHS))
        case 1 if at + 12 <= len(out):
            struct.pack_into("<I", out, at + 8, rng.choice(_LENGTHS))
        case 2:
            struct.pack_into("<H", out, at + 6, rng.choice(_LENGTHS) & 0xFFFF)
        case 3:
            out[at + 4 : at + 6] = rng.choice((b"SQ", b"UN", b"US", b"OB", b"UI", b"\0\0", b"zz"))
        case _:
            tag = rng.choice(_TAGS)
            struct.pack_into("<HH", out, at, tag >> 16, tag & 0xFFFF)
    return bytes(out)


def _value(data: bytes, rng: Random) -> bytes:
    """An element has another value, of the right length or of another."""
    at = _element(data, rng)
    if at is None:
        return data
    start, length = at + 8, int.from_bytes(data[at + 6 : at + 8], "little")
    if rng.random() < 0.5:
        value = rng.choice(_LENGTHS).to_bytes(8, "little")[: max(1, min(length, 8))]
        return data[:start] + value + data[start + len(value) :]
    value = rng.choice(_TEXTS)
    value += b" " * (len(value) % 2)
    return data[: at + 6] + struct.pack("<H", len(value)) + value + data[start + length :]


def _table(data: bytes, rng: Random) -> bytes:
    """Entries of the table of offsets are others, or zeros, or it has another length."""
    at, out = data.rfind(struct.pack("<HH", 0x7FE0, 0x0010)), bytearray(data)
    extended = data.find(struct.pack("<HH", 0x7FE0, 0x0001))
    if extended >= 0:
        at = extended - 8
    first = at + 20
    match rng.randrange(4):
        case 0:
            struct.pack_into("<I", out, first - 4, rng.choice(_LENGTHS))
        case 1:
            out[first : first + 512] = bytes(len(out[first : first + 512]))
        case _:
            place = first + 4 * rng.randrange(30)
            if place + 4 <= len(out):
                struct.pack_into("<I", out, place, rng.choice((*_LENGTHS, rng.randrange(1 << 16))))
    return bytes(out)


def _frame(data: bytes, rng: Random) -> bytes:
    """The stream in a fragment is damaged; its length may fit."""
    item = b"\xfe\xff\x00\xe0"
    base = data.rfind(struct.pack("<HH", 0x7FE0, 0x0010))
    places, at = [], data.find(item, base + 13)
    while at >= 0:
        places.append(at)
        at = data.find(item, at + 1)
    if not places:
        return data
    at = rng.choice(places)
    length = int.from_bytes(data[at + 4 : at + 8], "little")
    frame = damaged_stream(data[at + 8 : at + 8 + length], rng)
    if rng.random() < 0.5:
        frame = frame[:length].ljust(length, b"\0")
    said = len(frame) if rng.random() < 0.8 else length
    return data[: at + 4] + struct.pack("<I", said) + frame + data[at + 8 + length :]


def _deep(data: bytes, rng: Random) -> bytes:
    """Sequences within sequences, where a patient's name was."""
    at = data.find(struct.pack("<HH2s", 0x0010, 0x0010, b"PN"))
    if at < 0:
        return data
    sequence = struct.pack("<HH2sHI", 0x0048, 0x0105, b"SQ", 0, 0xFFFFFFFF)
    item = struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
    return data[:at] + (sequence + item) * rng.choice((1, 10, 20, 5000)) + data[at:]


_DAMAGES: tuple[_Damage, ...] = (
    _header, _header, _value, _value, _table, _frame, _frame, _deep,
    lambda data, rng: damaged_stream(data[:3000], rng) + data[3000:],
    damaged_stream,
)  # fmt: skip


def outcome(path: Path) -> str:
    """What became of a slide, in a word; raises what is no XmagError."""
    with tempfile.TemporaryDirectory() as folder:
        for number, content in enumerate(_unpacked(path.read_bytes())):
            Path(folder, f"{number}.dcm").write_bytes(content)
        for error in use(Path(folder), beside=True):
            if type(error) not in (InputError, SeveralScansError):
                raise error
    return "read"
