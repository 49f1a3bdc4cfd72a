"""Demo run: the features of one slide, two pictures of it, and a summary for a newcomer."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from xmag import draw
from xmag.demo.slide import write_demo_slide
from xmag.encoder import load_model
from xmag.extract import extract_features
from xmag.files import atomic_path, make_folder
from xmag.plan import TilePlan, plan_tiles
from xmag.slide import Slide
from xmag.tissue import find_tissue

_MODEL = "xmag-mini"


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoResult:
    """Result of the demo: the files it wrote, and a summary to print."""

    slide: Path
    features: Path
    overlay: Path
    feature_map: Path
    summary: str


def run_demo(
    out: str | os.PathLike[str],
    *,
    slide: str | os.PathLike[str] | None = None,
    mpp: float | None = None,
    progress: bool | None = None,
    tell: Callable[[str], object] = lambda _: None,
) -> DemoResult:
    """The features and two pictures of a slide, written into the folder `out`, and a summary.

    The model is the one inside the package. Without `slide`, one of real tissue is written to
    ``out/demo.svs`` first. `mpp` is the µm/px of level 0, where the slide's own is missing or
    wrong. `tell` is called with a line for each step. Raises OutputError where `out` cannot be
    written to, and what `extract_features` raises.
    """
    out = Path(out)
    make_folder(out)
    path = out / "demo.svs" if slide is None else Path(slide)
    if slide is None:
        tell(f"making a slide of real tissue: {path}")
        write_demo_slide(path)
    features, overlay, feature_map = (
        out / f"{path.stem}{end}" for end in (".h5", "-overlay.png", "-features.png")
    )
    encoder = load_model(_MODEL)
    with Slide(path, mpp=mpp) as opened:
        tell(f"looking for tissue on {path}")
        start = time.perf_counter()
        tissue = find_tissue(opened)
        plan = plan_tiles(opened, encoder.tile_spec, tissue=tissue)
        planned = time.perf_counter()
        tell(f"extracting features with {_MODEL}")
        bag = extract_features(opened, model=encoder, plan=plan, progress=progress)
        seconds = time.perf_counter() - planned
        bag.save(features)
        for picture, file in (
            (draw.overlay(opened, tissue=tissue, plan=plan), overlay),
            (draw.feature_map(opened, bag), feature_map),
        ):
            with atomic_path(file) as temporary:
                picture.save(temporary, format="PNG")
        lines = [
            ("slide", f"{path}: {opened.format}, {opened.dimensions[0]:,} x"
                      f" {opened.dimensions[1]:,} px, {opened.mpp:.4g} µm/px"
                      f" ({opened.mpp_source})"),
            ("tissue", f"{tissue.fraction:.0%} of the slide, found in {planned - start:.2f} s"),
            ("tiles", _tiles_line(plan)),
            ("features", f"{bag.features.dtype} {bag.features.shape}, {seconds:.2f} s,"
                         f" {len(bag) / seconds:.0f} tiles/s on {encoder.device.type}"),
            ("model", f"{_MODEL}, for trying things out; load_model() fetches XMAG itself"),
            ("written", str(features)), ("", str(overlay)), ("", str(feature_map)),
        ]  # fmt: skip
    text = "\n".join(f"{label:<10}{value}" for label, value in lines)
    scale = "" if mpp is None else f", mpp={mpp:g}"
    summary = (
        f"{text}\n\nNext, in Python:\n\n    import xmag\n    bag = xmag.extract_features("
        f'{str(path)!r}, model="{_MODEL}"{scale})\n    bag.features.shape'
    )
    return DemoResult(
        slide=path, features=features, overlay=overlay, feature_map=feature_map, summary=summary
    )


def _tiles_line(plan: TilePlan) -> str:
    dropped = ", ".join(f"{len(v):,} {k}" for k, v in plan.dropped.items() if len(v))
    side_um = plan.tiles.size_px * plan.tiles.mpp
    reduction = f" at 1/{plan.scale.reduction}" if plan.scale.reduction > 1 else ""
    share = "" if plan.coverage is None else f", {plan.coverage:.0%} of the tissue"
    return (
        f"{len(plan):,} of {plan.tiles.size_px} px at {plan.tiles.mpp:.4g} µm/px ({side_um:.0f} µm)"
        f" from level {plan.scale.level}{reduction}{share}; dropped: {dropped or 'none'}"
    )
