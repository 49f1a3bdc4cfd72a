"""Tissue masks that are given as files: GeoJSON, or PNG images -> TissueMask."""

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from xmag.errors import InputError
from xmag.geometry import polygons_from_geojson
from xmag.morphology import Bools
from xmag.slide import Slide
from xmag.slide.image import PNG_MAGIC, chunks_of_png
from xmag.slide.scale import check_area
from xmag.tissue import TISSUE_METHOD, TissueMask, find_tissue, px_inside, size_at

MASK_SUFFIXES = (".geojson", ".json", ".png")

GIVEN_METHOD: Mapping[str, Any] = {"name": "given", "parameters": {}}
"""Method of all given masks, as fingerprints have it; each mask's has its sha256 besides."""

_MOST_PX = 1 << 25
"""Most px of an image: all of a glass slide at 8 µm/px. It is held in memory as a whole."""


def tissue_of(slide: Slide, choice: TissueMask | str | PathLike[str] | None) -> TissueMask | None:
    """The tissue of a slide: found, for "auto"; that of a file; or what is given, as it is."""
    if isinstance(choice, TissueMask | None):
        return choice
    return find_tissue(slide) if choice == "auto" else read_mask(choice, slide)


def read_mask(path: str | PathLike[str], slide: Slide) -> TissueMask:
    """The TissueMask in a file: GeoJSON whose inside is tissue, or a PNG of the whole slide.

    GeoJSON is in level-0 px; of the px that `find_tissue` has, those are tissue whose centres lie
    in a polygon, so that what `TissueMask.to_geojson` wrote gives the same mask. A PNG is 0 (black)
    where there is no tissue, and has one other value where there is some; its scale is the slide's
    size by its own. `method` holds the SHA-256 of the file.

    Raises:
        InputError: The file is neither, cannot be read, or an image has more than two values,
            transparent px, too many px, or other proportions than the slide.
        SlideScaleError: The slide's µm/px are unknown.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"the tissue mask {path.name} cannot be read ({error.strerror or error}); expected a"
            " GeoJSON or PNG file"
        ) from None
    try:
        if data.startswith(PNG_MAGIC):
            mask = TissueMask.from_array(_of_png(data), slide)
        else:
            mask = _of_geojson(data, slide)
    except InputError as error:
        raise InputError(f"the tissue mask {path.name}: {error}") from None
    method = {**GIVEN_METHOD, "sha256": hashlib.sha256(data).hexdigest()}
    return replace(mask, method=method)


def _of_geojson(data: bytes, slide: Slide) -> TissueMask:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = ""
    if text.lstrip()[:1] not in ("{", "["):
        raise InputError("it is neither GeoJSON nor PNG; expected one of them")
    mpp, level0_mpp = float(TISSUE_METHOD["parameters"]["mpp"]), slide.known_mpp()
    check_area(slide.dimensions, level0_mpp, slide.name)
    downsample = mpp / level0_mpp
    width, height = size_at(slide, downsample)
    mask = px_inside(polygons_from_geojson(text), (height, width), downsample)
    return TissueMask(mask=mask, mpp=mpp, downsample=downsample, method=GIVEN_METHOD)


def _of_png(data: bytes) -> Bools:
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
    if not 0 < width * height <= _MOST_PX:
        raise InputError(
            f"the image has {width}x{height} px; expected at most {_MOST_PX} px. Write it coarser,"
            " such as at 8 µm/px"
        )
    try:
        with Image.open(chunks_of_png(data), formats=["PNG"]) as image:
            has_alpha = image.mode in ("LA", "RGBA") or "transparency" in image.info
            is_clear = has_alpha and np.asarray(image.convert("RGBA"))[..., 3].min() < 255
            # The numbers of a palette are those of its colours, in any order.
            plain = {"P": "RGB", "RGBA": "RGB", "LA": "L"}.get(image.mode, image.mode)
            array = np.asarray(image.convert(plain) if plain != image.mode else image)
    # Pillow raises SyntaxError and struct.error where a chunk makes no sense.
    except (OSError, ValueError, SyntaxError, struct.error) as error:
        raise InputError(f"the image is damaged ({type(error).__name__}); write it again") from None
    if is_clear:
        raise InputError(
            "the image has transparent px; expected 0 (black) where there is no tissue, and one"
            " other value where there is some"
        )
    # A number a colour.
    values = array if array.ndim == 2 else array @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    found = np.unique(values)
    if len(found) > 2 or (len(found) == 2 and found[0] != 0):
        raise InputError(
            f"the image has {len(found)} values, from {found[0]} to {found[-1]}; expected 0 (black)"
            " where there is no tissue, and one other value where there is some. Is it a picture,"
            " or does it have soft edges?"
        )
    return np.asarray(values > 0)
