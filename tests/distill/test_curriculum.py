"""What a step is taken on: the order of regions, and kept features against asked ones."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.distilling import ArraySource, RandomTeacher, colourful_regions

from xmag.distill.cache import (
    KeptLesson,
    KeptTargets,
    Lesson,
    LowViews,
    OnlineLesson,
    TargetSettings,
    check_lessons,
    keep_targets,
)
from xmag.distill.dataset import Group, Order, RegionLoader, share
from xmag.distill.regions import Manifest, plan_images
from xmag.distill.settings import TrainSettings
from xmag.distill.trainer import Curriculum, Stopwatch, Views
from xmag.distill.views import Augmentation, augment, low_view, teacher_tiles
from xmag.errors import InputError
from xmag.geometry import TileSpec

CPU = torch.device("cpu")
PLACES = Augmentation(brightness=0, contrast=0, saturation=0, hue=0)
"""Flips and turns alone."""


@pytest.mark.parametrize("batch", [3, 10, 25])
def test_every_region_comes_once_an_epoch(batch: int) -> None:
    regions = np.arange(100, 110)
    order = Order(regions, batch=batch, seed=1)
    taken = [order.step(number) for number in range(20)]
    numbers = np.concatenate([t[0] for t in taken])
    epochs = np.concatenate([t[1] for t in taken])
    for epoch in range(len(numbers) // 10):
        assert sorted(numbers[epochs == epoch]) == list(regions)
    assert numbers[:10].tolist() != numbers[10:20].tolist()
    assert Order(regions, batch=batch, seed=2).step(0)[0].tolist() != taken[0][0].tolist()


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
    settings: TargetSettings,
    teacher: RandomTeacher | None = None,
) -> KeptTargets:
    teacher = teacher or RandomTeacher(size_px=224)
    source = ArraySource(pixels)
    return keep_targets(folder, source, manifest, teacher, settings=settings, progress=False)


def views_of(
    lesson: Lesson, pixels: np.ndarray, augmentation: Augmentation, epoch: int = 0, seed: int = 5
) -> Views:
    curriculum = Curriculum([lesson], augmentation=augmentation, seed=seed, views=2, device=CPU)
    loader = RegionLoader(ArraySource(pixels), side=896, threads=1, ahead=1, device=CPU)
    group = Group(regions=np.arange(3), epochs=np.full(3, epoch))
    return curriculum.views(next(loader.read([group])), Stopwatch(CPU))


def test_plain_features_follow_the_flips_and_turns_of_their_tiles(
    tmp_path: Path, pixels: np.ndarray, manifest: Manifest
) -> None:
    teacher = ColourTeacher(6, size_px=224)
    asked = OnlineLesson(teacher=teacher)
    with kept(tmp_path, pixels, manifest, TargetSettings(), teacher) as targets:
        for epoch in range(4):
            one = views_of(asked, pixels, PLACES, epoch)
            other = views_of(KeptLesson(kept=targets), pixels, PLACES, epoch)
            assert torch.equal(one.low, other.low)
            torch.testing.assert_close(one.targets[0], other.targets[0], atol=2e-3, rtol=1e-3)


def test_augmented_features_go_with_the_images_they_were_computed_of(
    tmp_path: Path, pixels: np.ndarray, manifest: Manifest
) -> None:
    settings = TargetSettings(variants=3, seed=8)
    seen = []
    with kept(tmp_path, pixels, manifest, settings) as targets:
        lesson = KeptLesson(kept=targets)
        for epoch in range(3):
            found = views_of(lesson, pixels, Augmentation(), epoch)
            for view in range(2):
                numbers = (np.arange(3) + 2 * epoch + view) % 3
                seen.append(numbers[0])
                draws = settings.draws(np.arange(3), numbers)
                high = augment(torch.from_numpy(pixels), draws)
                expected = RandomTeacher(size_px=224).features(teacher_tiles(high))
                part = slice(3 * view, 3 * view + 3)
                torch.testing.assert_close(
                    found.targets[0][part], expected.view(3, 16, -1), atol=2e-3, rtol=1e-3
                )
                low = augment(low_view(torch.from_numpy(pixels)), draws)
                assert torch.equal(found.low[part], low)
    assert set(seen) == {0, 1, 2}


def test_kept_low_views_spare_the_slides(
    tmp_path: Path, pixels: np.ndarray, manifest: Manifest
) -> None:
    with kept(tmp_path, pixels, manifest, TargetSettings(low=True)) as targets:
        lesson = KeptLesson(kept=targets)
        expected = views_of(lesson, pixels, Augmentation())
        loader = RegionLoader(LowViews(targets), side=224, threads=1, ahead=1, device=CPU)
        curriculum = Curriculum(
            [lesson], augmentation=Augmentation(), seed=5, views=2, device=CPU, reads_low=True
        )
        group = Group(regions=np.arange(3), epochs=np.zeros(3, np.int64))
        found = curriculum.views(next(loader.read([group])), Stopwatch(CPU))
        assert torch.equal(found.low, expected.low)
        assert torch.equal(found.targets[0], expected.targets[0])


def test_regions_that_had_no_features_are_left_out(
    tmp_path: Path, pixels: np.ndarray, manifest: Manifest
) -> None:
    teacher = RandomTeacher(size_px=224)
    source = ArraySource(pixels, damaged=[1])
    with keep_targets(tmp_path, source, manifest, teacher, progress=False) as targets:
        found = views_of(KeptLesson(kept=targets), pixels, PLACES)
        expected = views_of(OnlineLesson(teacher=teacher), pixels, PLACES)
    whole = [0, 2, 3, 5]  # of both views
    assert torch.equal(found.low, expected.low[whole])
    assert torch.isfinite(found.targets[0]).all()


def test_lessons_that_do_not_go_together_are_refused(
    tmp_path: Path, pixels: np.ndarray, manifest: Manifest
) -> None:
    spec = TileSpec()
    with kept(tmp_path / "a", pixels, manifest, TargetSettings(variants=2)) as one:
        other = keep_targets(
            tmp_path / "b", ArraySource(pixels), manifest, RandomTeacher(size_px=224, name="other"),
            settings=TargetSettings(variants=2, seed=1), progress=False,
        )  # fmt: skip
        with other, pytest.raises(InputError, match="different augmentations"):
            check_lessons([KeptLesson(kept=one), KeptLesson(kept=other)], spec)
        asked = OnlineLesson(teacher=RandomTeacher(size_px=224, name="asked"))
        check_lessons([KeptLesson(kept=one), asked], spec)
        with pytest.raises(InputError, match="expected a student of such tiles"):
            check_lessons([KeptLesson(kept=one)], TileSpec(size_px=112))
