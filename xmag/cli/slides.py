"""The commands that run models on slides: extract, demo."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xmag.cli.console import ALL_DONE, FAILED, counted, one_line, say_torch_is_loading, write
from xmag.errors import InputError
from xmag.urls import place_of

# What needs torch is imported by the commands that call it.


def extract(
    slides: list[str],
    out: str,
    *,
    model: Sequence[str] = (),
    device: str | None = None,
    dtype: str | None = None,
    mask: str | None = None,
    **options: Any,
) -> int:
    """Extract the features of a cohort, with these options of `extract_cohort`; print its rows.

    `device` and `dtype` are those of `load_model`; `mask` is a path for `tissue`.
    """
    if mask is not None:
        if "tissue" in options:
            raise InputError("--mask and --tissue both say where tissue is; leave one of them out")
        options["tissue"] = Path(mask)
    if len(slides) > 1:
        for slide in slides:
            if Path(slide).is_dir() or slide.lower().endswith(".csv"):
                raise InputError(
                    f"{slide} is given beside other slides; expected slide files, or one folder, or"
                    " one CSV file"
                )
    say_torch_is_loading()
    from xmag.cohort import extract_cohort
    from xmag.cohort.report import report_name

    models = _loaded(model, device, dtype, options.get("gpus"))
    if models:
        options["model"] = models if len(models) > 1 else models[0]
    report = extract_cohort(slides if len(slides) > 1 else slides[0], out, **options)
    for row in report:
        of = f" ({row.model})" if row.model else ""
        share = "" if row.coverage is None else f", {row.coverage:.0%} of the tissue"
        done = f"{counted(row.tiles, 'tile')}{share}, {row.seconds:.1f} s"
        write(sys.stdout, f"{row.status:<8}{row.slide}{of}: {one_line(row.error) or done}")
    report_path = place_of(out) / report_name(options.get("shard"))
    counts = ", ".join(f"{n:,} {status}" for status, n in report.counts().items())
    noun = "slide" if len(model) < 2 else "bag"
    write(sys.stdout, f"{counted(len(report), noun)}: {counts}; see {report_path}")
    return FAILED if report.failed else ALL_DONE


def _loaded(
    names: Sequence[str], device: str | None, dtype: str | None, gpus: int | str | None
) -> Sequence[Any]:
    """The models, loaded where a device or a dtype is given, else as they are named."""
    device, dtype = (None if given == "auto" else given for given in (device, dtype))
    if device is None and dtype is None:
        return names
    if gpus is not None and device is not None:
        raise InputError("--gpus and --device both say where the models are; give one of them")
    import torch

    from xmag.encoder import load_model
    from xmag.hub.registry import DEFAULT_MODEL

    # Workers load their own: here it is held for its name and dtype, and takes no GPU's memory.
    if gpus is not None and (torch.cuda.device_count() if gpus == "all" else gpus) != 1:
        device = "cpu"
    options: dict[str, Any] = {"device": device or "auto", "dtype": dtype or "auto"}
    return [load_model(name, **options) for name in names or (DEFAULT_MODEL,)]


def demo(
    slide: str | None = None,
    *,
    out: str = "demo",
    mpp: float | None = None,
    region: int | None = None,
) -> int:
    """Run the demo, and print its summary."""

    def tell(step: str) -> None:
        write(sys.stderr, f"xmag: {step}")

    tell("loading PyTorch")  # takes seconds, so it is said before
    from xmag.demo import run_demo

    done = run_demo(out, slide=slide, mpp=mpp, region=region, tell=tell)
    write(sys.stdout, done.summary)
    return ALL_DONE
