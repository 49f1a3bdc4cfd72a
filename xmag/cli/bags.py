"""The commands on files of features: export, check."""

import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from xmag.bag import FeatureBag
from xmag.cli.console import ALL_DONE, FAILED, counted, one_line, say_torch_is_loading, write
from xmag.errors import BagError, InputError
from xmag.provenance import Provenance

_OURS = (".h5", ".safetensors")


def export(bag: str, out: str, *, layout: Any) -> int:
    """Write a bag in the layout of other software."""
    loaded = FeatureBag.load(bag)
    loaded.export(out, layout=layout)
    write(sys.stdout, f"written   {out}: {counted(len(loaded), 'tile')}, as {layout} has them")
    return ALL_DONE


def check(folder: str) -> int:
    """Verify the bags in a folder: each is whole and finite, none is missing, one made them all.

    Prints a line for each that is not so. Of several models, each has a folder of its own.
    """
    place = Path(folder)
    if not place.is_dir():
        raise InputError(f"there is no folder {folder!r}; give the one that xmag extract wrote to")
    paths = sorted(
        Path(parent, name)
        for parent, _, names in os.walk(place)
        for name in names
        if name.endswith(_OURS) and not name.startswith(".")
    )
    faults, models = _missing(place)
    if not paths and not faults:
        raise InputError(f"{folder!r} has no files of features; expected {' or '.join(_OURS)}")
    made: dict[str, dict[str, Provenance]] = {}
    tiles = 0
    for path in paths:
        below = path.relative_to(place)
        try:
            bag = FeatureBag.load(path)  # compares its checksum, and that all values are finite
        except BagError as error:
            faults.append(f"{below.as_posix()}: {one_line(error)}")
            continue
        tiles += len(bag)
        if bag.provenance is None:
            faults.append(f"{below.as_posix()}: no provenance says which model made it")
            continue
        model = below.parts[0] if below.parts[0] in models else ""
        made.setdefault(model, {})[below.as_posix()] = bag.provenance
    for bags in made.values():
        faults += _others(bags)
    for fault in faults:
        write(sys.stdout, f"fault     {fault}")
    verdict = f"{counted(len(faults), 'fault')}" if faults else "whole, finite, of one model each"
    if not faults and len(made) < 2:
        verdict = "whole, finite, of one model"
    write(sys.stdout, f"{counted(len(paths), 'bag')} with {counted(tiles, 'tile')}: {verdict}")
    return FAILED if faults else ALL_DONE


def is_cohort(folder: Path) -> bool:
    """Whether `extract_cohort` wrote to a folder, whole or shards of a cohort."""
    return (folder / "report.csv").is_file() or any(folder.glob("report-*-of-*.csv"))


def _missing(place: Path) -> tuple[list[str], set[str]]:
    """Lines on slides of the folder's report that have no bag, and the names of its models."""
    if not is_cohort(place):
        return [], set()
    say_torch_is_loading()
    from xmag.cohort.report import CohortReport

    rows = CohortReport.load(place)
    faults = []
    for row in rows:
        of = f" ({row.model})" if row.model else ""
        if row.status in ("failed", "lost"):
            faults.append(f"{row.slide}{of}: {row.status}: {one_line(row.error)}")
        elif not (place / row.output).is_file():
            faults.append(f"{row.slide}{of}: {row.output} is missing; extract it again")
    return faults, {row.model for row in rows if row.model}


def _others(bags: dict[str, Provenance]) -> list[str]:
    """Lines on bags that may not be mixed with most of the others."""
    kinds = {name: Provenance(made.fingerprint, {}).to_json() for name, made in bags.items()}
    ((most, _),) = Counter(kinds.values()).most_common(1)
    usual = next(bags[name] for name, kind in kinds.items() if kind == most)
    return [
        f"{name}: made differently than most: {'; '.join(usual.differences(made))}"
        for name, made in bags.items()
        if kinds[name] != most
    ]
