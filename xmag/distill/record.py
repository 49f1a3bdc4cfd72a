"""Metrics logger of a run: CSV files, written atomically, and TensorBoard."""

import csv
import io
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from xmag.errors import MissingExtraError
from xmag.files import write_text

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

TRAINING, VALIDATION = "metrics.csv", "validation.csv"


class RunRecord:
    """Metrics logger in a folder; on resuming, rows after `step` are dropped.

    The CSV files are written as a whole by `flush`. TensorBoard's event files are its own.
    """

    def __init__(self, folder: Path, *, step: int, tensorboard: bool) -> None:
        self._folder = folder
        self._rows = {name: _rows_until(folder / name, step) for name in (TRAINING, VALIDATION)}
        self._board = _board(folder / "tensorboard", step) if tensorboard else None

    def add(self, name: str, step: int, values: Mapping[str, float]) -> None:
        """Add a row of metrics at a step to the CSV file `name`, and to TensorBoard."""
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
            if rows:
                text = io.StringIO()
                writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n", restval="")
                writer.writeheader()
                writer.writerows(rows)
                write_text(self._folder / name, text.getvalue())
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        """Close TensorBoard's event file."""
        if self._board is not None:
            self._board.close()


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
