"""Which pages of a TIFF make up the slide: one function for each vendor's way of laying it out.

A layout names the pages of one pyramid and where they lie on the canvas. Labels, macros and
thumbnails are never among them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tifffile import TiffPage

from xmag.errors import InputError, UnsupportedSlideError
from xmag.slide import metadata
from xmag.slide.reader import ScaleMetadata

_REDUCED = 1
_MACRO = 8
_Pages = Sequence[TiffPage]


@dataclass(frozen=True, slots=True, kw_only=True)
class PageLevel:
    """A page as a level: `size` of the canvas and `origin` of the page on it, in px of the level.

    `stored_size` is the part of the page that holds the image, where the page is padded.
    """

    page: TiffPage
    size: tuple[int, int]
    origin: tuple[int, int] = (0, 0)
    stored_size: tuple[int, int] | None = None


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
    return _generic(pages, region)


def choose(names: Sequence[str], region: int | None) -> int:
    """The index of the scan to read; InputError, listing `names`, where that is not clear."""
    if region is None and len(names) == 1:
        return 0
    listing = ", ".join(f"region={i}: {name}" for i, name in enumerate(names))
    if region is None:
        raise InputError(f"the file holds {len(names)} scans; choose one with {listing}")
    if not 0 <= region < len(names):
        raise InputError(f"region={region!r} is not in the file; it holds {listing}")
    return region


def _page_size(page: TiffPage) -> tuple[int, int]:
    return page.imagewidth, page.imagelength


def _whole(page: TiffPage) -> PageLevel:
    return PageLevel(page=page, size=_page_size(page))


def _is_scaled(base: TiffPage, page: TiffPage) -> bool:
    """Whether `page` has the size of `base` divided by a whole number above 1."""
    return (
        page.imagewidth < base.imagewidth
        and whole_factor(_page_size(base), _page_size(page)) is not None
    )


def whole_factor(base: tuple[int, int], size: tuple[int, int]) -> int | None:
    """The whole k for which `size` is `base` / k, rounded up or down; None if there is none."""
    k = max(1, round(base[0] / size[0]))
    fits = all(b // k <= s <= -(-b // k) for b, s in zip(base, size, strict=True))
    return k if fits else None


def _refuse_planes(base: TiffPage, others: _Pages) -> None:
    """Raise UnsupportedSlideError where pages as large as `base` make a z-stack of it."""
    same = sum(_page_size(page) == _page_size(base) for page in others)
    if same:
        raise UnsupportedSlideError(
            f"the file holds {same + 1} images of {base.imagewidth}x{base.imagelength} px: a"
            " z-stack or time series, which xmag does not read; export one focal plane"
        )


def _is_aperio(page: TiffPage) -> bool:
    return page.description.startswith("Aperio")


def _aperio(pages: _Pages, region: int | None) -> TiffLayout:
    tiled = [page for page in pages if page.is_tiled]
    if not tiled or tiled[0] is not pages[0]:
        raise UnsupportedSlideError("the Aperio file begins with a page without tiles")
    _refuse_planes(tiled[0], tiled[1:])
    choose(["the scan"], region)
    return TiffLayout(
        format="aperio",
        levels=tuple(_whole(page) for page in tiled),
        metadata=metadata.aperio_scale(pages[0].description),
    )


def _generic(pages: _Pages, region: int | None) -> TiffLayout:
    """Scans are pages that are not reduced; the pages that follow one, scaled, are its levels."""
    scans: list[list[TiffPage]] = []
    for page in pages:
        if scans and _is_scaled(scans[-1][0], page) and page.is_tiled:
            scans[-1].append(page)
        elif not page.subfiletype & (_REDUCED | _MACRO) and (page.is_tiled or not scans):
            scans.append([page])
    if not scans:
        raise UnsupportedSlideError("the TIFF holds only reduced images, and no full one")
    for scan in scans:
        _refuse_planes(scan[0], [other[0] for other in scans if other is not scan])
        scan.extend(page for page in scan[0].pages or () if isinstance(page, TiffPage))
    names = [f"{scan[0].imagewidth}x{scan[0].imagelength} px" for scan in scans]
    chosen = scans[choose(names, region)]
    return TiffLayout(
        format="tiff",
        levels=tuple(_whole(page) for page in chosen),
        metadata=_resolution(chosen[0]),
    )


def _resolution(page: TiffPage) -> ScaleMetadata:
    """What the resolution tags of `page` say."""
    x, y = page.get_resolution()
    return metadata.resolution_scale(x, y, int(page.resolutionunit))


_LAYOUTS: tuple[
    tuple[Callable[[TiffPage], bool], Callable[[_Pages, int | None], TiffLayout]], ...
] = ((_is_aperio, _aperio),)
