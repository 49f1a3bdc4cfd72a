"""The command ``xmag``: parses, calls, prints.

What was made goes to stdout; progress, warnings and errors go to stderr. Exit status: 0 all done,
1 something failed, 2 wrong use, 130 interrupted.
"""

import argparse
import logging
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from xmag.errors import InputError, XmagError, XmagWarning

if TYPE_CHECKING:
    from xmag.slide import Slide

# The functions below import what they call: `xmag --help` must not wait for torch.

_ALL_DONE, _FAILED, _WRONG_USE, _INTERRUPTED = 0, 1, 2, 130

_DESCRIPTION = "Embeddings of whole-slide images at 5x (2.0 µm/px) with the XMAG foundation model."
_EPILOG = """\
examples:
  xmag demo                                  make a small slide and extract its features
  xmag info slide.svs                        what xmag sees in a file
  xmag extract slide.svs -o features         one slide
  xmag extract slides/ -o features --overlay every slide in a folder, with pictures
  xmag extract slides.csv -o features        columns: slide, and optionally mpp and id

`xmag COMMAND --help` tells more. Exit status: 0 all done, 1 a slide failed, 2 wrong use.
"""
_EXTRACT_EPILOG = """\
Features, and report.csv, are written below DIR at the paths that the slides have below their common
folder. What is there already is kept, so that the same command goes on where it was stopped.

examples:
  xmag extract a.svs b.svs -o features
  xmag extract slides/ -o features --model xmag-mini --format safetensors
  xmag extract scan.tif -o features --mpp 0.25
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status of the command line `argv`, once it has been carried out."""
    try:
        args = _parser().parse_args(argv)
    except SystemExit as end:  # how argparse leaves, after --help and after wrong use
        return int(end.code or 0)
    with _console(verbose=args.verbose):
        try:
            status: int = args.run(args)
        except XmagError as error:
            _write(sys.stderr, f"xmag: error: {_one_line(error)}")
            return _WRONG_USE if isinstance(error, InputError) else _FAILED
        except KeyboardInterrupt:
            _write(sys.stderr, "xmag: interrupted; what is written is whole")
            return _INTERRUPTED
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="xmag", description=_DESCRIPTION, epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

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
    extract.add_argument(
        "--model", metavar="NAME", help="a Hub name, a path, or xmag-mini (default: AI4PATH/XMAG)"
    )
    extract.add_argument("--format", choices=("h5", "safetensors"), default="h5")
    extract.add_argument("--overlay", action="store_true", help="also draw tissue and tiles (.png)")
    extract.add_argument(
        "--redo", action="store_true", help="replace features that were made differently"
    )
    extract.set_defaults(run=_extract)

    demo = commands.add_parser("demo", help="run the main job on a small slide", allow_abbrev=False)
    demo.add_argument(
        "slide", metavar="SLIDE", nargs="?", help="your slide (default: one that is made)"
    )
    demo.add_argument("-o", "--out", metavar="DIR", default="demo", help="default: demo")
    demo.set_defaults(run=_demo)

    for command in (info, extract, demo):
        command.add_argument(
            "--mpp", metavar="UM", type=float,
            help="µm per px of level 0, where the file's own is missing or wrong",
        )  # fmt: skip
        command.add_argument("-v", "--verbose", action="store_true", help="log to stderr")
    return parser


class _Version(argparse.Action):
    """Looks the version up only when asked for it."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        _write(sys.stdout, f"xmag {version('xmag')}")
        parser.exit()


def _info(args: argparse.Namespace) -> int:
    from xmag.slide import Slide

    with Slide(args.slide, mpp=args.mpp) as slide:
        for label, value in _info_lines(slide):
            _write(sys.stdout, f"{label:<10}{value}")
    return _ALL_DONE


def _info_lines(slide: "Slide") -> Iterator[tuple[str, str]]:
    """What there is to know of a slide, as (label, value)."""
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

    report = extract_cohort(
        slides if len(slides) > 1 else slides[0],
        args.out,
        model=args.model,
        format=args.format,
        mpp=args.mpp,
        overlay=args.overlay,
        on_mismatch="redo" if args.redo else "error",
    )
    for row in report:
        done = f"{_counted(row.tiles, 'tile')}, {row.seconds:.1f} s"
        _write(sys.stdout, f"{row.status:<8}{row.slide}: {_one_line(row.error) or done}")
    report_path = Path(args.out) / "report.csv"
    counts = ", ".join(f"{n:,} {status}" for status, n in report.counts().items())
    _write(sys.stdout, f"{_counted(len(report), 'slide')}: {counts}; see {report_path}")
    return _FAILED if report.failed else _ALL_DONE


def _demo(args: argparse.Namespace) -> int:
    from xmag.demo import run_demo

    _write(sys.stdout, run_demo(args.out, slide=args.slide, mpp=args.mpp).summary)
    return _ALL_DONE


@contextmanager
def _console(*, verbose: bool) -> Iterator[None]:
    """Warnings as one line each, and the log where it is asked for; all is undone at the end."""

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, XmagWarning):
            _write(sys.stderr, f"xmag: warning: {_one_line(message)}")

    logger = logging.getLogger("xmag")
    # What tifffile says of a damaged file would come twice: it is in the error as well.
    loggers = (logger, logging.getLogger("tifffile"))
    level = logger.level
    handler = logging.StreamHandler(sys.stderr) if verbose else logging.NullHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
    with warnings.catch_warnings():
        warnings.simplefilter("default", XmagWarning)
        warnings.showwarning = show
        for each in loggers:
            each.addHandler(handler)
        if verbose:
            logger.setLevel(logging.DEBUG)
        try:
            yield
        finally:
            for each in loggers:
                each.removeHandler(handler)
            logger.setLevel(level)


def _one_line(message: object) -> str:
    """The message without line ends, its remedies in the words of the command line."""
    text = str(message).replace("on_mismatch='redo'", "--redo")
    text = re.sub(r"(?<!\S)mpp=(\d?)", lambda found: f"--mpp {found[1]}".rstrip(), text)
    return " ".join(text.split())


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _write(stream: TextIO, text: str) -> None:
    """Writes a line; what the stream's encoding lacks (a µ, an odd file name) is escaped."""
    encoding = stream.encoding or "utf-8"
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
