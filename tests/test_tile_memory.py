"""Memory of batches is used again, and never while somebody can see it."""

import gc
import threading
import tracemalloc
from contextlib import suppress

import numpy as np
import pytest
import torch
from support.slides import write_svs

from xmag import Slide, TileSpec, plan_tiles, read_tiles
from xmag.errors import DamagedSlideError
from xmag.tiles.arena import Recycler


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def test_memory_comes_back_once_the_array_is_gone() -> None:
    recycler = Recycler(12)
    first = recycler.empty((2, 2, 3))
    at = address(first)
    del first
    again = recycler.empty((3, 3))  # smaller ones fit as well
    assert address(again) == at
    assert again.shape == (3, 3)
    again[:] = 7
    assert again.sum() == 63


@pytest.mark.parametrize(
    "hold",
    [
        lambda array: array[1],
        lambda array: array[0][:, 1:],
        lambda array: array.reshape(-1),
        lambda array: array.view(np.int8),
        memoryview,
        torch.from_numpy,
        lambda array: torch.from_numpy(array)[0, 1],
        iter,
    ],
)
def test_whoever_holds_a_view_keeps_the_memory(hold) -> None:
    recycler = Recycler(12)
    array = recycler.empty((2, 2, 3))
    at = address(array)
    view = hold(array)
    del array
    gc.collect()
    assert address(recycler.empty((2, 2, 3))) != at
    del view
    gc.collect()
    mine = [recycler.empty((2, 2, 3)) for _ in range(3)]
    assert at in [address(array) for array in mine]


def test_threads_never_share_memory() -> None:
    recycler = Recycler(64)
    wrong = []

    def work(number: int) -> None:
        for _ in range(300):
            array = recycler.empty((64,))
            array[:] = number
            if not (array == number).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_error_leaves_no_pixels_for_the_garbage_collector(tmp_path) -> None:
    """A cycle of error, traceback and future would keep them, for slide after damaged slide."""
    path = tmp_path / "slide.svs"
    write_svs(path, pixels=np.full((960, 1920, 3), 120, np.uint8), mpp=0.5, power=20)
    with Slide(path) as slide:
        plan = plan_tiles(slide, TileSpec())
        places = slide.reader._tables[plan.scale.level]
        start, length = places.offsets[0], places.lengths[0]
    data = bytearray(path.read_bytes())
    data[start + length // 2 : start + length] = bytes(length - length // 2)
    path.write_bytes(data)

    def read() -> None:
        with suppress(DamagedSlideError):  # pytest.raises would hold the error
            list(read_tiles(slide, plan, threads=4))
            pytest.fail("the damage was not seen")

    pixels = 240 * 240 * 3
    with Slide(path) as slide:
        plan = plan_tiles(slide, TileSpec())
        read()  # which imports and remembers what it will need again
        gc.collect()
        gc.disable()
        tracemalloc.start()
        try:
            read()
            left, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
            gc.enable()
    assert peak > 8 * pixels
    assert left < pixels
