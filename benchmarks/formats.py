"""A slide in each container that can be written here -> time a tile: xmag, OpenSlide, tiffslide.

    python benchmarks/formats.py [--size 4000 3000] [--mpp 1.0] [--repeats 5] [--json OUT]

The tiles of one plan, with one thread, and each contender opens the slide itself. OpenSlide and
tiffslide read each tile by itself, from the level that the plan reads, and resize it. "no" is a
slide that they do not open or whose level they do not show. "off OpenSlide" is the mean absolute
difference of the tiles in grey levels, transparent pixels on white; so is "off tiffslide".
"""

import argparse
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import tifffile
import tiffslide
from common import interleaved, report
from PIL import Image
from tiles import compare, drained, ours

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support import vendor_slides
from support.dicom_slides import pyramid as frames
from support.dicom_slides import write_dicom_beside
from support.slides import shrunk, strip_page, texture, write_svs, write_tiff
from support.tiff import write_pages
from support.zarr_slides import write_zarr

from xmag.geometry import TileSpec
from xmag.plan import TilePlan, plan_tiles
from xmag.slide import Slide

MPP, LEVELS = 0.25, (1, 2, 4)
Size = tuple[int, int]


def pyramid(path: Path, size: Size, *, alpha: str = "", planar: bool = False, **options: Any):
    """A pyramid in SubIFDs, as tifffile writes it."""
    base = texture(*size)

    def samples(factor: int) -> np.ndarray:
        pixels = shrunk(base, factor) if factor > 1 else base
        if alpha:
            pixels = np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)])
        return np.moveaxis(pixels, -1, 0) if planar else pixels

    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        for factor in LEVELS:
            writer.write(
                samples(factor), tile=(256, 256), photometric="rgb", metadata=None,
                planarconfig="separate" if planar else "contig",
                extrasamples=[alpha] if alpha else None,
                resolution=(1e4 / MPP / factor,) * 2, resolutionunit="CENTIMETER",
                subfiletype=int(factor > 1), subifds=len(LEVELS) - 1 if factor == 1 else None,
                **options,
            )  # fmt: skip


def strips(path: Path, size: Size) -> None:
    base = strip_page(texture(*size), rows=16)
    scale = (5, 1e4 / MPP)
    base.tags |= {282: scale, 283: scale, 296: (3, 3)}
    write_pages(path, [base])


CONTAINERS: dict[str, tuple[str, Callable[[Path, Size], object]]] = {
    "Aperio, JPEG 4:2:0": ("a.svs", lambda p, s: write_svs(p, size=s, levels=LEVELS)),
    "Aperio, JPEG RGB": ("b.svs", lambda p, s: write_svs(p, size=s, levels=LEVELS, color="rgb444")),
    "Aperio, JPEG 2000": (
        "c.svs", lambda p, s: write_svs(p, size=s, levels=LEVELS, color="j2k-rgb")
    ),
    "TIFF, JPEG 4:2:0": ("a.tif", lambda p, s: write_tiff(p, size=s, levels=LEVELS)),
    "TIFF, deflate": ("b.tif", lambda p, s: write_tiff(p, size=s, levels=LEVELS, color="deflate")),
    "TIFF, WebP": ("c.tif", lambda p, s: write_tiff(p, size=s, levels=LEVELS, color="webp")),
    "OME-TIFF": ("a.ome.tif", lambda p, s: vendor_slides.write_ome(p, sizes=[s], levels=LEVELS)),
    "Philips": ("p.tiff", lambda p, s: vendor_slides.write_philips(p, size=s, levels=LEVELS)),
    "Leica": (
        "l.scn",
        lambda p, s: vendor_slides.write_scn(
            p, regions=[((64, 64), s)], canvas=(s[0] + 128, s[1] + 128), levels=LEVELS
        ),
    ),
    "Ventana": (
        "v.bif",
        lambda p, s: vendor_slides.write_ventana(p, grid=(s[0] // 256, s[1] // 256), levels=LEVELS),
    ),
    "Hamamatsu": (
        "h.ndpi",
        lambda p, s: vendor_slides.write_ndpi(
            p, size=(s[0] // 320 * 320, s[1] // 32 * 32), levels=(1, 2, 4)
        ),
    ),
    "TIFF in strips": ("s.tif", strips),
    "TIFF in planes, deflate": ("d.tif", partial(pyramid, planar=True, compression="zlib")),
    "TIFF, associated alpha": ("e.tif", partial(pyramid, alpha="assocalpha", compression="zlib")),
    "TIFF, PNG": ("f.tif", partial(pyramid, compression="png")),
    "TIFF, JPEG XL": ("g.tif", partial(pyramid, compression="jpegxl")),
    "DICOM, JPEG 4:2:0": (
        "d.dcm", lambda p, s: write_dicom_beside(p, frames(texture(*s), LEVELS, mpp=MPP))
    ),
    "OME-Zarr 0.4": ("z.zarr", lambda p, s: write_zarr(p, texture(*s), chunk=512, mpp=MPP)),
    "OME-Zarr 0.5": (
        "y.zarr", lambda p, s: write_zarr(p, texture(*s), chunk=512, mpp=MPP, zarr_format=3)
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--size", type=int, nargs=2, default=(4000, 3000), help="px of the base")
    parser.add_argument("--mpp", type=float, default=1.0, help="µm/px of the tiles, of 224 px")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=CONTAINERS, default=list(CONTAINERS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # tiffslide's, of what it does not parse
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for container in args.only:
            name, write = CONTAINERS[container]
            path = Path(folder) / name
            write(path, tuple(args.size))
            rows.append(measure(container, path, TileSpec(mpp=args.mpp), args.repeats))
    report("formats", rows, args.json)


def measure(container: str, path: Path, spec: TileSpec, repeats: int) -> dict[str, Any]:
    """A row of the table: one slide."""
    with Slide(path) as slide:
        plan = plan_tiles(slide, spec)
        level = slide.level_dimensions[plan.scale.level]
        reader = type(slide.reader).__name__
    openers = {"OpenSlide": openslide.OpenSlide, "tiffslide": tiffslide.TiffSlide}
    runs = {
        name: partial(per_tile, opener, path, plan, level)
        for name, opener in openers.items()
        if shows(opener, path, level)
    }
    seconds = interleaved(
        {
            "xmag": lambda: drained(ours(path, plan, 1)),
            **{name: lambda run=run: drained(run()) for name, run in runs.items()},
        },
        repeats=repeats,
    )
    row: dict[str, Any] = {"container": container, "reader": reader, "tiles": len(plan)}
    for name in ("xmag", *openers):
        times = seconds.get(name)
        row[f"{name} ms/tile"] = (
            "no" if times is None else 1e3 * float(np.median(times)) / len(plan)
        )
    for name in openers:
        off = compare(ours(path, plan, 1), runs[name]())[0] if name in runs else "no"
        row[f"off {name}"] = off
    return row


def shows(opener: Callable[[Path], Any], path: Path, level: Size) -> bool:
    """Whether a package opens a slide, and has this level of it."""
    try:
        with opener(path) as slide:
            return level in slide.level_dimensions
    except Exception:  # noqa: BLE001 (each package has its own, and many)
        return False


def per_tile(
    opener: Callable[[Path], Any], path: Path, plan: TilePlan, level: Size
) -> Iterator[np.ndarray]:
    """The tiles read one by one, on white, and resized."""
    size, scale = plan.spec.size_px, plan.scale
    side = round(size * scale.factor * scale.reduction)
    with opener(path) as slide:
        number = slide.level_dimensions.index(level)
        for corner in plan.coords.tolist():
            image = slide.read_region(tuple(corner), number, (side, side))
            if image.mode == "RGBA":
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
            if side != size:
                image = image.resize((size, size), Image.Resampling.BOX)
            yield np.asarray(image)


if __name__ == "__main__":
    main()
