"""The slides that the benchmarks read: 40x and 20x, JPEG and JPEG 2000, in the manner of Aperio.

    python benchmarks/make_slides.py FOLDER [--size 48000 40000] [--dicom]

Writes 40x and 20x slides as JPEG YCbCr 4:2:0, JPEG RGB and JPEG 2000 in YCbCr (33003) and RGB
(33005); what lies there already is kept. With --dicom, the JPEG slides are written as DICOM too,
tiles as they are: the first level as FOLDER/dicom/*.dcm of the same name, all else beside it. Needs
the folder of real data, ../shared, beside the repository: its generator writes the JPEG slides,
which the JPEG 2000 slides are made from.
"""

import argparse
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from common import usable_cores
from support.slides import J2K_RGB, J2K_YCBCR, RGB, shrunk, to_ycbcr
from support.tiff import ASCII, LONG, SHORT, Page, write_pages

from xmag.slide import Slide
from xmag.slide.reader import Pixels
from xmag.tissue import find_tissue

GENERATOR = Path(__file__).parents[2] / "shared" / "tools" / "make_slide.py"
TILE_PX = 256
PATTERN = 16
"""Tiles after which the tissue of a JPEG 2000 slide repeats: few are left to be encoded."""
JPEG_2000 = {
    "irreversible": True, "num_resolutions": 6, "progression": "LRCP", "no_jp2": True,
    "quality_mode": "rates", "quality_layers": [14],
}  # fmt: skip
"""Aperio's "Q=70": the 9/7 wavelet in 6 resolutions, one layer, at most 14 kB a tile."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, nargs=2, default=[48_000, 40_000], metavar=("W", "H"))
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--dicom", action="store_true", help="write the JPEG slides as DICOM too")
    args = parser.parse_args()
    folder, size = args.folder, tuple(args.size)
    if not GENERATOR.exists():
        sys.exit(f"there is no {GENERATOR.name} in {GENERATOR.parent}; it writes the JPEG slides")
    folder.mkdir(parents=True, exist_ok=True)
    for power in (40, 20):
        for color in ("ycc420", "rgb444"):
            path = folder / f"s{power}_{color}.svs"
            if not path.exists():
                options = ["--mag", str(power), "--color", color]
                options += ["--size", *map(str, size), "--threads", str(args.threads)]
                subprocess.run([sys.executable, GENERATOR, path, *options], check=True)
            copy = folder / "dicom" / f"{path.stem}.dcm"
            if args.dicom and not copy.exists():
                from support.dicom_slides import tiff_frames, write_dicom_beside

                write_dicom_beside(copy, tiff_frames(path))
        for compression in (J2K_YCBCR, J2K_RGB):
            path = folder / f"s{power}_j2k_{compression}.svs"
            if not path.exists():
                write_jpeg2000(path, folder / f"s{power}_rgb444.svs", compression, power, size)
                print(f"{path} {path.stat().st_size / 1e6:.1f} MB")


def write_jpeg2000(
    path: Path, source: Path, compression: int, power: int, size: tuple[int, int]
) -> None:
    """A slide with the texture of `source`, and tissue where that has it, tile by tile."""
    with Slide(source) as slide:
        tissue = find_tissue(slide)
        pattern = densest(slide, tissue.mask, tissue.downsample)
    # As many tiles as four halvings can share.
    across, down = (side // TILE_PX // 16 * 16 for side in size)
    rows = np.arange(down) * tissue.mask.shape[0] // down
    columns = np.arange(across) * tissue.mask.shape[1] // across
    is_tissue = tissue.mask[np.ix_(rows, columns)]
    glass = np.full_like(pattern, 243)
    pages = []
    for downsample in (1, 4, 16):
        scaled = [shrunk(pixels, downsample) for pixels in (glass, pattern)]
        pages.append(page(scaled, is_tissue, downsample, compression, power))
    write_pages(path, pages, big=True)


def densest(slide: Slide, mask: np.ndarray, downsample: float) -> Pixels:
    """A square of PATTERN tiles from where the slide has the most tissue."""
    side = round(PATTERN * TILE_PX / downsample)
    sums = np.pad(mask.astype(np.int64), ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    held = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    y, x = np.unravel_index(held.argmax(), held.shape)
    corner = (int(x * downsample), int(y * downsample))
    return slide.read_region(corner, (PATTERN * TILE_PX, PATTERN * TILE_PX))


def page(
    scaled: list[Pixels], is_tissue: np.ndarray, downsample: int, compression: int, power: int
) -> Page:
    """A level: `scaled` are glass and tissue, of which each cell of TILE_PX shows one."""
    cell = TILE_PX // downsample
    down, across = (-(-n // downsample) for n in is_tissue.shape)
    height, width = (n * TILE_PX // downsample for n in is_tissue.shape)

    def shows(row: int, column: int) -> tuple[int, int, bytes]:
        """What tells the pixels of a tile from those of others: place in the pattern, cells."""
        cells = is_tissue[
            row * downsample : (row + 1) * downsample,
            column * downsample : (column + 1) * downsample,
        ]
        period = max(PATTERN // downsample, 1)
        cells = np.pad(cells, [(0, downsample - n) for n in cells.shape])
        return row % period, column % period, cells.tobytes()

    def encoded(key: tuple[int, int, bytes]) -> bytes:
        row, column, cells = key
        side = len(scaled[0])
        at = np.ix_(*((n * TILE_PX + np.arange(TILE_PX)) % side for n in (row, column)))
        glass, tissue = (pixels[at] for pixels in scaled)
        mask = np.frombuffer(cells, bool).reshape(downsample, downsample)
        mask = mask.repeat(cell, 0).repeat(cell, 1)
        return encode(np.where(mask[..., None], tissue, glass), compression)

    keys = [shows(row, column) for row in range(down) for column in range(across)]
    streams = {key: encoded(key) for key in set(keys)}
    base = f"{is_tissue.shape[1] * TILE_PX}x{is_tissue.shape[0] * TILE_PX}"
    arrow = f" -> {width}x{height}" if downsample > 1 else ""
    description = (
        f"Aperio Image Library v11.2.1 \r\n{base} [0,0 {base}] ({TILE_PX}x{TILE_PX}){arrow}"
        f" J2K/KDU Q=70|AppMag = {power}|MPP = {10 / power}"
    )
    tags = {
        254: (LONG, 0), 256: (LONG, width), 257: (LONG, height), 258: (SHORT, [8, 8, 8]),
        259: (SHORT, compression), 262: (SHORT, RGB), 270: (ASCII, description),
        277: (SHORT, 3), 284: (SHORT, 1), 322: (LONG, TILE_PX), 323: (LONG, TILE_PX),
    }  # fmt: skip
    return Page(tags, [streams[key] for key in keys])


def encode(pixels: Pixels, compression: int) -> bytes:
    """A tile as Aperio's encoder makes it."""
    rgb = compression == J2K_RGB
    file = io.BytesIO()
    image = Image.fromarray(pixels if rgb else to_ycbcr(pixels))
    image.save(file, "JPEG2000", mct=int(rgb), **JPEG_2000)
    return file.getvalue()


if __name__ == "__main__":
    main()
