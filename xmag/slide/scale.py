"""µm/px of a slide, judged from the caller's value, the file's and the objective power."""

import math
import warnings

from xmag.errors import InputError, SlideScaleError, XmagWarning
from xmag.slide.reader import ScaleMetadata

_PLAUSIBLE_MPP = (0.05, 20.0)
_UM_PER_PX_AT_1X = 10.0
"""µm/px at an objective power of 1; one of 40 goes with about 0.25 µm/px in every scanner."""
_CONTRADICTION = 0.3
_ANISOTROPY = 0.01
_MAX_AREA_MM2 = 17_000.0
"""Largest area of a slide; the largest glass for microscopes, 6 by 4 inches, has 15,500 mm²."""


def checked_scale(mpp: float) -> float:
    """`mpp` as it is; InputError where it is no scale."""
    if not (math.isfinite(mpp) and mpp > 0):
        raise InputError(f"mpp is {mpp!r}; expected a positive number of µm/px")
    return mpp


def checked_mpp(mpp: float | None) -> float | None:
    """`mpp` as given by the caller; InputError where it cannot be a slide's µm/px."""
    if mpp is None:
        return None
    low, high = _PLAUSIBLE_MPP
    if not low <= checked_scale(mpp) <= high:
        raise InputError(
            f"mpp is {mpp!r}; expected µm per level-0 px, between {low} and {high}"
            " (0.25 for a typical 40x scan)"
        )
    return float(mpp)


def known_mpp(mpp: float | None, found: ScaleMetadata, name: str) -> float:
    """`mpp` as it is; SlideScaleError, with what the file says, where it is None."""
    if mpp is not None:
        return mpp
    seen = "does not say how large its pixels are; expected µm/px"
    if found.mpp is not None:
        seen = (
            f"says {_said(found)}, which is no scale of a slide; expected between"
            f" {_PLAUSIBLE_MPP[0]:g} and {_PLAUSIBLE_MPP[1]:g} (it may be a macro image, or nobody"
            " calibrated it)"
        )
    raise SlideScaleError(
        f"{name} {seen}, so give them: mpp=0.25 for a typical 40x scan, mpp=0.5 at 20x"
    )


def _said(found: ScaleMetadata) -> str:
    """The µm/px in a file's metadata and their source, in words."""
    x, y = found.mpp or (math.nan, math.nan)
    width, height = (f"{side:.0f}" if side >= 100 else f"{side:.4g}" for side in (x, y))
    value = width if width == height else f"{width} by {height}"
    return f"{value} µm/px ({found.mpp_source})"


def check_area(size: tuple[int, int], mpp: float, name: str) -> None:
    """Raise SlideScaleError where a slide of `size` level-0 px would be larger than any glass.

    What is done at a scale in µm takes memory by the area that the file claims.
    """
    width, height = (side * mpp / 1000 for side in size)
    if width * height > _MAX_AREA_MM2:
        raise SlideScaleError(
            f"{name} would be {width:.4g}x{height:.4g} mm large at {mpp:.4g} µm/px; expected at"
            f" most {_MAX_AREA_MM2:.0f} mm², more than any glass slide has. Give the right scale as"
            " mpp=, or copy the file again"
        )


def judge(found: ScaleMetadata, given: float | None, name: str) -> tuple[float | None, str]:
    """(mpp, its source), judged by the caller's value and the file's metadata."""
    if given is not None:
        return given, "given"
    power = found.objective_power
    nominal = _plausible(_UM_PER_PX_AT_1X / power) if power and power > 0 else None
    if found.mpp is not None and all(_plausible(value) for value in found.mpp):
        x, y = found.mpp
        if abs(x / y - 1) > _ANISOTROPY:
            raise SlideScaleError(
                f"{name} says that its pixels are {x:.4g} µm wide and {y:.4g} µm high; expected"
                " square ones. Give the right scale as mpp="
            )
        mpp = x if x == y else (x + y) / 2
        if nominal is not None and abs(mpp / nominal - 1) > _CONTRADICTION:
            warnings.warn(
                f"{name} says {mpp:.4g} µm/px ({found.mpp_source}), but an objective power of"
                f" {power:g}, which goes with about {nominal:.4g}; {mpp:.4g} is used. Give mpp= if"
                " that is wrong",
                XmagWarning,
                stacklevel=4,
            )
        return mpp, found.mpp_source
    if nominal is not None:
        seen = "" if found.mpp is None else f" as {_said(found)} is none,"
        warnings.warn(
            f"{name} gives no usable µm/px,{seen} only an objective power of {power:g};"
            f" {nominal:.4g} µm/px is assumed, which may be off by 10%. Give mpp= if you know it",
            XmagWarning,
            stacklevel=4,
        )
        return nominal, "objective power"
    return None, "unknown"


def _plausible(mpp: float) -> float | None:
    """`mpp` where a slide scanner could have made it; None otherwise."""
    return mpp if _PLAUSIBLE_MPP[0] <= mpp <= _PLAUSIBLE_MPP[1] else None
