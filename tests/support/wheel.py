"""What a wheel of xmag may contain: ``python wheel.py xmag-*.whl`` fails where it holds more."""

import re
import sys
import zipfile
from pathlib import Path

_ALLOWED = re.compile(
    r"xmag/([a-z_0-9]+/)*[a-z_0-9]+\.py"
    r"|xmag/examples/[A-Za-z_]+\.(py|md|toml|yaml|ipynb)"
    r"|xmag/py\.typed"
    r"|xmag/demo/fields\.avif"
    r"|xmag/draw/html/[a-z]+\.(html|css|js)"
    r"|xmag/hub/mini\.safetensors"
    r"|xmag-[\w.]+\.dist-info/(METADATA|WHEEL|RECORD|entry_points\.txt|licenses/LICENSE)"
)
_MOST_BYTES = 20 << 20


def problems(wheel: Path, package: Path) -> list[str]:
    """Why this wheel is not the package and nothing but it, a line each; empty where it is."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        size = sum(info.file_size for info in archive.infolist())
    found = [f"{name} does not belong there" for name in names if not _ALLOWED.fullmatch(name)]
    paths = [*package.rglob("*.py"), *package.glob("draw/html/*.*")]
    modules = {f"xmag/{path.relative_to(package).as_posix()}" for path in paths}
    modules |= {f"xmag/examples/{path.name}" for path in package.parent.glob("examples/*.*")}
    found += [f"{name} is missing" for name in sorted(modules - set(names))]
    if size > _MOST_BYTES:
        found.append(f"it unpacks to {size} bytes, more than {_MOST_BYTES}")
    return found


if __name__ == "__main__":
    faults = problems(Path(sys.argv[1]), Path(__file__).parents[2] / "xmag")
    print("\n".join(faults))
    sys.exit(1 if faults else 0)
