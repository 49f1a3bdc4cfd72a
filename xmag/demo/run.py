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
from xmag.progress import ProgressOption
from xmag.slide import Slide, scan_stem
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
    region: int | None = None,
    progress: ProgressOption = None,
    tell: Callable[[str], object] = lambda _: None,
) -> DemoResult:
    """The features and two pictures of a slide, written into the folder `out`, and a summary.

    The model is the one inside the package. Without `slide`, one of real tissue is written to
    ``out/demo.svs`` first. `mpp` is the µm/px of level 0, where the slide's own is missing or
    wrong, `region` the scan of a file that holds several. `tell` is called with a line for each
    step. Raises OutputError where `out` cannot be written to, and what `extract_features` raises.
    """
    out = Path(out)
    make_folder(out)
    path = out / "demo.svs" if slide is None else Path(slide)
    if slide is None:
        tell(f"making a slide of real tissue: {path}")
        write_demo_slide(path, progress=progress)
    features, overlay, feature_map = (
        out / f"{scan_stem(path.stem, region)}{end}"
        for end in (".h5", "-overlay.png", "-features.png")
    )
    encoder = load_model(_MODEL)
    with Slide(path, mpp=mpp, region=region) as opened:
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
            (draw.feature_map(opened, bag, tissue=tissue), feature_map),
        ):
            with atomic_path(file) as temporary:
                picture.save(temporary, format="PNG")
        width, height = opened.dimensions
        scale = "" if mpp is None else f", mpp={mpp:g}"
        scale += "" if region is None else f", region={region}"
        summary = f"""\
slide     {path}: {opened.format}, {width:,} x {height:,} px, {opened.mpp:.4g} µm/px\
 ({opened.mpp_source})
tissue    {tissue.fraction:.0%} of the slide, found in {planned - start:.2f} s
tiles     {_tiles_line(plan)}
features  {bag.features.dtype} {bag.features.shape}, {seconds:.2f} s, {len(bag) / seconds:.0f}\
 tiles/s on {encoder.device.type}
model     {_MODEL}, for trying things out; load_model() fetches XMAG itself
written   {features}
          {overlay}
          {feature_map}

Next, in Python:

    import xmag
    bag = xmag.extract_features({str(path)!r}, model="{_MODEL}"{scale})
    bag.features.shape"""
    return DemoResult(
        slide=path, features=features, overlay=overlay, feature_map=feature_map, summary=summary
    )


def _tiles_line(plan: TilePlan) -> str:
    tiles, scale = plan.tiles, plan.scale
    dropped = ", ".join(f"{len(v):,} {k}" for k, v in plan.dropped.items() if len(v))
    reduction = f" at 1/{scale.reduction}" if scale.reduction > 1 else ""
    share = "" if plan.coverage is None else f", {plan.coverage:.0%} of the tissue"
    return (
        f"{len(plan):,} of {tiles.size_px} px at {tiles.mpp:.4g} µm/px"
        f" ({tiles.size_px * tiles.mpp:.0f} µm)"
        f" from level {scale.level}{reduction}{share}; dropped: {dropped or 'none'}"
    )
