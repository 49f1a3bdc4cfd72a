"""Regions against the tiles of a plan, against crops of the image, and with damage in them."""

import os
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.fake_reader import FakeTileReader, noise
from support.slides import texture, write_svs

from xmag.distill import dataset
from xmag.distill.dataset import RegionLoader, RegionSource, SlideRegions
from xmag.distill.regions import REGION_SPEC, Manifest, plan_images, plan_slides
from xmag.errors import ClosedSlideError, DamagedSlideError, InputError, SlideError, SlideScaleError
from xmag.geometry import TileSpec
from xmag.plan import plan_tiles
from xmag.slide import Slide
from xmag.tiles import read_tiles
from xmag.tiles.children import PROCESSES_SUPPORTED, PlacePool
from xmag.tiles.stream import read_places
from xmag.tiles.worker import Places

in_processes = pytest.mark.skipif(not PROCESSES_SUPPORTED, reason="needs POSIX")
LANCZOS = TileSpec(mpp=0.5, size_px=896, resample="lanczos")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slide at 40x, one between scales, one at 20x."""
    root = tmp_path_factory.mktemp("slides")
    pixels = np.tile(texture(1000, 700), (3, 4, 1))  # places that look alike are never compared
    write_svs(root / "40x.svs", pixels=pixels[:1800, :3600], mpp=0.25, levels=(1, 4))
    write_svs(root / "odd.svs", pixels=pixels[:1600, :2700], mpp=0.3, power=None, levels=(1, 4))
    write_svs(root / "20x.svs", pixels=pixels[:900, :1900], mpp=0.499, power=20, levels=(1,))
    return root


@pytest.fixture(scope="module")
def manifest(folder: Path) -> Manifest:
    return plan_slides(folder, tissue=None, overlap=200)


@pytest.fixture
def regions(manifest: Manifest, folder: Path) -> Iterator[SlideRegions]:
    with SlideRegions(manifest, folder, threads=2) as source:
        yield source


def planned(folder: Path, manifest: Manifest) -> np.ndarray:
    """All regions as `read_tiles` reads them, slide by slide."""
    parts = []
    for source in manifest.sources:
        with Slide(folder / source.path) as slide:
            plan = plan_tiles(slide, manifest.spec, overlap=200, border="drop")
            parts += [tiles for _, tiles in read_tiles(slide, plan, threads=1)]
    return np.concatenate(parts)


def test_regions_are_the_tiles_of_a_plan_in_every_bit(
    regions: SlideRegions, folder: Path, manifest: Manifest
) -> None:
    expected = planned(folder, manifest)
    assert len(regions) == len(expected) == len(manifest) == 6
    assert isinstance(regions, RegionSource)
    order = [4, 0, 2, 2, 5, 1, 3]
    found = regions.read(order)
    assert found.dtype == np.uint8
    assert np.array_equal(found, expected[order])
    for index in range(6):
        assert np.array_equal(regions.read([index])[0], expected[index])
    assert regions.read([]).shape == (0, 896, 896, 3)
    assert not regions.damaged


def test_the_kernel_is_the_manifests(folder: Path) -> None:
    area = plan_slides(folder / "odd.svs", tissue=None)
    lanczos = plan_slides(folder / "odd.svs", tissue=None, spec=LANCZOS)
    assert lanczos.sha256 != area.sha256
    with SlideRegions(lanczos, folder) as source:
        found = source.read([0])[0]
    with Slide(folder / "odd.svs") as slide:
        whole = slide.read_region((0, 0), slide.dimensions)
    side = 896 * 0.5 / 0.3
    crop = Image.fromarray(whole[: int(np.ceil(side)), : int(np.ceil(side))])
    expected = crop.resize((896, 896), Image.Resampling.LANCZOS, box=(0, 0, side, side))
    assert np.abs(found.astype(int) - np.asarray(expected)).max() <= 1
    with SlideRegions(area, folder) as source:
        assert np.abs(found.astype(int) - source.read([0])[0]).max() > 3


def test_regions_of_images_are_their_crops(tmp_path: Path) -> None:
    images = {f"{n}.png": texture(1000, 950, seed=n) for n in range(3)}
    for name, pixels in images.items():
        Image.fromarray(pixels).save(tmp_path / name)
    manifest = plan_images(tmp_path, mpp=0.5, regions=9)
    with SlideRegions(manifest, tmp_path) as source:
        found = source.read(range(9))
    for (number, x, y), pixels in zip(manifest.places.tolist(), found, strict=True):
        whole = images[manifest.sources[number].path]
        assert np.array_equal(pixels, whole[y : y + 896, x : x + 896])


def test_many_threads_read_the_same(
    regions: SlideRegions, folder: Path, manifest: Manifest
) -> None:
    expected = planned(folder, manifest)
    rng = np.random.default_rng(0)
    calls = [rng.integers(0, 5, size).tolist() for size in (1, 3, 1, 4, 1, 2, 1, 1)]
    with ThreadPoolExecutor(8) as pool:
        for call, found in zip(calls, pool.map(regions.read, calls), strict=True):
            assert np.array_equal(found, expected[call])


def test_slides_not_used_for_longest_are_closed(
    folder: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    plain = dataset.Slide

    def counted(path: Path, **options: float) -> Slide:
        opened.append(path.name)
        return plain(path, **options)

    monkeypatch.setattr(dataset, "Slide", counted)
    monkeypatch.setattr(dataset, "_OPEN_SOURCES", 2)
    first = {source: int(np.argmax(manifest.places[:, 0] == source)) for source in range(3)}
    with SlideRegions(manifest, folder, threads=1) as regions:
        for source in (0, 0, 1, 0, 2, 0, 1):
            regions.read([first[source]])
    assert opened == ["20x.svs", "40x.svs", "odd.svs", "40x.svs"]


def test_plain_images_are_closed_before_they_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        Image.fromarray(texture(900, 900, seed=number)).save(tmp_path / f"{number}.png")
    manifest = plan_images(tmp_path, mpp=0.5, regions=3)
    monkeypatch.setattr(dataset, "_OPEN_IMAGE_BYTES", 2 * 900 * 900 * 3)
    with SlideRegions(manifest, tmp_path) as source:
        source.read(range(3))
        assert len(source._slides._entries) == 2


def damaged_copy(folder: Path, into: Path) -> Path:
    """The slides with the bytes of one source tile of 40x.svs overwritten."""
    copy = Path(shutil.copytree(folder, into))
    path = copy / "40x.svs"
    with Slide(path) as slide:
        (data,) = slide.reader.read_tile_bytes(0, [7 * 15 + 9])  # at (2160, 1680)
    content = path.read_bytes()
    scan = data[data.index(b"\xff\xda") + 30 : -2]
    at = content.index(scan)
    path.write_bytes(
        content[:at] + b"\xff\xd9" * (len(scan) // 2) + content[at + len(scan) // 2 * 2 :]
    )
    return copy


def test_damage_is_an_error_a_count_and_never_px(folder: Path, tmp_path: Path) -> None:
    copy = damaged_copy(folder, tmp_path / "damaged")
    manifest = plan_slides(copy, tissue=None, overlap=200)
    (bad,) = [
        number
        for number, (source, x, y) in enumerate(manifest.places.tolist())
        if manifest.sources[source].path == "40x.svs" and x <= 2160 < x + 1792
        if x + 1792 > 2160 + 240
    ]
    expected = planned(folder, plan_slides(folder, tissue=None, overlap=200))
    good = [index for index in range(6) if index != bad]
    with SlideRegions(manifest, copy, threads=2) as source:
        assert not source.damaged
        with pytest.raises(DamagedSlideError, match=rf"1 of 6 .*region {bad}: 40x\.svs: tile 114"):
            source.read(range(6))
        assert list(source.damaged) == [bad]
        with pytest.raises(DamagedSlideError, match="1 of 1"):
            source.read([bad])
        rows, found = source.read_intact([4, bad, *good])
        assert rows.tolist() == [0, 2, 3, 4, 5, 6]
        assert np.array_equal(found, expected[[4, *good]])
        assert source.read_intact([bad])[1].shape == (0, 896, 896, 3)
        assert "tile 114 (row 7, column 9)" in source.damaged[bad]


@in_processes
def test_processes_read_the_same_and_leave_none_behind(
    folder: Path, manifest: Manifest, tmp_path: Path
) -> None:
    expected = planned(folder, manifest)
    with SlideRegions(manifest, folder, processes=2) as source:
        assert np.array_equal(source.read([4, 0, 2, 5]), expected[[4, 0, 2, 5]])
        with ThreadPoolExecutor(3) as pool:
            found = pool.map(source.read, [[1], [3], [1], [0]])
            assert np.array_equal(np.concatenate(list(found)), expected[[1, 3, 1, 0]])
        started = [child.popen for child in source._children._children.values()]
        assert [process.poll() for process in started] == [None, None]
        started[0].kill()
        assert np.array_equal(source.read([1, 2, 3]), expected[1:4])  # another takes its place
        assert not source.damaged
    assert all(process.poll() is not None for process in started)
    with pytest.raises(ClosedSlideError):
        source.read([0])


@in_processes
def test_a_slide_that_kills_who_reads_it_is_damaged(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tests = Path(__file__).parents[1]
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join(map(str, (tests / "support/planted", tests.parent)))
    )
    hanging = tmp_path / "hang@opening.svs"
    shutil.copy(next(folder.glob("*.svs")), hanging)
    stuck = Places(str(hanging), None, REGION_SPEC, np.array([[0, 0]]))
    tiles = np.empty((1, 896, 896, 3), np.uint8)
    with PlacePool(1, slot_tiles=1, size_px=896) as pool:

        def kill_all() -> None:
            for _ in range(2):
                process = pool._children[0].popen
                while pool._children[0].popen is process and process.poll() is None:
                    time.sleep(0.3)
                    process.kill()
                while pool._children[0].popen is process and not done.is_set():
                    time.sleep(0.01)

        done = threading.Event()
        killer = threading.Thread(target=kill_all)
        killer.start()
        with pytest.raises(DamagedSlideError, match=r"was killed .signal SIGKILL."):
            pool.read(stuck, tiles)
        done.set()
        killer.join()
        with pytest.raises(SlideError, match="there is no file"):
            pool.read(Places(str(tmp_path / "no.svs"), None, REGION_SPEC, stuck.coords), tiles)
    assert not [t for t in threading.enumerate() if t is killer]


@in_processes
def test_what_processes_find_wrong_is_what_threads_do(folder: Path, tmp_path: Path) -> None:
    copy = damaged_copy(folder, tmp_path / "damaged")
    manifest = plan_slides(copy, tissue=None, overlap=200)
    with SlideRegions(manifest, copy) as source:
        source.read_intact(range(6))
        expected = dict(source.damaged)
    with SlideRegions(manifest, copy, processes=1) as source:
        rows, _ = source.read_intact(range(6))
        assert dict(source.damaged) == expected
        assert len(expected) == 1
        assert len(rows) == 5
    (copy / "odd.svs").write_bytes(b"II*\0")
    with (
        SlideRegions(manifest, copy, processes=1) as source,
        pytest.raises(InputError, match=r"'odd\.svs' is not the file"),
    ):
        source.read([5])


def test_damaged_regions_of_anyones_source_leave_their_batches(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Source:
        def __len__(self) -> int:
            return 4

        def read(self, indices: list[int]) -> np.ndarray:
            if 2 in indices:
                raise DamagedSlideError("a bad block")
            return np.full((len(indices), 4, 4, 3), indices[0], np.uint8)

    loader = RegionLoader(Source(), side=4, threads=2, ahead=1, device=torch.device("cpu"))
    wanted = ([3, 2, 0, 2, 1], [2], [2, 2], [], [1, 0])
    epochs = [np.arange(len(numbers)) for numbers in wanted]
    found = list(
        loader.read((np.array(n, np.int64), e) for n, e in zip(wanted, epochs, strict=True))
    )
    assert [batch.regions.tolist() for batch in found] == [[3, 0, 1], [], [], [], [1, 0]]
    assert [batch.epochs.tolist() for batch in found] == [[0, 2, 4], [], [], [], [0, 1]]
    for batch in found:
        assert batch.pixels.shape == (len(batch.regions), 4, 4, 3)
        assert batch.pixels[:, 0, 0, 0].tolist() == batch.regions.tolist()
    assert loader.damaged.tolist() == [False, False, True, False]
    assert caplog.text.count("region 2 cannot be decoded and is left out: a bad block") == 1


def test_another_file_under_the_name_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    manifest = plan_slides(copy, tissue=None)
    with (copy / "40x.svs").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"?")
    with SlideRegions(manifest, copy) as source:
        numbers = np.flatnonzero(manifest.places[:, 0] == 1)
        with pytest.raises(InputError, match=r"'40x\.svs' is not the file that the manifest"):
            source.read(numbers)
    with (
        SlideRegions(manifest, tmp_path) as source,
        pytest.raises(SlideError, match=r"no '20x\.svs' in .*as root"),
    ):
        source.read([0])


def test_closed_regions_and_impossible_numbers_are_refused(
    folder: Path, manifest: Manifest
) -> None:
    with pytest.raises(InputError, match="threads is 0"):
        SlideRegions(manifest, folder, threads=0)
    with SlideRegions(manifest, folder) as source:
        for numbers in ([6], [-1], [0, 99]):
            with pytest.raises(InputError, match="expected numbers from 0 to 5"):
                source.read(numbers)
    source.close()
    with pytest.raises(ClosedSlideError, match="the regions are closed"):
        source.read([0])
    assert not [t for t in threading.enumerate() if t.name.startswith("xmag-regions")]


def test_places_share_the_source_tiles_that_they_touch() -> None:
    reader = FakeTileReader(noise(2000, 1200), tile=(240, 240))
    slide = Slide.from_reader(reader, name="fake")
    coords = np.array([[3, 5], [101, 57], [3, 5]])
    spec = TileSpec(mpp=0.25, size_px=800)
    found = read_places(slide, spec, coords)
    assert set(reader.decoded.values()) == {1}
    for (x, y), tile in zip(coords.tolist(), found, strict=True):
        assert np.array_equal(tile, noise(2000, 1200)[y : y + 800, x : x + 800])
    assert read_places(slide, spec, np.empty((0, 2), np.int64)).shape == (0, 800, 800, 3)


def test_places_off_the_slide_or_its_scale_are_refused() -> None:
    slide = Slide.from_reader(FakeTileReader(noise(1000, 900)), name="fake")
    spec = TileSpec(mpp=0.25, size_px=800)
    for corner in ([-1, 0], [0, 102], [202, 0]):
        with pytest.raises(InputError, match=r"is not wholly on fake, which has 1000x900 px"):
            read_places(slide, spec, np.array([[0, 0], corner]))
    with pytest.raises(SlideScaleError, match="never upsampled"):
        read_places(slide, TileSpec(mpp=0.2, size_px=8), np.array([[0, 0]]))
    assert REGION_SPEC.size_px * REGION_SPEC.mpp == 448
