"""Slides with texts planted wherever a scanner could have written of a patient."""

import struct
from collections.abc import Mapping
from pathlib import Path

from fuzz.structure import Entry, map_tiff
from fuzz.tiffs import Editor
from PIL import Image, PngImagePlugin

SECRET = "Plantedname"
"""What stands in every text, and must not be found anywhere."""

_ASCII = 2
_ENTRIES = {
    "Aperio": f"|ScanScope ID = {SECRET}|Filename = {SECRET}|Date = 01/02/03|User = {SECRET}",
    "OME>": f"<!-- {SECRET} -->",
}
_EXTRA_TAGS = (269, 271, 285, 306, 315, 316, 33432, 36867, 42016, 65000)
"""DocumentName, Make, PageName, DateTime, Artist, HostComputer, Copyright, DateTimeOriginal,
ImageUniqueID, and one that is private."""


def plant(data: bytes) -> bytes:
    """A TIFF with SECRET in its descriptions and in ten more tags of its first directory."""
    editor = Editor(data)
    for directory in editor.map.directories:
        for entry in directory.entries:
            if entry.code in (270, 700):
                editor.repoint(entry, _with_secret(data, entry))
    present = {entry.code for entry in editor.map.directories[0].entries}
    _add_tags(
        editor, {code: SECRET.encode() + b"\0" for code in _EXTRA_TAGS if code not in present}
    )
    return bytes(editor.data)


def _with_secret(data: bytes, entry: Entry) -> bytes:
    """The text of a tag with SECRET where the vendor has names, dates, barcodes and users."""
    text = data[entry.value_at : entry.value_at + entry.count * entry.item_size].decode()
    ending = "\0" if text.endswith("\0") else ""
    text = text.rstrip("\0")
    if text.startswith("Aperio"):
        return f"{text}{_ENTRIES['Aperio']}{ending}".encode()
    for old, new in (
        ("<barcode>MDE=</barcode>", f"<barcode>{SECRET}</barcode>"),
        ('<image name="', f'<image name="{SECRET} '),
        ("<collection ", f'<collection name="{SECRET}" '),
        ('Name="scan', f'Name="{SECRET} scan'),
        ("<iScan ", f'<iScan Barcode1D="{SECRET}" UserName="{SECRET}" '),
        (
            '<DataObject ObjectType="DPUfsImport">',
            '<DataObject ObjectType="DPUfsImport"><Attribute Name="PIM_DP_UFS_BARCODE">'
            f"{SECRET}</Attribute>",
        ),
    ):
        text = text.replace(old, new)
    if SECRET not in text and not text.startswith("<"):
        text = f"{text} {SECRET}"
    return f"{text}{ending}".encode()


def _add_tags(editor: Editor, tags: Mapping[int, bytes]) -> None:
    """Put a copy of the first directory, with more tags, at the end of the file."""
    first, word = editor.map.directories[0], editor.map.word[-1]
    room, length = (8, 20) if editor.map.big else (4, 12)
    is_ndpi = any(entry.code == 65_421 for entry in first.entries)
    entries = [(e.code, bytes(editor.data[e.at : e.at + length])) for e in first.entries]
    for code, text in tags.items():
        at = editor.append(text)
        form = f"{editor.map.order}HH{word}{word}"
        entries.append((code, struct.pack(form, code, _ASCII, len(text), at)))
    count = struct.pack(editor.map.order + ("Q" if editor.map.big else "H"), len(entries))
    following = bytes(editor.data[first.next_at : first.next_at + (8 if is_ndpi else room)])
    high = bytes(4 * len(entries)) if is_ndpi else b""
    directory = count + b"".join(entry for _, entry in sorted(entries)) + following + high
    editor.put(8 if editor.map.big else 4, room, editor.append(directory))


def plant_image(source: Path, target: Path) -> None:
    """A PNG or JPEG with SECRET in its texts."""
    with Image.open(source) as image:
        if target.suffix == ".png":
            info = PngImagePlugin.PngInfo()
            info.add_text("Patient", SECRET)
            info.add_text("Comment", SECRET, zip=True)
            image.save(target, pnginfo=info)
            return
        exif = image.getexif()
        exif[0x010E] = exif[0x013B] = SECRET
        image.save(target, exif=exif, comment=SECRET.encode(), quality=85)


def is_planted(data: bytes) -> bool:
    """Whether SECRET is found in a TIFF in more than one place, and the file can be mapped."""
    return data.count(SECRET.encode()) > 1 and bool(map_tiff(data).directories)
