"""A TIFF writer that writes exactly what it is told: any tag, empty tiles, NDPI's odd offsets."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

BYTE, ASCII, SHORT, LONG, RATIONAL, UNDEFINED, LONG8, DOUBLE, FLOAT, SLONG = (
    1,
    2,
    3,
    4,
    5,
    7,
    16,
    12,
    11,
    9,
)
_FORMATS = {SHORT: "H", LONG: "I", LONG8: "Q", DOUBLE: "d", FLOAT: "f", SLONG: "i"}
_SUB_IFDS = 330


@dataclass
class Page:
    """A directory: tags as code -> (type, values), and its tiles (or strips), None where empty."""

    tags: dict[int, tuple[int, object]]
    chunks: Sequence[bytes | None]
    tiled: bool = True
    sub_pages: list["Page"] = field(default_factory=list)


def write_pages(path: Path, pages: Sequence[Page], *, big: bool = False, ndpi: bool = False):
    """Write a little-endian TIFF; `ndpi` gives directories the high halves that Hamamatsu adds."""
    with path.open("wb") as file:
        file.write(
            b"II" + (struct.pack("<HHHQ", 43, 8, 0, 0) if big else struct.pack("<HQ", 42, 0))
        )
        offsets = [_write_page(file, page, big=big, ndpi=ndpi) for page in pages]
        for at, following in zip(
            [8 if big else 4, *(end for _, end in offsets)], offsets, strict=False
        ):
            file.seek(at)
            file.write(struct.pack("<Q" if big or ndpi else "<I", following[0]))


def _write_page(file, page: Page, *, big: bool, ndpi: bool) -> tuple[int, int]:
    """(offset of the directory, offset of its pointer to the next)."""
    tags = dict(page.tags)
    offsets, lengths = [], []
    for chunk in page.chunks:
        file.seek(0, 2)
        offsets.append(file.tell() if chunk is not None else 0)
        lengths.append(len(chunk or b""))
        file.write(chunk or b"")
    tags[324 if page.tiled else 273] = (LONG8 if big else LONG, offsets)
    tags[325 if page.tiled else 279] = (LONG8 if big else LONG, lengths)
    if page.sub_pages:
        subs = [_write_page(file, sub, big=big, ndpi=ndpi)[0] for sub in page.sub_pages]
        tags[_SUB_IFDS] = (LONG8 if big else LONG, subs)
    entries = []
    for code, (kind, values) in sorted(tags.items()):
        data, count = _packed(kind, values)
        room = 8 if big else 4
        if len(data) > room:
            file.seek(0, 2)
            file.write(b"\0" * (file.tell() % 2))
            at = file.tell()
            file.write(data)
            data = struct.pack("<Q" if big else "<I", at)
        head = struct.pack("<HHQ" if big else "<HHI", code, kind, count)
        entries.append(head + data.ljust(room, b"\0"))
    file.seek(0, 2)
    file.write(b"\0" * (file.tell() % 2))
    start = file.tell()
    file.write(struct.pack("<Q" if big else "<H", len(entries)) + b"".join(entries))
    end = file.tell()
    file.write(b"\0" * (8 if big or ndpi else 4))
    if ndpi:
        file.write(b"\0\0\0\0" * len(entries))
    return start, end


def _packed(kind: int, values) -> tuple[bytes, int]:
    if kind == ASCII:
        data = values.encode() + b"\0"
        return data, len(data)
    if kind in (BYTE, UNDEFINED):
        return bytes(values), len(values)
    values = list(values) if isinstance(values, list | tuple) else [values]
    if kind == RATIONAL:
        parts = [part for value in values for part in (round(value * 10_000), 10_000)]
        return struct.pack(f"<{len(parts)}I", *parts), len(values)
    return struct.pack(f"<{len(values)}{_FORMATS[kind]}", *values), len(values)
