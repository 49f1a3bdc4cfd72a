"""Cases of damaged TIFFs that are read through tiffslide; what is done with them is as with all."""

import tempfile
from pathlib import Path

import numpy as np
import tifffile
from support.slides import texture

from fuzz.slides import FINE, THEIR_PRINTS, THEIR_WARNINGS, make, outcome, use

__all__ = ["FINE", "THEIR_PRINTS", "THEIR_WARNINGS", "make", "outcome", "seeds", "use"]

_OPTIONS = {
    "planes.tif": {"planarconfig": "separate", "compression": "zlib"},
    "planes-raw.tif": {"planarconfig": "separate"},
    "alpha.tif": {"extrasamples": ["assocalpha"], "compression": "lzw"},
    "png.tif": {"compression": "png"},
    "jpeg-xl.tif": {"compression": "jpegxl"},
    "jpeg-xl-alpha.tif": {"extrasamples": ["unassalpha"], "compression": "jpegxl"},
}


def seeds() -> dict[str, bytes]:
    """The undamaged files by name."""
    found, pixels = {}, texture(420, 300)
    with tempfile.TemporaryDirectory() as folder:
        for name, options in _OPTIONS.items():
            samples = pixels
            if "extrasamples" in options:
                samples = np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)])
            if "planarconfig" in options:
                samples = np.moveaxis(pixels, -1, 0)
            path = Path(folder) / name
            tifffile.imwrite(
                path, samples, tile=(96, 128), photometric="rgb", resolution=(40_000, 40_000),
                resolutionunit=3, **options,
            )  # fmt: skip
            found[name] = path.read_bytes()
    return found
