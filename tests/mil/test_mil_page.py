"""docs/mil.md does what it says: its code, run in order, and its table of options."""

import re
from pathlib import Path

import pytest

from xmag.mil import AGGREGATORS, aggregator, aggregator_config

_PAGE = (Path(__file__).parents[2] / "docs" / "mil.md").read_text(encoding="utf-8")


def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", _PAGE, re.M | re.S)
    assert len(blocks) == 7
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "mil.md", "exec"), names)
    assert names["attention"].kind == "softmax"
    assert names["scores"].shape == (3,)
    assert names["clf"].score(names["bags"], names["labels"]) > 0.9
    assert {path.name for path in tmp_path.iterdir()} == {"classifier", "own"}


@pytest.mark.parametrize("name", AGGREGATORS)
def test_the_table_has_each_option_with_its_default(name: str) -> None:
    row = next(line for line in _PAGE.splitlines() if line.startswith("|") and f'"{name}"' in line)
    options = aggregator_config(aggregator(name, in_dim=4, classes=2))["options"]
    for option, default in options.items():
        shown = f'"{default}"' if isinstance(default, str) else str(default)
        assert f"`{option}` {shown}" in row
