"""Summary of a run, its estimate before, and the logger of its metrics."""

import csv
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from xmag.errors import MissingExtraError
from xmag.files import write_text

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

TRAINING, VALIDATION = "metrics.csv", "validation.csv"


class MetricsLogger:
    """Logger of metrics to CSV files in a folder and TensorBoard; a context manager.

    On resuming, rows after `step` are dropped. The CSV files are written as a whole by `flush`.
    Without `writes`, as on ranks that do not lead, nothing is logged.
    """

    def __init__(self, folder: Path, *, step: int, tensorboard: bool, writes: bool = True) -> None:
        self._folder, self._writes = folder, writes
        self._rows = {name: _rows_until(folder / name, step) for name in (TRAINING, VALIDATION)}
        self._board = _board(folder / "tensorboard", step) if tensorboard and writes else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._board is not None:
            self._board.close()

    def add(self, name: str, step: int, values: Mapping[str, float]) -> None:
        """Add a row of metrics at a step to the CSV file `name`, and to TensorBoard."""
        if not self._writes:
            return
        row = {"step": str(step)} | {key: f"{value:.6g}" for key, value in values.items()}
        rows = self._rows[name]
        if not (rows and rows[-1]["step"] == row["step"]):
            rows.append(row)
        if self._board is not None:
            kind = name.removesuffix(".csv")
            for key, value in values.items():
                self._board.add_scalar(f"{kind}/{key}", value, step)

    def flush(self) -> None:
        """Write the rows added to the CSV files; OutputError where that is not possible."""
        for name, rows in self._rows.items():
            if rows and self._writes:
                text = io.StringIO()
                writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n", restval="")
                writer.writeheader()
                writer.writerows(rows)
                write_text(self._folder / name, text.getvalue())
        if self._board is not None:
            self._board.flush()


def check_tensorboard() -> None:
    """Raise MissingExtraError where TensorBoard is not installed."""
    if find_spec("tensorboard") is None:
        raise MissingExtraError(
            "TensorBoard is not installed: run pip install 'xmag[distill]', or set"
            " log.tensorboard = false, which leaves the CSV files"
        )


def _board(folder: Path, step: int) -> "SummaryWriter":
    from torch.utils.tensorboard import SummaryWriter

    # What a killed run logged after its last checkpoint is hidden.
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)


def _rows_until(path: Path, step: int) -> list[dict[str, str]]:
    if not step or not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if int(row["step"]) <= step]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Estimated memory and time of a run, measured on a few steps.

    `state_bytes` are those of weights, gradients, moments and EMA; `activation_bytes` those saved
    for backward in one micro-batch; `peak_bytes` is the peak GPU allocation with teachers, None on
    a CPU. `seconds_per_step` includes reading, and `cache_seconds` is the time to compute the
    feature caches.
    """

    student_parameters: int
    head_parameters: int
    state_bytes: Mapping[str, int]
    activation_bytes: int
    peak_bytes: int | None
    seconds_per_step: float
    cache_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Summary of a run; of a dry run, with an `estimate`, where nothing was trained or written.

    `regions` is the number trained on. `validation` are the last cosines to the teachers, and
    `untrained` those before the first step; both are empty without regions held out. `damaged` is
    the number of regions that could not be read; `model` is the folder for `load_model`, and
    `seconds` the time of all parts of the run. `data` counts slides and regions, where they were
    sampled from slides, and `plan` describes the run in words.
    """

    steps: int
    epochs: float
    regions: int
    damaged: int
    seconds: float
    validation: Mapping[str, float] = field(default_factory=dict)
    untrained: Mapping[str, float] = field(default_factory=dict)
    model: Path | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    plan: tuple[str, ...] = ()
    estimate: Estimate | None = None

    def lines(self) -> list[str]:
        """The summary as lines of text."""
        return [*self.plan, *(self._estimated(self.estimate) if self.estimate else self._done())]

    def _done(self) -> Iterator[str]:
        yield (
            f"done      {self.steps:,} steps, {self.epochs:.3g} epochs of {self.regions:,} regions,"
            f" {duration(self.seconds)}"
        )
        if self.damaged:
            yield f"damaged   {self.damaged:,} regions, never trained on"
        for name, value in self.validation.items():
            yield f"held out  {name} {value:.3f} (untrained {self.untrained[name]:.3f})"
        if self.model is not None:
            yield f"model     {self.model}"

    def _estimated(self, found: Estimate) -> Iterator[str]:
        parts = ", ".join(f"{name} {size(n)}" for name, n in found.state_bytes.items())
        yield (
            f"student   {found.student_parameters / 1e6:.1f} M parameters, heads"
            f" {found.head_parameters / 1e6:.1f} M"
        )
        yield f"memory    {parts}, activations {size(found.activation_bytes)}"
        if found.peak_bytes is not None:
            yield f"          {size(found.peak_bytes)} at most on the GPU, all together (measured)"
        if found.cache_seconds:
            yield f"features  {duration(found.cache_seconds)} to compute what is cached"
        yield (
            f"time      {found.seconds_per_step:.3g} s a step (measured),"
            f" {duration(self.seconds)} in all"
        )
        yield "dry run   nothing was written"


def size(count: float) -> str:
    """Format a number of bytes as MB or GB."""
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def duration(seconds: float) -> str:
    """Format seconds in days, hours, minutes or seconds."""
    for unit, length in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} s"
