"""Slide -> uint8 tiles: xmag against per-tile reading, and against the bare decoder.

    python benchmarks/tiles.py SLIDE... [--of all tissue] [--threads 1 2] [--repeats 5] [--json OUT]

Every contender reads the same tiles of one plan, and opens the slide itself: `all` tiles of the
slide, or those on `tissue` alone. OpenSlide and tiffslide read each tile by itself and resize it.
The floor is the decoder alone, over exactly the source tiles that are needed, whose bytes are in
memory already; it drops what it decodes. Slides to run it on are made by `make_slides.py`.

"grey levels off" compares the pixels with OpenSlide's: the mean absolute difference over all tiles,
that of the worst tile, and the largest of a single px (which clipped colours decide).
"""

import argparse
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
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

BATCH = 32
"""Tiles a batch of xmag: as many as `extract_features` takes on a CPU."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("slides", type=Path, nargs="+")
    parser.add_argument("--of", nargs="+", choices=("all", "tissue"), default=["all", "tissue"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--without", nargs="*", choices=("tiffslide",), default=[])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = [
        measure(path, of, threads, args.repeats, args.without)
        for path in args.slides
        for of in args.of
        for threads in args.threads
    ]
    report("tiles", rows, args.json)


def measure(path: Path, of: str, threads: int, repeats: int, without: list[str]) -> dict[str, Any]:
    """A row of the table: one slide, all or some of its tiles, one number of threads."""
    with Slide(path) as slide:
        plan = plan_tiles(slide, TileSpec(), tissue=find_tissue(slide) if of == "tissue" else None)
        pixels = slide.dimensions
        payloads = needed_bytes(slide, plan)
        shares = [payloads[i::threads] for i in range(threads)]
        decode = bare_decoder(slide, plan)
        contenders = {
            "xmag": lambda: drained(ours(path, plan, threads)),
            "openslide": lambda: drained(per_tile(openslide.OpenSlide, path, plan, threads)),
            "tiffslide": lambda: drained(per_tile(tiffslide.TiffSlide, path, plan, threads)),
            "floor": lambda: drained(in_threads(decode, shares, threads)),
        }
        for name in without:
            del contenders[name]
        seconds = interleaved(contenders, repeats=repeats)
    tiles = len(plan)
    mean, worst, most = compare(
        ours(path, plan, threads), per_tile(openslide.OpenSlide, path, plan, threads)
    )
    rivals = [name for name in seconds if name not in ("xmag", "floor")]
    return {
        "slide": path.stem,
        "px": f"{pixels[0]}x{pixels[1]}",
        "of": of,
        "tiles": tiles,
        "threads": threads,
        "xmag tiles/s": tiles / float(np.median(seconds["xmag"])),
        **{f"x {name}": ratio(seconds[name], seconds["xmag"]) for name in rivals},
        "of the floor": ratio(seconds["xmag"], seconds["floor"]),
        "floor x openslide": ratio(seconds["openslide"], seconds["floor"]),
        "grey levels off": mean,
        "worst tile": worst,
        "worst px": most,
    }


def ours(path: Path, plan: TilePlan, threads: int) -> Iterator[np.ndarray]:
    """The tiles as xmag reads them."""
    with Slide(path) as slide:
        for _, tiles in read_tiles(slide, plan, batch_size=BATCH, threads=threads):
            yield from tiles


def per_tile(
    opener: Callable[[Path], Any], path: Path, plan: TilePlan, threads: int
) -> Iterator[np.ndarray]:
    """The tiles read one by one, from the level that the plan reads, and resized."""
    size, scale = plan.spec.size_px, plan.scale
    side = round(size * scale.factor * scale.reduction)

    def one(corner: list[int]) -> np.ndarray:
        image = slide.read_region(tuple(corner), scale.level, (side, side)).convert("RGB")
        if side != size:
            image = image.resize((size, size), Image.Resampling.BOX)
        return np.asarray(image)

    with opener(path) as slide:
        yield from in_threads(one, plan.coords.tolist(), threads)


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


def in_threads(
    work: Callable[[Any], Any], items: Sequence[Any], threads: int, ahead: int = 64
) -> Iterator[Any]:
    """The results in order; without a pool for one thread."""
    if threads == 1:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(threads) as pool:
        waiting = deque(pool.submit(work, item) for item in items[:ahead])
        for item in items[ahead:]:
            yield waiting.popleft().result()
            waiting.append(pool.submit(work, item))
        yield from (future.result() for future in waiting)


def drained(tiles: Iterable[Any]) -> None:
    """Take all, and keep none: tiles are embedded and dropped."""
    for _ in tiles:
        pass


def compare(tiles: Iterable[np.ndarray], others: Iterable[np.ndarray]) -> tuple[float, float, int]:
    """Absolute differences in grey levels: the mean, that of the worst tile, the largest."""
    means, most = [], 0
    for tile, other in zip(tiles, others, strict=True):
        difference = np.abs(tile.astype(np.int16) - other)
        means.append(float(difference.mean()))
        most = max(most, int(difference.max()))
    return float(np.mean(means)), max(means), most


if __name__ == "__main__":
    main()
