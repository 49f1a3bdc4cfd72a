"""Bags as AnnData, read back by the package itself."""

import sys

import anndata
import numpy as np
import pytest
from support.encoders import ColourEncoder
from support.slides import write_svs

import xmag
from xmag import FeatureBag, Slide
from xmag.errors import BagError, MissingExtraError
from xmag.provenance import Provenance

pytestmark = pytest.mark.filterwarnings("ignore:The 'future.infer_string' option")


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    path = tmp_path_factory.mktemp("slides") / "case 7.svs"
    rng = np.random.default_rng(0)
    pixels = np.full((1200, 1600, 3), 244, np.uint8)
    pixels[300:1000, 200:1400] = rng.integers(90, 200, (700, 1200, 3))
    write_svs(path, pixels=pixels, mpp=0.5, power=20)
    with Slide(path) as slide:
        yield slide


@pytest.fixture(scope="module")
def bag(slide):
    return xmag.extract_features(slide, model=ColourEncoder(), tissue=None)


def test_rows_are_tiles_and_places_their_centres(bag):
    table = bag.to_anndata()
    np.testing.assert_array_equal(table.X, bag.features)
    np.testing.assert_array_equal(table.obs[["x", "y"]].to_numpy(), bag.coords)
    side = bag.tiles.size_px * bag.tiles.mpp / bag.tiles.level0_mpp
    np.testing.assert_allclose(table.obsm["spatial"], bag.coords + side / 2)
    assert table.obs_names.is_unique
    assert Provenance.from_json(table.uns["provenance"]) == bag.provenance


def test_all_of_it_survives_h5ad(bag, slide, tmp_path):
    table = bag.to_anndata(slide)
    table.write_h5ad(tmp_path / "bag.h5ad")
    again = anndata.read_h5ad(tmp_path / "bag.h5ad")
    np.testing.assert_array_equal(again.X, bag.features)
    np.testing.assert_array_equal(again.obsm["spatial"], table.obsm["spatial"])
    assert again.uns["provenance"] == bag.provenance.to_json()
    (picture,) = again.uns["spatial"].values()
    assert list(again.uns["spatial"]) == ["case 7"]
    np.testing.assert_array_equal(picture["images"]["hires"], np.asarray(slide.thumbnail()))


def test_a_centre_times_the_scale_factor_is_its_px_in_the_thumbnail(bag, slide):
    """The tile's own pixels, averaged, are those of the thumbnail around that px."""
    table = bag.to_anndata(slide)
    (picture,) = table.uns["spatial"].values()
    scale = picture["scalefactors"]["tissue_hires_scalef"]
    half = picture["scalefactors"]["spot_diameter_fullres"] / 2 * scale
    for (x, y), feature in zip(table.obsm["spatial"] * scale, bag.features, strict=True):
        part = picture["images"]["hires"][round(y - half) : round(y + half)]
        colour = part[:, round(x - half) : round(x + half)].mean(axis=(0, 1))
        np.testing.assert_allclose(colour, feature[:3], atol=4)


def test_a_slide_of_another_size_is_refused(bag, tmp_path):
    write_svs(
        tmp_path / "other.svs", pixels=np.full((900, 900, 3), 240, np.uint8), mpp=0.5, power=20
    )
    with Slide(tmp_path / "other.svs") as other, pytest.raises(BagError, match="900"):
        bag.to_anndata(other)


def test_a_bag_without_places_or_sizes_says_what_is_missing():
    with pytest.raises(BagError, match="coords is None"):
        FeatureBag(np.zeros((2, 3), np.float32), None).to_anndata()
    with pytest.raises(BagError, match="tiles is None"):
        FeatureBag(np.zeros((2, 3), np.float32), np.zeros((2, 2), np.int64)).to_anndata()


def test_without_the_package_the_error_names_the_extra(bag, monkeypatch):
    monkeypatch.setitem(sys.modules, "anndata", None)
    with pytest.raises(MissingExtraError, match=r"xmag\[anndata\]"):
        bag.to_anndata()


def test_the_mean_is_that_of_the_rows():
    features = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    bag = FeatureBag(features, np.zeros((7, 2), np.int64))
    np.testing.assert_allclose(bag.mean(), features.astype(float).mean(0), rtol=1e-6)
    assert bag.mean().dtype == np.float32
    with pytest.raises(BagError, match="no tiles"):
        FeatureBag(np.zeros((0, 5), np.float32), np.zeros((0, 2), np.int64)).mean()
