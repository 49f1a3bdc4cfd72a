"""Scale and place, without any I/O: tile specifications, the choice of a level, polygons.

Frames of reference used throughout xmag: *level-0 px* count pixels of the finest level from the
top-left corner of the canvas; *decoded px* are pixels of a level decoded at 1/reduction; *output
px* are pixels of a finished tile.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from xmag.errors import InputError, SlideScaleError

Resample = Literal["area", "lanczos"]

_SAME_MPP = 1e-6
"""Relative difference below which two scales are the same but for rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TileSpec:
    """What a model wants to see: a square of `size_px` at `mpp` µm/px.

    A level, or a level decoded at 1/2, 1/4 or 1/8, whose scale is within the relative
    `mpp_tolerance` of `mpp` is read as it is (0: never, unless it is equal). Otherwise the next
    finer one is resampled to exactly `mpp`, by "area" averaging or with "lanczos", which also
    keeps decoding at full scale.
    """

    mpp: float = 2.0
    size_px: int = 224
    mpp_tolerance: float = 0.05
    resample: Resample = "area"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mpp) and self.mpp > 0):
            raise InputError(f"TileSpec.mpp is {self.mpp!r}; expected a positive number of µm/px")
        if not (isinstance(self.size_px, int) and self.size_px > 0):
            raise InputError(f"TileSpec.size_px is {self.size_px!r}; expected a positive int")
        if not 0 <= self.mpp_tolerance < 0.5:
            raise InputError(
                f"TileSpec.mpp_tolerance is {self.mpp_tolerance!r}; expected a fraction in [0, 0.5)"
            )
        if self.resample not in ("area", "lanczos"):
            raise InputError(
                f"TileSpec.resample is {self.resample!r}; expected 'area' or 'lanczos'"
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "TileSpec":
        """The TileSpec with these fields; InputError where one is unknown."""
        known = {"mpp", "size_px", "mpp_tolerance", "resample"}
        if unknown := sorted(set(fields) - known):
            raise InputError(
                f"a tile spec has unknown fields {unknown}; expected some of {sorted(known)}"
            )
        return cls(**fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadScale:
    """How pixels of a wanted scale are made: `level` decoded at 1/`reduction`, then resampled.

    `decoded_mpp` is the scale of the decoded pixels; `mpp` that of the result. The two are equal
    where the decoded pixels are used as they are.
    """

    level: int
    reduction: int
    decoded_mpp: float
    mpp: float

    @property
    def factor(self) -> float:
        """Decoded px per output px: 1.0 where nothing is resampled, else more."""
        return self.mpp / self.decoded_mpp


def choose_scale(
    level_mpps: Sequence[float], reductions: Sequence[Sequence[int]], spec: TileSpec
) -> ReadScale:
    """The cheapest way to read what `spec` asks for from levels of these scales.

    Cheapest is the coarsest level, as the cost of reading is that of its compressed bytes. Raises
    SlideScaleError where the finest level is coarser than `spec.mpp` by more than its tolerance:
    detail that was never scanned is not made up.
    """
    candidates = [
        (mpp * reduction, mpp, level, reduction)
        for level, mpp in enumerate(level_mpps)
        for reduction in (reductions[level] if spec.resample == "area" else (1,))
    ]
    tolerance = max(spec.mpp_tolerance, _SAME_MPP)
    fitting = [c for c in candidates if abs(c[0] / spec.mpp - 1) <= tolerance + 1e-12]
    if fitting:
        decoded, _, level, reduction = max(fitting, key=lambda c: (c[1], -abs(c[0] - spec.mpp)))
        return ReadScale(level=level, reduction=reduction, decoded_mpp=decoded, mpp=decoded)
    finer = [c for c in candidates if c[0] < spec.mpp]
    if not finer:
        raise SlideScaleError(
            f"the slide has {min(level_mpps):.4g} µm/px at its finest level, but {spec.mpp:g} µm/px"
            f" (tolerance {spec.mpp_tolerance:.0%}) is asked for; it is never upsampled. Give mpp= if"
            " the slide's own scale is wrong, or a model for a coarser scale"
        )
    decoded, _, level, reduction = max(finer)
    return ReadScale(level=level, reduction=reduction, decoded_mpp=decoded, mpp=spec.mpp)


@dataclass(frozen=True, slots=True, kw_only=True)
class TileGeometry:
    """Where the tiles of a slide lie: what a reader of `coords` needs to know besides.

    `size_px` output px at `mpp` cover `size_level0` level-0 px (the nearest int; `mpp` and
    `level0_mpp` are exact). Neighbours share `overlap_px` output px.
    """

    size_px: int
    mpp: float
    size_level0: int
    overlap_px: int
    level0_mpp: float
    level0_size: tuple[int, int]

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return {**asdict(self), "level0_size": list(self.level0_size)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "TileGeometry":
        """The TileGeometry with these fields."""
        width, height = fields["level0_size"]
        return cls(**{**fields, "level0_size": (int(width), int(height))})
