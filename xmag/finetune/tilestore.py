"""Cache of decoded tiles of slides, in memory or in memory-mapped files."""

import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xmag.errors import InputError
from xmag.extract import Transform, transformed
from xmag.files import atomic_path
from xmag.geometry import TileSpec
from xmag.grid import Border
from xmag.plan import Coords, TilePlan, plan_tiles, warn_of_lost_tissue
from xmag.progress import ProgressOption, progress_bar
from xmag.slide import Slide
from xmag.tiles import read_tiles
from xmag.tiles.arena import Tiles
from xmag.tissue import find_tissue

SlideLike = Slide | str | PathLike[str]
OnTiles = Callable[[int], object]

_GIB = 2**30
_SAMPLED_TILES = 16
_BATCH = 256


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class TileStore:
    """All decoded tiles of one slide, in the order of its plan.

    Attributes:
        tiles: uint8 (N, S, S, 3) RGB, N at least 1; an array, or a file mapped into memory.
        name: The name of the slide in errors.
        coords: int64 (N, 2), top-left corners in level-0 px; None where there is no slide.
        identity: Tells the slide from others by its content; by default a hash of some tiles.
        options: The options of the plan; None where there is none.

    Raises InputError for tiles of another type or shape, and where there are none.
    """

    tiles: Tiles
    name: str = "tiles"
    coords: Coords | None = None
    identity: str = ""
    options: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        shape, dtype = np.shape(self.tiles), getattr(self.tiles, "dtype", None)
        square = len(shape) == 4 and shape[1] == shape[2] and shape[3] == 3
        if dtype != np.uint8 or not square:
            raise InputError(
                f"the tiles of {self.name!r} are {dtype} {shape}; expected uint8 (N, S, S, 3)"
            )
        if not len(self.tiles):
            raise _without_tiles([repr(self.name)])
        object.__setattr__(self, "identity", self.identity or _digest(self.tiles))

    def __len__(self) -> int:
        return len(self.tiles)

    def __repr__(self) -> str:
        return f"<TileStore {self.name!r} of {len(self)} tiles>"

    def read(self, rows: Any) -> Tensor:
        """Copy some tiles: uint8 (B, S, S, 3) on the CPU; `rows` is a slice or indices."""
        return torch.from_numpy(np.array(self.tiles[rows]))


@dataclass(frozen=True, slots=True, kw_only=True)
class TileOptions:
    """Options of the tiles to train on: tissue, border, scale, transform, storage.

    Attributes:
        tissue: "auto" finds the tissue, None takes every tile.
        min_tissue: Smallest fraction of a tile's area that is tissue; see `plan_tiles`.
        border: "shift" moves tiles that would reach over the border of a slide inwards, "drop"
            leaves them out; see `plan_tiles`.
        mpp: µm/px of level 0 for all slides given as paths, whatever their files say.
        transform: Applied to each batch of tiles, for instance to normalise stains.
        memory_gib: Tiles beyond this go to files mapped into memory; a thousand take 0.14 GiB.
        folder: Where those files go; by default the folder for temporary files. They are gone
            when training ends, and on Linux and macOS also when the program is killed.
    """

    tissue: Literal["auto"] | None = "auto"
    min_tissue: float | None = 0.25
    border: Border = "shift"
    mpp: float | None = None
    transform: Transform | None = None
    memory_gib: float = 8.0
    folder: str | PathLike[str] | None = None

    def __post_init__(self) -> None:
        if self.tissue not in ("auto", None):
            raise InputError(f"tissue is {self.tissue!r}; expected 'auto' or None (every tile)")
        if self.memory_gib < 0:
            raise InputError(f"memory_gib is {self.memory_gib!r}; expected at least 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedSlide:
    """An opened slide, its tile plan, and its identity by content."""

    slide: SlideLike
    name: str
    plan: TilePlan
    identity: str

    @property
    def options(self) -> Mapping[str, Any]:
        """The options of the tile plan."""
        return self.plan.options

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of the decoded tiles (N, S, S, 3); uint8, so that the product is their bytes."""
        side = self.plan.spec.size_px
        return len(self.plan), side, side, 3

    def batches(self, options: TileOptions, on_tiles: OnTiles) -> Iterator[Tiles]:
        """Decoded and transformed tiles in batches; `on_tiles` is told how many."""
        with _opened(self.slide, options.mpp) as opened:
            for _, tiles in read_tiles(opened, self.plan, batch_size=_BATCH):
                yield transformed(tiles, options.transform)
                on_tiles(len(tiles))


Source = TileStore | PlannedSlide
"""Source of a slide's tiles: decoded already, or opened and planned."""


@contextmanager
def stored_tiles(
    slides: Sequence[SlideLike],
    *,
    spec: TileSpec,
    options: TileOptions | None = None,
    progress: ProgressOption = None,
) -> Iterator[list[TileStore]]:
    """A context with the TileStore of each slide, to share decoded tiles between runs.

    Every slide is opened and planned before the first is decoded, so that one that is missing or
    has no tiles is known early.

    Args:
        slides: Paths, or open slides.
        spec: The tiles that the model wants, ``encoder.tile_spec``.
        options: The selection of tiles, and their storage.
        progress: Show a bar on stderr; None does on a terminal and in a notebook. A function is
            called with each `xmag.progress.ProgressEvent` instead.

    Raises:
        InputError: Slides without tiles; all of them are named.
        SlideError: A slide cannot be read, or is damaged: which one, and where.
        OutputError: There is no room for the tiles.
    """
    options = options or TileOptions()
    planned = plan_slides(slides, spec=spec, options=options, progress=progress)
    with decoded(planned, options=options, progress=progress) as stores:
        yield stores


def plan_slides(
    slides: Sequence[SlideLike | TileStore],
    *,
    spec: TileSpec,
    options: TileOptions,
    progress: ProgressOption = False,
) -> list[Source]:
    """The plan of each slide that is no TileStore already; raises what `stored_tiles` does."""
    sources: list[Source] = []
    with progress_bar(progress, total=len(slides), desc="planning", unit="slide") as bar:
        for slide in slides:
            sources.append(_source(slide, spec, options))
            bar.update()
    if empty := [s for s in sources if isinstance(s, PlannedSlide) and not len(s.plan)]:
        raise _without_tiles([f"{entry.name!r} ({_why(entry.plan)})" for entry in empty])
    return sources


@contextmanager
def decoded(
    sources: Sequence[Source], *, options: TileOptions, progress: ProgressOption
) -> Iterator[list[TileStore]]:
    """A context with the decoded tiles (TileStore) of each source."""
    planned = {i: s for i, s in enumerate(sources) if isinstance(s, PlannedSlide)}
    in_memory, room = dict[int, PlannedSlide](), options.memory_gib * _GIB
    for i, entry in planned.items():  # each, in order, that still fits
        if (size := math.prod(entry.shape)) <= room:
            in_memory[i], room = entry, room - size
    in_file = {i: entry for i, entry in planned.items() if i not in in_memory}
    total = sum(len(entry.plan) for entry in planned.values())
    # Windows does not delete a file that somebody still has mapped.
    with tempfile.TemporaryDirectory(
        prefix="xmag-tiles-", dir=options.folder, ignore_cleanup_errors=True
    ) as scratch:
        with progress_bar(progress, total=total, desc="decoding", unit="tile") as bar:
            tiles = {i: _in_memory(s, options, bar.update) for i, s in in_memory.items()}
            mapped = _in_file(list(in_file.values()), Path(scratch, "tiles"), options, bar.update)
        tiles |= zip(in_file, mapped, strict=True)
        yield [
            s
            if isinstance(s, TileStore)
            else TileStore(tiles[i], s.name, s.plan.coords, s.identity, s.options)
            for i, s in enumerate(sources)
        ]


def _source(slide: SlideLike | TileStore, spec: TileSpec, options: TileOptions) -> Source:
    if isinstance(slide, TileStore):
        if (side := slide.tiles.shape[1]) != spec.size_px:
            raise InputError(
                f"the tiles of {slide.name!r} have {side} px a side, and the model wants"
                f" {spec.size_px} px; make them with stored_tiles(slides, spec=encoder.tile_spec)"
            )
        return slide
    with _opened(slide, options.mpp) as opened:
        mask = find_tissue(opened) if options.tissue == "auto" else None
        plan = plan_tiles(
            opened, spec, tissue=mask, min_tissue=options.min_tissue, border=options.border
        )
        if len(plan):  # without tiles it is an error, which says why
            warn_of_lost_tissue(plan, opened.name)
        # A slide without a file is known by its name alone.
        content = (opened.fingerprint or {"name": opened.name}).copy()
        if "content_sample_sha256" in content:
            del content["name"]  # a copy by another name is the same slide
        identity = json.dumps(content, sort_keys=True)
        return PlannedSlide(slide=slide, name=opened.name, plan=plan, identity=identity)


def _in_memory(entry: PlannedSlide, options: TileOptions, on_tiles: OnTiles) -> Tiles:
    tiles, done = np.empty(entry.shape, np.uint8), 0
    for batch in entry.batches(options, on_tiles):
        tiles[done : done + len(batch)] = batch
        done += len(batch)
    return tiles


def _in_file(
    slides: Sequence[PlannedSlide], path: Path, options: TileOptions, on_tiles: OnTiles
) -> list[Tiles]:
    """Decode the tiles of slides into one unlinked file; memory maps of it, read-only."""
    if not slides:
        return []
    # Written, and only then mapped: a disk that is full is an error, and no fatal signal.
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        for entry in slides:
            for batch in entry.batches(options, on_tiles):
                file.write(np.ascontiguousarray(batch).data)
    whole = np.memmap(path, np.uint8, mode="r")
    with suppress(PermissionError):  # Windows keeps the name as long as the mapping
        path.unlink()
    ends = np.cumsum([math.prod(entry.shape) for entry in slides])
    parts = np.split(whole, ends[:-1])
    return [part.reshape(entry.shape) for part, entry in zip(parts, slides, strict=True)]


def _opened(slide: SlideLike, mpp: float | None) -> AbstractContextManager[Slide]:
    """A context with the slide opened; closed on exit if it was given as a path."""
    return nullcontext(slide) if isinstance(slide, Slide) else Slide(slide, mpp=mpp)


def _digest(tiles: NDArray[np.uint8]) -> str:
    digest = hashlib.sha256(repr(tiles.shape).encode())
    for row in np.unique(np.linspace(0, len(tiles) - 1, _SAMPLED_TILES).round().astype(int)):
        digest.update(np.ascontiguousarray(tiles[row]).data)
    return digest.hexdigest()


def _why(plan: TilePlan) -> str:
    reasons = [f"dropped {len(v)}: {k}" for k, v in plan.dropped.items() if len(v)]
    if small := plan.uncovered_mm2["too_small"]:
        reasons.append(f"{small:.2g} mm² in pieces too small to count as tissue")
    return ", ".join(reasons)


def _without_tiles(slides: Sequence[str]) -> InputError:
    return InputError(
        f"{len(slides)} of the slides have no tiles to learn from: {', '.join(slides[:10])}; leave"
        " them out, or lower min_tissue or set tissue=None in TileOptions, to take more tiles"
    )
