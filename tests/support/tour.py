"""Runs examples/tour.ipynb and keeps its outputs: ``python tests/support/tour.py``."""

import os
import tempfile
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).parents[2] / "examples" / "tour.ipynb"

_WIDGET = "application/vnd.jupyter.widget-view+json"
"""Form of a bar where ipywidgets is installed."""


def read() -> Any:
    """The notebook, with the outputs that are stored."""
    import nbformat

    return nbformat.read(NOTEBOOK, as_version=4)


def executed(folder: Path) -> Any:
    """The notebook with the outputs of a run in `folder`, without the network.

    Bars of progress, which no two runs share, are left out; all else on stderr is an error. Of a
    picture the smaller of its two forms is kept.
    """
    import nbclient  # of the group test

    notebook = read()
    nbclient.NotebookClient(
        notebook,
        timeout=800,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    ).execute(env={**os.environ, "HF_HUB_OFFLINE": "1"})
    for cell in notebook.cells:
        for output in [*cell.get("outputs", [])]:
            data = output.get("data", {})
            if "image/jpeg" in data:
                data.pop("image/png", None)
            if output.get("name") == "stderr" or _WIDGET in data:
                cell.outputs.remove(output)
            if output.get("name") == "stderr":
                lines = filter(str.strip, output.text.replace("\r", "\n").split("\n"))
                assert all("%|" in line for line in lines), output.text
    return notebook


if __name__ == "__main__":
    import nbformat

    with tempfile.TemporaryDirectory() as made_in:
        done = executed(Path(made_in))
    done.metadata.language_info = {"name": "python"}  # and not this machine's version of it
    nbformat.write(done, NOTEBOOK)
