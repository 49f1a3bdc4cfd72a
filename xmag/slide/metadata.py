"""Parsers of the text that scanners write into their files: scale, scans, levels; no I/O here.

Functions raise ValueError, KeyError or ElementTree's ParseError where a text is not what its
vendor writes; the TIFF reader turns them into DamagedSlideError.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from xmag.slide.reader import ScaleMetadata

UM_PER_UNIT = {"µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6}

_ASSOCIATED = re.compile(
    r"(?P<kind>label|macro|overview|thumbnail|preview|barcode)([ _-]?image)?"
    r"(\s+-.*|\s+\d+\s?x\s?\d+.*|[\s_#\d]*)"
    r"|.*[\W_](?P<image>label|macro|overview|thumbnail)[ _]image"
    r"|\d+x\d+ -> ?\d+x\d+ -.*",
    re.IGNORECASE,
)
"""Line by which vendors mark an associated image: "label 387x463", "Macro -offset=(0,0)", "slide 1
macro image", and Aperio's thumbnail, "2220x2967 -> 574x768 - "."""


def associated_kind(text: str) -> str | None:
    """Kind of image that a description or a name says it is, such as "label" or "macro"; or None.

    As free text may hold any word ("Macrophage CD68"), a whole line has to say so, and what
    Aperio writes behind a bar does not count.
    """
    for line in text.partition("|")[0].splitlines():
        if match := _ASSOCIATED.fullmatch(line.strip("\0 ")):
            return (match["kind"] or match["image"] or "thumbnail").lower()
    return None


def aperio_fields(description: str) -> dict[str, str]:
    """The fields of an Aperio ImageDescription: `... |AppMag = 20|MPP = 0.4990|...`."""
    pairs = (field.partition("=") for field in description.split("|")[1:])
    return {key.strip(): value.strip() for key, _, value in pairs}


def aperio_scale(description: str) -> ScaleMetadata:
    """The scale in an Aperio ImageDescription."""
    return _scale(aperio_fields(description), "MPP", "AppMag", source="Aperio MPP")


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
    for spacing in ElementTree.fromstring(description).iterfind(
        ".//{*}DataObject[@ObjectType='PixelDataRepresentation']"
        "/{*}Attribute[@Name='DICOM_PIXEL_SPACING']"
    ):
        y, x = (float(part) * 1e3 for part in (spacing.text or "").replace('"', " ").split())
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


def leica_scans(
    description: str,
) -> tuple[tuple[int, int], list[LeicaScan], list[LeicaScan]]:
    """(the size of the slide in nm, the scans on it, the images of all of it) in an SCN's XML."""
    collection = _first(ElementTree.fromstring(description), "collection")
    whole = (int(collection.attrib["sizeX"]), int(collection.attrib["sizeY"]))
    images = [_leica_scan(image) for image in collection.iterfind("{*}image")]
    parts: tuple[list[LeicaScan], list[LeicaScan]] = [], []
    for image in images:
        parts[(image.offset_nm, image.size_nm) == ((0, 0), whole)].append(image)
    return whole, *parts


def _leica_scan(image: ElementTree.Element) -> LeicaScan:
    view = _first(image, "view").attrib
    dimensions = image.findall(".//{*}dimension")
    levels = [
        (int(d.attrib["sizeX"]), int(d.attrib["sizeY"]), int(d.attrib["ifd"]))
        for d in dimensions
        if d.get("z", "0") == "0" and d.get("c", "0") == "0"
    ]
    return LeicaScan(
        offset_nm=(int(view["offsetX"]), int(view["offsetY"])),
        size_nm=(int(view["sizeX"]), int(view["sizeY"])),
        levels=tuple(sorted(levels, reverse=True)),
        planes=len({(d.get("z"), d.get("c")) for d in dimensions}),
        illumination=image.findtext(".//{*}illuminationSource", "").strip(),
        power=_number(image.findtext(".//{*}objective")),
    )


def ventana_scale(xml: str) -> ScaleMetadata:
    """The scale in the `iScan` element of a Ventana slide."""
    root = ElementTree.fromstring(xml)
    iscan = root if root.tag.rpartition("}")[2] == "iScan" else _first(root, "iScan")
    return _scale(iscan.attrib, "ScanRes", "Magnification", source="Ventana ScanRes")


def ventana_is_stitched(xml: str) -> bool:
    """Whether the tiles of a Ventana slide overlap, or lie elsewhere than on one regular grid."""
    root = ElementTree.fromstring(xml)
    joints = root.iterfind(".//{*}TileJointInfo")
    if any(float(joint.get(f"Overlap{axis}", 0)) for joint in joints for axis in "XY"):
        return True
    areas = [a for a in root.iterfind(".//{*}ImageInfo") if a.get("AOIScanned") != "0"]
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
        for objective in root.iterfind(".//{*}Objective")
    }
    images: list[OmeImage] = []
    following = 0
    for image in root.iterfind("{*}Image"):
        pixels = _first(image, "Pixels")
        data, uuid = pixels.find("{*}TiffData"), pixels.find("{*}TiffData/{*}UUID")
        page = following if data is None else int(data.get("IFD", following))
        channels = [int(c.get("SamplesPerPixel", 1)) for c in pixels.iterfind("{*}Channel")]
        samples = max(1, *channels, *page_samples[page : page + 1])
        depth = int(pixels.get("SizeZ", 1)) * int(pixels.get("SizeT", 1))
        planes = depth * -(-int(pixels.get("SizeC", 1)) // samples)
        following = page + planes
        objective = image.find("{*}ObjectiveSettings")
        power = None if objective is None else powers.get(objective.get("ID"))
        images.append(
            OmeImage(
                name=image.get("Name") or image.get("ID") or f"image {len(images)}",
                page=page,
                planes=planes,
                file=None if uuid is None else uuid.get("FileName"),
                scale=_ome_scale(pixels, power),
            )
        )
    return images


def _ome_scale(pixels: ElementTree.Element, power: float | None) -> ScaleMetadata:
    """The physical size of pixels; in µm where no unit is named, as the OME schema has it."""
    sizes = []
    for axis in "XY":
        size = _number(pixels.get(f"PhysicalSize{axis}"))
        um = UM_PER_UNIT.get(pixels.get(f"PhysicalSize{axis}Unit", "µm"))
        if size is None or um is None:
            return ScaleMetadata(objective_power=power)
        sizes.append(size * um)
    x, y = sizes
    return ScaleMetadata(mpp=(x, y), mpp_source="OME PhysicalSize", objective_power=power)


def _scale(fields: Mapping[str, str], mpp: str, power: str, *, source: str) -> ScaleMetadata:
    """The scale in two fields, of which either may be missing; pixels are square."""
    um = _number(fields.get(mpp))
    return ScaleMetadata(
        mpp=None if um is None else (um, um),
        mpp_source="" if um is None else source,
        objective_power=_number(fields.get(power)),
    )


def _first(element: ElementTree.Element, name: str) -> ElementTree.Element:
    """The first element called `name` below `element`; ValueError where there is none."""
    found = element.find(f"{{*}}{name}")
    if found is None:
        raise ValueError(f"{element.tag!r} holds no {name!r}")
    return found


def _number(text: str | None) -> float | None:
    """The number that `text` begins with; scanners in some countries write a decimal comma."""
    match = re.match(r"\s*[-+]?\d+([.,]\d+)?([eE][-+]?\d+)?", text or "")
    return float(match[0].replace(",", ".")) if match else None
