"""Slides with texts planted wherever a scanner could have written of a patient."""

import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import numpy as np
from fuzz import seeds
from fuzz import tiffslide as through_tiffslide
from fuzz.structure import Entry, map_tiff
from fuzz.tiffs import Editor
from PIL import Image, PngImagePlugin
from support import slides, vendor_slides
from support.tiff import ASCII, BYTE, UNDEFINED, Page, write_pages
from support.zarr_slides import write_zarr

SECRET = "Plantedname"
"""What stands in every text, and must not be found anywhere."""

MARK = (0, 255, 40)
"""The colour of all labels and macros, which no slide and no drawing has."""

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


_TEXT_TAGS = (
    *_EXTRA_TAGS, 272, 333, 337, 32781, 36868, 36880, 36881, 40092, 42032, 42035, 42113, 65427,
    65442,
)  # fmt: skip
"""Tags that are texts: also Model, InkNames, TargetPrinter, ImageID, more of EXIF, GDAL_NODATA, and
what Hamamatsu calls the reference and the serial number."""
_BYTE_TAGS = {700: BYTE, 33723: UNDEFINED, 34377: BYTE, 37510: UNDEFINED, 50839: BYTE}
"""XMP, IPTC, Photoshop's, EXIF's comment, ImageJ's."""
_APERIO_KEYS = (
    "ScanScope ID", "Filename", "Date", "Time", "Time Zone", "User", "Title", "Barcode", "Label",
    "Patient", "Parmset", "Originalheight", "Exposure Scale", "ICC Profile", "ImageID", "Slide",
)  # fmt: skip
_OME_IMAGE = f"<AcquisitionDate>{SECRET}</AcquisitionDate><Description>{SECRET}</Description>"
_OME_REST = f"""<Experimenter ID="Experimenter:0" FirstName="{SECRET}" LastName="{SECRET}"
 Email="{SECRET}" UserName="{SECRET}" Institution="{SECRET}"/><Project ID="Project:0"
 Name="{SECRET}"><Description>{SECRET}</Description></Project><Instrument ID="Instrument:0">
<Microscope Manufacturer="{SECRET}" Model="{SECRET}" SerialNumber="{SECRET}"/></Instrument>
<StructuredAnnotations><CommentAnnotation ID="Annotation:0" Namespace="{SECRET}"><Description>
{SECRET}</Description><Value>{SECRET}</Value></CommentAnnotation><XMLAnnotation
 ID="Annotation:1"><Value><Patient Name="{SECRET}">{SECRET}</Patient></Value></XMLAnnotation>
<MapAnnotation ID="Annotation:2"><Value><M K="{SECRET}">{SECRET}</M></Value></MapAnnotation>
</StructuredAnnotations></OME>"""
_IN_XML = (
    ("<OME ", f'<OME Creator="{SECRET}" UUID="urn:uuid:{SECRET}" '),
    ('Name="scan', f'Name="{SECRET} scan'),
    ('Name="label', f'Name="{SECRET} label'),
    ("<Pixels ", f"{_OME_IMAGE}<Pixels "),
    ("<Channel ", f'<Channel Fluor="{SECRET}" Name="{SECRET}" '),
    ('PlaneCount="1"/>', f'><UUID FileName="{SECRET}.tif">urn:uuid:{SECRET}</UUID></TiffData>'),
    ("</OME>", _OME_REST),
    ("<barcode>MDE=</barcode>", f"<barcode>{SECRET}</barcode>"),
    ('<image name="', f'<image uuid="{SECRET}" name="{SECRET} '),
    ("<collection ", f'<collection name="{SECRET}" uuid="{SECRET}" '),
    ("</image>", f'<creationDate>{SECRET}</creationDate><device model="{SECRET}"/></image>'),
    (
        "<iScan ",
        f'<iScan Barcode1D="{SECRET}" Barcode2D="{SECRET}" UserName="{SECRET}" SlideAnnotation='
        f'"{SECRET}" ScanDate="{SECRET}" UniqueID="{SECRET}" ',
    ),
    ("<EncodeInfo ", f'<EncodeInfo Operator="{SECRET}" '),
    (
        '<DataObject ObjectType="DPUfsImport">',
        '<DataObject ObjectType="DPUfsImport">'
        + "".join(
            f'<Attribute Name="{name}">{SECRET}</Attribute>'
            for name in (
                "PIM_DP_UFS_BARCODE", "PIIM_DP_SCANNER_OPERATOR_ID", "DICOM_DEVICE_SERIAL_NUMBER",
                "DICOM_ACQUISITION_DATETIME", "PIM_DP_UFS_INTERFACE_VERSION",
            )
        ),
    ),
)  # fmt: skip


def plant_everywhere(write: Callable[..., object], path: Path, **options: object) -> None:
    """A slide of a writer of the tests, SECRET in each text of each directory, and MARK in labels.

    And in macros: all that is small.
    """

    def paint(width: int, height: int, **seed: int) -> np.ndarray:
        pixels = texture(width, height, **seed)
        if width * height <= 320 * 240:
            pixels[:] = MARK
        return pixels

    def plant_and_write(path: Path, pages: Sequence[Page], **kind: bool) -> None:
        for page in _with_sub_pages(pages):
            _plant_page(page)
        write_pages(path, pages, **kind)

    texture = slides.texture
    with ExitStack() as stack:
        for module in (slides, vendor_slides):
            stack.enter_context(patch.object(module, "texture", paint))
            stack.enter_context(patch.object(module, "write_pages", plant_and_write))
        write(path, **options)


def _with_sub_pages(pages: Sequence[Page]) -> Iterator[Page]:
    for page in pages:
        yield page
        yield from _with_sub_pages(page.sub_pages)


def _plant_page(page: Page) -> None:
    """SECRET in each text tag of a page, in what is there as in what is not."""
    for code, kind in _BYTE_TAGS.items():
        old = page.tags.get(code, (kind, f"<x>{SECRET}</x>".encode()))
        page.tags[code] = (old[0], _in_text(bytes(old[1]).decode()).encode())
    for code in (270, 305, *_TEXT_TAGS):
        _, text = page.tags.get(code, (ASCII, SECRET))
        page.tags[code] = (ASCII, _in_text(text) if code == 270 else f"{text} {SECRET}".strip())
    if 65421 in page.tags:  # Hamamatsu's map of properties
        page.tags[65449] = (ASCII, f"NDP.S/N={SECRET}\r\nUser={SECRET}\r\nPatient={SECRET}\r\n")


def _in_text(text: str) -> str:
    if text.startswith("Aperio"):
        return text + "".join(f"|{key} = {SECRET}" for key in _APERIO_KEYS)
    if text.startswith("<") and SECRET not in text:
        for old, new in _IN_XML:
            text = text.replace(old, new)
        return text
    return text if SECRET in text else f"{text}\n{SECRET}"


def _plant_seed(name: str, path: Path) -> None:
    """A slide that the fuzzer starts from, with SECRET in its texts."""
    path.write_bytes(seeds.seed(name))
    if path.suffix in (".png", ".jpg"):
        plant_image(path, path)
    else:
        path.write_bytes(plant(path.read_bytes()))
        assert is_planted(path.read_bytes()), name


def _plant_zarr(path: Path) -> None:
    """An OME-Zarr as bioformats2raw lays it out, with SECRET in all its texts, and a macro."""
    macro = np.full((100, 150, 3), MARK, np.uint8)
    for name, pixels, kind in (
        ("0", slides.texture(420, 300), SECRET),
        ("1", macro, "macro image"),
    ):
        omero = {"name": SECRET, "channels": [{"label": SECRET}] * 3}
        texts = {"omero": omero, SECRET: SECRET}
        # zarr leaves out chunks that are all fill value, and the red of MARK is 0.
        write_zarr(path, pixels, name=name, levels=2, fill=1, attributes=texts)
        attributes = json.loads((path / name / ".zattrs").read_text())
        attributes["multiscales"][0] |= {"name": kind, "metadata": {"description": SECRET}}
        (path / name / ".zattrs").write_text(json.dumps(attributes))
        (path / name / "0" / ".zattrs").write_text(json.dumps({SECRET: SECRET}))
    (path / ".zattrs").write_text(json.dumps({"bioformats2raw.layout": 3, SECRET: SECRET}))
    (path / "OME").mkdir()
    (path / "OME/.zattrs").write_text(json.dumps({"series": ["0", "1"], SECRET: SECRET}))
    image = '<Image Name="{0}"><Pixels SizeC="3"><Channel SamplesPerPixel="3"/></Pixels></Image>'
    xml = f"<OME>{image.format(SECRET)}{image.format('macro')}<!-- {SECRET} --></OME>"
    (path / "OME/METADATA.ome.xml").write_text(xml)


def _plant_dicom(folder: Path) -> None:
    """The folder of a DICOM slide with SECRET in each text of each file, and MARK in its labels."""
    from support.dicom_slides import plant_texts, pyramid, write_dicom

    pixels = slides.texture(420, 300)
    levels = pyramid(pixels, (1, 2), tile=(128, 128))
    for path in write_dicom(folder, levels, text=SECRET, mark=MARK):
        plant_texts(path, SECRET)


_SMALL = {"size": (420, 300), "levels": (1, 2)}

EVERYWHERE: dict[str, Callable[[Path], object]] = {
    "every.svs": partial(plant_everywhere, slides.write_svs, **_SMALL, tile=128),
    "every.ndpi": partial(
        plant_everywhere, vendor_slides.write_ndpi, size=(640, 480), levels=(1, 2)
    ),
    "every.ome.tif": partial(
        plant_everywhere, vendor_slides.write_ome, sizes=[(420, 300)], levels=(1, 2)
    ),
    "every.tiff": partial(plant_everywhere, vendor_slides.write_philips, **_SMALL, tile=128),
    "every.scn": partial(
        plant_everywhere, vendor_slides.write_scn, regions=[((60, 40), (400, 260))],
        canvas=(700, 520), levels=(1, 2),
    ),
    "every.zarr": _plant_zarr,
    "every.bif": partial(
        plant_everywhere, vendor_slides.write_ventana, grid=(3, 2), tile=128, levels=(1, 2)
    ),
    **({"every-dicom": _plant_dicom} if find_spec("wsidicom") else {}),
}  # fmt: skip
"""Slides with SECRET in every text, and labels and macros in MARK; each writes a file or folder."""

PLANTED: dict[str, Callable[[Path], object]] = EVERYWHERE | {
    name: partial(_plant_seed, name)
    for name in seeds.NAMES
    if not name.startswith(("trestle", "ome-two"))
}
PLANTED |= {
    name: lambda path, data=data: path.write_bytes(plant(data))
    for name, data in through_tiffslide.seeds().items()
    if name in ("planes.tif", "jpeg-xl.tif")
}
"""Slides of every format and coding with SECRET in texts."""


def has_mark(picture: Image.Image) -> bool:
    """Whether a picture shows the colour of labels and macros."""
    away = np.abs(np.asarray(picture.convert("RGB"), int) - MARK).max(axis=-1)
    return bool((away < 40).any())
