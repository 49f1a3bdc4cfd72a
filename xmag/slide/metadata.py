"""What scanners write about scale into their files, read from the text alone: no I/O here."""

import re

from xmag.slide.reader import ScaleMetadata


def aperio_scale(description: str) -> ScaleMetadata:
    """The scale in an Aperio ImageDescription: `... |AppMag = 20|MPP = 0.4990|...`."""
    pairs = (field.partition("=") for field in description.split("|"))
    fields = {key.strip(): value for key, _, value in pairs}
    mpp = _number(fields.get("MPP"))
    return ScaleMetadata(
        mpp=None if mpp is None else (mpp, mpp),
        mpp_source="" if mpp is None else "Aperio MPP",
        objective_power=_number(fields.get("AppMag")),
    )


def resolution_scale(x: float, y: float, unit: int) -> ScaleMetadata:
    """The scale in TIFF resolution tags: px per `unit` (2 inch, 3 cm; others say nothing)."""
    um = {2: 25_400.0, 3: 10_000.0}.get(unit)
    if um is None or x <= 0 or y <= 0:
        return ScaleMetadata()
    return ScaleMetadata(mpp=(um / x, um / y), mpp_source="TIFF resolution")


def _number(text: str | None) -> float | None:
    """The number that `text` begins with; scanners in some countries write a decimal comma."""
    match = re.match(r"\s*[-+]?\d+([.,]\d+)?([eE][-+]?\d+)?", text or "")
    return float(match[0].replace(",", ".")) if match else None
