"""The pins of lowest versions that .ci/run tests with."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from support.lowest import pins

CONTENT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())


def pins_of(*dependencies: str, extra: str = "s3fs>=2024.6") -> list[str]:
    project: dict[str, Any] = {
        "dependencies": list(dependencies), "optional-dependencies": {"s3": [extra]}
    }  # fmt: skip
    return pins(project, {"test-lowest": ["pytest>=8.2"]})


def test_each_dependency_is_pinned_at_its_lowest_version_but_torch() -> None:
    found = pins_of("torch>=2.10", "numpy>=2.0", "fsspec[http]>=2024.6")
    assert found == ["numpy==2.0", "fsspec==2024.6", "s3fs==2024.6", "pytest==8.2"]


def test_all_of_this_package_has_a_lowest_version() -> None:
    project = CONTENT["project"]
    found = {pin.split("==")[0] for pin in pins(project, CONTENT["dependency-groups"])}
    required = {re.match(r"[\w-]+", text)[0] for text in project["dependencies"]}  # type: ignore[index]
    assert required - found == {"torch"}


@pytest.mark.parametrize("wrong", ["numpy", "numpy<3", "s3fs>=2025.1"])
def test_without_one_lowest_version_it_stops(wrong: str) -> None:
    with pytest.raises(SystemExit, match=r"lowest version"):
        pins_of(wrong)
