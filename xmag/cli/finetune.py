"""The command finetune: an encoder and a classifier, trained together on labelled slides."""

import os
import sys
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any

from xmag import files
from xmag.cli.console import ALL_DONE, write
from xmag.cli.table import read_table
from xmag.cli.tasks import Target
from xmag.cohort.jobs import jobs_of
from xmag.finetune import Settings, TileOptions, finetune_slides
from xmag.slide import Slide


def finetune(csv: Path, out: str, *, label: str = "label", **options: Any) -> int:
    """Fine-tune on the slides of a CSV, with these options of `finetune_slides`; save the result.

    What is a field of `Settings` or of `TileOptions` goes there.
    """
    parts: dict[str, dict[str, Any]] = {}
    for kind in (Settings, TileOptions):
        names = {field.name for field in fields(kind)} & options.keys()
        parts[kind.__name__] = {name: options.pop(name) for name in names}
    table = read_table(csv, None, target=Target(columns=(label,)), with_features=False)
    given = parts["TileOptions"].get("mpp")
    jobs = jobs_of(csv, format="h5", mpp=given)
    folder = Path(out, "run")  # below the model, where nothing takes it for weights
    files.make_folder(folder)
    with ExitStack() as stack:
        slides: list[Any] = [
            # By path where that says all, as open slides hold files.
            job.path if job.mpp == given and job.region is None
            else stack.enter_context(Slide(job.path, mpp=job.mpp, region=job.region))
            for job in jobs
        ]  # fmt: skip
        result = finetune_slides(
            slides,
            table.y,
            groups=table.patients,
            settings=Settings(**parts["Settings"]),
            tiles=TileOptions(**parts["TileOptions"]),
            checkpoint=folder / "checkpoint.safetensors",
            **options,
        )
    if os.environ.get("RANK", "0") != "0":  # torchrun starts a process for each GPU
        return ALL_DONE
    result.save(out)
    for row in result.history:
        seen = "" if row.validation_loss is None else f", validation loss {row.validation_loss:.3f}"
        told = f"loss {row.train_loss:.3f}{seen}, {row.tiles:,} tiles in {row.seconds:.1f} s"
        write(sys.stdout, f"epoch {row.epoch}: {told}")
    kept = "the last" if result.best_epoch is None else f"epoch {result.best_epoch}"
    write(sys.stdout, f"saved     {out}: encoder and classifier of {kept}")
    return ALL_DONE
