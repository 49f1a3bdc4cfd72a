"""Slide -> uint8 tiles: xmag against per-tile reading, and against the bare decoder.

    python benchmarks/tiles.py SLIDE... [--threads 1 2] [--repeats 5] [--json OUT]

Every contender reads the same tiles of one plan, all the tissue of the slide, and opens the slide
itself. OpenSlide and tiffslide read each tile by itself and resize it. The floor is the decoder
alone, over exactly the source tiles that are needed, whose bytes are in memory already; it drops
what it decodes. Slides to run it on are made by `make_slides.py` beside it.

"grey levels off" compares the pixels with OpenSlide's: the mean absolute difference over all tiles,
that of the worst tile, and the largest of a single px (which clipped colours decide).
"""

import argparse
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import tiffslide
from common import interleaved, ratio, report
from PIL import Image

from xmag.geometry import TileSpec
from xmag.plan import TilePlan, plan_tiles
from xmag.slide import Slide
from xmag.tiles import read_tiles
from xmag.tissue import find_tissue


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("slides", type=Path, nargs="+")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = [
        measure(path, threads, args.repeats) for path in args.slides for threads in args.threads
    ]
    report("tiles", rows, args.json)


def measure(path: Path, threads: int, repeats: int) -> dict[str, Any]:
    """A row of the table: one slide, one number of threads."""
    with Slide(path) as slide:
        plan = plan_tiles(slide, TileSpec(), tissue=find_tissue(slide))
        pixels = slide.dimensions
        payloads = needed_bytes(slide, plan)
        shares = [payloads[i::threads] for i in range(threads)]
        decode = bare_decoder(slide, plan)
        seconds = interleaved(
            {
                "xmag": lambda: ours(path, plan, threads),
                "openslide": lambda: per_tile(openslide.OpenSlide(path), plan, threads),
                "tiffslide": lambda: per_tile(tiffslide.TiffSlide(path), plan, threads),
                "floor": lambda: in_threads(decode, shares, threads),
            },
            repeats=repeats,
        )
    tiles = len(plan)
    mean, worst, most = compare(
        ours(path, plan, threads), per_tile(openslide.OpenSlide(path), plan, threads)
    )
    return {
        "slide": path.stem,
        "px": f"{pixels[0]}x{pixels[1]}",
        "tiles": tiles,
        "threads": threads,
        "xmag tiles/s": tiles / float(np.median(seconds["xmag"])),
        "x openslide": ratio(seconds["openslide"], seconds["xmag"]),
        "x tiffslide": ratio(seconds["tiffslide"], seconds["xmag"]),
        "of the floor": ratio(seconds["xmag"], seconds["floor"]),
        "grey levels off": mean,
        "worst tile": worst,
        "worst px": most,
    }


def ours(path: Path, plan: TilePlan, threads: int) -> list[np.ndarray]:
    """The tiles as xmag reads them."""
    with Slide(path) as slide:
        return [tiles for _, tiles in read_tiles(slide, plan, threads=threads)]


def per_tile(slide: Any, plan: TilePlan, threads: int) -> list[np.ndarray]:
    """The tiles read one by one, from the level that the plan reads, and resized."""
    size, side = (
        plan.spec.size_px,
        round(plan.spec.size_px * plan.scale.factor * plan.scale.reduction),
    )

    def one(corner: list[int]) -> np.ndarray:
        image = slide.read_region(tuple(corner), plan.scale.level, (side, side)).convert("RGB")
        if side != size:
            image = image.resize((size, size), Image.Resampling.BOX)
        return np.asarray(image)

    with slide:
        return in_threads(one, plan.coords.tolist(), threads)


def needed_bytes(slide: Slide, plan: TilePlan) -> list[bytes]:
    """The bytes of the source tiles that the plan touches, each once."""
    level = slide.reader.levels[plan.scale.level]
    side = plan.spec.size_px * plan.scale.factor * plan.scale.reduction
    needed = set()
    for x, y in (plan.coords / level.downsample).tolist():
        columns = range(int(x // level.tile_size[0]), int((x + side - 1) // level.tile_size[0]) + 1)
        rows = range(int(y // level.tile_size[1]), int((y + side - 1) // level.tile_size[1]) + 1)
        needed |= {row * level.tiles_across + column for row in rows for column in columns}
    return slide.reader.read_tile_bytes(plan.scale.level, sorted(needed))


def bare_decoder(slide: Slide, plan: TilePlan) -> Callable[[list[bytes]], None]:
    """Decodes at the plan's reduction, and does nothing else."""

    def decode(payloads: list[bytes]) -> None:
        for data in payloads:
            slide.reader.decode(plan.scale.level, data, plan.scale.reduction)

    return decode


def in_threads(work: Callable[[Any], Any], items: Iterable[Any], threads: int) -> list[Any]:
    """The results in order; without a pool for one thread."""
    if threads == 1:
        return [work(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, items, chunksize=1))


def compare(batches: list[np.ndarray], others: list[np.ndarray]) -> tuple[float, float, int]:
    """Absolute differences in grey levels: the mean, that of the worst tile, the largest."""
    means, most = [], 0
    for tile, other in zip((tile for batch in batches for tile in batch), others, strict=True):
        difference = np.abs(tile.astype(np.int16) - other)
        means.append(float(difference.mean()))
        most = max(most, int(difference.max()))
    return float(np.mean(means)), max(means), most


if __name__ == "__main__":
    main()
