"""Parsers of the text that scanners write into their files: scale, scans, levels; no I/O here.

Functions raise ValueError, KeyError or ElementTree's ParseError where a text is not what its
vendor writes; the TIFF reader turns them into DamagedSlideError.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from xmag.slide.reader import ScaleMetadata

_UM_PER_UNIT = {"µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6}

_ASSOCIATED = re.compile(
    r"(label|macro|overview|thumbnail|preview|barcode)([ _-]?image)?"
    r"(\s+-.*|\s+\d+\s?x\s?\d+.*|[\s_#\d]*)"
    r"|.*[\W_](label|macro|overview|thumbnail)[ _]image"
    r"|\d+x\d+ -> ?\d+x\d+ -.*",
    re.IGNORECASE,
)
"""Line by which vendors mark an associated image: "label 387x463", "Macro -offset=(0,0)", "slide 1
macro image", and Aperio's thumbnail, "2220x2967 -> 574x768 - "."""


def is_associated(text: str) -> bool:
    """Whether a description or a name says that an image is a label, a macro or a thumbnail.

    As free text may hold any word ("Macrophage CD68"), a whole line has to say so, and what
    Aperio writes behind a bar does not count.
    """
    lines = text.partition("|")[0].splitlines()
    return any(_ASSOCIATED.fullmatch(line.strip("\0 ")) for line in lines)


def aperio_scale(description: str) -> ScaleMetadata:
    """The scale in an Aperio ImageDescription: `... |AppMag = 20|MPP = 0.4990|...`."""
    pairs = (field.partition("=") for field in description.split("|"))
    fields = {key.strip(): value for key, _, value in pairs}
    mpp = _number(fields.get("MPP"))
    return ScaleMetadata(
        mpp=None if mpp is None else (mpp, mpp),
        mpp_source="" if mpp is None else "Aperio MPP",
        objective_power=_number(fields.get("AppMag")),
    )


def resolution_scale(x: float, y: float, unit: int) -> ScaleMetadata:
    """The scale in TIFF resolution tags: px per `unit` (2 inch, 3 cm; others say nothing).

    1 px is what writers put there who have nothing to say.
    """
    um = {2: 25_400.0, 3: 10_000.0}.get(unit)
    if um is None or x <= 0 or y <= 0 or x == y == 1:
        return ScaleMetadata()
    return ScaleMetadata(mpp=(um / x, um / y), mpp_source="TIFF resolution")


def philips_spacings(description: str) -> list[tuple[float, float]]:
    """(x, y) µm/px of each level of a Philips slide, finest first.

    The XML holds them in mm, as text like `"0.000250" "0.000250"`, the row spacing (y) first.
    """
    spacings = []
    for level in _children(ElementTree.fromstring(description), "DataObject", deep=True):
        if level.get("ObjectType") != "PixelDataRepresentation":
            continue
        for attribute in _children(level, "Attribute"):
            if attribute.get("Name") == "DICOM_PIXEL_SPACING":
                y, x = (
                    float(part) * 1e3 for part in (attribute.text or "").replace('"', " ").split()
                )
                spacings.append((x, y))
    return spacings


@dataclass(frozen=True, slots=True, kw_only=True)
class LeicaScan:
    """One image of a Leica collection: its place in nm, and (width, height, page) of its levels."""

    offset_nm: tuple[int, int]
    size_nm: tuple[int, int]
    levels: tuple[tuple[int, int, int], ...]
    planes: int
    illumination: str
    power: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LeicaCollection:
    """The slide as Leica has it: its size in nm and the scans on it, macro images left out."""

    size_nm: tuple[int, int]
    scans: tuple[LeicaScan, ...]


def leica_collection(description: str) -> LeicaCollection:
    """The Leica collection that the XML of an SCN file describes."""
    root = ElementTree.fromstring(description)
    collection = _first(root, "collection")
    whole = _int_pair(collection, "sizeX", "sizeY")
    scans = (_leica_scan(image) for image in _children(collection, "image"))
    return LeicaCollection(
        size_nm=whole,
        scans=tuple(s for s in scans if (s.offset_nm, s.size_nm) != ((0, 0), whole)),
    )


def _leica_scan(image: ElementTree.Element) -> LeicaScan:
    view = _first(image, "view")
    dimensions = list(_children(image, "dimension", deep=True))
    levels = [
        (int(d.attrib["sizeX"]), int(d.attrib["sizeY"]), int(d.attrib["ifd"]))
        for d in dimensions
        if d.get("z", "0") == "0" and d.get("c", "0") == "0"
    ]
    return LeicaScan(
        offset_nm=_int_pair(view, "offsetX", "offsetY"),
        size_nm=_int_pair(view, "sizeX", "sizeY"),
        levels=tuple(sorted(levels, reverse=True)),
        planes=len({(d.get("z"), d.get("c")) for d in dimensions}),
        illumination=_text(image, "illuminationSource"),
        power=_number(_text(image, "objective")),
    )


def ventana_scale(xml: str) -> ScaleMetadata:
    """The scale in the `iScan` element of a Ventana slide."""
    root = ElementTree.fromstring(xml)
    iscan = root if _local(root) == "iScan" else _first(root, "iScan")
    mpp = _number(iscan.get("ScanRes"))
    return ScaleMetadata(
        mpp=None if mpp is None else (mpp, mpp),
        mpp_source="" if mpp is None else "Ventana ScanRes",
        objective_power=_number(iscan.get("Magnification")),
    )


def ventana_is_stitched(xml: str) -> bool:
    """Whether the tiles of a Ventana slide overlap, or lie elsewhere than on one regular grid."""
    root = ElementTree.fromstring(xml)
    joints = _children(root, "TileJointInfo", deep=True)
    if any(float(joint.get(f"Overlap{axis}", 0)) for joint in joints for axis in "XY"):
        return True
    areas = [a for a in _children(root, "ImageInfo", deep=True) if a.get("AOIScanned") != "0"]
    return len(areas) > 1 or any(float(areas[0].get(f"Pos-{axis}", 0)) for axis in "XY")


@dataclass(frozen=True, slots=True, kw_only=True)
class OmeImage:
    """One image of an OME-TIFF: its name, where its pixels are, and what the XML says of them."""

    name: str
    page: int
    planes: int
    file: str | None
    scale: ScaleMetadata


def ome_images(description: str, page_samples: Sequence[int] = ()) -> list[OmeImage]:
    """The images that an OME-XML lists.

    `page_samples` are the interleaved samples of each page of the file: many writers leave it out
    that a page holds all three channels.
    """
    root = ElementTree.fromstring(description)
    powers = {
        objective.get("ID"): _number(objective.get("NominalMagnification"))
        for objective in _children(root, "Objective", deep=True)
    }
    images: list[OmeImage] = []
    following = 0
    for image in _children(root, "Image"):
        pixels = _first(image, "Pixels")
        data = list(_children(pixels, "TiffData"))
        samples = max(
            (int(c.get("SamplesPerPixel", 1)) for c in _children(pixels, "Channel")), default=1
        )
        page = int(data[0].get("IFD", following)) if data else following
        samples = max(samples, *page_samples[page : page + 1], 1)
        depth = int(pixels.get("SizeZ", 1)) * int(pixels.get("SizeT", 1))
        planes = depth * -(-int(pixels.get("SizeC", 1)) // samples)
        following = page + planes
        settings = next(_children(image, "ObjectiveSettings"), None)
        images.append(
            OmeImage(
                name=image.get("Name") or image.get("ID") or f"image {len(images)}",
                page=page,
                planes=planes,
                file=next(
                    (uuid.get("FileName") for d in data for uuid in _children(d, "UUID")), None
                ),
                scale=_ome_scale(
                    pixels, None if settings is None else powers.get(settings.get("ID"))
                ),
            )
        )
    return images


def _ome_scale(pixels: ElementTree.Element, power: float | None) -> ScaleMetadata:
    """The physical size of pixels; in µm where no unit is named, as the OME schema has it."""
    sizes = []
    for axis in "XY":
        size = _number(pixels.get(f"PhysicalSize{axis}"))
        um = _UM_PER_UNIT.get(pixels.get(f"PhysicalSize{axis}Unit", "µm"))
        if size is None or um is None:
            return ScaleMetadata(objective_power=power)
        sizes.append(size * um)
    return ScaleMetadata(
        mpp=(sizes[0], sizes[1]), mpp_source="OME PhysicalSize", objective_power=power
    )


def _children(
    element: ElementTree.Element, name: str, *, deep: bool = False
) -> Iterator[ElementTree.Element]:
    """The elements called `name`, in whatever namespace, below `element`."""
    return (child for child in (element.iter() if deep else element) if _local(child) == name)


def _first(element: ElementTree.Element, name: str) -> ElementTree.Element:
    """The first element called `name` below `element`; ValueError where there is none."""
    for child in _children(element, name):
        return child
    raise ValueError(f"{_local(element)!r} holds no {name!r}")


def _local(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _text(element: ElementTree.Element, name: str) -> str:
    """The text of the first element called `name` below `element`; "" where there is none."""
    return next((child.text or "" for child in _children(element, name, deep=True)), "").strip()


def _int_pair(element: ElementTree.Element, x: str, y: str) -> tuple[int, int]:
    return int(element.attrib[x]), int(element.attrib[y])


def _number(text: str | None) -> float | None:
    """The number that `text` begins with; scanners in some countries write a decimal comma."""
    match = re.match(r"\s*[-+]?\d+([.,]\d+)?([eE][-+]?\d+)?", text or "")
    return float(match[0].replace(",", ".")) if match else None
