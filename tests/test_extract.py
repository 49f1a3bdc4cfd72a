"""A slide's features, against the same made step by step."""

import io
import sys

import numpy as np
import pytest
from support.encoders import ColourEncoder
from support.fake_reader import FakeTileReader, noise
from support.slides import write_svs

from xmag.bag import FeatureBag
from xmag.errors import InputError, ModelError, SlideError, SlideScaleError, XmagWarning
from xmag.extract import extract_features
from xmag.geometry import TileSpec
from xmag.plan import plan_tiles
from xmag.slide import Slide
from xmag.tiles import read_tiles
from xmag.tissue import TissueMask, find_tissue


@pytest.fixture(scope="module")
def slide_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("slides") / "slide.svs"
    write_svs(path, size=(4000, 3000), mpp=0.25)
    return path


@pytest.fixture
def fake_slide():
    return Slide.from_reader(FakeTileReader(noise(2000, 1500)), name="fake")


def flipped(tiles):
    return tiles[:, ::-1]


def test_row_i_belongs_to_coordinate_i(slide_path):
    encoder = ColourEncoder()
    bag = extract_features(slide_path, model=encoder, batch_size=5)
    with Slide(slide_path) as slide:
        plan = plan_tiles(slide, encoder.tile_spec, tissue=find_tissue(slide))
        expected = np.concatenate([encoder.embed(t) for _, t in read_tiles(slide, plan)])
    assert len(bag) > 3
    assert np.array_equal(bag.coords, plan.coords)
    assert np.allclose(bag.features, expected, atol=1e-4)
    assert bag.tiles == plan.tiles


def test_an_open_slide_stays_open_and_gives_the_same_as_its_path(slide_path):
    with Slide(slide_path) as slide:
        bag = extract_features(slide, model=ColourEncoder())
        assert slide.read_region((0, 0), (4, 4)).shape == (4, 4, 3)
    other = extract_features(slide_path, model=ColourEncoder())
    assert np.array_equal(bag.features, other.features)


def test_no_tissue_detection_means_every_tile(slide_path):
    bag = extract_features(slide_path, model=ColourEncoder(), tissue=None)
    assert len(bag) == -(-4000 // 448) * -(-3000 // 448)


def test_a_plan_of_the_users_is_followed(fake_slide):
    encoder = ColourEncoder()
    plan = plan_tiles(fake_slide, encoder.tile_spec, overlap=20)
    bag = extract_features(fake_slide, model=encoder, plan=plan)
    assert np.array_equal(bag.coords, plan.coords)
    assert bag.provenance.record["plan"]["overlap_px"] == 20


def test_mpp_overrides_the_file_and_is_recorded(slide_path):
    bag = extract_features(slide_path, model=ColourEncoder(), mpp=0.5, tissue=None)
    assert bag.tiles.size_level0 == 224
    assert bag.provenance.record["scale"]["level0_mpp"] == 0.5


def test_provenance_says_how_to_make_it_again_and_nothing_about_where(slide_path):
    bag = extract_features(slide_path, model=ColourEncoder())
    fingerprint, record = bag.provenance.fingerprint, bag.provenance.record
    assert fingerprint["weights_sha256"] == "sha-of-colours"
    assert fingerprint["tile_spec"] == TileSpec(size_px=56).to_dict()
    assert fingerprint["dtype_class"] == "fp32"
    assert record["slide"]["name"] == "slide.svs"
    assert record["scale"]["effective_mpp"] == 2.0
    assert record["tiles"]["kept"] == len(bag)
    assert str(slide_path.parent) not in bag.provenance.to_json()


def test_a_transform_is_applied_and_named(fake_slide):
    seen = []

    class Rows(ColourEncoder):
        def embed(self, tiles):
            seen.append(tiles.copy())
            return super().embed(tiles)

    extract_features(fake_slide, model=Rows(), tissue=None)
    bag = extract_features(fake_slide, model=Rows(), tissue=None, transform=flipped)
    plain, changed = seen
    assert np.array_equal(changed, plain[:, ::-1])
    assert bag.provenance.fingerprint["transform"].endswith("flipped")


def test_a_transform_that_changes_the_shape_is_refused(fake_slide):
    with pytest.raises(InputError, match=r"returned uint8.*expected uint8"):
        extract_features(
            fake_slide, model=ColourEncoder(), tissue=None, transform=lambda tiles: tiles[:, :9]
        )


def test_a_slide_without_tiles_is_an_empty_bag_and_a_warning():
    slide = Slide.from_reader(FakeTileReader(noise(100, 100)), name="tiny")
    with pytest.warns(XmagWarning, match=r"'tiny' has no tile.*1 border"):
        bag = extract_features(slide, model=ColourEncoder(), tissue=None)
    assert bag.features.shape == (0, 6)
    assert bag.coords.shape == (0, 2)


def test_values_that_are_not_finite_are_refused(fake_slide):
    class Broken(ColourEncoder):
        def embed(self, tiles):
            return np.full((len(tiles), 6), np.nan, np.float32)

    with pytest.raises(ModelError, match=r"not finite.*tile 0"):
        extract_features(fake_slide, model=Broken(), tissue=None)


def test_an_encoder_that_lies_about_its_width_is_refused(fake_slide):
    class Wide(ColourEncoder):
        embed_dim = 7

    with pytest.raises(ModelError, match=r"expected \(\d+, 7\)"):
        extract_features(fake_slide, model=Wide(), tissue=None)


def test_arguments_that_contradict_each_other_are_refused(fake_slide):
    plan = plan_tiles(fake_slide, TileSpec(size_px=57))
    with pytest.raises(InputError, match="the model wants"):
        extract_features(fake_slide, model=ColourEncoder(), plan=plan)
    with pytest.raises(InputError, match="goes with a path"):
        extract_features(fake_slide, model=ColourEncoder(), mpp=0.5)
    with pytest.raises(InputError, match="model is a int"):
        extract_features(fake_slide, model=3)
    for tissue in ("find", np.ones((9, 9), bool)):
        with pytest.raises(InputError, match=r"is (a ndarray|'find'); expected 'auto'"):
            extract_features(fake_slide, model=ColourEncoder(), tissue=tissue)
    with pytest.raises(InputError, match="batch_size is 0"):
        extract_features(fake_slide, model=ColourEncoder(), tissue=None, batch_size=0)


def test_a_slide_that_is_not_there_is_said_before_a_model_is_loaded(tmp_path):
    with pytest.raises(SlideError, match="there is no file"):
        extract_features(tmp_path / "typo.svs", model="nobody/nothing")


def test_a_slide_without_a_scale_names_the_remedy(tmp_path):
    write_svs(tmp_path / "slide.svs", size=(1000, 1000), mpp=None, power=None)
    with pytest.raises(SlideScaleError, match="mpp="):
        extract_features(tmp_path / "slide.svs", model=ColourEncoder())
    bag = extract_features(tmp_path / "slide.svs", model=ColourEncoder(), mpp=0.25, tissue=None)
    assert len(bag) == 3 * 3


@pytest.mark.parametrize(("progress", "shown"), [(None, False), (False, False), (True, True)])
def test_progress_is_on_stderr_and_only_where_someone_sees_it(fake_slide, capsys, progress, shown):
    extract_features(fake_slide, model=ColourEncoder(), tissue=None, progress=progress)
    out, err = capsys.readouterr()
    assert out == ""
    assert ("fake" in err) == shown


def test_progress_shows_by_default_on_a_terminal(fake_slide, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    extract_features(fake_slide, model=ColourEncoder(), tissue=None)
    assert "fake: 100%" in sys.stderr.getvalue()


def test_mini_embeds_a_slide_from_end_to_end(slide_path):
    bag = extract_features(slide_path, model="xmag-mini", tissue=None)
    assert bag.features.shape == (3 * 2, 384)
    assert bag.provenance.record["model"]["name"] == "xmag-mini"


def test_what_the_tiles_cover_of_the_tissue_stands_in_the_bag_and_its_file(fake_slide, tmp_path):
    mask = np.zeros((75, 100), bool)
    mask[:60, 20:] = True
    tissue = TissueMask.from_array(mask, fake_slide)
    options = {"model": ColourEncoder(), "tissue": tissue}
    bag = extract_features(fake_slide, **options)
    plan = plan_tiles(fake_slide, ColourEncoder().tile_spec, tissue=tissue)
    assert np.array_equal(bag.coords, plan.coords)
    bag.save(tmp_path / "a.h5")
    assert FeatureBag.load(tmp_path / "a.h5").coverage == bag.coverage == plan.coverage > 0.95
    assert bag.provenance.record["tissue"]["mm2"] == pytest.approx(80 * 60 * 0.005**2)
    with pytest.warns(XmagWarning, match=r"border='shift'"):
        less = extract_features(fake_slide, **options, border="drop")
    assert less.coverage < 0.9
    assert bag.provenance.differences(less.provenance) == [
        "plan.border: 'drop' there, 'shift' here"
    ]
    assert extract_features(fake_slide, model=ColourEncoder(), tissue=None).coverage is None
