"""Source tiles -> the decoded windows of wanted tiles, each source tile once.

Work is cut into runs of neighbouring source tiles, in row order. A run reads its bytes together,
decodes them, and copies the pixels into the windows that overlap them; a batch of windows is
complete when the last run that touches it is. So memory holds a band of the slide, however large
that is.
"""

import hashlib
import itertools
import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from xmag.errors import DamagedSlideError
from xmag.geometry import ReadScale
from xmag.plan import Coords
from xmag.slide.pixels import decode_tile, decode_together, empty_tile, read_level, tiles_at_once
from xmag.slide.reader import Level, Pixels, SlideReader, TileReader
from xmag.tiles.arena import Recycler

Pixels4D = NDArray[np.uint8]
"""uint8 (B, height, width, 3): decoded windows of the tiles of a batch."""

Damaged = Literal["error", "drop"]
"""Policy for tiles whose bytes are damaged."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Hash and empty source tiles of the file, found by reading the tiles of a plan.

    `sha256` is of the compressed bytes of all source tiles under them, whatever the threads and
    batches; of the pixels where a reader hides the bytes. `empty` is how many source tiles of the
    level that is read the file declares empty; of those under the plan, where it has no list.
    """

    sha256: str
    empty: int = 0


_WHITE = 255
_HASHED_TOGETHER = 8
"""Source tiles that share a hash: another number gives all slides another."""
_MOST_TOGETHER = 32
"""Source tiles that a thread takes at once where many stand in line: it makes the hand-over cheap.
Few threads take as many as are hashed together, which stay in the caches of a core."""
_STACKING_THREADS = 3
"""From so many on they wait for the GIL, which decoding tiles together holds for less; with fewer,
decoding one by one is faster, as codes in a stack take longer."""


@dataclass(frozen=True, slots=True)
class Windows:
    """Area of each tile in decoded px: whole pixels [start, end), and the exact box in them.

    int64 (N, 2) each; `box` is float64 (N, 4), x0 y0 x1 y1 from `start`, or None where the whole
    pixels are the tile.
    """

    start: NDArray[np.int64]
    end: NDArray[np.int64]
    box: NDArray[np.float64] | None


def windows_of(coords: Coords, scale: ReadScale, size_px: int, level: Level) -> Windows:
    """The windows of tiles of `size_px`, with these corners, in the decoded px of their level."""
    corner = coords / (level.downsample * scale.reduction)
    decoded_size = np.floor_divide(level.size, scale.reduction)
    if scale.factor == 1.0:
        start = np.minimum(np.rint(corner).astype(np.int64), decoded_size - size_px)
        return Windows(start, start + size_px, None)
    side = size_px * scale.factor
    # Corners are whole level-0 px: their rounding must not push a window over the edge.
    corner = np.minimum(corner, decoded_size - side)
    start = np.floor(corner + 1e-6).astype(np.int64)
    end = np.minimum(np.ceil(corner + side - 1e-6).astype(np.int64), decoded_size)
    offset = np.maximum(corner - start, 0)
    return Windows(start, end, np.concatenate([offset, offset + side], axis=1))


@dataclass(frozen=True, slots=True)
class Run:
    """Work for one thread: source tiles that are read together, and the batches they end up in.

    They are decoded side by side. `pieces` has a row for what each wanted tile has of each row of
    neighbours among them: wanted tile, its y and x, y and x of the side-by-side, height and width
    in decoded px, and how many wanted tiles go on from there, each where the one before ends.
    """

    sources: list[int]
    pieces: NDArray[np.int64]
    batches: list[int]


class Decoding:
    """Decodes the windows of tiles into batches, a run of source tiles at a time.

    What is damaged is an error, or with `damaged` "drop" noted in `lost`, bool (N,): the windows of
    those tiles hold no pixels. `absent` are source tiles without bytes, and `white` those without
    any in all levels. With `hashed`, `sha256` is there once all runs are done. `threads` is how
    many of this process decode at once.
    """

    def __init__(
        self,
        reader: SlideReader,
        scale: ReadScale,
        windows: Windows,
        batch_size: int,
        *,
        damaged: Damaged = "error",
        hashed: bool = False,
        threads: int = 1,
    ) -> None:
        self._reader, self._scale, self._damaged = reader, scale, damaged
        self._hashed, self._digests = hashed, dict[int, bytes]()
        self._stacking = threads >= _STACKING_THREADS
        self.white: list[int] = []
        self.absent: list[int] = []
        self.lost = np.zeros(len(windows.start), np.bool_)
        # Asked once, because looking for the methods of a protocol is slow.
        self._tile_reader = reader if isinstance(reader, TileReader) else None
        self._level = reader.levels[scale.level]
        self._windows, self._batch_size = windows, batch_size
        count = len(windows.start)
        self.batch_count = -(-count // batch_size)
        extent = (windows.end - windows.start).max(axis=0) if count else (0, 0)
        self._window_shape = (int(extent[1]), int(extent[0]), 3)
        self._memory = Recycler(math.prod((min(count, batch_size), *self._window_shape)))
        width, height = (side // scale.reduction for side in self._level.tile_size or (0, 0))
        self._source_shape = (height, width)
        self._run_tiles = 1
        if self._tile_reader is not None:
            few, most = (
                tiles_at_once(self._level, scale.reduction, n)
                for n in (_HASHED_TOGETHER, _MOST_TOGETHER)
            )
            self._run_tiles = most // few * few if self._stacking else few
        self._rows = Recycler(height * width * self._run_tiles * 3)
        self.runs = self._cut_runs()

    def new_batch(self, number: int) -> Pixels4D:
        """Space for the decoded windows of a batch."""
        count = min(self._batch_size, len(self._windows.start) - number * self._batch_size)
        shape = (count, *self._window_shape)
        covered = self._level.origin == (0, 0) and self._level.stored == self._level.size
        batch = self._memory.empty(shape)
        if not covered:
            # Canvas that the file declares empty is white. Where tiles cover all of it, each byte
            # of a window is about to be written.
            batch.fill(_WHITE)
        return batch

    def decode(self, run: Run, batches: dict[int, Pixels4D]) -> None:
        """Read and decode the source tiles of a run, and copy them into `batches`."""
        if self._tile_reader is not None:
            self._decode_tiles(self._tile_reader, run, batches)
        else:
            self._read_windows(run, batches)

    def _decode_tiles(self, reader: TileReader, run: Run, batches: dict[int, Pixels4D]) -> None:
        row, lost = self._side_by_side(reader, run)
        size = self._batch_size
        for tile, y, x, from_y, from_x, height, width, count in run.pieces.tolist():
            place = slice(tile % size, tile % size + count)
            pixels = row[from_y : from_y + height, from_x : from_x + width * count]
            # Each copy lets go of the GIL, and waits for it: so one for all.
            batches[tile // size][place, y : y + height, x : x + width] = pixels.reshape(
                height, count, width, 3
            ).swapaxes(0, 1)
        for number in lost:
            first, last = number * self._source_shape[1], (number + 1) * self._source_shape[1]
            for tile, _, _, _, from_x, _, width, count in run.pieces.tolist():
                starts = from_x + width * np.arange(count)
                self.lost[tile : tile + count] |= (starts < last) & (starts + width > first)

    def look(self, run: Run) -> None:
        """Read what a run needs for `sha256`, and decode only what has no bytes of its own."""
        if self._tile_reader is None:
            self.decode(run, {batch: self.new_batch(batch) for batch in run.batches})
            return
        reader = self._tile_reader
        self._note(
            run,
            [
                data if isinstance(data, bytes) else self._pixels(reader, source, data)
                for source, data in zip(run.sources, self._chunks(reader, run.sources), strict=True)
            ],
        )

    def sha256(self) -> str:
        """A hash of what was read, in the order of the source tiles, and of where windows lie."""
        digest = hashlib.sha256(self._windows.start.astype("<i8").tobytes())
        for source, part in sorted(self._digests.items()):
            digest.update(source.to_bytes(8, "little") + part)
        return digest.hexdigest()

    def reading(self) -> Reading:
        """The Reading, once all runs are done."""
        return Reading(self.sha256(), self._level.empty_tiles or len(self.absent))

    def _note(self, run: Run, contents: Sequence[bytes | Pixels | None]) -> None:
        """Hash the bytes, or the pixels, of a run's source tiles; None is one that is damaged.

        Some together, which lets go of the GIL once; the same ones with any threads and batches.
        """
        if not self._hashed:
            return
        for at in range(0, len(contents), _HASHED_TOGETHER):
            these = contents[at : at + _HASHED_TOGETHER]
            parts = [c.tobytes() if isinstance(c, np.ndarray) else c or b"" for c in these]
            lengths = np.array([len(part) for part in parts], "<i8").tobytes()
            digest = hashlib.sha256(b"".join((lengths, *parts))).digest()
            self._digests[run.sources[at]] = digest

    def _side_by_side(self, reader: TileReader, run: Run) -> tuple[Pixels, list[int]]:
        """The pixels of the source tiles of a run side by side, and numbers of the damaged ones.

        Damaged ones have no pixels; they are there only where what they touch is dropped.
        """
        chunks, scale = self._chunks(reader, run.sources), self._scale
        height, width = self._source_shape
        row = self._rows.empty((height, len(chunks) * width, 3))
        done = [False] * len(chunks)
        if self._stacking:
            done = decode_together(reader, scale.level, chunks, scale.reduction, row)
        contents, lost = list[bytes | Pixels | None](), []
        for number, (source, data) in enumerate(zip(run.sources, chunks, strict=True)):
            pixels = None if done[number] else self._pixels(reader, source, data)
            if pixels is not None:
                row[:, number * width : (number + 1) * width] = pixels
            elif not done[number]:
                lost.append(number)
            contents.append(data if isinstance(data, bytes) else pixels)
        self._note(run, contents)
        return row, lost

    def _chunks(
        self, reader: TileReader, sources: list[int]
    ) -> list[bytes | DamagedSlideError | None]:
        """The bytes of source tiles, None for one declared empty, or why they cannot be read."""
        try:
            return [*reader.read_tile_bytes(self._scale.level, sources)]
        except DamagedSlideError as error:
            if self._damaged == "error":
                raise
            if len(sources) == 1:
                return [error]
        return [chunk for source in sources for chunk in self._chunks(reader, [source])]

    def _pixels(
        self, reader: TileReader, source: int, data: bytes | DamagedSlideError | None
    ) -> Pixels | None:
        level, reduction = self._scale.level, self._scale.reduction
        try:
            if isinstance(data, DamagedSlideError):
                raise data
            if data is not None:
                return decode_tile(reader, level, source, data, reduction)
            self.absent.append(source)
            pixels = empty_tile(reader, level, source, reduction)
        except DamagedSlideError:
            if self._damaged == "error":
                raise
            return None
        if (pixels == _WHITE).all():
            self.white.append(source)
        return pixels

    def _read_windows(self, run: Run, batches: dict[int, Pixels4D]) -> None:
        (tile,) = run.sources
        x, y = self._windows.start[tile].tolist()
        width, height = (self._windows.end[tile] - self._windows.start[tile]).tolist()
        window = batches[tile // self._batch_size][tile % self._batch_size]
        try:
            pixels = read_level(
                self._reader, self._scale.level, self._scale.reduction, (x, y), (width, height)
            )
            window[:height, :width] = pixels
            self._note(run, [pixels])
        except DamagedSlideError:
            if self._damaged == "error":
                raise
            self.lost[tile] = True
            self._note(run, [None])

    def _cut_runs(self) -> list[Run]:
        if self._tile_reader is None:
            # Without source tiles to share, a wanted tile is its own source.
            nothing = np.empty((0, 8), np.int64)
            count, size = len(self._windows.start), self._batch_size
            return [Run(sources=[n], pieces=nothing, batches=[n // size]) for n in range(count)]
        source, pieces = _overlaps(self._windows, self._level, self._scale.reduction)
        if not len(source):
            return []
        sources, number = np.unique(source, return_inverse=True)
        run, place = np.divmod(number, self._run_tiles)
        pieces[:, 4] += place * self._source_shape[1]
        # Neighbours of a row are side by side, and under one tile make one piece.
        keys = np.stack([run, source // self._level.tiles_across, pieces[:, 0]])
        order = np.lexsort((source, *keys[::-1]))
        keys, pieces = keys[:, order], pieces[order]
        first = np.flatnonzero(np.append(True, (keys[:, 1:] != keys[:, :-1]).any(axis=0)))
        widths = np.add.reduceat(pieces[:, 6], first)
        keys, pieces = keys[:, first], pieces[first]
        pieces[:, 6] = widths
        first, pieces = _in_rows(keys, pieces, self._window_shape[1], self._batch_size)
        bounds = np.searchsorted(keys[0, first], np.arange(run.max() + 2))
        return [
            Run(
                sources=sources[n * self._run_tiles : (n + 1) * self._run_tiles].tolist(),
                pieces=pieces[low:high],
                batches=np.unique(pieces[low:high, 0] // self._batch_size).tolist(),
            )
            for n, (low, high) in enumerate(itertools.pairwise(bounds))
        ]


def _in_rows(
    keys: NDArray[np.int64], pieces: NDArray[np.int64], side: int, batch_size: int
) -> tuple[NDArray[np.intp], NDArray[np.int64]]:
    """The first of each of the pieces that go on in the next wanted tile, and (P, 8) with counts.

    They have the same `keys`, (K, N), and lie in one batch; `side` is the width of a wanted tile.
    """
    step = np.diff(pieces, axis=0)
    follows = (np.diff(keys[:-1], axis=1) == 0).all(axis=0)
    follows &= (step[:, 0] == 1) & (step[:, 4] == side) & ~step[:, [1, 2, 3, 5, 6]].any(axis=1)
    follows &= (pieces[1:, 6] == side) & (pieces[1:, 0] % batch_size > 0)
    first = np.flatnonzero(np.append(True, ~follows))
    counts = np.diff(np.append(first, len(pieces)))
    return first, np.column_stack([pieces[first], counts])


def _overlaps(
    windows: Windows, level: Level, reduction: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Overlaps of windows and source tiles: source tile (P,), and (P, 7) as in `Run.pieces`.

    Window parts outside the stored image appear in no row.
    """
    assert level.tile_size is not None
    side = np.floor_divide(level.tile_size, reduction)
    origin = np.floor_divide(level.origin, reduction)
    low = np.maximum(windows.start - origin, 0)
    high = np.minimum(windows.end - origin, np.floor_divide(level.stored, reduction))
    first = low // side
    # Windows beside the stored image may still lie on the padding of its last tiles.
    span = np.where(high > low, -(-high // side) - first, 0)
    count = span.prod(axis=1)
    tile = np.repeat(np.arange(len(count)), count)
    nth = np.arange(count.sum()) - np.repeat(count.cumsum() - count, count)
    columns = span[tile, 0]
    cell = first[tile] + np.stack([nth % columns, nth // columns], axis=1)
    begin = np.maximum(low[tile], cell * side)
    extent = np.minimum(high[tile], (cell + 1) * side) - begin
    into = begin - (windows.start - origin)[tile]
    out_of = begin - cell * side
    source = cell[:, 1] * level.tiles_across + cell[:, 0]
    return source, np.column_stack([tile, into[:, ::-1], out_of[:, ::-1], extent[:, ::-1]])


def in_order(decoding: Decoding, pool: Executor, *, ahead: int) -> Iterator[Pixels4D]:
    """The decoded batches in order, while up to `ahead` runs of later ones are under way."""
    last_run = [-1] * decoding.batch_count
    for number, run in enumerate(decoding.runs):
        for batch in run.batches:
            last_run[batch] = number
    batches: dict[int, Pixels4D] = {}
    pending: deque[tuple[int, Future[None]]] = deque()
    waiting = deque(enumerate(decoding.runs))
    try:
        for batch, last in enumerate(last_run):
            while waiting and (waiting[0][0] <= last or len(pending) < ahead):
                number, run = waiting.popleft()
                for touched in run.batches:
                    if touched not in batches:
                        batches[touched] = decoding.new_batch(touched)
                pending.append((number, pool.submit(decoding.decode, run, batches)))
            due = deque[Future[None]]()
            while pending and pending[0][0] <= last:
                due.append(pending.popleft()[1])
            if due:
                # Sleeps once a batch: each time it woke it would take the GIL from a decoding
                # thread.
                due[-1].exception()
            while due:
                due.popleft().result()
            yield batches.pop(batch) if batch in batches else decoding.new_batch(batch)
    finally:
        # An error holds this frame by its traceback, and a future here would hold the error: all
        # pixels would stay until the garbage collector comes by.
        pending.clear()
        batches.clear()
