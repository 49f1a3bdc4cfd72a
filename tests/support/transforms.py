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
