"""Recovery from CUDA running out of memory: the same work again, in smaller parts."""

from collections.abc import Callable
from typing import TypeVar

import torch

_Result = TypeVar("_Result")


def with_less_memory(
    run: Callable[[], _Result], halve: Callable[[torch.cuda.OutOfMemoryError], None]
) -> _Result:
    """Result of `run`, called again after each `halve` as long as CUDA runs out of memory.

    `halve` makes the parts smaller that `run` computes at once, says so in the log, and raises
    ModelError where they cannot be any smaller. `run` has to begin anew at every call.
    """
    while True:
        try:
            return run()
        except torch.cuda.OutOfMemoryError as error:
            halve(error)
        # Outside of the handler, so that the failed tensors are gone.
        torch.cuda.empty_cache()
