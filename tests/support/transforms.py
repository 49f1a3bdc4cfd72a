"""Transforms that workers can import; all leave the tiles as they are."""

import os
import signal
import time
from pathlib import Path


def same(tiles):
    return tiles


def slowly(tiles):
    time.sleep(0.3)
    return tiles


def killing_the_third(tiles):
    """The third call, in whichever process, ends that process as a crash would.

    Calls are counted by files in the folder that XMAG_TEST_CALLS names.
    """
    folder = Path(os.environ["XMAG_TEST_CALLS"])
    for number in range(1000):
        try:
            (folder / str(number)).touch(exist_ok=False)
        except FileExistsError:
            continue
        if number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return tiles
    raise AssertionError("far more calls than slides")


def killing_at_grey(tiles):
    """A slide of one grey ends the process, and leaves how many tiles of others were seen."""
    folder = Path(os.environ["XMAG_TEST_CALLS"])
    if tiles.std() > 0:
        (folder / f"tiles-{time.monotonic_ns()}").touch()
        return tiles
    seen = len(list(folder.glob("tiles-*")))
    (folder / f"death-{time.monotonic_ns()}").write_text(str(seen))
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("alive")
