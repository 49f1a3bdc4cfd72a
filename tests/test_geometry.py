"""The choice of level and reduction, worked out by hand."""

import math

import pytest

from xmag.errors import InputError, SlideScaleError
from xmag.geometry import TileGeometry, TileSpec, choose_scale

JPEG = (1, 2, 4, 8)


def choose(*level_mpps, reductions=JPEG, **spec):
    scale = choose_scale(level_mpps, [reductions] * len(level_mpps), TileSpec(**spec))
    return scale.level, scale.reduction, scale.mpp


@pytest.mark.parametrize(
    ("level_mpps", "expected"),
    [
        ((0.25, 1.0, 4.0), (1, 2, 2.0)),  # 40x Aperio: the 10x level at 1/2
        ((0.5, 2.0, 8.0), (1, 1, 2.0)),  # 20x Aperio: the native 5x level
        ((0.25,), (0, 8, 2.0)),  # no pyramid: the base at 1/8
        ((0.2425, 0.97), (1, 2, 1.94)),  # 3% off is read as it is, and says so
        ((0.5026, 2.0104), (1, 1, 2.0104)),
        ((0.275, 1.1, 4.4), (1, 1, 2.0)),  # 2.2 is 10% off: the next finer one, resampled
        ((0.3,), (0, 2, 2.0)),  # 2.4 is too coarse; 0.6 resampled, as 1.2 would come out blurred
        ((2.09,), (0, 1, 2.09)),  # coarser than wanted, within 5%
    ],
)
def test_the_cheapest_scale_within_the_tolerance_is_read(level_mpps, expected):
    assert choose(*level_mpps) == pytest.approx(expected)


def test_just_inside_the_tolerance_is_read_and_just_outside_is_resampled():
    assert choose(2 * 0.9501 / 8) == pytest.approx((0, 8, 1.9002))
    assert choose(2 * 0.9499 / 8) == pytest.approx((0, 4, 2.0))
    assert choose(2 * 1.0499 / 8) == pytest.approx((0, 8, 2.0998))
    assert choose(2 * 1.0501 / 8) == pytest.approx((0, 2, 2.0))


def test_no_tolerance_means_exact():
    assert choose(0.2525, 1.01, mpp_tolerance=0.0) == pytest.approx((1, 1, 2.0))
    assert choose(0.25, 1.0, mpp_tolerance=0.0) == pytest.approx((1, 2, 2.0))
    # Equal up to rounding is equal.
    assert choose(0.1 + 0.2, mpp=0.3, mpp_tolerance=0.0) == pytest.approx((0, 1, 0.3))


def test_lanczos_never_decodes_at_a_reduced_scale():
    assert choose(0.25, 1.0, 4.0, resample="lanczos") == pytest.approx((1, 1, 2.0))
    assert choose(0.5, 2.0, resample="lanczos") == pytest.approx((1, 1, 2.0))


def test_what_was_never_scanned_is_not_made_up():
    with pytest.raises(SlideScaleError, match=r"2\.11 µm/px at its finest.*never upsampled"):
        choose(2.11, 8.0)
    with pytest.raises(SlideScaleError):
        choose(2.01, mpp_tolerance=0.0)


def test_factor_is_decoded_px_per_output_px():
    scale = choose_scale([0.275], [JPEG], TileSpec())
    assert math.isclose(scale.factor, 2.0 / 0.55)


@pytest.mark.parametrize(
    "fields",
    [{"mpp": 0}, {"mpp": math.nan}, {"size_px": 0}, {"mpp_tolerance": -0.1}, {"resample": "box"}],
)
def test_an_impossible_tile_spec_is_refused(fields):
    with pytest.raises(InputError, match=f"{next(iter(fields))}.*expected"):
        TileSpec(**fields)


def test_specs_and_geometries_survive_json_values():
    spec = TileSpec(mpp=1.0, size_px=256, mpp_tolerance=0.0, resample="lanczos")
    assert TileSpec.from_dict(spec.to_dict()) == spec
    with pytest.raises(InputError, match=r"TileSpec\.magnification is no known key; expected"):
        TileSpec.from_dict({"mpp": 1.0, "magnification": 5})
    tiles = TileGeometry(
        size_px=224,
        mpp=2.0,
        size_level0=1792,
        overlap_px=0,
        level0_mpp=0.25,
        level0_size=(10, 20),
    )
    assert TileGeometry.from_dict(tiles.to_dict()) == tiles
