"""Pixels of windows: tiles decoded, put together and resampled."""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from xmag.cores import usable_cores
from xmag.errors import DamagedSlideError, UnsupportedSlideError
from xmag.geometry import Resample
from xmag.slide.codecs import MAX_TILE_PX, box_average
from xmag.slide.reader import Level, Pixels, RegionReader, SlideReader, TileReader

Box = tuple[float, float, float, float]
"""(left, top, right, bottom)."""

_WHITE = 255
_MAX_DECODED_PX = 1 << 25
"""Decoded px held at once while a large window is resampled."""
_MANY_TILES = 64
"""From so many on a window is decoded by several threads: it is most of what finding tissue takes,
and no tile of the slide is decoded before."""
_MOST_THREADS = 16
_ALIGNED = 1e-6
"""Px within which a box edge counts as lying on a px edge."""


def read_level(
    reader: SlideReader, level: int, reduction: int, xy: tuple[int, int], size: tuple[int, int]
) -> Pixels:
    """The pixels of a window of a level decoded at 1/`reduction`; uint8 (height, width, 3).

    `xy` and `size` (width, height) are in decoded px, and the window lies wholly inside the
    canvas. What the file declares empty is white; a tile without bytes shows the finer level.
    Raises DamagedSlideError, naming level and tile.
    """
    if isinstance(reader, RegionReader):
        return reader.read_region(level, xy, size)
    tiles = cast(TileReader, reader)
    window = np.full((size[1], size[0], 3), _WHITE, np.uint8)
    shape = reader.levels[level]
    end = [shape.origin[axis] + shape.stored[axis] for axis in (0, 1)]

    def paste(run: range) -> None:
        chunks = tiles.read_tile_bytes(level, run)
        width, height = (side // reduction for side in shape.tile_size or (0, 0))
        row = np.empty((height, len(run) * width, 3), np.uint8)
        done = [False] * len(run)
        if threads > 1:
            done = decode_together(tiles, level, chunks, reduction, row)
        for number, (index, data) in enumerate(zip(run, chunks, strict=True)):
            into = row[:, number * width : (number + 1) * width]
            if data is None:
                into[:] = empty_tile(tiles, level, index, reduction)
            elif not done[number]:
                into[:] = decode_tile(tiles, level, index, data, reduction)
        left, top, _, _ = _tile_box(shape, run[0])
        x, y = left // reduction - xy[0], top // reduction - xy[1]
        # Without the padding of tiles at the edges, which may leave nothing for the window.
        right = min(x + row.shape[1], (end[0] - left) // reduction + x, size[0])
        bottom = min(y + height, (end[1] - top) // reduction + y, size[1])
        if right > 0 and bottom > 0:
            part = row[max(-y, 0) : bottom - y, max(-x, 0) : right - x]
            window[max(y, 0) : bottom, max(x, 0) : right] = part

    runs = list(_runs(shape, reduction, xy, size))
    many = sum(map(len, runs)) >= _MANY_TILES
    threads = min(_MOST_THREADS, len(runs), usable_cores()) if many else 1
    if threads > 1:
        with ThreadPoolExecutor(threads, thread_name_prefix="xmag-window") as pool:
            list(pool.map(paste, runs))
    else:
        for run in runs:
            paste(run)
    return window


def check_whole(size: tuple[int, int]) -> None:
    """Raise UnsupportedSlideError where an image beside the scan is too large to read at once."""
    if math.prod(size) > MAX_TILE_PX:
        raise UnsupportedSlideError(
            f"it is {size[0]}x{size[1]} px; expected at most {MAX_TILE_PX} px in all"
        )


def read_whole(reader: SlideReader) -> Pixels:
    """The pixels of the first level, if that is not too large."""
    size = reader.levels[0].size
    check_whole(size)
    return read_level(reader, 0, 1, (0, 0), size)


def decode_together(
    reader: TileReader, level: int, chunks: Sequence[object], reduction: int, row: Pixels
) -> list[bool]:
    """Decode those tiles that a reader decodes together into `row`, side by side; says which."""
    decode_many = getattr(reader, "decode_many", None)
    if decode_many is None:
        return [False] * len(chunks)
    return cast(list[bool], decode_many(level, chunks, reduction, row))


def decode_tile(reader: TileReader, level: int, index: int, data: bytes, reduction: int) -> Pixels:
    """The pixels of a tile from its bytes; DamagedSlideError that says which tile it is."""
    try:
        return reader.decode(level, data, reduction)
    except DamagedSlideError as error:
        row, column = divmod(index, reader.levels[level].tiles_across)
        raise DamagedSlideError(
            f"tile {index} (row {row}, column {column}) of level {level} is damaged: {error}."
            " Copy the file again; xmag never makes up pixels"
        ) from error


def empty_tile(reader: TileReader, level: int, index: int, reduction: int) -> Pixels:
    """The pixels of a tile without bytes, in full tile size at 1/`reduction`.

    They come from the nearest finer level that has bytes there, and are white where none has.
    """
    shape = reader.levels[level]
    left, top, width, height = _tile_box(shape, index)
    edges = (left, top, left + width, top + height)
    x0, y0, x1, y1 = (edge * shape.downsample for edge in edges)
    box = (x0, y0, x1, y1)
    size = (width // reduction, height // reduction)
    for finer in range(level - 1, -1, -1):
        if _has_bytes(reader, finer, box):
            factor = shape.downsample * reduction / reader.levels[finer].downsample
            finest = max(n for n in reader.levels[finer].reductions if n <= factor)
            return read_box(reader, finer, finest, box, size)
    return np.full((size[1], size[0], 3), _WHITE, np.uint8)


def read_box(
    reader: SlideReader, level: int, reduction: int, box: Box, size: tuple[int, int]
) -> Pixels:
    """The pixels of `box`, in level-0 px, averaged to `size` from a level at 1/`reduction`.

    What of the box lies outside the canvas shows the pixels at its edge.
    """
    shape = reader.levels[level]
    x0, y0, x1, y1 = (edge / (shape.downsample * reduction) for edge in box)
    canvas = shape.decoded_size(reduction)
    px_width, px_height = (x1 - x0) / size[0], (y1 - y0) / size[1]
    if px_width * px_height > _MAX_DECODED_PX:
        raise UnsupportedSlideError(
            f"each of the {size[0]}x{size[1]} px asked for covers {px_width:.3g}x{px_height:.3g} px"
            f" of level {level}; expected at most {_MAX_DECODED_PX} px. Ask for more px, or convert"
            " the slide to a pyramid with smaller levels"
        )
    columns = min(size[0], max(1, int(_MAX_DECODED_PX / max(px_width * max(px_height, 1), 1))))
    rows = max(1, int(_MAX_DECODED_PX / (columns * px_width * max(px_height, 1))))
    result = np.empty((size[1], size[0], 3), np.uint8)
    for first, last in _bands(size[1], rows):
        above, below = y0 + first * px_height, y0 + last * px_height
        top, bottom = _span(above, below, canvas[1])
        for start, stop in _bands(size[0], columns):
            west, east = x0 + start * px_width, x0 + stop * px_width
            left, right = _span(west, east, canvas[0])
            window = read_level(reader, level, reduction, (left, top), (right - left, bottom - top))
            inner = (west - left, above - top, east - left, below - top)
            into = (stop - start, last - first)
            result[first:last, start:stop] = resample(window, inner, into, "area")
    return result


def _bands(count: int, step: int) -> Iterator[tuple[int, int]]:
    """[0, count) in parts of `step`."""
    return ((first, min(first + step, count)) for first in range(0, count, step))


def resample(pixels: Pixels, box: Box, size: tuple[int, int], kernel: Resample) -> Pixels:
    """The part `box` of `pixels`, in px of it, at `size` (width, height).

    "area" is the mean over exactly what each output px covers, px cut by an edge counting by
    their share; "lanczos" is Pillow's. What of the box lies outside shows the pixels at the edge.
    """
    height, width = pixels.shape[:2]
    x0, y0, x1, y1 = box
    if kernel == "lanczos":
        inside = (max(x0, 0), max(y0, 0), min(x1, width), min(y1, height))
        resized = Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS, box=inside)
        return np.asarray(resized)
    factor = max(1, round((x1 - x0) / size[0]))
    left, top = round(x0), round(y0)
    right, bottom = left + factor * size[0], top + factor * size[1]
    whole = zip(box, (left, top, right, bottom), strict=True)
    on_edges = all(abs(edge - px) <= _ALIGNED for edge, px in whole)
    if on_edges and left >= 0 and top >= 0 and bottom <= height and right <= width:
        return box_average(pixels[top:bottom, left:right], factor)
    rows = _weighted_sums(pixels.reshape(height, -1), *_area_weights(y0, y1, size[1], height))
    columns = np.ascontiguousarray(rows.reshape(size[1], width, 3).swapaxes(0, 1))
    means = _weighted_sums(
        columns.reshape(width, -1), *_area_weights(x0, x1, size[0], width)
    ).reshape(size[0], size[1], 3)
    return np.ascontiguousarray((means + 0.5).astype(np.uint8).swapaxes(0, 1))


def _area_weights(
    start: float, stop: float, count: int, length: int
) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """(count, k): the px that each of equal parts of [start, stop) covers, and their shares."""
    edges = np.clip(np.linspace(start, stop, count + 1), 0, length)
    lower = np.minimum(edges[:-1], length - _ALIGNED)
    upper = np.maximum(edges[1:], lower + _ALIGNED)
    first = np.floor(lower).astype(np.intp)
    covered = int((np.ceil(upper).astype(np.intp) - first).max())
    indices = first[:, None] + np.arange(covered)
    shares = np.minimum(upper[:, None], indices + 1) - np.maximum(lower[:, None], indices)
    shares = np.clip(shares, 0, None)
    shares /= shares.sum(axis=1, keepdims=True)
    return np.minimum(indices, length - 1), shares.astype(np.float32)


def _weighted_sums(
    rows: NDArray[np.uint8 | np.float32], indices: NDArray[np.intp], weights: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Sums of rows: result[i] is the sum over k of weights[i, k] * rows[indices[i, k]]."""
    total = np.zeros((len(indices), rows.shape[1]), np.float32)
    for k in range(indices.shape[1]):
        total += rows[indices[:, k]] * weights[:, k, None]
    return total


def _span(start: float, stop: float, length: int) -> tuple[int, int]:
    """The whole px that [start, stop) touches in [0, length); at least one."""
    first = min(max(math.floor(start + _ALIGNED), 0), length - 1)
    last = max(min(math.ceil(stop - _ALIGNED), length), first + 1)
    return first, last


def _tile_box(shape: Level, index: int) -> tuple[int, int, int, int]:
    """(left, top, width, height) of a tile on the canvas, in px of the level."""
    assert shape.tile_size is not None
    row, column = divmod(index, shape.tiles_across)
    width, height = shape.tile_size
    return shape.origin[0] + column * width, shape.origin[1] + row * height, width, height


def _runs(
    shape: Level, reduction: int, xy: tuple[int, int], size: tuple[int, int]
) -> Iterator[range]:
    """The tiles under a window in decoded px: each row cut evenly into those decoded at once."""
    assert shape.tile_size is not None
    spans = []
    for axis, tiles in enumerate((shape.tiles_across, shape.tiles_down)):
        start = xy[axis] * reduction - shape.origin[axis]
        stop = start + size[axis] * reduction
        side = shape.tile_size[axis]
        spans.append(range(max(start // side, 0), min(-(-stop // side), tiles)))
    columns, rows = spans
    parts = -(-len(columns) // tiles_at_once(shape, reduction, 16))
    for row in rows:
        first = row * shape.tiles_across + columns.start
        for n in range(parts):
            start, stop = (first + len(columns) * m // parts for m in (n, n + 1))
            yield range(start, stop)


def tiles_at_once(shape: Level, reduction: int, most: int) -> int:
    """Number of tiles of a level to decode side by side: `most`, fewer where they are large."""
    return min(most, max(1, (reduction << 10) ** 2 // math.prod(shape.tile_size or ())))


def are_huge(shape: Level) -> bool:
    """Whether the tiles of a level are so large that only one of them is to be in memory."""
    return 2 * math.prod(shape.tile_size or ()) > _MAX_DECODED_PX


def _has_bytes(reader: TileReader, level: int, box: Box) -> bool:
    """Whether any tile of a level under `box`, in level-0 px, is stored."""
    shape = reader.levels[level]
    x0, x1 = _span(box[0] / shape.downsample, box[2] / shape.downsample, shape.size[0])
    y0, y1 = _span(box[1] / shape.downsample, box[3] / shape.downsample, shape.size[1])
    return any(
        data is not None
        for run in _runs(shape, 1, (x0, y0), (x1 - x0, y1 - y0))
        for data in reader.read_tile_bytes(level, run)
    )
