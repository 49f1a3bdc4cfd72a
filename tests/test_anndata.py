"""Bags as AnnData and in WSIData, read back by the packages themselves."""

import dataclasses
import sys

import anndata
import numpy as np
import pytest
from support.encoders import ColourEncoder
from support.slides import write_svs

import xmag
from xmag import FeatureBag, Slide
from xmag.errors import BagError, InputError, MissingExtraError
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


def test_tiles_at_the_same_place_have_names_of_their_own(slide):
    """A closer look at tiles that overlap has some of its tiles twice."""
    plan = xmag.plan_tiles(slide, ColourEncoder().tile_spec, tissue=None, overlap=28)
    closer = plan.zoom(np.arange(len(plan)), mpp=1.0)
    bag = xmag.extract_features(
        slide, model=ColourEncoder(spec=xmag.TileSpec(mpp=1.0, size_px=56)), plan=closer
    )
    assert len(np.unique(bag.coords, axis=0)) < len(bag)
    table = bag.to_anndata()
    assert table.obs_names.is_unique
    first = dict.fromkeys(f"{x}_{y}" for x, y in bag.coords)
    assert set(first) < set(table.obs_names)


def test_without_a_slide_nothing_promises_a_picture(bag):
    """scanpy and squidpy fail on ``uns["spatial"]`` without one, and do without either."""
    assert "spatial" not in bag.to_anndata().uns


def test_tables_of_several_slides_keep_their_pictures(bag, slide):
    first, second = bag.to_anndata(slide), bag.to_anndata(slide)
    second.uns["spatial"] = {"case 8": second.uns["spatial"]["case 7"]}
    tables = {"case 7": first, "case 8": second}
    both = anndata.concat(tables, label="slide", index_unique="-", uns_merge="unique")
    assert both.obs_names.is_unique
    assert set(both.uns["spatial"]) == set(both.obs["slide"]) == {"case 7", "case 8"}


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
    monkeypatch.setitem(sys.modules, "wsidata", None)
    with pytest.raises(MissingExtraError, match=r"xmag\[wsidata\]"):
        bag.to_wsidata(None)


def test_the_mean_is_that_of_the_rows():
    features = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    bag = FeatureBag(features, np.zeros((7, 2), np.int64))
    np.testing.assert_allclose(bag.mean(), features.astype(float).mean(0), rtol=1e-6)
    assert bag.mean().dtype == np.float32
    assert np.mean(bag) == features.mean()  # NumPy asks the bag, with options
    np.testing.assert_array_equal(np.mean(bag, 1, keepdims=True), features.mean(1, keepdims=True))
    with pytest.raises(BagError, match="no tiles"):
        FeatureBag(np.zeros((0, 5), np.float32), np.zeros((0, 2), np.int64)).mean()


@pytest.fixture(params=[(0.26, 40), (0.45, 20)], ids=["448 px a tile", "248.9 px a tile"])
def wsi_and_bag(request, tmp_path):
    """A slide opened by wsidata, and its bag; the tiles of the second were resampled.

    By wsidata's own arithmetic, those of the first would be 447 px wide.
    """
    reason = "wsidata is not installed; it takes SpatialData, Dask and OpenCV along"
    wsidata = pytest.importorskip("wsidata", reason=reason)
    pixels = np.random.default_rng(0).integers(0, 256, (7, 9, 3), np.uint8)
    pixels = pixels.repeat(400, axis=0).repeat(400, axis=1)[:2403, :3205]
    mpp, power = request.param
    write_svs(tmp_path / "case 7.svs", pixels=pixels, mpp=mpp, power=power)
    bag = xmag.extract_features(tmp_path / "case 7.svs", model=ColourEncoder(), tissue=None)
    wsi = wsidata.open_wsi(tmp_path / "case 7.svs", store=tmp_path / "case 7.zarr")
    yield wsi, bag
    wsi.close()


def test_wsidata_reads_the_tiles_that_the_features_are_of(wsi_and_bag):
    wsi, bag = wsi_and_bag
    assert bag.to_wsidata(wsi) == "colours_tiles"
    assert list(wsi.tables["colours_tiles"].obs["tile_id"]) == list(range(len(bag)))
    spec = wsi.tile_spec("tiles")
    assert (spec.base_width, spec.width) == (int(bag.tiles.side_level0), 56)
    for item, feature in zip(wsi.ds.tile_images("tiles"), bag.features, strict=True):
        colour = np.asarray(item["image"], np.float64).mean(axis=(0, 1))
        np.testing.assert_allclose(colour, feature[:3], atol=4)  # another kernel


@pytest.mark.filterwarnings("ignore:zarr v3 autosharding")
def test_tiles_and_features_survive_spatialdata_zarr(wsi_and_bag):
    wsi, bag = wsi_and_bag
    table = bag.to_wsidata(wsi, name="mine", tile_key="squares")
    wsi.write()
    again = pytest.importorskip("spatialdata").read_zarr(wsi.wsi_store)
    squares = again.shapes["squares"].bounds.to_numpy()
    np.testing.assert_array_equal(squares[:, :2], bag.coords)
    np.testing.assert_allclose(squares[:, 2:], bag.coords + bag.tiles.side_level0)
    assert table == "mine_squares"
    np.testing.assert_array_equal(again.tables[table].X, bag.features)
    np.testing.assert_array_equal(
        again.tables[table].obsm["spatial"], bag.to_anndata().obsm["spatial"]
    )
    assert Provenance.from_json(again.tables[table].uns["provenance"]) == bag.provenance


def test_bags_of_one_plan_share_tiles_and_others_need_a_name(wsi_and_bag):
    wsi, bag = wsi_and_bag
    bag.to_wsidata(wsi)
    tiles = wsi.shapes["tiles"]
    bag.to_wsidata(wsi, name="another")
    assert wsi.shapes["tiles"] is tiles
    assert set(wsi.tables) == {"colours_tiles", "another_tiles"}
    fewer = FeatureBag(bag.features[1:], bag.coords[1:], bag.provenance, bag.tiles)
    with pytest.raises(InputError, match="tile_key"):
        fewer.to_wsidata(wsi)
    fewer.to_wsidata(wsi, tile_key="fewer")
    assert len(wsi.shapes["fewer"]) == len(bag) - 1


def test_what_wsidata_cannot_hold_is_refused(wsi_and_bag):
    wsi, bag = wsi_and_bag
    none = FeatureBag(bag.features[:0], bag.coords[:0], bag.provenance, bag.tiles)
    with pytest.raises(BagError, match="no tiles"):
        none.to_wsidata(wsi)
    smaller = dataclasses.replace(bag.tiles, level0_size=(900, 900))
    with pytest.raises(BagError, match="900"):
        FeatureBag(bag.features, bag.coords, bag.provenance, smaller).to_wsidata(wsi)
    assert not list(wsi.shapes)


def test_an_empty_bag_is_an_empty_table(bag, tmp_path):
    none = FeatureBag(bag.features[:0], bag.coords[:0], bag.provenance, bag.tiles)
    none.to_anndata().write_h5ad(tmp_path / "none.h5ad")
    assert anndata.read_h5ad(tmp_path / "none.h5ad").shape == (0, bag.features.shape[1])
