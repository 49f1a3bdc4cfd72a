"""Small slides in the manner of each vendor, written from known pixels."""

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import imagecodecs
import numpy as np
import simplejpeg
from support.tiff import ASCII, FLOAT, LONG, RATIONAL, SHORT, SLONG, UNDEFINED, Page, write_pages

JPEG, J2K_YCBCR, J2K_RGB = 7, 33003, 33005
_RGB, _YCBCR = 2, 6
_SUBSAMPLINGS = {"ycbcr444": (1, 1), "ycbcr422": (2, 1), "ycbcr420": (2, 2)}


def texture(width: int, height: int, *, seed: int = 0):
    """Pixels like an H&E section: pink stroma, violet nuclei, pale gaps; the same every time."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    rng = np.random.default_rng(seed)
    waves = np.zeros((height, width), np.float32)
    for period in (7, 11, 19, 37, 83, 211):
        angle, phase = rng.uniform(0, 2 * np.pi, 2)
        waves += np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / period + phase)
    nuclei = 1 / (1 + np.exp(-3 * (waves - 1.5)))
    gaps = 1 / (1 + np.exp(3 * (waves + 3)))
    stain = np.stack([nuclei, gaps, 1 - nuclei - gaps], -1) @ np.array(
        [[105, 70, 150], [242, 241, 243], [225, 150, 190]], np.float32
    )
    return np.clip(stain + rng.normal(0, 2, (height, width, 1)), 0, 255).astype(np.uint8)


def shrunk(pixels, factor: int):
    """`pixels` box-averaged; what does not fill a box is cut off, as Aperio does."""
    height, width = pixels.shape[0] // factor * factor, pixels.shape[1] // factor * factor
    blocks = pixels[:height, :width].reshape(height // factor, factor, width // factor, factor, 3)
    return (blocks.mean(axis=(1, 3)) + 0.5).astype(np.uint8)


def tiles_of(pixels, tile: tuple[int, int]) -> Iterator:
    """The tiles of `pixels`, row by row, those at the edges padded with grey."""
    width, height = tile
    for y in range(0, pixels.shape[0], height):
        for x in range(0, pixels.shape[1], width):
            part = pixels[y : y + height, x : x + width]
            whole = np.full((height, width, 3), 128, np.uint8)
            whole[: part.shape[0], : part.shape[1]] = part
            yield whole


def jpeg_segments(stream: bytes) -> Iterator[tuple[int, bytes]]:
    """(marker, segment) of each segment after SOI; the last holds the scan and all that follows."""
    at = 2
    while True:
        marker, length = stream[at + 1], int.from_bytes(stream[at + 2 : at + 4], "big")
        if marker == 0xDA:
            yield marker, stream[at:]
            return
        yield marker, stream[at : at + 2 + length]
        at += 2 + length


def encode_jpeg(pixels, color: str, quality: int = 90) -> bytes:
    """A JPEG stream without JFIF or Adobe marker, as Aperio writes them."""
    if color == "rgb444":
        stream = imagecodecs.jpeg8_encode(
            pixels, level=quality, colorspace="RGB", outcolorspace="RGB"
        )
    else:
        stream = simplejpeg.encode_jpeg(pixels, quality, colorsubsampling=color[-3:])
    kept = [part for marker, part in jpeg_segments(stream) if not 0xE0 <= marker <= 0xEF]
    return b"\xff\xd8" + b"".join(kept)


def abbreviated(stream: bytes) -> tuple[bytes, bytes]:
    """(JPEGTables, stream without them)."""
    tables, rest = b"", b""
    for marker, part in jpeg_segments(stream):
        if marker in (0xDB, 0xC4):
            tables += part
        else:
            rest += part
    return b"\xff\xd8" + tables + b"\xff\xd9", b"\xff\xd8" + rest


def encode_tile(pixels, color: str, quality: int = 90) -> bytes:
    """The bytes of a tile in any of the codings that `page` knows."""
    if color == "j2k-rgb":
        return imagecodecs.jpeg2k_encode(pixels, level=45, codecformat="j2k", mct=True)
    if color == "j2k-ycbcr":
        return imagecodecs.jpeg2k_encode(to_ycbcr(pixels), level=45, codecformat="j2k", mct=False)
    if color == "lzw":
        return imagecodecs.lzw_encode(pixels.tobytes())
    if color == "deflate":
        return imagecodecs.zlib_encode(imagecodecs.delta_encode(pixels, axis=1).tobytes())
    if color == "zstd":
        return imagecodecs.zstd_encode(pixels.tobytes())
    if color == "webp":
        return imagecodecs.webp_encode(pixels, lossless=True)
    if color == "raw":
        return pixels.tobytes()
    return encode_jpeg(pixels, color, quality)


def to_ycbcr(pixels):
    """Full-range BT.601 YCbCr."""
    r, g, b = (pixels[..., i].astype(np.float64) for i in range(3))
    y = 0.299 * r + 0.587 * g + 0.114 * b
    ycbcr = np.stack([y, 128 + (b - y) / 1.772, 128 + (r - y) / 1.402], -1)
    return np.clip(np.rint(ycbcr), 0, 255).astype(np.uint8)


_COMPRESSIONS = {
    "j2k-rgb": J2K_RGB, "j2k-ycbcr": J2K_YCBCR, "lzw": 5, "deflate": 8, "zstd": 50000,
    "webp": 50001, "raw": 1,
}  # fmt: skip


def page(
    pixels,
    *,
    tile: tuple[int, int] = (240, 240),
    color: str = "ycbcr420",
    description: str = "",
    subfiletype: int = 0,
    missing: Sequence[int] = (),
    size: tuple[int, int] | None = None,
    shared_tables: bool = True,
    tags: dict[int, tuple[int, object]] | None = None,
    quality: int = 90,
) -> Page:
    """A tiled page; `size` is what it states where that is not the size of `pixels`."""
    chunks = [encode_tile(part, color, quality) for part in tiles_of(pixels, tile)]
    width, height = size or (pixels.shape[1], pixels.shape[0])
    all_tags = {
        254: (LONG, subfiletype), 256: (LONG, width), 257: (LONG, height),
        258: (SHORT, [8, 8, 8]), 259: (SHORT, _COMPRESSIONS.get(color, JPEG)),
        262: (SHORT, _YCBCR if color.startswith("ycbcr") else _RGB),
        277: (SHORT, 3), 284: (SHORT, 1), 322: (LONG, tile[0]), 323: (LONG, tile[1]),
    }  # fmt: skip
    if color in _SUBSAMPLINGS:
        all_tags[530] = (SHORT, list(_SUBSAMPLINGS[color]))
    if color == "deflate":
        all_tags[317] = (SHORT, 2)
    if description:
        all_tags[270] = (ASCII, description)
    if shared_tables and all_tags[259] == (SHORT, JPEG):
        tables = {abbreviated(chunk)[0] for chunk in chunks}
        assert len(tables) == 1, "tiles do not share their tables"
        all_tags[347] = (UNDEFINED, tables.pop())
        chunks = [abbreviated(chunk)[1] for chunk in chunks]
    all_tags |= tags or {}
    return Page(all_tags, [None if i in missing else chunk for i, chunk in enumerate(chunks)])


def strip_page(pixels, *, rows: int = 64, description: str = "", subfiletype: int = 0) -> Page:
    """An uncompressed page in strips, such as thumbnails and labels are."""
    height, width = pixels.shape[:2]
    tags = {
        254: (LONG, subfiletype), 256: (LONG, width), 257: (LONG, height),
        258: (SHORT, [8, 8, 8]), 259: (SHORT, 1), 262: (SHORT, _RGB), 277: (SHORT, 3),
        278: (LONG, rows), 284: (SHORT, 1), 270: (ASCII, description),
    }  # fmt: skip
    strips = [pixels[y : y + rows].tobytes() for y in range(0, height, rows)]
    return Page(tags, strips, tiled=False)


def write_svs(
    path: Path,
    *,
    size: tuple[int, int] = (1500, 1100),
    mpp: float | None = 0.25,
    power: float | None = 40,
    levels: Sequence[int] = (1, 4, 16),
    tile: int = 240,
    color: str = "ycbcr420",
    pixels=None,
    missing: dict[int, Sequence[int]] | None = None,
    bigtiff: bool = False,
    quality: int = 90,
):
    """An Aperio slide with a thumbnail, a label and a macro; returns the pixels of its base.

    `missing` lists, for each level, the tiles without bytes.
    """
    base = texture(*size) if pixels is None else pixels
    height, width = base.shape[:2]
    fields = "".join(
        f"|{key} = {value}"
        for key, value in (("AppMag", power), ("StripeWidth", 2040), ("MPP", mpp))
        if value is not None
    )
    head = f"Aperio Image Library v11.2.1 \r\n{width}x{height}"
    pages = []
    for number, factor in enumerate(levels):
        scaled = shrunk(base, factor)
        arrow = f" -> {scaled.shape[1]}x{scaled.shape[0]}" if number else ""
        description = f"{head} [0,0 {width}x{height}] ({tile}x{tile}){arrow} JPEG/RGB Q=90{fields}"
        pages.append(
            page(
                scaled,
                tile=(tile, tile),
                color=color,
                description=description,
                quality=quality,
                missing=(missing or {}).get(number, ()),
            )  # fmt: skip
        )
    thumbnail = shrunk(base, max(1, min(width, height) // 100))
    pages.insert(1, strip_page(thumbnail, description=f"{head} -> thumbnail"))
    label = texture(120, 90, seed=7)
    pages.append(strip_page(label, description=f"{head}\r\nlabel 120x90", subfiletype=1))
    pages.append(strip_page(label, description=f"{head}\r\nmacro 120x90", subfiletype=9))
    write_pages(path, pages, big=bigtiff)
    return base


def write_tiff(
    path: Path,
    *,
    size: tuple[int, int] = (1500, 1100),
    mpp: float | None = 0.25,
    levels: Sequence[int] = (1, 2, 4),
    tile: tuple[int, int] = (256, 256),
    color: str = "ycbcr420",
    pixels=None,
    missing: dict[int, Sequence[int]] | None = None,
    bigtiff: bool = False,
    shared_tables: bool = False,
):
    """A pyramid of pages that nobody's name is on; returns the pixels of its base."""
    base = texture(*size) if pixels is None else pixels
    tags = {} if mpp is None else _resolution(mpp)
    pages = [
        page(
            shrunk(base, factor),
            tile=tile,
            color=color,
            subfiletype=1 if number else 0,
            missing=(missing or {}).get(number, ()),
            shared_tables=shared_tables,
            tags=tags,
        )  # fmt: skip
        for number, factor in enumerate(levels)
    ]
    write_pages(path, pages, big=bigtiff)
    return base


def _resolution(mpp: float) -> dict[int, tuple[int, object]]:
    per_cm = 10_000 / mpp
    return {282: (RATIONAL, per_cm), 283: (RATIONAL, per_cm), 296: (SHORT, 3)}


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
    spacings = "".join(
        '<DataObject ObjectType="PixelDataRepresentation"><Attribute Name="DICOM_PIXEL_SPACING"'
        f' Group="0x0028" Element="0x0030" PMSVR="IDoubleArray">"{mpp * k / 1e3:.9f}"'
        f' "{mpp * k / 1e3:.9f}"</Attribute></DataObject>'
        for k in levels
    )
    xml = (
        '<?xml version="1.0" encoding="UTF-8" ?>\n<DataObject ObjectType="DPUfsImport">'
        '<Attribute Name="PIM_DP_SCANNED_IMAGES" Group="0x301D" Element="0x1003" PMSVR="IDataObjectArray">'
        '<Array><DataObject ObjectType="DPScannedImage">'
        '<Attribute Name="PIM_DP_IMAGE_TYPE" Group="0x301D" Element="0x1004" PMSVR="IString">WSI</Attribute>'
        f'<Attribute Name="DICOM_PIXEL_SPACING" PMSVR="IDoubleArray">"{mpp / 1e3:.9f}" "{mpp / 1e3:.9f}"</Attribute>'
        '<Attribute Name="PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE" PMSVR="IDataObjectArray"><Array>'
        f"{spacings}</Array></Attribute></DataObject></Array></Attribute></DataObject>"
    )
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
            )  # fmt: skip
        )
    pages.append(strip_page(texture(90, 60, seed=3), description="Label", subfiletype=1))
    pages.append(strip_page(texture(90, 60, seed=4), description="Macro", subfiletype=1))
    write_pages(path, pages)
    return base


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
    """A Leica SCN of several scans, ((x, y), (width, height)) in level-0 px; returns their pixels."""
    nm = round(mpp * 1000)
    tags = _resolution(mpp)
    whole = f'sizeX="{canvas[0] * nm}" sizeY="{canvas[1] * nm}"'
    macro = texture(260, 200, seed=9)
    pages, images, contents = [page(macro, tile=(256, 256))], [], []
    images.append(
        f'<image name="macro"><pixels sizeX="260" sizeY="200"><dimension sizeX="260" sizeY="200"'
        f' r="0" ifd="0"/></pixels><view {whole} offsetX="0" offsetY="0"/>{_scan_settings("brightfield")}'
        "</image>"
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
    mpp: float = 0.25,
    levels: Sequence[int] = (1, 2, 4),
    overlap: int = 0,
):
    """A Ventana BIF of `grid` tiles that overlap by `overlap` px; returns the pixels of its tiles."""
    columns, rows = grid
    base = texture(columns * tile, rows * tile)
    iscan = f'<iScan Magnification="40" ScanRes="{mpp}" UnitNumber="1"/>'

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
        f'<EncodeInfo Ver="2"><SlideStitchInfo><ImageInfo AOIScanned="1" AOIIndex="0" NumRows="{rows}"'
        f' NumCols="{columns}" Width="{tile}" Height="{tile}" Pos-X="0" Pos-Y="0">{joints}'
        '</ImageInfo></SlideStitchInfo><AoiOrigin><AOI0 OriginX="0" OriginY="0"/></AoiOrigin></EncodeInfo>'
    )
    label = strip_page(texture(90, 60, seed=3), description="Label Image")
    label.tags[700] = (UNDEFINED, f"<Metadata>{iscan}</Metadata>".encode())
    label.tags[305] = (ASCII, "ScanOutputManager 1.1.0.15854")
    pages = [label]
    for level, factor in enumerate(levels):
        description = f"level={level} mag={40 / factor:g} quality=90"
        tags = {700: (UNDEFINED, encoding.encode())} if level == 0 else {}
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
    restart_px: int = 256,
    z_planes: int = 1,
):
    """A Hamamatsu NDPI: each level one JPEG cut into tiles by restart markers; returns the base."""
    base = texture(*size)
    pages = []
    for z in range(z_planes):
        for factor in levels:
            scaled = shrunk(base, factor)
            pages.append(_ndpi_page(scaled, mpp * factor, power / factor, restart_px, z))
    macro = _ndpi_page(texture(320, 240, seed=5), 8.0, -1.0, 320, 0)
    write_pages(path, [*pages, macro], ndpi=True)
    return base


def _ndpi_page(pixels, mpp: float, lens: float, restart_px: int, z: int) -> Page:
    """The MCUs are 16x8 px (4:2:2), `restart_px` wide stretches end with a restart marker."""
    height, width = pixels.shape[:2]
    whole = simplejpeg.encode_jpeg(pixels, 90, colorsubsampling="422")
    stretches, header = [], b""
    # Each stretch is encoded as a JPEG of its own: without prediction across, the scans are the same.
    for y in range(0, height, 8):
        for x in range(0, width, restart_px):
            part = np.ascontiguousarray(pixels[y : y + 8, x : x + restart_px])
            segments = dict(jpeg_segments(simplejpeg.encode_jpeg(part, 90, colorsubsampling="422")))
            scan = segments[0xDA]
            stretches.append(scan[2 + int.from_bytes(scan[2:4], "big") : -2])
    for marker, segment in jpeg_segments(whole):
        if marker == 0xDA:
            header += b"\xff\xdd" + struct.pack(">HH", 4, restart_px // 16)
            segment = segment[: 2 + int.from_bytes(segment[2:4], "big")]
        header += segment
    header = b"\xff\xd8" + header
    stream, starts = header, []
    for number, stretch in enumerate(stretches):
        starts.append(len(stream))
        stream += stretch
        stream += bytes([0xFF, 0xD0 + number % 8]) if number + 1 < len(stretches) else b"\xff\xd9"
    tags = {
        254: (LONG, 0), 256: (LONG, width), 257: (LONG, height), 258: (SHORT, [8, 8, 8]),
        259: (SHORT, JPEG), 262: (SHORT, _YCBCR), 271: (ASCII, "Hamamatsu"), 272: (ASCII, "C13210"),
        277: (SHORT, 3), 278: (LONG, height), 284: (SHORT, 1), 530: (SHORT, [2, 1]),
        65420: (LONG, 1), 65421: (FLOAT, lens), 65422: (SLONG, 0), 65423: (SLONG, 0),
        65424: (SLONG, z * 1000), 65426: (LONG, starts), **_resolution(mpp),
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
            f' PhysicalSizeXUnit="{unit}" PhysicalSizeY="{mpp * per_um}" PhysicalSizeYUnit="{unit}">'
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
