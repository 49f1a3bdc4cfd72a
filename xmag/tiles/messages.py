"""What this process and its decoding processes say to each other."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from xmag.geometry import TileSpec
from xmag.grid import Border
from xmag.plan import TilePlan
from xmag.slide import SlideFacts
from xmag.slide.reader import Pixels
from xmag.tiles.decoding import Damaged, Reading
from xmag.tissue import TissueMask
from xmag.urls import Place


@dataclass(frozen=True, slots=True, kw_only=True)
class Earlier:
    """A slide as it was when it was done before, and what is wanted now.

    While its content and scale are those: no tiles, and its thumbnail only if `thumbnail`.
    Otherwise all that the job says if `redo`, and else nothing. `sha256` is of the bytes that were
    read then, and `versions` those of the file (see SlideFacts) that had them.
    """

    content: Mapping[str, Any] | None
    mpp: float | None
    thumbnail: bool
    redo: bool
    sha256: str | None = None
    versions: frozenset[str] = frozenset()

    def is_to_compare(self, slide: SlideFacts) -> bool:
        """Whether the bytes have to be read again: the file was written since, at the same size."""
        is_same = (self.content, self.mpp) == (slide.fingerprint, slide.mpp)
        return is_same and bool(self.versions) and slide.version not in self.versions

    def is_of(self, slide: SlideFacts, sha256: str | None) -> bool:
        """Whether the slide is as it was; `sha256` is None where its bytes were not read again."""
        is_same = (self.content, self.mpp) == (slide.fingerprint, slide.mpp)
        return is_same and sha256 in (None, self.sha256)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeJob:
    """A slide to plan and decode; `number` comes back with all that belongs to it.

    With `thumbnail_px`, a thumbnail of at most that size comes with the plan.
    """

    number: int
    path: str | Place
    mpp: float | None
    spec: TileSpec
    tissue: Literal["auto"] | None
    overlap: int
    min_tissue: float | None
    border: Border
    thumbnail_px: int | None = None
    earlier: Earlier | None = None
    damaged: Damaged = "error"


@dataclass(frozen=True, slots=True)
class Free:
    """A slot may be written to again."""

    slot: int


@dataclass(frozen=True, slots=True)
class Ready:
    """The child has started, and takes jobs."""


@dataclass(frozen=True, slots=True)
class Begun:
    """The child is at this slide: if it dies now, of this one."""

    number: int


@dataclass(frozen=True, slots=True)
class Warned:
    """An XmagWarning about the slide."""

    number: int
    text: str


@dataclass(frozen=True, slots=True)
class Opened:
    """The slide was opened, and this is what it is."""

    number: int
    slide: SlideFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class Thumbnail:
    """All that a picture of the slide needs: pixels, level-0 px, and where tissue is."""

    pixels: Pixels
    dimensions: tuple[int, int]
    tissue: TissueMask | None


@dataclass(frozen=True, slots=True)
class Planned:
    """These are the slide's tiles."""

    number: int
    plan: TilePlan
    thumbnail: Thumbnail | None = None


@dataclass(frozen=True, slots=True)
class Filled:
    """`count` tiles of the slide lie in a slot of the arena."""

    number: int
    slot: int
    count: int


@dataclass(frozen=True, slots=True)
class Finished:
    """All that was wanted of the slide has been sent.

    `lost`, bool (N,), says which tiles of the plan were damaged and left out; None where none was.
    `reading` is None where no tile was read.
    """

    number: int
    lost: NDArray[np.bool_] | None = None
    reading: Reading | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """The slide cannot be done; no more of it will come."""

    number: int
    reason: str


@dataclass(frozen=True, slots=True)
class Idle:
    """Nothing happened for a moment: time to look whether slots can be released."""


Event = Begun | Warned | Opened | Planned | Filled | Finished | Failed | Idle
"""What the user of a DecodingPool gets to see."""

FromChild = Ready | Begun | Warned | Opened | Planned | Filled | Finished | Failed
