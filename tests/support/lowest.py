"""Pins of the lowest versions that pyproject.toml allows: ``python lowest.py > constraints.txt``.

For the lowest Python alone: later ones have no wheels of versions that are older than they are.
"""

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

_AS_IT_IS = {"torch": "PyPI has no CPU build of its lowest version"}
"""Packages that stay at the version that is installed, and why."""


def pins(project: dict[str, Any], groups: dict[str, list[Any]]) -> list[str]:
    """A pin for each package that users of any extra get, and for the tools of their tests."""
    extras = project["optional-dependencies"].values()
    requirements = [*project["dependencies"], *(r for extra in extras for r in extra)]
    floors: dict[str, str] = {}
    for requirement in [*requirements, *groups["test-lowest"]]:
        found = re.fullmatch(r"([\w-]+)(?:\[[\w,]+\])?>=([\d.]+)", requirement)
        if found is None:
            raise SystemExit(f"{requirement!r} has no lowest version; expected name>=version")
        name, floor = found.groups()
        if floors.setdefault(name, floor) != floor:
            raise SystemExit(f"{name} has the lowest versions {floors[name]} and {floor}")
    return [f"{name}=={floor}" for name, floor in floors.items() if name not in _AS_IT_IS]


if __name__ == "__main__":
    content = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    lowest = content["project"]["requires-python"].removeprefix(">=")
    if lowest == f"{sys.version_info.major}.{sys.version_info.minor}":
        print("\n".join(pins(content["project"], content["dependency-groups"])))
        for package, reason in _AS_IT_IS.items():
            print(f"{package} stays as it is: {reason}", file=sys.stderr)
    else:
        print(f"not pinned: the lowest versions are for Python {lowest}", file=sys.stderr)
