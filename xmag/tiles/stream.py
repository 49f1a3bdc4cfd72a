"""Tiles of one slide: batches of a plan in order, or tiles at any places, read with threads."""

import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from xmag.cores import usable_cores
from xmag.errors import DamagedSlideError, InputError, XmagError, XmagWarning
from xmag.geometry import TileSpec
from xmag.plan import Coords, TilePlan
from xmag.slide import Slide
from xmag.slide.pixels import are_huge, resample
from xmag.slide.reader import Level, Pixels
from xmag.tiles.arena import Tiles
from xmag.tiles.decoding import Damaged, Decoding, Pixels4D, Reading, Windows, in_order, windows_of
from xmag.tissue import find_tissue

_MOSTLY = 0.5
"""Of a source tile, the share that has to be tissue in the mask, which fills gaps and holes."""
_MOST_THREADS = 16
"""More threads than this in one process wait for the GIL more than they decode."""


def read_tiles(
    slide: Slide,
    plan: TilePlan,
    *,
    batch_size: int = 256,
    threads: int | None = None,
    damaged: Damaged = "error",
) -> Iterator[tuple[Coords, Tiles]]:
    """The tiles of `plan` in its order: pairs of coords int64 (B, 2) and uint8 (B, S, S, 3) RGB.

    B is `batch_size` but for the last batch, and for those that lost damaged tiles. Each array is
    the caller's to keep. Closing the iterator early stops the threads.

    Args:
        slide: The open slide that the plan was made for.
        plan: What to read.
        batch_size: Tiles a batch.
        threads: Decoding threads; by default one a usable core, at most 16.
        damaged: What becomes of tiles some of whose bytes do not decode: "error" raises, "drop"
            leaves them out. No pixel is made up in either case.

    Raises:
        InputError: The plan belongs to another slide, or an argument is out of its range.
        DamagedSlideError: Some bytes do not decode.
    """
    rows = read_rows(slide, plan, batch_size=batch_size, threads=threads, damaged=damaged)

    def stream() -> Iterator[tuple[Coords, Tiles]]:
        with closing(rows):
            for numbers, tiles in rows:
                yield plan.coords[numbers], tiles

    return stream()


def read_rows(
    slide: Slide,
    plan: TilePlan,
    *,
    batch_size: int = 256,
    threads: int | None = None,
    damaged: Damaged = "error",
    note: Callable[[Reading], object] | None = None,
) -> Generator[tuple[NDArray[np.int64], Tiles]]:
    """The tiles of `plan` as `read_tiles` has them, with the number of each in it, int64 (B,).

    `note` is called at the end. Warns of source tiles without bytes where there is tissue.
    """
    check_damaged(damaged)
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size!r}; expected at least 1")
    if threads is not None and threads < 1:
        raise InputError(f"threads is {threads!r}; expected at least 1, or None for the default")
    if plan.slide is not None and slide.fingerprint is not None and plan.slide != slide.fingerprint:
        raise InputError(
            f"the plan was made for {plan.slide['name']!r}, not for the content of {slide.name!r};"
            " make a plan for this slide with plan_tiles()"
        )
    if plan.tiles.level0_size != slide.dimensions or plan.tiles.level0_mpp != slide.mpp:
        raise InputError(
            f"the plan is for {plan.tiles.level0_size} px at {plan.tiles.level0_mpp} µm/px, but"
            f" {slide.name!r} has {slide.dimensions} px at {slide.mpp} µm/px; make a plan for this"
            " slide with plan_tiles()"
        )
    level = slide.reader.levels[plan.scale.level]
    workers = 1 if are_huge(level) else threads or default_threads()

    def stream() -> Generator[tuple[NDArray[np.int64], Tiles]]:
        windows = windows_of(plan.coords, plan.scale, plan.spec.size_px, level)
        decoding = Decoding(
            slide.reader,
            plan.scale,
            windows,
            batch_size,
            damaged=damaged,
            hashed=note is not None,
            threads=workers,
        )
        # A batch ahead, so that threads have work while the caller is busy with the one it got.
        ahead = 3 * workers + len(decoding.runs) // max(decoding.batch_count, 1)
        with ThreadPoolExecutor(workers, thread_name_prefix="xmag-tiles") as pool:
            try:
                for number, decoded in enumerate(in_order(decoding, pool, ahead=ahead)):
                    batch = slice(number * batch_size, number * batch_size + len(decoded))
                    rows = np.arange(batch.start, batch.stop)
                    tiles = finished(decoded, windows, batch, plan.spec, pool.map)
                    lost = decoding.lost[batch]
                    if not lost.any():
                        yield rows, tiles
                    elif not lost.all():
                        yield rows[~lost], tiles[~lost]
                if note is not None:
                    note(decoding.reading())
                if decoding.white:
                    _warn_of_white(slide, level, decoding.white, plan)
            except DamagedSlideError as error:
                raise DamagedSlideError(f"{slide.name}: {error}") from error
            finally:
                # A consumer that stops early must not wait for runs that nobody will look at.
                pool.shutdown(wait=True, cancel_futures=True)

    return stream()


def reading_of(slide: Slide, plan: TilePlan, *, threads: int | None = None) -> Reading:
    """The Reading of the tiles of a plan, without decoding them."""
    level = slide.reader.levels[plan.scale.level]
    windows = windows_of(plan.coords, plan.scale, plan.spec.size_px, level)
    decoding = Decoding(slide.reader, plan.scale, windows, 1, damaged="drop", hashed=True)
    with ThreadPoolExecutor(threads or default_threads(), "xmag-look") as pool:
        for _ in pool.map(decoding.look, decoding.runs):
            pass
    return decoding.reading()


def default_threads() -> int:
    """Decoding threads where the caller names none: one a core this process may use, at most 16."""
    return min(_MOST_THREADS, usable_cores())


def check_damaged(damaged: str) -> None:
    """Raise InputError where `damaged` is no policy."""
    if damaged not in get_args(Damaged):
        raise InputError(f"damaged is {damaged!r}; expected 'error' or 'drop'")


def _warn_of_white(slide: Slide, level: Level, white: Sequence[int], plan: TilePlan) -> None:
    """Warn of source tiles without bytes, in any level, where there is tissue in a coarser one."""
    known = None if plan.options.get("roi_sha256") else plan.tissue  # of a region, a part of it
    try:
        mask = find_tissue(slide) if known is None else known
    except XmagError:
        return  # no overview: every tile was asked for, and each is there or declared empty
    assert level.tile_size is not None
    rows, columns = np.divmod(white, level.tiles_across)
    px = level.downsample / mask.downsample
    tiles = np.stack([columns, rows], -1)
    low = ((tiles * level.tile_size + level.origin) * px).astype(int)
    high = np.ceil(((tiles + 1) * level.tile_size + level.origin) * px).astype(int)
    there = [mask.mask[y0:y1, x0:x1] for (x0, y0), (x1, y1) in zip(low, high, strict=True)]
    lost = sum(part.size > 0 and part.mean() >= _MOSTLY for part in there)
    if lost:
        warnings.warn(
            f"{lost} of the source tiles of {slide.name!r} that are read have no bytes, and are"
            " white, where its overview shows tissue; a part of the file's table of tiles may be"
            " lost: compare it with another copy",
            XmagWarning,
            stacklevel=2,
        )


def finished(
    decoded: Pixels4D, windows: Windows, batch: slice, spec: TileSpec, mapped: Callable[..., Any]
) -> Tiles:
    """The tiles of a batch, resampled by `mapped` where `windows` asks for it."""
    if windows.box is None:
        return decoded
    size = (spec.size_px, spec.size_px)
    extents = (windows.end[batch] - windows.start[batch]).tolist()
    boxes = windows.box[batch].tolist()

    def one(i: int) -> Pixels:
        width, height = extents[i]
        return resample(decoded[i, :height, :width], tuple(boxes[i]), size, spec.resample)

    tiles = np.empty((len(decoded), *size, 3), np.uint8)
    for i, pixels in enumerate(mapped(one, range(len(decoded)))):
        tiles[i] = pixels
    return tiles


def read_places(slide: Slide, spec: TileSpec, coords: Coords) -> Tiles:
    """The tiles with these top-left corners: uint8 (N, S, S, 3), as `read_tiles` reads them.

    `coords` is int64 (N, 2) in level-0 px, in any order and at any px. A source tile that several
    of them touch is decoded once, in this thread.

    Raises:
        SlideScaleError: The slide has no µm/px, or is coarser than `spec` tolerates.
        InputError: A tile is not wholly on the slide.
        DamagedSlideError: Some bytes do not decode; no pixel is made up for them.
    """
    scale = slide.scale_for(spec)
    level = slide.reader.levels[scale.level]
    side = spec.size_px * scale.factor * level.downsample * scale.reduction
    outside = (coords < 0) | (coords + side > np.asarray(slide.dimensions) + 1)
    if outside.any():
        x, y = coords[int(outside.any(1).argmax())].tolist()
        raise InputError(
            f"a tile at ({x}, {y}) of {side:.0f} level-0 px is not wholly on {slide.name}, which"
            f" has {slide.dimensions[0]}x{slide.dimensions[1]} px"
        )
    if not len(coords):
        return np.empty((0, spec.size_px, spec.size_px, 3), np.uint8)
    windows = windows_of(coords, scale, spec.size_px, level)
    decoding = Decoding(slide.reader, scale, windows, len(coords))
    batches = {0: decoding.new_batch(0)}
    try:
        for run in decoding.runs:
            decoding.decode(run, batches)
    except DamagedSlideError as error:
        raise DamagedSlideError(f"{slide.name}: {error}") from error
    return finished(batches[0], windows, slice(None), spec, map)
