"""The seam between slide files and everything above: what a reader of a format has to offer.

A reader knows the levels of one image (the canvas), and hands out the compressed bytes of its
tiles and the pixels in them. It neither knows nor decides a scale: `Slide` and `plan` do.
Readers whose format hides its tiles (OpenSlide, plain images) offer `read_region` instead.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from xmag.errors import InputError, SeveralScansError

Pixels = NDArray[np.uint8]
"""uint8 RGB pixels, shape (height, width, 3)."""
_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """One level of the pyramid, in px of that level.

    `size` is the (width, height) of the canvas, `downsample` the level-0 px per px of this
    level. Where pixels are stored in tiles, `tile_size` is (width, height) of a tile, tiles are
    numbered row-major, and the first begins at `origin` on the canvas; `stored_size` is what the
    tiles cover from there. Canvas outside of it is declared empty, and white. `reductions` lists
    the n for which `decode` returns a tile at 1/n; each divides the tile size and the origin.
    `empty_tiles` is how many tiles the file declares empty.
    """

    size: tuple[int, int]
    downsample: float
    tile_size: tuple[int, int] | None = None
    origin: tuple[int, int] = (0, 0)
    stored_size: tuple[int, int] | None = None
    reductions: tuple[int, ...] = (1,)
    empty_tiles: int = 0

    @property
    def stored(self) -> tuple[int, int]:
        """(width, height) of the stored image; the canvas where nothing else was said."""
        return self.stored_size or self.size

    def decoded_size(self, reduction: int) -> tuple[int, int]:
        """(width, height) of the canvas at 1/`reduction`, in whole decoded px; at least 1."""
        return max(1, self.size[0] // reduction), max(1, self.size[1] // reduction)

    @property
    def tiles_across(self) -> int:
        """Tiles in a row of the stored image."""
        assert self.tile_size is not None
        return -(-self.stored[0] // self.tile_size[0])

    @property
    def tiles_down(self) -> int:
        """Rows of tiles in the stored image."""
        assert self.tile_size is not None
        return -(-self.stored[1] // self.tile_size[1])


def whole_factor(base: tuple[int, int], size: tuple[int, int]) -> int | None:
    """The whole k for which `size` is `base` / k, rounded up or down; None if there is none."""
    k = max(1, round(base[0] / size[0]))
    fits = all(b // k <= s <= -(-b // k) for b, s in zip(base, size, strict=True))
    return k if fits else None


def downsample(base: tuple[int, int], size: tuple[int, int], stated: float | None = None) -> float:
    """Level-0 px per px: whole where the sizes allow it, as they are rounded."""
    if min(*base, *size) < 1:
        return stated or math.nan
    mean = (base[0] / size[0] + base[1] / size[1]) / 2
    return float(whole_factor(base, size) or stated or mean)


def choose_scan(scans: Sequence[tuple[int, int]], region: int | None) -> int:
    """Index of the scan to read, of a file that holds scans of these (width, height).

    Raises SeveralScansError, which lists them, where one must be chosen, and InputError where
    `region` is none of them. They are told by their sizes alone: a name is free text, in which a
    patient may stand.
    """
    if region is None and len(scans) == 1:
        return 0
    listing = ", ".join(f"region={i} ({w}x{h} px)" for i, (w, h) in enumerate(scans))
    if region is None:
        error = SeveralScansError(
            f"the file holds {len(scans)} scans; choose one by region=, --region or a column"
            f" 'region' of a CSV: {listing}"
        )
        error.scans = tuple(scans)
        raise error
    if not (isinstance(region, int) and 0 <= region < len(scans)):
        raise InputError(f"region={region!r} is not in the file; it holds {listing}")
    return region


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleMetadata:
    """Scale as a file states it, unjudged: (x, y) µm/px of level 0, objective power."""

    mpp: tuple[float, float] | None = None
    mpp_source: str = ""
    objective_power: float | None = None


@runtime_checkable
class SlideReader(Protocol):
    """Protocol of slide readers. Methods are safe to call from several threads at once.

    `format` is a short lower-case name, such as "aperio" or "ome-tiff"; `levels` are the levels,
    finest first, the first with a downsample of 1; `metadata` is the scale as the file states it.
    """

    format: str
    levels: tuple[Level, ...]
    metadata: ScaleMetadata

    def close(self) -> None:
        """Release the file. Closing twice is fine."""


@runtime_checkable
class DescribedReader(SlideReader, Protocol):
    """A reader that also has what a file holds beside the scan: its texts, and other images.

    Patients are named there. So nothing of it is read before these are called, nor kept after, and
    none of it stands in an error, log or repr. Errors are SlideErrors, raised `from None`. Readers
    without these methods are taken for those of files that hold nothing else.
    """

    def read_properties(self) -> Mapping[str, str]:
        """The texts of the file by their names, as it has them; DamagedSlideError where broken."""

    def associated_images(self) -> Mapping[str, Callable[[], Pixels]]:
        """Functions that read the images beside the scan, such as "label", "macro", "thumbnail".

        Their names are of the reader's choice, lower-case, and no text of the file. The pixels are
        checked as a tile's are: DamagedSlideError, and never a pixel that is made up.
        """


@runtime_checkable
class TileReader(SlideReader, Protocol):
    """A reader that hands out compressed tiles, so that each can be decoded once.

    It may also have `decode_many(level, chunks, reduction, row)`, which is faster and raises
    nothing: it decodes tiles into `row`, uint8 (height, widths of all, 3), side by side, and gives
    a bool for each. What is False, and its place in `row` undefined, is left to `decode`: a chunk
    that is no bytes, that cannot be decoded with the others, or that is damaged.
    """

    def read_tile_bytes(self, level: int, indices: Sequence[int]) -> list[bytes | None]:
        """The bytes of tiles, each complete enough for `decode`; None for one declared empty."""

    def decode(self, level: int, data: bytes, reduction: int) -> Pixels:
        """The pixels of one tile at 1/`reduction`, in full tile size even at the edges.

        Raises DamagedSlideError where the bytes do not hold what they should.
        """


@runtime_checkable
class RegionReader(SlideReader, Protocol):
    """A reader that only offers finished pixels."""

    def read_region(self, level: int, xy: tuple[int, int], size: tuple[int, int]) -> Pixels:
        """The pixels of a window wholly inside the level; `xy` in px of that level."""


class Unshown(Mapping[str, _Value]):
    """A mapping whose repr tells how many values there are, and none of them."""

    def __init__(
        self, slide: str, what: str, found: Mapping[str, Any], get: Callable[[Any], _Value]
    ) -> None:
        self._slide, self._what, self._found, self._get = slide, what, found, get

    def __getitem__(self, name: str) -> _Value:
        return self._get(self._found[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def __repr__(self) -> str:
        return f"<{len(self)} {self._what} of {self._slide!r}>"
