"""The command examples: the scripts that come with the package, copied to a folder."""

import sys
from pathlib import Path

from xmag.cli.console import ALL_DONE, FAILED, counted, write
from xmag.errors import OutputError
from xmag.files import make_folder, write_bytes

_PACKAGE = Path(__file__).parents[1]


def examples(folder: str) -> int:
    """Copy the examples; files that are there and differ stay as they are."""
    # In a checkout they lie beside the package; the wheel has them in it.
    found = next(
        (p for p in (_PACKAGE / "examples", _PACKAGE.parent / "examples") if p.is_dir()), None
    )
    if found is None:
        raise OutputError(
            "this installation of xmag lacks its examples; install it again: pip install"
            " --force-reinstall --no-deps xmag"
        )
    place, status = Path(folder), ALL_DONE
    make_folder(place)
    files = sorted(path for path in found.iterdir() if path.is_file())
    for path in files:
        content, copy = path.read_bytes(), place / path.name
        if copy.exists() and copy.read_bytes() != content:
            write(sys.stderr, f"xmag: error: {copy} is there and differs; it stays as it is")
            status = FAILED
        else:
            write_bytes(copy, content)
    write(sys.stdout, f"{counted(len(files), 'example')} in {place}; begin with README.md")
    return status
