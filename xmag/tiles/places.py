"""Tiles at any places of a slide, read on their own: what sampling needs, and no plan describes."""

from concurrent.futures import Executor

import numpy as np

from xmag.errors import DamagedSlideError, InputError
from xmag.geometry import TileSpec
from xmag.plan import Coords
from xmag.slide import Slide
from xmag.tiles.decoding import Decoding, windows_of
from xmag.tiles.stream import Tiles, finished


def read_places(
    slide: Slide, spec: TileSpec, coords: Coords, *, pool: Executor | None = None
) -> Tiles:
    """The tiles with these top-left corners: uint8 (N, S, S, 3), as `read_tiles` reads them.

    `coords` is int64 (N, 2) in level-0 px, in any order and at any px. A source tile that several
    of them touch is decoded once. The work is done in this thread, or shared among those of `pool`.

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
        if pool is None:
            for run in decoding.runs:
                decoding.decode(run, batches)
        else:
            for future in [pool.submit(decoding.decode, run, batches) for run in decoding.runs]:
                future.result()
    except DamagedSlideError as error:
        raise DamagedSlideError(f"{slide.name}: {error}") from error
    return finished(batches[0], windows, slice(None), spec, pool)
