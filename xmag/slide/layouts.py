"""Pyramid of a TIFF slide: a function for each vendor's layout finds the pages of its levels.

A layout names the pages of one pyramid and where they lie on the canvas. Labels, macros and
thumbnails are never among them.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from tifffile import TiffPage

from xmag.errors import UnsupportedSlideError
from xmag.slide import metadata
from xmag.slide.reader import ScaleMetadata, choose_scan, whole_factor

_ASCII, _XMP_TAG = 2, 700
_NDPI_SOURCE_LENS_TAG, _NDPI_FILTER_TAG, _NDPI_CAPTURE_MODE_TAG = 65421, 65434, 65441
_MAX_JPEG_SIDE = 65_500
_LOSSLESS = frozenset({1, 5, 8, 32773, 32946, 34933, 50000, 50013})

_Pages = Sequence[TiffPage]


class NeedsOpenSlideError(UnsupportedSlideError):
    """The slide is laid out in a way that only OpenSlide reads."""


class NeedsTiffslideError(UnsupportedSlideError):
    """Pixels are stored in a way that xmag reads through tiffslide, if at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PageLevel:
    """A page as a level: `size` of the canvas and `origin` of the page on it, in px of the level.

    `downsample` is None where the sizes tell it.
    """

    page: TiffPage
    size: tuple[int, int]
    origin: tuple[int, int] = (0, 0)
    downsample: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TiffLayout:
    """The pyramid chosen from a TIFF file, finest level first."""

    format: str
    levels: tuple[PageLevel, ...]
    metadata: ScaleMetadata


def find_layout(pages: _Pages, region: int | None) -> TiffLayout:
    """The layout of the slide in a TIFF with these pages.

    Raises UnsupportedSlideError where it is none, InputError where `region` is needed or wrong.
    """
    for recognises, layout in _LAYOUTS:
        if recognises(pages[0]):
            return layout(pages, region)
    # A label may come first, which says nothing of the scanner.
    return (_aperio if any(map(_is_aperio, pages)) else _generic)(pages, region)


def page_size(page: TiffPage) -> tuple[int, int]:
    """(width, height) of a page."""
    return page.imagewidth, page.imagelength


def _whole(pages: _Pages) -> tuple[PageLevel, ...]:
    """Levels of pages that are levels just as they are."""
    return tuple(PageLevel(page=page, size=page_size(page)) for page in pages)


def _one_scan(format: str, pages: _Pages, scale: ScaleMetadata, region: int | None) -> TiffLayout:
    """The layout of a file whose one scan has these pages as levels; a z-stack is refused."""
    _refuse_planes(pages[0], pages[1:])
    choose_scan([page_size(pages[0])], region)
    return TiffLayout(format=format, levels=_whole(pages), metadata=scale)


def _is_associated(page: TiffPage) -> bool:
    """Whether a page says that it is a label, a macro (8) or a thumbnail."""
    return bool(page.subfiletype & 8) or metadata.associated_kind(page.description) is not None


def _scan_pages(pages: _Pages) -> list[TiffPage]:
    """The pages that do not say they are something else; UnsupportedSlideError without any."""
    kept = [page for page in pages if not _is_associated(page)]
    if not kept:
        raise only_associated()
    return kept


def associated_pages(pages: _Pages, layout: TiffLayout) -> dict[str, TiffPage]:
    """The pages beside the levels of a layout, by what they show: "label", "macro", "thumbnail".

    "other" is one of which the file does not say it.
    """
    kinds: dict[int, str | None] = {}
    if layout.format == "leica":
        macros = metadata.leica_scans(pages[0].description)[2]
        kinds = {macro.levels[0][2]: "macro" for macro in macros}
    elif layout.format == "ome-tiff":
        images = metadata.ome_images(pages[0].description, _samples(pages))
        kinds = {image.page: metadata.associated_kind(image.name) for image in images}
    levels = {level.page.offset for level in layout.levels}
    found: dict[str, TiffPage] = {}
    for number, page in enumerate(pages):
        kind = kinds.get(number) or _kind(page, layout)
        if kind is None or page.offset in levels:
            continue
        same = sum(name.partition("-")[0] == kind for name in found)
        found[f"{kind}-{same + 1}" if same else kind] = page
    return found


def _kind(page: TiffPage, layout: TiffLayout) -> str | None:
    """Name of what a page shows beside the scan; None where it may be a part of that."""
    if layout.format == "hamamatsu":
        return "macro" if page.tags.valueof(_NDPI_SOURCE_LENS_TAG) == -1 else None
    if (kind := metadata.associated_kind(page.description)) is not None:
        return kind
    if page.subfiletype & 8:
        return "macro"
    if page.is_tiled:
        return None
    return "thumbnail" if layout.format == "aperio" else "other"


def texts(pages: _Pages, layout: TiffLayout) -> dict[str, str]:
    """The text tags of the first level by their names in TIFF, and those of the first page.

    And the fields of Aperio's descriptions, named as OpenSlide does.
    """
    base = layout.levels[0].page
    found = {f"tiff.{name}": text for name, text in _texts(base)}
    if pages[0].offset != base.offset:
        found |= {f"tiff.page-0.{name}": text for name, text in _texts(pages[0])}
    if layout.format == "aperio":
        fields = metadata.aperio_fields(base.description)
        found |= {f"aperio.{name}": value for name, value in fields.items()}
    return found


def _texts(page: TiffPage) -> Iterator[tuple[str, str]]:
    for tag in page.tags:
        if tag.code == _XMP_TAG:
            yield tag.name, _xmp(page)
        elif tag.dtype == _ASCII and isinstance(tag.value, str):
            yield tag.name, tag.value


def only_associated() -> UnsupportedSlideError:
    """The error for a file without a scan."""
    return UnsupportedSlideError(
        "the file holds nothing but what is called a label, a macro, an overview or a thumbnail;"
        " expected a scan. Open the file of the scan"
    )


def _is_reduced(base: TiffPage, page: TiffPage) -> bool:
    """Whether `page` may show what `base` does, smaller: of its shape, rounded, and no label."""
    (width, height), (w, h) = page_size(base), page_size(page)
    # Nobody keeps a small copy of what was stored with loss without; labels often are.
    is_label = page.compression in _LOSSLESS and base.compression not in _LOSSLESS
    similar = (w - 1) * height <= (h + 1) * width and (h - 1) * width <= (w + 1) * height
    return w < width and h < height and similar and not is_label and not _is_associated(page)


def _refuse_planes(base: TiffPage, others: _Pages) -> None:
    """Raise UnsupportedSlideError where pages as large as `base` make a z-stack of it."""
    same = sum(page_size(page) == page_size(base) for page in others)
    if same:
        raise _stack(f"{same + 1} images of {base.imagewidth}x{base.imagelength} px")


def _stack(what: str) -> UnsupportedSlideError:
    return UnsupportedSlideError(
        f"the file holds {what}: a z-stack, time series or fluorescence channels, which xmag does"
        " not read. Export one focal plane of a brightfield scan"
    )


def _is_aperio(page: TiffPage) -> bool:
    return page.description.startswith("Aperio")


def _aperio(pages: _Pages, region: int | None) -> TiffLayout:
    """Layout of an Aperio slide: its largest tiled page, and those of its shape, in any order."""
    tiled = [page for page in _scan_pages(pages) if page.is_tiled]
    if not tiled:
        raise UnsupportedSlideError("no page of the scan in the Aperio file has tiles")
    tiled.sort(key=page_size, reverse=True)
    base = tiled[0]
    _refuse_planes(base, tiled[1:])
    signed = next(page for page in (base, *pages) if _is_aperio(page))
    scale = _or_resolution(metadata.aperio_scale(signed.description), base)
    levels = [base, *(page for page in tiled if _is_reduced(base, page))]
    return _one_scan("aperio", levels, scale, region)


def _philips(pages: _Pages, region: int | None) -> TiffLayout:
    """Layout of a Philips slide: levels padded to whole tiles, true sizes from the px spacings."""
    tiled = [page for page in _scan_pages(pages) if page.is_tiled]
    spacings = metadata.philips_spacings(pages[0].description)
    if not tiled or len(spacings) != len(tiled):
        raise ValueError(f"{len(tiled)} levels, but {len(spacings)} px spacings")
    choose_scan([page_size(tiled[0])], region)
    width, height = page_size(tiled[0])
    levels = []
    for page, spacing in zip(tiled, spacings, strict=True):
        k = round(sum(fine / base for fine, base in zip(spacing, spacings[0], strict=True)) / 2)
        size = (width // k, height // k)
        levels.append(PageLevel(page=page, size=size, downsample=float(k)))
    scale = ScaleMetadata(mpp=spacings[0], mpp_source="Philips DICOM_PIXEL_SPACING")
    return TiffLayout(format="philips", levels=tuple(levels), metadata=scale)


def _leica(pages: _Pages, region: int | None) -> TiffLayout:
    """Layout of a Leica slide: scans on one canvas, the whole slide, in OpenSlide's coordinates."""
    slide_nm, scans, _ = metadata.leica_scans(pages[0].description)
    scans = [scan for scan in scans if scan.illumination == "brightfield"]
    if not scans:
        raise UnsupportedSlideError("none of the scans in the Leica file is brightfield")
    scan = scans[choose_scan([scan.levels[0][:2] for scan in scans], region)]
    if scan.planes > 1:
        raise _stack(f"{scan.planes} planes of each level")
    levels = []
    for number, (_, _, page) in enumerate(scan.levels):
        # OpenSlide puts all scans on the canvas at the scale of the finest.
        nm = min(s.size_nm[0] / s.levels[number][0] for s in scans if number < len(s.levels))
        levels.append(
            PageLevel(
                page=pages[page],
                size=(math.ceil(slide_nm[0] / nm), math.ceil(slide_nm[1] / nm)),
                origin=(int(scan.offset_nm[0] / nm), int(scan.offset_nm[1] / nm)),
            )
        )
    x, y = (scan.size_nm[i] / scan.levels[0][i] / 1e3 for i in (0, 1))
    scale = ScaleMetadata(mpp=(x, y), mpp_source="Leica view size", objective_power=scan.power)
    return TiffLayout(format="leica", levels=tuple(levels), metadata=scale)


def _xmp(page: TiffPage) -> str:
    value = page.tags.valueof(_XMP_TAG, default=b"")
    return bytes(value).decode("utf-8", "replace").rstrip("\0")


def _ventana(pages: _Pages, region: int | None) -> TiffLayout:
    levels = [page for page in pages if "level=" in page.description]
    if not levels:
        raise UnsupportedSlideError("the Ventana file holds no page that is called a level")
    encoding = _xmp(levels[0])
    if "EncodeInfo" in encoding and metadata.ventana_is_stitched(encoding):
        raise NeedsOpenSlideError("its tiles overlap or are scattered")
    scale = _or_resolution(metadata.ventana_scale(_xmp(pages[0])), levels[0])
    return _one_scan("ventana", levels, scale, region)


def _hamamatsu(pages: _Pages, region: int | None) -> TiffLayout:
    """Layout of a Hamamatsu slide: pages with a positive lens, not macro or focus map."""
    levels = [page for page in pages if (page.tags.valueof(_NDPI_SOURCE_LENS_TAG) or 0) > 0]
    if not levels:
        raise UnsupportedSlideError("the NDPI file holds no page taken through an objective")
    # Capture mode 0 is brightfield, 16 one in grey, all others are fluorescence; older scanners
    # give the filter set alone (Bio-Formats, NDPIReader).
    mode = levels[0].tags.valueof(_NDPI_CAPTURE_MODE_TAG)
    filters = str(levels[0].tags.valueof(_NDPI_FILTER_TAG, default="")).strip("\0 ")
    if mode or (mode is None and filters):
        seen = f"capture mode {mode}" if mode else "the name of a filter set"
        raise UnsupportedSlideError(
            f"the NDPI file has {seen}, which means fluorescence or grey; xmag reads brightfield"
            " scans in colour"
        )
    if levels[0].jpegheader is None and max(page_size(levels[0])) > _MAX_JPEG_SIDE:
        raise NeedsOpenSlideError("it has no restart markers that would cut it into tiles")
    power = float(levels[0].tags.valueof(_NDPI_SOURCE_LENS_TAG))
    scale = replace(_resolution(levels[0]), objective_power=power)
    return _one_scan("hamamatsu", levels, scale, region)


def _ome(pages: _Pages, region: int | None) -> TiffLayout:
    listed = metadata.ome_images(pages[0].description, _samples(pages))
    images = [image for image in listed if metadata.associated_kind(image.name) is None]
    if listed and not images:
        raise only_associated()
    if not images or len({image.file for image in images}) > 1:
        raise UnsupportedSlideError(
            "the pixels of the OME-TIFF lie in several files, or in another one; xmag reads"
            " OME-TIFF that is one file"
        )
    image = images[choose_scan([page_size(pages[image.page]) for image in images], region)]
    if image.planes > 1:
        raise _stack(f"{image.planes} planes of each image")
    base = pages[image.page]
    return TiffLayout(
        format="ome-tiff",
        levels=_whole([base, *_sub_pages(base)]),
        metadata=_or_resolution(image.scale, base),
    )


def _samples(pages: _Pages) -> list[int]:
    """The interleaved samples of each page."""
    return [p.samplesperpixel if p.planarconfig == 1 else 1 for p in pages]


def _sub_pages(page: TiffPage) -> list[TiffPage]:
    """The pages that `page` lists as its own reduced versions, and that can be such."""
    subs = page.pages or ()
    return [sub for sub in subs if isinstance(sub, TiffPage) and _is_reduced(page, sub)]


def _trestle(pages: _Pages, _: int | None) -> TiffLayout:
    raise NeedsOpenSlideError(f"the tiles of its {len(pages)} pages overlap")


def _generic(pages: _Pages, region: int | None) -> TiffLayout:
    """Layout of any other TIFF: scans are pages that are not reduced, then come their levels."""
    scans: list[list[TiffPage]] = []
    for page in _scan_pages(pages):
        fitting = (
            scan
            for scan in reversed(scans)
            if _is_reduced(scan[-1], page) and whole_factor(page_size(scan[-1]), page_size(page))
        )
        larger = next(fitting, None)
        if page.is_tiled and larger is not None:
            larger.append(page)
        elif not page.subfiletype & 1 and (page.is_tiled or not scans):
            scans.append([page, *_sub_pages(page)])
    if not scans:
        raise UnsupportedSlideError("the TIFF holds only reduced images, and no full one")
    # What is kept in strips before a larger image in tiles is a thumbnail, a label or a macro.
    first, *others = (scan[0] for scan in scans)
    if others and not first.is_tiled and page_size(first) < max(map(page_size, others)):
        del scans[0]
    for scan in scans:
        _refuse_planes(scan[0], [other[0] for other in scans if other is not scan])
    chosen = scans[choose_scan([page_size(scan[0]) for scan in scans], region)]
    return TiffLayout(format="tiff", levels=_whole(chosen), metadata=_resolution(chosen[0]))


def _or_resolution(found: ScaleMetadata, page: TiffPage) -> ScaleMetadata:
    """Scale in a vendor's text, or else in the resolution tags of `page`."""
    if found.mpp is not None:
        return found
    return replace(_resolution(page), objective_power=found.objective_power)


def _resolution(page: TiffPage) -> ScaleMetadata:
    """Scale in the resolution tags of `page`."""
    x, y = page.get_resolution()
    return metadata.resolution_scale(x, y, int(page.resolutionunit))


_LAYOUTS: tuple[
    tuple[Callable[[TiffPage], bool], Callable[[_Pages, int | None], TiffLayout]], ...
] = (
    (_is_aperio, _aperio),
    (lambda p: p.software.startswith("Philips") and "DPUfsImport" in p.description, _philips),
    (lambda p: "http://www.leica-microsystems.com/scn/" in p.description, _leica),
    (lambda p: "<iScan" in _xmp(p), _ventana),
    (lambda p: _NDPI_SOURCE_LENS_TAG in p.tags, _hamamatsu),
    (lambda p: p.description.rstrip().endswith("OME>"), _ome),
    (lambda p: p.software.startswith("MedScan"), _trestle),
)
"""By the first page of a file, the layout of its vendor."""
