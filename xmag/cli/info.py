"""The command info: facts about slides, and about the files and folders that xmag writes."""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from xmag.bag import SUFFIXES, FeatureBag
from xmag.cli.bags import is_cohort
from xmag.cli.console import ALL_DONE, WRONG_USE, counted, one_line, say_torch_is_loading, write
from xmag.errors import SeveralScansError, SlideScaleError, XmagError
from xmag.geometry import TileSpec
from xmag.slide import Slide
from xmag.urls import Place, place_of, readable

Fact = tuple[str, str]
"""A line: its label, which is empty where it is that of the line before, and its value."""

_ESTIMATORS = ("classifier.json", "regressor.json", "survival.json")


def info(
    slides: Sequence[str],
    *,
    mpp: float | None = None,
    region: int | None = None,
    properties: bool = False,
) -> int:
    """Print the facts about slides, files of features, and folders of reports and classifiers.

    With `properties` also what a slide's scanner wrote, escaped as JSON.
    """
    status = ALL_DONE
    for number, path in enumerate(slides):
        try:
            facts = _of_ours(path)
            if facts is None:
                facts = _of_slide(path, mpp=mpp, region=region, properties=properties)
        except XmagError as error:
            if len(slides) == 1:
                raise
            write(sys.stderr, f"xmag: error: {one_line(error)}")
            status = WRONG_USE
            continue
        if number:
            write(sys.stdout, "")
        for label, value in facts:
            write(sys.stdout, f"{label:<10}{value}")
    return status


def _of_ours(path: str) -> list[Fact] | None:
    """Facts about what xmag wrote, or a file of features of others; None for what is neither."""
    place = place_of(path)
    if place.suffix.lower() in SUFFIXES:
        return [*_of_bag(readable(place.name), FeatureBag.load(place))]
    if not isinstance(place, Path) or not place.is_dir():
        return None
    if any((place / name).is_file() for name in _ESTIMATORS):
        return _of_estimator(place)
    if is_cohort(place):
        return _of_cohort(place)
    if (kind := kind_of_evaluation(place)) is None:
        return None
    say_torch_is_loading()
    from xmag import evaluate  # needs the extra

    lines = str(getattr(evaluate, kind).load(place)).splitlines()
    return [("report", readable(place.name)), *(("", line) for line in lines)]


def kind_of_evaluation(folder: Place) -> str | None:
    """Name of the class in `xmag.evaluate` that was saved to a folder; None for no such folder."""
    kinds = {"report.json": "Report", "compare.json": "Comparison"}
    return next((kind for name, kind in kinds.items() if (folder / name).exists()), None)


def _of_bag(name: str, bag: FeatureBag) -> Iterator[Fact]:
    yield "features", name
    yield "tiles", f"{len(bag):,}, {bag.features.shape[1]:,} features each"
    if bag.tiles is not None:
        tiles = bag.tiles
        overlap = f", {tiles.overlap_px} px shared" if tiles.overlap_px else ""
        yield "", f"{tiles.size_px} px at {tiles.mpp:.4g} µm/px{overlap}"
    if bag.coverage is not None:
        yield "coverage", f"{bag.coverage:.0%} of the tissue"
    if bag.provenance is None:
        yield "made by", "other software, or unknown: there is no provenance"
        return
    record: dict[str, Any] = dict(bag.provenance.record)
    model, slide = (record.get(key) or {} for key in ("model", "slide"))
    weights = str(bag.provenance.fingerprint.get("weights_sha256"))
    yield "model", f"{readable(Path(str(model.get('name'))).name)}, weights {weights[:12]}"
    yield "slide", readable(str(slide.get("name")))
    where = f"on {record.get('device')} in {record.get('dtype')}"
    yield "made by", f"xmag {record.get('xmag')}, {record.get('created')}, {where}"


def _of_estimator(folder: Path) -> list[Fact]:
    say_torch_is_loading()
    from xmag.cli.tasks import Target
    from xmag.mil import load_estimator

    loaded = load_estimator(folder, device="cpu")
    facts = [("model", readable(folder.name)), ("estimator", repr(loaded))]
    if hasattr(loaded, "classes_"):
        facts.append(("classes", ", ".join(map(str, loaded.classes_))))
    if (target := Target.load(str(folder))) is not None:
        facts.append(("predicts", f"{', '.join(target.columns)} ({target.task})"))
    if (folder / "config.json").is_file():
        facts.append(("encoder", "in the same folder: it was fine-tuned"))
    return facts


def _of_cohort(folder: Path) -> list[Fact]:
    say_torch_is_loading()
    from xmag.cohort.report import CohortReport

    report = CohortReport.load(folder)
    counts = ", ".join(f"{count:,} {status}" for status, count in report.counts().items())
    facts = [("cohort", readable(folder.name)), ("slides", f"{len(report):,}: {counts or 'none'}")]
    facts.append(("tiles", f"{sum(row.tiles for row in report):,}"))
    left = [row for row in report if row.status in ("failed", "lost")]
    for number, row in enumerate(left[:_MOST_FAILED]):
        facts.append(("" if number else "failed", f"{row.slide}: {one_line(row.error)}"))
    if len(left) > _MOST_FAILED:
        facts.append(("", f"and {counted(len(left) - _MOST_FAILED, 'more slide')}"))
    return facts


_MOST_FAILED = 5


def _of_slide(path: str, *, mpp: float | None, region: int | None, properties: bool) -> list[Fact]:
    """Facts about a slide, or the scans of a file of which none is chosen."""
    try:
        with Slide(path, mpp=mpp, region=region) as opened:
            facts = [*_of_levels(opened)]
            if region is not None:
                facts.insert(1, ("region", str(region)))
            if properties:
                for key, value in opened.properties.items():
                    facts.append(("property", f"{json.dumps(key)}: {json.dumps(value)}"))
    except SeveralScansError as error:
        facts = [("slide", readable(place_of(path).name))]
        for number, (width, height) in enumerate(error.scans):
            facts.append(("" if number else "scans", f"{number}: {width:,} x {height:,} px"))
        facts.append(("", "choose one with --region"))
    return facts


def _of_levels(slide: Slide) -> Iterator[Fact]:
    width, height = slide.dimensions
    mpp = slide.mpp
    yield "slide", slide.name
    yield "format", slide.format
    size = f"{width:,} x {height:,} px"
    if mpp is not None:
        size += f", {width * mpp / 1e3:.3g} x {height * mpp / 1e3:.3g} mm"
    yield "size", size
    yield "scale", "unknown: give --mpp" if mpp is None else f"{mpp:.4g} µm/px ({slide.mpp_source})"
    levels = zip(slide.level_dimensions, slide.level_downsamples, strict=True)
    for level, ((width, height), by) in enumerate(levels):
        scale = "" if mpp is None else f", {mpp * by:.4g} µm/px"
        value = f"{level}: {width:,} x {height:,} px, 1/{by:.4g}{scale}"
        yield "" if level else "levels", value
    if mpp is None:
        return
    spec = TileSpec()
    label = f"{spec.mpp:g} µm/px"
    try:
        scale_read = slide.scale_for(spec)
    except SlideScaleError as error:
        yield label, f"cannot be read: {error}"
        return
    reduced = f" decoded at 1/{scale_read.reduction}" if scale_read.reduction > 1 else ""
    how = (
        f"as it is, {scale_read.mpp:.4g} µm/px" if scale_read.factor == 1.0
        else f"{scale_read.decoded_mpp:.4g} µm/px, resampled"
    )  # fmt: skip
    yield label, f"read from level {scale_read.level}{reduced}, {how}"
