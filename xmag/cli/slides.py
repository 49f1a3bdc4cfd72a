"""The commands on slides: info, extract, demo."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from xmag.cli.arguments import Commands, add_model, add_mpp
from xmag.cli.console import ALL_DONE, FAILED, counted, one_line, write
from xmag.errors import InputError

if TYPE_CHECKING:
    from xmag.slide import Slide

_EXTRACT_EPILOG = """\
Features, and report.csv, are written below DIR at the paths that the slides have below their common
folder. What is there already is kept, so that the same command goes on where it was stopped.

examples:
  xmag extract a.svs b.svs -o features
  xmag extract slides/ -o features --model xmag-mini --format safetensors
  xmag extract scan.tif -o features --mpp 0.25
  xmag extract slides/ -o features --gpus all
  xmag extract slides.csv -o s3://bucket/features --shard 0/4
"""


def add_commands(commands: Commands) -> None:
    """Add info, extract and demo to the commands."""
    info = commands.add_parser("info", help="show what a slide holds", allow_abbrev=False)
    info.add_argument("slide", metavar="SLIDE", help="a slide file")
    info.set_defaults(run=_info)

    extract = commands.add_parser(
        "extract", help="extract the features of slides", epilog=_EXTRACT_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    extract.add_argument(
        "slides", metavar="SLIDE", nargs="+", help="slide files; or one folder; or one CSV file"
    )
    extract.add_argument("-o", "--out", metavar="DIR", required=True, help="where to write")
    add_model(extract)
    extract.add_argument("--format", choices=("h5", "safetensors"), default="h5")
    extract.add_argument("--overlay", action="store_true", help="also draw tissue and tiles (.png)")
    extract.add_argument(
        "--border", choices=("shift", "drop"), default="shift",
        help="what becomes of tiles that would reach over the border of the slide: they move"
        " inwards (default), or are left out",
    )  # fmt: skip
    extract.add_argument(
        "--redo", action="store_true", help="replace features that were made differently"
    )
    extract.add_argument(
        "--damaged", choices=("error", "drop"), default="error",
        help="what becomes of a slide with damaged tiles: it fails (default), or loses those tiles",
    )  # fmt: skip
    extract.add_argument(
        "--slide-timeout", metavar="S", type=float, help="seconds that decoding a slide may take"
    )
    extract.add_argument(
        "--gpus", metavar="N", type=_gpus,
        help="on how many GPUs of this machine, or 'all': a process on each (default: one GPU)",
    )  # fmt: skip
    extract.add_argument(
        "--shard", metavar="I/N", type=_shard,
        help="do every N-th slide alone, from the I-th on, counted from 0: for N machines",
    )  # fmt: skip
    extract.set_defaults(run=_extract)

    demo = commands.add_parser("demo", help="run the main job on a small slide", allow_abbrev=False)
    demo.add_argument(
        "slide",
        metavar="SLIDE",
        nargs="?",
        help="your slide (default: one of real tissue that is made)",
    )
    demo.add_argument("-o", "--out", metavar="DIR", default="demo", help="default: demo")
    demo.set_defaults(run=_demo)
    for command in (info, extract, demo):
        add_mpp(command)


def _info(args: argparse.Namespace) -> int:
    from xmag.slide import Slide

    with Slide(args.slide, mpp=args.mpp) as slide:
        for label, value in _info_lines(slide):
            write(sys.stdout, f"{label:<10}{value}")
    return ALL_DONE


def _info_lines(slide: "Slide") -> Iterator[tuple[str, str]]:
    """Facts about a slide, as (label, value)."""
    from xmag.errors import SlideScaleError
    from xmag.geometry import TileSpec

    width, height = slide.dimensions
    mpp = slide.mpp
    yield "slide", slide.name
    yield "format", slide.format
    if mpp is None:
        yield "size", f"{width:,} x {height:,} px"
        yield "scale", "unknown: give --mpp"
    else:
        yield (
            "size",
            f"{width:,} x {height:,} px, {width * mpp / 1e3:.3g} x {height * mpp / 1e3:.3g} mm",
        )
        yield "scale", f"{mpp:.4g} µm/px ({slide.mpp_source})"
    label = "levels"
    for level, (size, by) in enumerate(
        zip(slide.level_dimensions, slide.level_downsamples, strict=True)
    ):
        scale = "" if mpp is None else f", {mpp * by:.4g} µm/px"
        yield label, f"{level}: {size[0]:,} x {size[1]:,} px, 1/{by:.4g}{scale}"
        label = ""
    spec = TileSpec()
    if mpp is None:
        return
    try:
        scale_read = slide.scale_for(spec)
    except SlideScaleError as error:
        yield f"{spec.mpp:g} µm/px", f"cannot be read: {error}"
        return
    decoded = f"level {scale_read.level}"
    if scale_read.reduction > 1:
        decoded += f" decoded at 1/{scale_read.reduction}"
    how = (
        f"as it is, {scale_read.mpp:.4g} µm/px" if scale_read.factor == 1.0
        else f"{scale_read.decoded_mpp:.4g} µm/px, resampled"
    )  # fmt: skip
    yield f"{spec.mpp:g} µm/px", f"read from {decoded}, {how}"


def _gpus(text: str) -> int | Literal["all"]:
    if text == "all":
        return "all"
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of GPUs; expected 'all' or 2")
    return int(text)


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is no share; expected I/N such as 0/4 or 3/4")
    return int(index), int(count)


def _extract(args: argparse.Namespace) -> int:
    slides: list[str] = args.slides
    if len(slides) > 1:
        for slide in slides:
            if Path(slide).is_dir() or slide.lower().endswith(".csv"):
                raise InputError(
                    f"{slide} is given beside other slides; expected slide files, or one folder, or"
                    " one CSV file"
                )
    from xmag.cohort import extract_cohort
    from xmag.cohort.report import report_name
    from xmag.urls import place_of

    report = extract_cohort(
        slides if len(slides) > 1 else slides[0],
        args.out,
        model=args.model,
        format=args.format,
        mpp=args.mpp,
        border=args.border,
        overlay=args.overlay,
        on_mismatch="redo" if args.redo else "error",
        damaged=args.damaged,
        slide_timeout=args.slide_timeout,
        gpus=args.gpus,
        shard=args.shard,
    )
    for row in report:
        share = "" if row.coverage is None else f", {row.coverage:.0%} of the tissue"
        done = f"{counted(row.tiles, 'tile')}{share}, {row.seconds:.1f} s"
        write(sys.stdout, f"{row.status:<8}{row.slide}: {one_line(row.error) or done}")
    report_path = place_of(args.out) / report_name(args.shard)
    counts = ", ".join(f"{n:,} {status}" for status, n in report.counts().items())
    write(sys.stdout, f"{counted(len(report), 'slide')}: {counts}; see {report_path}")
    return FAILED if report.failed or report.lost else ALL_DONE


def _demo(args: argparse.Namespace) -> int:
    def tell(step: str) -> None:
        write(sys.stderr, f"xmag: {step}")

    tell("loading PyTorch")  # takes seconds, so it is said before
    from xmag.demo import run_demo

    done = run_demo(args.out, slide=args.slide, mpp=args.mpp, tell=tell)
    write(sys.stdout, done.summary)
    return ALL_DONE
