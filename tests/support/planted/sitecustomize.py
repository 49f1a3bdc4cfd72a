"""Plants a faulty reader in decoding processes: what a slide does to them stands in its name.

Python imports this module at its start where the folder is on PYTHONPATH. The product knows
nothing of it.
"""

import ctypes
import os
import sys
import time

_MOST_EATEN = 3 * 2**30
"""Bytes after which a test that fails must not eat on."""


def _eat():
    import numpy as np

    eaten = []
    while sum(map(len, eaten)) < _MOST_EATEN:
        eaten.append(np.ones(2**26, np.uint8))


def _eat_natively():
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.memset.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
    for _ in range(_MOST_EATEN // 2**26):
        libc.memset(libc.malloc(2**26), 1, 2**26)  # as C does: without a look at what it got


FAULTS = {
    "segfault": lambda: ctypes.string_at(0),
    "abort": os.abort,
    "exit": lambda: os._exit(3),
    "hang": lambda: time.sleep(3600),
    "hang-with-gil": lambda: ctypes.PyDLL(None).sleep(3600),
    "eat": _eat,
    "eat-natively": _eat_natively,
    "vanish": lambda: os.kill(os.getpid(), 9),
}


def plant():
    import xmag.slide.slide as module

    open_reader = module.open_reader

    def faulty(path, region):
        reader = open_reader(path, region)
        fault = FAULTS.get(path.stem.partition("@")[0])
        at_opening = path.stem.endswith("@opening")
        if fault is not None and at_opening:
            fault()
        elif fault is not None:
            decode = reader.decode

            def after_a_while(*arguments):
                if after_a_while.calls == 1:
                    fault()
                after_a_while.calls += 1
                return decode(*arguments)

            after_a_while.calls = 0
            reader.decode = after_a_while
        return reader

    module.open_reader = faulty


if any("xmag.tiles." in argument for argument in sys.orig_argv):
    plant()
