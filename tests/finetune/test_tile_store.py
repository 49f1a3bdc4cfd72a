"""Tiles that are decoded once, against those that read_tiles gives; where they are kept."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from support.fake_reader import FakeTileReader, noise
from support.models import random_tiles
from support.slides import write_svs

from xmag.errors import DamagedSlideError, InputError, OutputError, SlideError
from xmag.finetune import TileOptions, TileStore, stored_tiles
from xmag.finetune.tilestore import plan_slides
from xmag.geometry import TileSpec
from xmag.plan import plan_tiles
from xmag.slide import Slide
from xmag.tiles import read_tiles
from xmag.tissue import find_tissue

SPEC = TileSpec(size_px=56)
ALL = TileOptions(tissue=None)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("slides")
    for number, width in enumerate((2000, 3000)):
        write_svs(folder / f"{number}.svs", size=(width, 1500), mpp=0.25)
    return [folder / "0.svs", folder / "1.svs"]


def expected_tiles(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with Slide(path) as slide:
        plan = plan_tiles(slide, SPEC, tissue=find_tissue(slide))
        return plan.coords, np.concatenate([tiles for _, tiles in read_tiles(slide, plan)])


@pytest.mark.parametrize("memory_gib", [8.0, 0.0])
def test_the_tiles_are_those_of_the_plan_in_memory_or_in_a_file(
    paths: list[Path], tmp_path: Path, memory_gib: float
) -> None:
    options = TileOptions(memory_gib=memory_gib, folder=tmp_path)
    with stored_tiles(paths, spec=SPEC, options=options) as stores:
        for path, store in zip(paths, stores, strict=True):
            coords, tiles = expected_tiles(path)
            assert store.name == path.name
            assert len(store) == len(tiles) > 5
            assert np.array_equal(store.coords, coords)
            assert isinstance(store.tiles, np.memmap) == (memory_gib == 0)
            assert np.array_equal(store.tiles, tiles)
            assert np.array_equal(store.read(slice(3, 9)).numpy(), tiles[3:9])
            assert np.array_equal(store.read(np.array([5, 0])).numpy(), tiles[[5, 0]])
    assert not list(tmp_path.iterdir())


def test_memory_is_used_up_to_the_limit_and_files_beyond(paths: list[Path]) -> None:
    sizes = [len(expected_tiles(path)[0]) * 56 * 56 * 3 for path in paths]
    for room, mapped in ((sizes[0], [False, True]), (sizes[0] - 1, [True, True]),
                         (sum(sizes), [False, False])):  # fmt: skip
        options = TileOptions(memory_gib=room / 2**30)
        with stored_tiles(paths, spec=SPEC, options=options) as stores:
            assert [isinstance(store.tiles, np.memmap) for store in stores] == mapped


def test_what_is_read_may_be_changed_and_the_store_stays(paths: list[Path]) -> None:
    with stored_tiles(paths[:1], spec=SPEC, options=TileOptions(memory_gib=0)) as (store,):
        before = np.array(store.tiles)
        store.read(slice(0, 2)).zero_()
        assert np.array_equal(store.tiles, before)


def test_open_slides_and_a_transform_are_taken(paths: list[Path]) -> None:
    options = TileOptions(transform=lambda tiles: 255 - tiles)
    with Slide(paths[0]) as slide, stored_tiles([slide], spec=SPEC, options=options) as (store,):
        assert np.array_equal(255 - store.tiles, expected_tiles(paths[0])[1])
        assert slide.read_region((0, 0), (2, 2)).shape == (2, 2, 3)


def test_slides_are_told_apart_by_content_and_not_by_name(
    paths: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "copy.svs").write_bytes(paths[0].read_bytes())
    slides = [*paths, tmp_path / "copy.svs"]
    one, other, copy = (p.identity for p in plan_slides(slides, spec=SPEC, options=ALL))
    assert one == copy != other
    stores = [TileStore(random_tiles(20, size_px=28, seed=s)) for s in (0, 0, 1)]
    assert stores[0].identity == stores[1].identity != stores[2].identity


def test_all_slides_without_tiles_are_named_before_any_is_decoded(tmp_path: Path) -> None:
    small = [Slide.from_reader(FakeTileReader(noise(100, 100)), name=n) for n in ("a", "b")]
    reader = FakeTileReader(noise(2000, 1500))
    slides = [Slide.from_reader(reader, name="large"), *small]
    with (
        pytest.raises(
            InputError, match=r"2 of the slides have no tiles.*'a' \(dropped 1: border\), 'b'"
        ),
        stored_tiles(slides, spec=SPEC, options=ALL),
    ):
        pass
    assert not reader.decoded


def test_a_missing_slide_is_named_before_any_is_decoded() -> None:
    reader = FakeTileReader(noise(2000, 1500))
    slides = [Slide.from_reader(reader, name="large"), "nowhere.svs"]
    with (
        pytest.raises(SlideError, match=r"nowhere\.svs"),
        stored_tiles(slides, spec=SPEC, options=ALL),
    ):
        pass
    assert not reader.decoded


def test_a_damaged_slide_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    slide = Slide.from_reader(FakeTileReader(noise(2000, 1500), damaged=[3]), name="broken")
    options = TileOptions(tissue=None, memory_gib=0, folder=tmp_path)
    with (
        pytest.raises(DamagedSlideError, match="broken"),
        stored_tiles([slide], spec=SPEC, options=options),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_an_error_that_says_so(
    paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    options = TileOptions(memory_gib=0, folder=tmp_path)
    with (
        pytest.raises(OutputError, match="No space left on device; free some"),
        stored_tiles(paths, spec=SPEC, options=options),
    ):
        pass
    assert not list(tmp_path.iterdir())


PROGRAM = """
import sys, time
from xmag.finetune import TileOptions, stored_tiles
from xmag.geometry import TileSpec
options = TileOptions(memory_gib=0, folder=sys.argv[2])
with stored_tiles([sys.argv[1]], spec=TileSpec(size_px=56), options=options) as stores:
    print(len(stores[0]), flush=True)
    time.sleep(800)
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows keeps the name of a mapped file")
def test_tiles_on_disk_do_not_outlive_a_program_that_is_killed(
    paths: list[Path], tmp_path: Path
) -> None:
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(paths[0]), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:
        printed = program.stdout.readline()
        program.send_signal(signal.SIGKILL)
    assert int(printed) > 5
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not left


@pytest.mark.parametrize(
    ("tiles", "message"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), r"float32 \(2, 8, 8, 3\); expected uint8"),
        (np.zeros((2, 8, 9, 3), np.uint8), "expected uint8"),
        (np.zeros((2, 3, 8, 8), np.uint8), "expected uint8"),
        (np.zeros((8, 8, 3), np.uint8), "expected uint8"),
        (np.zeros((0, 8, 8, 3), np.uint8), "no tiles to learn from: 'mine'"),
        ([1, 2], "expected uint8"),
    ],
)
def test_other_arrays_are_no_tiles(tiles: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        TileStore(tiles, "mine")


@pytest.mark.parametrize("options", [{"tissue": "all"}, {"memory_gib": -1}])
def test_an_option_out_of_range_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(InputError, match="expected"):
        TileOptions(**options)


def test_a_store_gives_tensors_of_bytes() -> None:
    read = TileStore(random_tiles(4, size_px=28)).read(slice(1, 3))
    assert (read.dtype, tuple(read.shape)) == (torch.uint8, (2, 28, 28, 3))
