"""Hook of mkdocs: the page of the tour, from examples/tour.ipynb and its outputs."""

import json
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

_NOTEBOOK = Path(__file__).parents[1] / "examples" / "tour.ipynb"


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """The files of the site, and the page tour.md."""
    cells = json.loads(_NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    content = "\n\n".join(block for cell in cells for block in _blocks(cell))
    files.append(File.generated(config, "tour.md", content=content))
    return files


def _blocks(cell: dict[str, Any]) -> Iterator[str]:
    """Markdown of a cell and its outputs; each in the richest form that it has."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        yield source
        return
    yield f"```python\n{source}\n```"
    for output in cell["outputs"]:
        data = {kind: "".join(text) for kind, text in output.get("data", {}).items()}
        text = "".join(output.get("text", "")) or data.get("text/plain", "")
        if html := data.get("text/html"):
            yield f'<div class="tour">{html}</div>'
        elif picture := data.get("image/jpeg"):
            yield f'<img src="data:image/jpeg;base64,{picture}" alt="{escape(text)}">'
        else:
            yield f"```text\n{text.rstrip()}\n```"
