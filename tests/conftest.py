import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from xmag.cores import usable_cores

# No test's verdict depends on how fast the machine is.
settings.register_profile("xmag", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("xmag")

_SHARED = Path(__file__).parents[2] / "shared"
_OPEN_FILES = Path("/proc/self/fd")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Twice as many as there are cores, as many tests wait for a clock or a process."""
    return 2 * usable_cores()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the repository; without it the test is skipped."""
    if not _SHARED.is_dir():
        pytest.skip("needs the real data in ../shared")
    return _SHARED


@pytest.fixture(autouse=True)
def _no_file_is_left_open(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    # Descriptors from os.open() give no ResourceWarning, so they are counted.
    folders = (str(tmp_path_factory.getbasetemp()), str(_SHARED))
    before = _open_files(folders)
    yield
    left = _open_files(folders) - before
    assert not left, f"left open: {sorted(left)}"


def _open_files(folders: tuple[str, ...]) -> set[tuple[str, str]]:
    found = set()
    for entry in _OPEN_FILES.iterdir() if _OPEN_FILES.is_dir() else ():
        try:
            target = os.readlink(entry)  # noqa: PTH115 (it may be a pipe, and no path)
        except FileNotFoundError:
            continue  # the one that lists this folder
        if target.startswith(folders):
            found.add((entry.name, target))
    return found
