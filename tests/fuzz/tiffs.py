"""Damage to TIFF files: header, directories, tags, texts, and the places of tiles."""

import re
import struct
from collections.abc import Callable
from random import Random

from fuzz.streams import bomb, damaged_stream
from fuzz.structure import Chunk, Directory, Entry, TiffMap, chunks_of, map_tiff

_CODES = (
    254, 256, 257, 258, 259, 262, 266, 270, 273, 277, 278, 279, 282, 283, 284, 296, 305, 306, 317,
    320, 322, 323, 324, 325, 330, 338, 339, 347, 530, 531, 532, 700, 32_997, 33_432, 33_550, 33_560,
    33_628, 33_922, 34_118, 34_361, 34_412, 34_665, 34_675, 34_853, 37_706, 42_112, 50_838, 50_839,
    51_123, 65_420, 65_421, 65_422, 65_424, 65_426, 65_432, 65_441, 65_449,
)  # fmt: skip
"""Tags that xmag or tifffile look at."""
_NUMBERS = (
    0, 1, 2, 3, 4, 5, 6, 7, 8, 15, 16, 64, 127, 128, 240, 255, 256, 4_095, 4_096, 32_767, 50_000,
    65_500,
    65_535, 65_536, 100_000, 1 << 20, (1 << 24) + 1, 1 << 26, 1 << 28, (1 << 31) - 1, 1 << 31,
    (1 << 32) - 1, 1 << 33, 1 << 40, (1 << 62) + 3, (1 << 63) - 1, (1 << 64) - 1,
)  # fmt: skip
_COMPRESSIONS = (
    0,
    1,
    2,
    5,
    6,
    7,
    8,
    32_773,
    32_946,
    33_003,
    33_005,
    33_007,
    34_712,
    34_892,
    50_000,
    50_001,
    50_002,
    65_000,
)
_TEXT_TAGS = (270, 305, 700, 271, 272)
_TEXT_NUMBERS = (
    "0",
    "-1",
    "1",
    "1e999",
    "nan",
    "inf",
    "-0.0",
    "99999999999999999999",
    "1.5",
    "",
    "0x10",
    "½",
    "2147483648",
    "1e-320",
)
_ENTITIES_OF_ENTITIES = (
    '<!DOCTYPE a [<!ENTITY b "bbbbbbbbbb">'
    + "".join(f'<!ENTITY {chr(99 + i)} "{("&" + chr(98 + i) + ";") * 10}">' for i in range(9))
    + "]><OME>&k;</OME>"
)
_VENDOR_TEXTS = (
    "Aperio Image Library v11\r\n1x1|AppMag = 0|MPP = nan", "Aperio",
    "ImageJ=1.0\nimages=9999999\n",
    '{"shape": [1, 2, 99999999]}', "<OME></OME>", "<OME><Image/></OME>", "level=0", "<scn/>",
    '<scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01"><collection/></scn>',
    "DPUfsImport", "<DataObject ObjectType='DPUfsImport'/>", "SCANIMAGE.SI={}", "<MetaData/>",
    _ENTITIES_OF_ENTITIES,
    "<OME>" + "<Image>" * 5_000 + "</Image>" * 5_000 + "</OME>", "\0\0\0", "é" * 70_000,
    '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><OME>&x;</OME>',
)  # fmt: skip


class Editor:
    """A file on its way to being damaged. What is appended leaves all mapped places as they are."""

    def __init__(self, data: bytes) -> None:
        self.pristine = data
        self.data = bytearray(data)
        self.map: TiffMap = map_tiff(data)

    def put(self, at: int, size: int, value: int) -> None:
        """Write a whole number of `size` bytes, cut to them."""
        order = "little" if self.map.order == "<" else "big"
        self.data[at : at + size] = (value % (1 << (8 * size))).to_bytes(size, order)

    def append(self, content: bytes) -> int:
        """Where `content` now lies."""
        self.data += b"\0" * (len(self.data) % 2)
        at = len(self.data)
        self.data += content
        return at

    def repoint(self, entry: Entry, content: bytes) -> None:
        """Give a tag another value, of the same type and of any length."""
        room = 8 if self.map.big else 4
        place = entry.at + self.map.entry_size - room
        self.put(entry.at + 4, room, len(content) // entry.item_size)
        if len(content) <= room:
            self.data[place : place + room] = content.ljust(room, b"\0")
        else:
            self.put(place, room, self.append(content))

    def replace(self, chunk: Chunk, stream: bytes) -> None:
        """Give a tile other bytes."""
        self.put(chunk.length_at, chunk.length_size, len(stream))
        if len(stream) <= chunk.length:
            self.data[chunk.offset : chunk.offset + len(stream)] = stream
        else:
            self.put(chunk.offset_at, chunk.offset_size, self.append(stream))


def damaged_tiff(data: bytes, rng: Random) -> bytes:
    """A TIFF, damaged in one to three ways."""
    editor = Editor(data)
    ways = rng.choices(_WAYS, weights=_WEIGHTS, k=rng.choice((1, 1, 1, 2, 3)))
    for way in ways:
        way(editor, rng)
    if rng.random() < 0.06:
        del editor.data[rng.randrange(len(editor.data)) :]
    return bytes(editor.data)


def _directory(editor: Editor, rng: Random) -> Directory:
    # The first ones hold what decides how a file is read.
    directories = editor.map.directories
    return directories[min(rng.randrange(len(directories)), rng.randrange(len(directories)))]


def _entry(editor: Editor, rng: Random) -> Entry:
    return rng.choice(_directory(editor, rng).entries)


def _number(value: int, editor: Editor, rng: Random) -> int:
    near = (value + 1, value - 1, value * 2, value // 2, value * 1000, len(editor.data), -1)
    return rng.choice(near if rng.random() < 0.4 else _NUMBERS)


def _change_header(editor: Editor, rng: Random) -> None:
    match rng.randrange(4):
        case 0:
            editor.data[rng.randrange(16)] = rng.randrange(256)
        case 1:
            editor.data[:4] = rng.choice((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"))
        case _:
            at, size = (8, 8) if editor.map.big else (4, 4)
            value = rng.choice((_number(8, editor, rng), rng.randrange(len(editor.data))))
            editor.put(at, size, value)


def _change_entry(editor: Editor, rng: Random) -> None:
    entry = _entry(editor, rng)
    room = 8 if editor.map.big else 4
    match rng.randrange(5):
        case 0:
            editor.put(entry.at, 2, rng.choice(_CODES))
        case 1:
            editor.put(entry.at + 2, 2, rng.choice((*range(20), 129, 65_535)))
        case 2:
            editor.put(entry.at + 4, room, _number(entry.count, editor, rng))
        case _:
            place = entry.at + editor.map.entry_size - room
            value = rng.choice(
                (_number(entry.value_at, editor, rng), rng.randrange(len(editor.data)))
            )
            editor.put(place, room, value)


def _change_value(editor: Editor, rng: Random) -> None:
    entry = _entry(editor, rng)
    size, items = entry.item_size, max(entry.count, 1)
    at = entry.value_at + size * rng.randrange(items)
    if entry.kind in (5, 10):
        at, size = at + rng.choice((0, 4)), 4
    value = int.from_bytes(editor.data[at : at + size], "little")
    if entry.code == 259:
        editor.put(at, size, rng.choice(_COMPRESSIONS))
    else:
        editor.put(at, size, _number(value, editor, rng))


def _change_text(editor: Editor, rng: Random) -> None:
    texts = [e for d in editor.map.directories for e in d.entries if e.code in _TEXT_TAGS]
    if not texts:
        return
    entry = rng.choice(texts[:2] if rng.random() < 0.7 else texts)
    start = entry.value_at
    text = editor.pristine[start : start + entry.count * entry.item_size].decode("utf-8", "replace")
    match rng.randrange(5):
        case 0:
            text = rng.choice(_VENDOR_TEXTS)
        case 1:
            a = rng.randrange(len(text) + 1)
            text = text[:a] + text[a + rng.choice((1, 5, 50, 500)) :]
        case 2:
            words = list(re.finditer(r'"[^"]*"|<[^>]*>', text))
            if words:
                word = rng.choice(words)
                text = (
                    text[: word.start()] + rng.choice(("", '""', word[0] * 2)) + text[word.end() :]
                )
        case _:
            numbers = list(re.finditer(r"\d+(\.\d+)?", text))
            for number in rng.sample(numbers, min(len(numbers), rng.choice((1, 1, 2)))):
                text = text[: number.start()] + rng.choice(_TEXT_NUMBERS) + text[number.end() :]
                break
    editor.repoint(entry, text.encode("utf-8", "replace") + rng.choice((b"\0", b"")))


def _change_directory(editor: Editor, rng: Random) -> None:
    directory = _directory(editor, rng)
    size, entry_size = (8, 20) if editor.map.big else (2, 12)
    match rng.randrange(5):
        case 0:
            count = len(directory.entries)
            editor.put(
                directory.at, size, rng.choice((0, 1, count - 1, count + 1, 4_097, 65_535, -1))
            )
        case 1:
            a, b = rng.choice(directory.entries), rng.choice(directory.entries)
            editor.data[a.at : a.at + entry_size] = editor.pristine[b.at : b.at + entry_size]
        case 2:
            first = directory.entries[0].at
            content = editor.data[first : directory.next_at]
            cut = entry_size * rng.randrange(len(directory.entries))
            editor.data[first : directory.next_at] = content[cut:] + content[:cut]
        case _:
            targets = [d.at for d in editor.map.directories]
            value = rng.choice(
                (*targets, _number(8, editor, rng), rng.randrange(len(editor.data)), 0)
            )
            editor.put(directory.next_at, 8 if editor.map.big else 4, value)


def _change_sub_ifds(editor: Editor, rng: Random) -> None:
    """Directories below directories that lead back to those above them."""
    room = 8 if editor.map.big else 4
    subs = [e for d in editor.map.directories for e in d.entries if e.code == 330]
    entry = rng.choice(subs) if subs else _entry(editor, rng)
    targets = [rng.choice(editor.map.directories).at for _ in range(rng.choice((1, 2, 500)))]
    content = b"".join(struct.pack(editor.map.word, at) for at in targets)
    editor.put(entry.at, 2, 330)
    editor.put(
        entry.at + 2, 2, rng.choice((13, 4, 18, 16)) if editor.map.big else rng.choice((13, 4))
    )
    count = len(content) // room
    editor.put(entry.at + 4, room, count)
    place = entry.at + editor.map.entry_size - room
    if count == 1:
        editor.data[place : place + room] = content
    else:
        editor.put(place, room, editor.append(content))


def _change_place(editor: Editor, rng: Random) -> None:
    """Tiles lie elsewhere, in each other, in the directories, beyond the end."""
    directory = _directory(editor, rng)
    chunks = chunks_of(editor.pristine, editor.map, directory)
    for chunk in rng.sample(chunks, min(len(chunks), rng.choice((1, 1, 3, 99)))):
        other = rng.choice(chunks)
        if rng.random() < 0.5:
            value = rng.choice(
                (other.offset, directory.at, chunk.offset + 1, _number(chunk.offset, editor, rng))
            )
            editor.put(chunk.offset_at, chunk.offset_size, value)
        else:
            value = rng.choice(
                (other.length, 0, 1, chunk.length - 1, _number(chunk.length, editor, rng))
            )
            editor.put(chunk.length_at, chunk.length_size, value)


def _change_tile(editor: Editor, rng: Random) -> None:
    chunks = chunks_of(editor.pristine, editor.map, _directory(editor, rng))
    for chunk in rng.sample(chunks, min(len(chunks), rng.choice((1, 1, 2, 99)))):
        stream = editor.pristine[chunk.offset : chunk.offset + chunk.length]
        editor.replace(chunk, damaged_stream(stream, rng))


def _swap_tiles(editor: Editor, rng: Random) -> None:
    """A tile of one level lies in another, or a packed bomb."""
    everywhere = [
        c for d in editor.map.directories for c in chunks_of(editor.pristine, editor.map, d)
    ]
    chunk, other = rng.choice(everywhere), rng.choice(everywhere)
    stream = editor.pristine[other.offset : other.offset + other.length]
    editor.replace(chunk, bomb(b"", rng) if rng.random() < 0.1 else stream)


def _change_tables(editor: Editor, rng: Random) -> None:
    tables = [e for d in editor.map.directories for e in d.entries if e.code in (347, 65_426)]
    if not tables:
        return
    entry = rng.choice(tables)
    content = editor.pristine[entry.value_at : entry.value_at + entry.count * entry.item_size]
    editor.repoint(entry, damaged_stream(content, rng))


def _overwrite(editor: Editor, rng: Random) -> None:
    """Bytes anywhere are others, as on a bad disk."""
    at = rng.randrange(len(editor.data))
    length = rng.choice((1, 4, 512, 4096))
    content = rng.choice((rng.randbytes(length), bytes(length), b"\xff" * length))
    editor.data[at : at + length] = content[: len(editor.data) - at]


_Way = Callable[[Editor, Random], None]
_WAYS: tuple[_Way, ...] = (
    _change_header, _change_entry, _change_value, _change_text, _change_directory, _change_sub_ifds,
    _change_place, _change_tile, _swap_tiles, _change_tables, _overwrite,
)  # fmt: skip
_WEIGHTS = (3, 14, 20, 10, 5, 2, 9, 26, 3, 3, 3)
