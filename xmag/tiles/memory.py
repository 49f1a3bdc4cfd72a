"""Memory of batches, used again once nobody looks at it.

A large array that is let go of goes back to the system, and the next one comes from there page by
page: for tiles that are dropped once they are embedded, that takes a sixth of the time of decoding.
"""

import math
import weakref
from collections import deque

import numpy as np
from numpy.typing import NDArray


class Recycler:
    """Gives out arrays of uint8 in memory of one size, which comes back by itself.

    Memory is given out again when the array and all views of it, torch's among them, are gone, so
    that each array is its holder's to keep. Usable from many threads.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._idle: deque[NDArray[np.uint8]] = deque()

    def empty(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """An array of this shape, of at most the recycler's size; what it holds is undefined."""
        try:
            memory = self._idle.pop()
        except IndexError:
            memory = np.empty(self._most_bytes, np.uint8)
        # Views of an array keep what owns its memory, here something that is no array: so they keep
        # `flat`, and not just `memory`.
        flat = np.frombuffer(memory.data, np.uint8, math.prod(shape))
        weakref.finalize(flat, self._idle.append, memory).atexit = False
        return flat.reshape(shape)
