"""docs/mil.md does what it says: its code, run in order, and its table of options."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xmag.mil import AGGREGATORS, aggregator, aggregator_config

_PAGE = (Path(__file__).parents[2] / "docs" / "mil.md").read_text(encoding="utf-8")


def _blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


def _run(blocks: list[str]) -> dict[str, Any]:
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "mil.md", "exec"), names)
    return names


_START, _QUESTIONS, _END = re.split(r"^(?=## How do I use|## Training)", _PAGE, flags=re.M)


def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = _blocks(_START + _END)
    assert len(blocks) == 7
    names = _run(blocks)
    assert names["attention"].kind == "softmax"
    assert names["scores"].shape == (3,)
    assert names["clf"].score(names["bags"], names["labels"]) > 0.9
    assert {path.name for path in tmp_path.iterdir()} == {"classifier", "own"}


def test_the_answers_of_the_page_run() -> None:
    blocks = _blocks(_QUESTIONS)
    assert len(blocks) == 11
    names = _run([*_blocks(_START)[:1], *blocks])
    cases = names["cases"]
    assert names["total"] == pytest.approx(1)
    assert names["clf"].predict_proba(cases).shape == (20, 2)
    assert names["survival"].score(cases, names["outcome"]) > 0.5
    assert 0 <= names["curve"](24) <= 1
    assert names["regressor"].predict(cases).shape == (20, 2)
    assert set(names["several"].predict(cases).ravel()) <= {0, 1}
    assert list(names["graded"].classes_) == ["0", "1+", "3+"]
    assert names["costly"].predict(cases).shape == (20,)
    assert len(names["across"].results) == 2
    assert names["clf"].novelty(names["blurred"])[0] > 95
    assert np.median(names["clf"].novelty(names["later"])) < 80
    assert len(names["vectors"]) == 20


@pytest.mark.parametrize("name", AGGREGATORS)
def test_the_table_has_each_option_with_its_default(name: str) -> None:
    row = next(line for line in _PAGE.splitlines() if line.startswith("|") and f'"{name}"' in line)
    options = aggregator_config(aggregator(name, in_dim=4, classes=2))["options"]
    for option, default in options.items():
        shown = f'"{default}"' if isinstance(default, str) else str(default)
        assert f"`{option}` {shown}" in row
