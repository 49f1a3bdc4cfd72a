"""benchmarks/miniature.py: its scores against scikit-learn, its images, fields and students."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.metrics import balanced_accuracy_score

from xmag.distill.settings import read_config
from xmag.hub.registry import MINI_WEIGHTS

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import miniature_data
import miniature_fields
import miniature_scores
import miniature_students
import miniature_table

RECIPE = Path(miniature_table.__file__).with_name("xmag-mini.toml")


def test_the_mean_over_seeds_is_that_of_scikit_learns_balanced_accuracy() -> None:
    rng = np.random.default_rng(0)
    classes = np.array(["a", "b", "c"])[rng.integers(3, size=60)]
    predicted = [np.where(rng.random(60) < 0.6, classes, "a") for _ in range(3)]
    found = miniature_scores.summary([p == classes for p in predicted], classes)
    expected = [balanced_accuracy_score(classes, p) for p in predicted]
    assert found["seeds"] == pytest.approx(expected)
    assert found["value"] == pytest.approx(np.mean(expected))
    assert found["low"] < found["value"] < found["high"]


def test_a_difference_is_that_of_the_two_values_and_zero_of_a_model_with_itself() -> None:
    rng = np.random.default_rng(1)
    classes = np.repeat(["a", "b", "c"], 20)
    good, poor = rng.random(60) < 0.9, rng.random(60) < 0.3
    found = miniature_scores.summary([good], classes, minus=[poor])
    alone = [miniature_scores.summary([hit], classes)["value"] for hit in (good, poor)]
    assert found["value"] == pytest.approx(alone[0] - alone[1])
    same = miniature_scores.summary([good], classes, minus=[good])
    assert (same["value"], same["low"], same["high"]) == (0, 0, 0)


def test_probes_never_see_the_patient_left_out() -> None:
    """Labels that only the left-out rows could teach are not learned."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(40, 8)).astype(np.float32)
    classes = np.repeat(["a", "b"], 20)
    held_out = np.arange(40) % 2 == 0
    x[~held_out, 0] += np.where(classes[~held_out] == "a", 9, -9)
    x[held_out, 0] += np.where(classes[held_out] == "a", -9, 9)
    found = miniature_scores.hits(x, classes, held_out)
    # Standardised, the one telling dimension weighs no more than the seven of noise.
    diluted = found.pop("probe, standardised")
    assert diluted.mean() <= 0.1
    assert not any(hit.any() for hit in found.values())


@pytest.mark.shared
def test_the_images_are_sixty_of_four_patients(shared: Path) -> None:
    images = miniature_data.read_images(shared / "images" / "osteosarcoma")
    assert tuple(images.pixels.shape) == (60, 1024, 1024, 3)
    names, counts = np.unique(images.patients, return_counts=True)
    assert dict(zip(names.tolist(), counts.tolist(), strict=True)) == {
        "Case-3": 19, "Case-4": 15, "Case-48": 18, "P9": 8,
    }  # fmt: skip


def textured(height: int, width: int) -> NDArray[np.uint8]:
    rng = np.random.default_rng(3)
    return rng.integers(60, 220, (height, width, 3), dtype=np.uint8)


def test_blocks_of_tissue_are_dark_or_textured_and_glass_is_neither() -> None:
    pixels = np.full((640, 640, 3), 230, np.uint8)
    pixels[:, 320:] = textured(640, 320)
    tissue = miniature_fields.tissue_blocks(pixels)
    assert tissue.shape == (10, 10)
    # A block counts where 8 of the 25 around it do: at the border one column more, one row less.
    assert not tissue[:, :4].any()
    assert tissue[1:-1, 6:].all()


@pytest.mark.parametrize("sheets", [False, True])
def test_a_region_is_drawn_by_its_seed_from_tissue_at_its_sources_scale(sheets: bool) -> None:
    source = miniature_fields.Source(mpp=0.5, regions=1, low=0.43, high=0.58, sheets=sheets)
    pixels = Image.fromarray(textured(1280, 1280))
    tissue = np.ones((20, 20), bool)
    tissue[:, -2:] = False
    piece = miniature_fields.Piece("one", pixels, 0.5, tissue)

    def draw(seed: int) -> tuple[NDArray[np.uint8], list[dict[str, object]]]:
        return miniature_fields.region([piece], source, np.random.default_rng(seed))

    (found, places), (again, same), (other, _) = draw(0), draw(0), draw(1)
    assert found.shape == (896, 896, 3)
    assert len(places) == (4 if sheets else 1)
    assert np.array_equal(found, again)
    assert places == same
    assert not np.array_equal(found, other)
    for place in places:
        assert 0.43 <= place["mpp"] <= 0.58
        side = (448 if sheets else 896) * place["mpp"] / 0.5
        assert piece.share(place["x"], place["y"], int(side)) >= 0.93


def test_a_field_is_stained_by_one_factor_of_the_density_of_each_channel() -> None:
    pixels = textured(64, 64)
    found, gains = miniature_fields.stained(pixels, np.random.default_rng(3))
    least, most = 1 / (1.25 * 1.15), 1.25 * 1.15
    assert all(least <= gain <= most for gain in gains)
    assert len({*gains}) == 3
    for channel, gain in enumerate(gains):
        before, after = (-np.log10(x[..., channel] / 255) for x in (pixels, found))
        middle = (found[..., channel] > 60) & (found[..., channel] < 240)
        # Half a grey level of rounding, and three digits of the factor.
        assert after[middle] == pytest.approx(gain * before[middle], abs=0.005)


def test_crops_are_the_centre_and_the_corners_and_colours_twelve_numbers_of_an_image() -> None:
    pixels = torch.from_numpy(textured(1024, 1024))[None]
    found = miniature_data.crops(pixels)
    assert found.shape == (5, 896, 896, 3)
    assert torch.equal(found[0], pixels[0, 64:960, 64:960])
    assert torch.equal(found[3], pixels[0, :896, 128:])
    low = torch.full((5, 224, 224, 3), 100, dtype=torch.uint8)
    low[:, :112, :, 0] = 200
    row = miniature_data.colours(low)
    assert row.shape == (1, 12)
    assert row[0, [0, 1, 2, 6, 7, 8]] == pytest.approx([150, 100, 100, 50, 0, 0])


def test_students_of_a_single_level_leave_out_the_other_one_alone() -> None:
    config = read_config(RECIPE)
    both, *alone = (*miniature_students.SEEDS[:1], *miniature_students.ALONE)
    whole = both.settings(config, 7)
    assert (whole.train.steps, whole.train.seed, whole.augment) == (7, 0, config.settings.augment)
    assert whole.loss == config.loss
    weights = {
        run.levels: (
            run.settings(config, 7).loss.global_weight,
            run.settings(config, 7).loss.local_weight,
        )
        for run in alone
    }
    assert weights == {"global": (1.0, 0.0), "local": (0.0, 0.5)}


def test_the_file_inside_the_package_is_embedded_as_the_students_of_the_table() -> None:
    low = torch.from_numpy(textured(224, 224 * 5)).reshape(224, 5, 224, 3).transpose(0, 1)
    device = torch.device("cpu")
    shipped, fresh = (
        miniature_table.embedded(miniature_table.load_student(file, 0, device), low.contiguous())
        for file in (MINI_WEIGHTS, None)
    )
    for found in (shipped, fresh):
        parts = [found[name] for name in (miniature_table.CLASS_TOKEN, miniature_table.PATCHES)]
        assert np.array_equal(found[miniature_table.POOLED], np.concatenate(parts, axis=1))
    for name in (miniature_table.CLASS_TOKEN, miniature_table.PATCHES):
        assert shipped[name].shape == fresh[name].shape == (1, 192)
        assert not np.allclose(shipped[name], fresh[name], atol=0.1)
