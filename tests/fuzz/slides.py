"""Cases of damaged slides, and what is done with each of them."""

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random

from fuzz.streams import damaged_stream
from fuzz.tiffs import damaged_tiff
from xmag.errors import InputError, SeveralScansError, XmagError
from xmag.geometry import TileSpec
from xmag.plan import TilePlan, plan_tiles
from xmag.slide import Slide
from xmag.tiles import read_tiles
from xmag.tissue import find_tissue

FINE = "read"
THEIR_WARNINGS: tuple[type[Warning], ...] = ()
THEIR_PRINTS = r"OpenSlide-WARNING"
"""What OpenSlide writes to stderr by itself, and no one can keep it from."""
SPEC = TileSpec(mpp=1.0, size_px=32)
_BATCHES = 4
"""Batches of tiles looked at: a slide that says it is large would else take as long as one."""


def make(originals: Mapping[str, bytes], number: int, rng: Random) -> tuple[str, bytes]:
    """(name, content) of a damaged slide."""
    name = rng.choice(sorted(originals))
    data = originals[name]
    change = damaged_tiff if data[:2] in (b"II", b"MM") else damaged_stream
    return name, change(data, rng)


def use(path: Path, *, beside: bool = False) -> list[XmagError]:
    """What xmag said about a slide, in a row: nothing, where it is read without complaint.

    With `beside`, what lies in it beside the scan is read as well.
    Whatever is not an XmagError comes out of here.
    """
    said: list[XmagError] = []
    slide = _opened(path, said)
    if slide is None:
        return said
    with slide:
        width, height = slide.dimensions
        steps: list[Callable[[], object]] = [
            lambda: slide.thumbnail(max_px=100),
            lambda: slide.read_region((0, 0), (min(70, width), min(70, height))),
            lambda: slide.read_region((width - 1, height - 1), (1, 1)),
            lambda: slide.read_region((width // 3, height // 3), (20, 20), mpp=0.8),
            lambda: find_tissue(slide),
            lambda: _read_tiles(slide),
        ]
        if beside:
            steps.append(lambda: dict(slide.properties))
            steps.append(lambda: [slide.associated_images[n] for n in slide.associated_images])
        for step in steps:
            _say(step, said)
    return said


def _opened(path: Path, said: list[XmagError]) -> Slide | None:
    slide = None
    for options in ({}, {"region": 0}):
        try:
            slide = Slide(path, **options)
            break
        except InputError as error:  # it holds several scans
            said.append(error)
        except XmagError as error:
            said.append(error)
            return None
    if slide is not None and slide.mpp is None:
        slide.close()
        slide = Slide(path, mpp=0.25, **options)
    return slide


def _read_tiles(slide: Slide) -> None:
    """Read tiles as few threads do, one by one, and as many do, stacked: with one result."""
    plan = plan_tiles(slide, SPEC)
    alone, stacked = (_first_tiles(slide, plan, threads=threads) for threads in (2, 4))
    assert type(alone) is type(stacked), f"alone {alone!r:.200}, stacked {stacked!r:.200}"
    if isinstance(alone, XmagError):
        raise alone
    assert alone == stacked, "stacked tiles have other pixels"


def _first_tiles(slide: Slide, plan: TilePlan, *, threads: int) -> bytes | XmagError:
    try:
        batches = read_tiles(slide, plan, batch_size=16, threads=threads)
        return b"".join(tiles.tobytes() for _, tiles in itertools.islice(batches, _BATCHES + 1))
    except XmagError as error:
        return type(error)(str(error))  # without its traceback, which would hold all pixels


def _say(step: Callable[[], object], said: list[XmagError]) -> None:
    try:
        step()
    except XmagError as error:
        said.append(error)


def outcome(path: Path, *, beside: bool = True) -> str:
    """What became of a slide, in a word; raises what is no XmagError."""
    said = use(path, beside=beside)
    for error in said:
        if type(error) not in (InputError, SeveralScansError):
            raise error
    return "read"
