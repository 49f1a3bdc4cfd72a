"""The micro-batches of a step: the order of regions, and cached features against online ones."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.distilling import ArraySource, RandomTeacher, colourful_regions

from xmag.distill.cache import (
    CachedFeatures,
    CacheSettings,
    FeatureCache,
    cache_features,
)
from xmag.distill.dataset import RegionSampler, share
from xmag.distill.regions import Manifest, plan_images
from xmag.distill.settings import Settings, TrainSettings
from xmag.distill.teachers import OnlineFeatures, TeacherFeatures, check_teachers
from xmag.distill.trainer import Stopwatch, ViewLoader, Views
from xmag.errors import InputError
from xmag.geometry import Resample, TileSpec
from xmag.training import Ranks
from xmag.training.augmentation import NONE, Augmentation

CPU = torch.device("cpu")
PLACES = Augmentation(brightness=0, contrast=0, saturation=0, hue=0)
"""Flips and turns alone."""


@pytest.mark.parametrize("batch", [3, 10, 25])
def test_every_region_comes_once_an_epoch(batch: int) -> None:
    regions = np.arange(100, 110)
    sampler = RegionSampler(regions, batch=batch, seed=1)
    taken = [sampler.step(number) for number in range(20)]
    numbers = np.concatenate([t[0] for t in taken])
    epochs = np.concatenate([t[1] for t in taken])
    for epoch in range(len(numbers) // 10):
        assert sorted(numbers[epochs == epoch]) == list(regions)
    assert numbers[:10].tolist() != numbers[10:20].tolist()
    assert RegionSampler(regions, batch=batch, seed=2).step(0)[0].tolist() != taken[0][0].tolist()


@pytest.mark.parametrize(("world", "micro_batch"), [(1, 12), (1, 5), (2, 6), (3, 4), (4, 2)])
def test_ranks_share_a_step_between_them(world: int, micro_batch: int) -> None:
    parts = [
        part
        for rank in range(world)
        for part in share(rank, world, batch=12, micro_batch=micro_batch)
    ]
    assert [n for part in parts for n in range(12)[part]] == list(range(12))
    assert all(part.stop - part.start <= micro_batch for part in parts)


def test_the_steps_of_a_run_are_those_of_its_epochs() -> None:
    assert TrainSettings(epochs=10, batch=48).total_steps(1000) == 208
    assert TrainSettings(epochs=10, batch=48, steps=7).total_steps(1000) == 7
    assert TrainSettings(epochs=0.001).total_steps(10) == 1


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return colourful_regions(3, side=896)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory, pixels: np.ndarray) -> Manifest:
    """A manifest whose regions are those of `pixels`, in some order of its own."""
    folder = tmp_path_factory.mktemp("images")
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number}.png")
    return plan_images(folder, mpp=0.5, regions=3, progress=False)


class ColourTeacher(RandomTeacher):
    """Sees colours and their contrasts, and is blind to how a tile is turned."""

    def features(self, tiles: torch.Tensor) -> torch.Tensor:
        values = tiles.flatten(1, 2).float() / 255
        return torch.cat((values.mean(1), values.std(1)), dim=1)


def kept(
    folder: Path,
    pixels: np.ndarray,
    manifest: Manifest,
    *,
    low: bool = False,
    kernel: Resample = "lanczos",
    teacher: RandomTeacher | None = None,
) -> FeatureCache:
    teacher = teacher or RandomTeacher(size_px=224)
    source, settings = ArraySource(pixels), CacheSettings(low=low, resample=kernel)
    return cache_features(folder, source, manifest, teacher, settings=settings, progress=False)


def loader_of(
    *teachers: TeacherFeatures,
    source: ArraySource,
    augmentation: Augmentation,
    kernel: Resample = "lanczos",
) -> ViewLoader:
    settings = Settings(augment=augmentation, train=TrainSettings(batch=3, views=2, seed=5))
    return ViewLoader(
        source, teachers, TileSpec(resample=kernel), training=np.arange(3), settings=settings,
        ranks=Ranks(), device=CPU,
    )  # fmt: skip


def views_of(
    teacher: TeacherFeatures, pixels: np.ndarray, augmentation: Augmentation, epoch: int = 0
) -> Views:
    """The views of all regions in an epoch, which is a step."""
    loader = loader_of(teacher, source=ArraySource(pixels), augmentation=augmentation)
    (views,) = loader.batches(epoch, epoch + 1, Stopwatch(CPU))
    return views


def test_cached_features_follow_the_flips_and_turns_of_their_tiles(
    tmp_path: Path, pixels: np.ndarray, manifest: Manifest
) -> None:
    teacher = ColourTeacher(6, size_px=224)
    asked = OnlineFeatures(teacher=teacher)
    with kept(tmp_path, pixels, manifest, teacher=teacher) as cache:
        for epoch in range(4):
            one = views_of(asked, pixels, PLACES, epoch)
            other = views_of(CachedFeatures(cache=cache), pixels, PLACES, epoch)
            assert torch.equal(one.low, other.low)
            torch.testing.assert_close(one.targets[0], other.targets[0], atol=2e-3, rtol=1e-3)


def test_kept_low_views_spare_the_slides(
    tmp_path: Path, pixels: np.ndarray, manifest: Manifest
) -> None:
    with kept(tmp_path, pixels, manifest, low=True) as cache:
        teacher = CachedFeatures(cache=cache)
        expected = views_of(teacher, pixels, Augmentation())
        nothing = ArraySource(pixels, damaged=[0, 1, 2])
        loader = loader_of(teacher, source=nothing, augmentation=Augmentation())
        (found,) = loader.batches(0, 1, Stopwatch(CPU))
        assert torch.equal(found.low, expected.low)
        assert torch.equal(found.targets[0], expected.targets[0])


@pytest.mark.parametrize("low", [False, True])
def test_low_views_are_made_with_the_students_kernel(
    tmp_path: Path, pixels: np.ndarray, manifest: Manifest, low: bool
) -> None:
    """Cached or not, they are what Pillow's reduce makes of the regions."""
    with kept(tmp_path, pixels, manifest, low=low, kernel="area") as cache:
        loader = loader_of(
            CachedFeatures(cache=cache), source=ArraySource(pixels), augmentation=NONE,
            kernel="area",
        )  # fmt: skip
        (plain,) = loader.plain(np.arange(3))
        (found,) = loader.batches(0, 1, Stopwatch(CPU))
    expected = np.stack([np.asarray(Image.fromarray(image).reduce(4)) for image in pixels])
    order, _ = RegionSampler(np.arange(3), batch=3, seed=5).step(0)
    assert np.array_equal(plain.low.numpy(), expected)
    assert np.array_equal(found.low.numpy(), expected[[*order, *order]])


def test_low_views_of_another_kernel_are_refused(
    tmp_path: Path, pixels: np.ndarray, manifest: Manifest
) -> None:
    with kept(tmp_path, pixels, manifest, low=True) as cache:
        teacher = CachedFeatures(cache=cache)
        with pytest.raises(InputError, match=r"'lanczos', and the student's tiles with 'area'"):
            loader_of(teacher, source=ArraySource(pixels), augmentation=NONE, kernel="area")


def test_features_without_low_views_serve_students_of_both_kernels(
    tmp_path: Path, pixels: np.ndarray, manifest: Manifest
) -> None:
    with kept(tmp_path, pixels, manifest) as cache:
        before = cache.provenance.fingerprint
    with kept(tmp_path, pixels, manifest, kernel="area") as cache:
        assert cache.provenance.fingerprint == before


def test_regions_without_features_leave_the_batch(
    tmp_path: Path, pixels: np.ndarray, manifest: Manifest
) -> None:
    teacher = RandomTeacher(size_px=224)
    source = ArraySource(pixels, damaged=[1])
    with kept(tmp_path / "all", pixels, manifest) as cache:
        whole = views_of(CachedFeatures(cache=cache), pixels, PLACES)
    with cache_features(tmp_path / "one", source, manifest, teacher, progress=False) as cache:
        found = views_of(CachedFeatures(cache=cache), pixels, PLACES)
    order, _ = RegionSampler(np.arange(3), batch=3, seed=5).step(0)
    rows = [row for row, region in enumerate([*order, *order]) if region != 1]
    assert len(rows) == 4
    assert torch.equal(found.low, whole.low[rows])
    assert torch.equal(found.targets[0], whole.targets[0][rows])


def test_a_batch_of_damaged_regions_is_empty(
    tmp_path: Path, pixels: np.ndarray, manifest: Manifest
) -> None:
    damaged = ArraySource(pixels, damaged=[0, 1, 2])
    with kept(tmp_path, pixels, manifest) as cache:
        teachers = [
            OnlineFeatures(teacher=RandomTeacher(size_px=224, name="online")),
            CachedFeatures(cache=cache),
        ]
        loader = loader_of(*teachers, source=damaged, augmentation=Augmentation())
        (found,) = loader.batches(0, 1, Stopwatch(CPU))
    assert loader.count_damaged() == 3
    assert found.low.shape == (0, 224, 224, 3)
    assert [target.shape for target in found.targets] == [(0, 16, 24)] * 2


def test_quarters_of_a_batch_without_regions_are_empty() -> None:
    views = Views(low=torch.zeros(0, 224, 224, 3), targets=[torch.zeros(0, 16, 24)])
    found = views.quarters(torch.zeros(0, dtype=torch.int64))
    assert found.low.shape == (0, 112, 112, 3)
    assert [target.shape for target in found.targets] == [(0, 4, 24)]


def test_quarters_of_views_come_with_the_features_of_their_tiles(
    tmp_path: Path, pixels: np.ndarray, manifest: Manifest
) -> None:
    """Each quarter is found in its view, and what the teacher says of its tiles is asked again."""
    teacher = ColourTeacher(6, size_px=224)
    settings = Settings(augment=PLACES, train=TrainSettings(batch=3, views=2, quarters=2, seed=5))
    loader = ViewLoader(
        ArraySource(pixels), [OnlineFeatures(teacher=teacher)], TileSpec(),
        training=np.arange(3), settings=settings, ranks=Ranks(), device=CPU,
    )  # fmt: skip
    seen: list[set[int]] = [set(), set(), set()]
    assert loader.count == 2
    for epoch in range(2):
        order, _ = loader.sampler.step(epoch)
        whole, small = loader.batches(epoch, epoch + 1, Stopwatch(CPU))
        assert whole.low.shape == (6, 224, 224, 3)
        assert small.low.shape == (12, 112, 112, 3)
        assert small.targets[0].shape == (12, 4, 6)
        for at, (low, target) in enumerate(zip(small.low, small.targets[0], strict=True)):
            view, tiles = whole.low[at % 6], whole.targets[0][at % 6].view(4, 4, 6)
            corners = [(112 * (n // 2), 112 * (n % 2)) for n in range(4)]
            places = [
                n for n, (y, x) in enumerate(corners)
                if torch.equal(view[y : y + 112, x : x + 112], low)
            ]  # fmt: skip
            assert len(places) == 1
            y, x = (2 * (places[0] // 2), 2 * (places[0] % 2))
            assert torch.equal(target.view(2, 2, 6), tiles[y : y + 2, x : x + 2])
            if at % 6 < 3:
                seen[int(order[at % 6])].add(places[0])
    assert all(len(places) >= 3 for places in seen)  # two in each epoch, of which one is new


def test_teachers_that_do_not_go_together_are_refused(
    tmp_path: Path, pixels: np.ndarray, manifest: Manifest
) -> None:
    spec = TileSpec()
    with kept(tmp_path, pixels, manifest) as cache:
        cached = CachedFeatures(cache=cache)
        asked = OnlineFeatures(teacher=RandomTeacher(size_px=224, name="asked"))
        check_teachers([cached, asked], spec)
        with pytest.raises(InputError, match="a name of its own for each"):
            check_teachers([cached, cached], spec)
        with pytest.raises(InputError, match="expected a student of such tiles"):
            check_teachers([cached], TileSpec(size_px=112))
