"""The check of the built wheel that .ci/run makes, on wheels made here."""

import zipfile
from pathlib import Path

import pytest
from support.wheel import problems

PACKAGE = Path(__file__).parents[1] / "xmag"


def write_wheel(path: Path, *, without: str = "", extra: str = "") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for module in [*PACKAGE.rglob("*.py"), *PACKAGE.rglob("draw/html/*.*")]:
            name = f"xmag/{module.relative_to(PACKAGE).as_posix()}"
            if name != without:
                archive.writestr(name, module.read_bytes())
        for example in PACKAGE.parent.glob("examples/*.*"):
            if f"xmag/examples/{example.name}" != without:
                archive.write(example, f"xmag/examples/{example.name}")
        for name in ("xmag/py.typed", "xmag/hub/mini.safetensors", "xmag/demo/fields.avif", extra):
            if name:
                archive.writestr(name, b"")
        for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"):
            archive.writestr(f"xmag-0.1.0.dist-info/{name}", b"")
    return path


def test_the_package_and_nothing_else_is_fine(tmp_path: Path) -> None:
    assert problems(write_wheel(tmp_path / "xmag.whl"), PACKAGE) == []


@pytest.mark.parametrize(
    "extra",
    [
        "tests/test_wheel.py", "xmag/slide/.env", "xmag/notes.txt", "xmag/slide/a.svs",
        "xmag-0.1.0.data/scripts/run.sh", "evil.pth", "xmag/../evil.py",
        "xmag/hub/other.safetensors", "xmag/demo/other.avif", "xmag/draw/other.js",
    ],
)  # fmt: skip
def test_whatever_does_not_belong_there_is_found(tmp_path: Path, extra: str) -> None:
    wheel = write_wheel(tmp_path / "xmag.whl", extra=extra)
    assert problems(wheel, PACKAGE) == [f"{extra} does not belong there"]


@pytest.mark.parametrize(
    "name", ["xmag/tiles/worker.py", "xmag/draw/html/page.css", "xmag/examples/tour.ipynb"]
)
def test_a_file_that_is_left_out_is_found(tmp_path: Path, name: str) -> None:
    wheel = write_wheel(tmp_path / "xmag.whl", without=name)
    assert problems(wheel, PACKAGE) == [f"{name} is missing"]
