"""Small slides as Philips, Leica, Ventana, Hamamatsu and OME write them, from known pixels."""

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import simplejpeg
from support.slides import (
    JPEG,
    YCBCR,
    jpeg_segments,
    page,
    resolution_tags,
    shrunk,
    strip_page,
    texture,
)
from support.tiff import ASCII, BYTE, FLOAT, LONG, SHORT, SLONG, UNDEFINED, Page, write_pages


def write_philips(
    path: Path,
    *,
    size: tuple[int, int] = (1900, 1300),
    mpp: float = 0.25,
    levels: Sequence[int] = (1, 2, 4),
    tile: int = 256,
    missing: dict[int, Sequence[int]] | None = None,
):
    """A Philips TIFF: level sizes padded to whole tiles, sparse tiles; returns the base."""
    padded = tuple(-(-side // tile) * tile for side in size)
    base = np.full((padded[1], padded[0], 3), 255, np.uint8)
    base[: size[1], : size[0]] = texture(*size)
    xml = philips_xml(levels, mpp)
    pages = []
    for number, k in enumerate(levels):
        scaled = shrunk(base, k)
        stated = tuple(-(-side // tile) * tile for side in (scaled.shape[1], scaled.shape[0]))
        tags = {305: (ASCII, "Philips DP v1.0")}
        pages.append(
            page(
                scaled,
                tile=(tile, tile),
                size=stated,
                tags=tags,
                description=xml if number == 0 else f"level={number}",
                subfiletype=1 if number else 0,
                missing=(missing or {}).get(number, ()),
            )
        )
    pages.append(strip_page(texture(90, 60, seed=3), description="Label", subfiletype=1))
    pages.append(strip_page(texture(90, 60, seed=4), description="Macro", subfiletype=1))
    write_pages(path, pages)
    return base


def philips_xml(levels: Sequence[int], mpp: float) -> str:
    """The description of the first page, which gives the px spacing of each level."""
    spacings = "".join(
        '<DataObject ObjectType="PixelDataRepresentation"><Attribute Name="DICOM_PIXEL_SPACING"'
        f' Group="0x0028" Element="0x0030" PMSVR="IDoubleArray">"{mpp * k / 1e3:.9f}"'
        f' "{mpp * k / 1e3:.9f}"</Attribute></DataObject>'
        for k in levels
    )
    return (
        '<?xml version="1.0" encoding="UTF-8" ?>\n<DataObject ObjectType="DPUfsImport">'
        '<Attribute Name="PIM_DP_SCANNED_IMAGES" PMSVR="IDataObjectArray"><Array>'
        '<DataObject ObjectType="DPScannedImage">'
        '<Attribute Name="PIM_DP_IMAGE_TYPE" PMSVR="IString">WSI</Attribute>'
        '<Attribute Name="DICOM_PIXEL_SPACING" PMSVR="IDoubleArray">'
        f'"{mpp / 1e3:.9f}" "{mpp / 1e3:.9f}"</Attribute>'
        '<Attribute Name="PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE" PMSVR="IDataObjectArray"><Array>'
        f"{spacings}</Array></Attribute></DataObject></Array></Attribute></DataObject>"
    )


def write_scn(
    path: Path,
    *,
    regions: Sequence[tuple[tuple[int, int], tuple[int, int]]] = (
        ((300, 200), (900, 700)),
        ((1500, 1100), (700, 520)),
    ),
    canvas: tuple[int, int] = (2600, 2000),
    mpp: float = 0.25,
    levels: Sequence[int] = (1, 4),
    illumination: str = "brightfield",
    z_planes: int = 1,
):
    """A Leica SCN of scans at ((x, y), (width, height)) in level-0 px; returns their pixels."""
    nm = round(mpp * 1000)
    tags = resolution_tags(mpp)
    whole = f'sizeX="{canvas[0] * nm}" sizeY="{canvas[1] * nm}"'
    macro = texture(260, 200, seed=9)
    pages, images, contents = [page(macro, tile=(256, 256))], [], []
    images.append(
        f'<image name="macro"><pixels sizeX="260" sizeY="200"><dimension sizeX="260" sizeY="200"'
        f' r="0" ifd="0"/></pixels><view {whole} offsetX="0" offsetY="0"/>'
        f"{_scan_settings('brightfield')}</image>"
    )
    for number, ((x, y), (width, height)) in enumerate(regions):
        pixels = texture(width, height, seed=number)
        contents.append(pixels)
        dimensions = ""
        for z in range(z_planes):
            for r, factor in enumerate(levels):
                scaled = shrunk(pixels, factor)
                dimensions += (
                    f'<dimension sizeX="{scaled.shape[1]}" sizeY="{scaled.shape[0]}" r="{r}"'
                    f' z="{z}" ifd="{len(pages)}"/>'
                )
                pages.append(page(scaled, tile=(256, 256), tags=tags))
        images.append(
            f'<image name="scan {number}"><pixels sizeX="{width}" sizeY="{height}">{dimensions}'
            f'</pixels><view sizeX="{width * nm}" sizeY="{height * nm}" offsetX="{x * nm}"'
            f' offsetY="{y * nm}"/>{_scan_settings(illumination)}</image>'
        )
    xml = (
        '<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01">'
        f"<collection {whole}><barcode>MDE=</barcode>{''.join(images)}</collection></scn>"
    )
    pages[0].tags[270] = (ASCII, xml)
    write_pages(path, pages, big=True)
    return contents


def _scan_settings(illumination: str) -> str:
    return (
        "<scanSettings><objectiveSettings><objective>40</objective></objectiveSettings>"
        f"<illuminationSettings><numericalAperture>0.65</numericalAperture>"
        f"<illuminationSource>{illumination}</illuminationSource></illuminationSettings>"
        "</scanSettings>"
    )


def write_ventana(
    path: Path,
    *,
    grid: tuple[int, int] = (6, 4),
    tile: int = 256,
    mpp: float | None = 0.25,
    power: float | None = 40,
    levels: Sequence[int] = (1, 2, 4),
    overlap: int = 0,
    resolution: tuple[float, int] | None = None,
):
    """A Ventana BIF of `grid` tiles that overlap by `overlap` px; returns their pixels."""
    columns, rows = grid
    base = texture(columns * tile, rows * tile)
    said = "" if power is None else f'Magnification="{power:g}" '
    said += "" if mpp is None else f'ScanRes="{mpp}" '
    iscan = f'<iScan {said}UnitNumber="1"/>'

    def number(column: int, row: int) -> int:
        from_below = rows - 1 - row
        return from_below * columns + (columns - 1 - column if from_below % 2 else column) + 1

    joints = "".join(
        f'<TileJointInfo FlagJoined="1" Confidence="95" Direction="{direction}" Tile1="{one}"'
        f' Tile2="{two}" OverlapX="{overlap if direction == "RIGHT" else 0}"'
        f' OverlapY="{overlap if direction == "UP" else 0}"/>'
        for direction, one, two in [
            *(
                ("RIGHT", number(c, r), number(c + 1, r))
                for r in range(rows)
                for c in range(columns - 1)
            ),
            *(
                ("UP", number(c, r + 1), number(c, r))
                for r in range(rows - 1)
                for c in range(columns)
            ),
        ]
    )
    encoding = (
        '<EncodeInfo Ver="2"><SlideStitchInfo><ImageInfo AOIScanned="1" AOIIndex="0"'
        f' NumRows="{rows}" NumCols="{columns}" Width="{tile}" Height="{tile}" Pos-X="0" Pos-Y="0">'
        f'{joints}</ImageInfo></SlideStitchInfo><AoiOrigin><AOI0 OriginX="0" OriginY="0"/>'
        "</AoiOrigin></EncodeInfo>"
    )
    label = strip_page(texture(90, 60, seed=3), description="Label Image")
    label.tags[700] = (BYTE, f"<Metadata>{iscan}</Metadata>\0".encode())
    label.tags[305] = (ASCII, "ScanOutputManager 1.1.0.15854")
    pages = [label]
    for level, factor in enumerate(levels):
        description = f"level={level} mag={40 / factor:g} quality=90"
        tags = {700: (UNDEFINED, encoding.encode())} if level == 0 else {}
        if resolution is not None:
            tags |= resolution_tags(*resolution)
        scaled = shrunk(base, factor)
        pages.append(page(scaled, tile=(tile, tile), description=description, tags=tags))
    write_pages(path, pages, big=True)
    return base


def write_ndpi(
    path: Path,
    *,
    size: tuple[int, int] = (1280, 960),
    mpp: float = 0.25,
    power: float = 40,
    levels: Sequence[int] = (1, 4),
    restart_px: int = 320,
    z_planes: int = 1,
    tags: dict[int, tuple[int, object]] | None = None,
):
    """A Hamamatsu NDPI: each level one JPEG cut into tiles by restart markers; returns the base."""
    base = texture(*size)
    pages = []
    for z in range(z_planes):
        for factor in levels:
            scaled = shrunk(base, factor)
            pages.append(_ndpi_page(scaled, mpp * factor, power / factor, restart_px, z))
    macro = _ndpi_page(texture(320, 240, seed=5), 8.0, -1.0, 320, 0)
    for written in pages:
        written.tags |= tags or {}
    write_pages(path, [*pages, macro], ndpi=True)
    return base


def _ndpi_page(pixels, mpp: float, lens: float, restart_px: int, z: int) -> Page:
    """The MCUs are 16x8 px (4:2:2), `restart_px` wide stretches end with a restart marker."""
    height, width = pixels.shape[:2]
    whole = simplejpeg.encode_jpeg(pixels, 90, colorsubsampling="422")
    stretches, header = [], b""
    # Nothing is predicted across restarts, so each stretch is the scan of a JPEG of its own.
    for y in range(0, height, 8):
        for x in range(0, width, restart_px):
            part = np.ascontiguousarray(pixels[y : y + 8, x : x + restart_px])
            segments = dict(jpeg_segments(simplejpeg.encode_jpeg(part, 90, colorsubsampling="422")))
            scan = segments[0xDA]
            stretches.append(scan[2 + int.from_bytes(scan[2:4], "big") : -2])
    for marker, segment in jpeg_segments(whole):
        if marker == 0xDA:
            header += b"\xff\xdd" + struct.pack(">HH", 4, restart_px // 16)
            header += segment[: 2 + int.from_bytes(segment[2:4], "big")]
        else:
            header += segment
    header = b"\xff\xd8" + header
    stream, starts = header, []
    for number, stretch in enumerate(stretches):
        starts.append(len(stream))
        stream += stretch
        stream += bytes([0xFF, 0xD0 + number % 8]) if number + 1 < len(stretches) else b"\xff\xd9"
    tags = {
        254: (LONG, 0), 256: (LONG, width), 257: (LONG, height), 258: (SHORT, [8, 8, 8]),
        259: (SHORT, JPEG), 262: (SHORT, YCBCR), 271: (ASCII, "Hamamatsu"), 272: (ASCII, "C13210"),
        277: (SHORT, 3), 278: (LONG, height), 284: (SHORT, 1), 530: (SHORT, [2, 1]),
        65420: (LONG, 1), 65421: (FLOAT, lens), 65422: (SLONG, 0), 65423: (SLONG, 0),
        65424: (SLONG, z * 1000), 65426: (LONG, starts), **resolution_tags(mpp),
    }  # fmt: skip
    return Page(tags, [stream], tiled=False)


def write_ome(
    path: Path,
    *,
    sizes: Sequence[tuple[int, int]] = ((1300, 900), (800, 700)),
    mpp: float = 0.25,
    unit: str = "µm",
    levels: Sequence[int] = (1, 2, 4),
    z_planes: int = 1,
    color: str = "ycbcr420",
):
    """An OME-TIFF: an image a scan and a label image, pyramids in SubIFDs; returns the pixels."""
    per_um = {"µm": 1.0, "nm": 1e3, "mm": 1e-3}[unit]
    contents, pages, images = [], [], []
    for number, size in enumerate([*sizes, (120, 90)]):
        name = f"scan {number}" if number < len(sizes) else "label image"
        images.append(
            f'<Image ID="Image:{number}" Name="{name}"><Pixels ID="Pixels:{number}" Type="uint8"'
            f' DimensionOrder="XYCZT" SizeX="{size[0]}" SizeY="{size[1]}" SizeC="3"'
            f' SizeZ="{z_planes}" SizeT="1" PhysicalSizeX="{mpp * per_um}"'
            f' PhysicalSizeXUnit="{unit}" PhysicalSizeY="{mpp * per_um}"'
            f' PhysicalSizeYUnit="{unit}">'
            f'<Channel ID="Channel:{number}:0" SamplesPerPixel="3"/>'
            f'<TiffData IFD="{len(pages)}" PlaneCount="{z_planes}"/></Pixels></Image>'
        )
        pixels = texture(*size, seed=number)
        contents.append(pixels)
        for _ in range(z_planes):
            base = page(pixels, tile=(256, 256), color=color)
            base.sub_pages = [
                page(shrunk(pixels, k), tile=(256, 256), color=color, subfiletype=1)
                for k in levels[1:]
                if number < len(sizes)
            ]
            pages.append(base)
    pages[0].tags[270] = (
        ASCII,
        '<?xml version="1.0" encoding="UTF-8"?>'
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
        f"{''.join(images)}</OME>",
    )
    write_pages(path, pages, big=True)
    return contents[:-1]
