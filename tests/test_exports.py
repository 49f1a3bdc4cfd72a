import os

import h5py
import numpy as np
import pytest
import torch

from xmag.bag import FeatureBag
from xmag.errors import BagError, InputError, OutputError
from xmag.geometry import TileGeometry
from xmag.provenance import Provenance

_TILES = TileGeometry(
    size_px=224,
    mpp=2.02,
    size_level0=906,
    overlap_px=0,
    level0_mpp=0.4993,
    level0_size=(48_000, 40_000),
)
_PROVENANCE = Provenance({}, {"model": {"name": "AI4PATH/XMAG"}})


def _bag(rows=5, *, scale=1.0, provenance=_PROVENANCE, tiles=_TILES):
    rng = np.random.default_rng(rows)
    features = (rng.normal(size=(rows, 8)) * scale).astype(np.float32)
    return FeatureBag(features, rng.integers(0, 48_000, (rows, 2)), provenance, tiles)


def _stamp_reads(path):
    """(feats, µm, tile µm, µm/px) as STAMP takes them: modeling/data.py, BagDataset, get_coords."""
    with h5py.File(path, "r") as h5:
        feats = torch.from_numpy(h5["feats"][:]).float()
        assert h5.attrs.get("feat_type") is None  # else it is not one row a tile
        assert h5.attrs.get("encoder") is None
        assert not h5.attrs.get("stamp_version")  # a newer one than STAMP's own is refused
        assert not (h5.attrs.get("tile_size", None) and h5.attrs.get("unit", None) == "um")
        tile_size_um = float(h5.attrs.get("tile_size_um", None))
        tile_size_px = int(h5.attrs["tile_size_px"])
        coords_um = torch.from_numpy(h5["coords"][:]).float()
    return feats, coords_um, tile_size_um, tile_size_um / tile_size_px


@pytest.mark.parametrize("rows", [0, 1, 300])
def test_clam_loads_a_float32_tensor(tmp_path, rows):
    """CLAM: dataset_modules/dataset_generic.py, Generic_MIL_Dataset."""
    bag = _bag(rows)
    (tmp_path / "pt_files").mkdir()
    bag.export(tmp_path / "pt_files" / "Fall 1 é.pt", layout="clam")

    features = torch.load(os.path.join(tmp_path, "pt_files", "{}.pt".format("Fall 1 é")))  # noqa: PTH118
    assert type(features) is torch.Tensor
    assert features.dtype == torch.float32
    np.testing.assert_array_equal(features.numpy(), bag.features, strict=True)


def test_the_tensor_loads_without_running_code(tmp_path):
    _bag().export(tmp_path / "a.pt", layout="clam")
    assert torch.load(tmp_path / "a.pt", weights_only=True).shape == (5, 8)


@pytest.mark.parametrize("rows", [0, 1, 300])
def test_stamp_finds_features_places_and_scale(tmp_path, rows):
    bag = _bag(rows)
    bag.export(tmp_path / "slide.h5", layout="stamp")

    feats, coords_um, tile_size_um, mpp = _stamp_reads(tmp_path / "slide.h5")
    np.testing.assert_allclose(feats, bag.features, rtol=2**-11, atol=2**-25)
    np.testing.assert_allclose(coords_um, bag.coords * 0.4993, rtol=1e-6)
    assert tile_size_um == pytest.approx(452.48)
    assert mpp == pytest.approx(2.02)


def test_the_stamp_file_has_stamps_types(tmp_path):
    _bag().export(tmp_path / "slide.h5", layout="stamp")
    with h5py.File(tmp_path / "slide.h5") as h5:
        assert set(h5) == {"feats", "coords"}
        assert h5["feats"].dtype == np.float16
        assert h5["coords"].dtype == np.float32
        assert h5.attrs["unit"] == "um"
        assert h5.attrs["extractor"] == "AI4PATH/XMAG"
        assert h5.attrs["tile_size_px"] == 224


def test_an_extractor_that_nobody_recorded_is_unknown(tmp_path):
    _bag(provenance=None).export(tmp_path / "slide.h5", layout="stamp")
    with h5py.File(tmp_path / "slide.h5") as h5:
        assert h5.attrs["extractor"] == "unknown"


def test_a_feature_beyond_float16_is_refused_and_not_made_infinite(tmp_path):
    features = np.zeros((3, 4), np.float32)
    features[1, 2] = -65_520  # the smallest that rounds to infinity
    bag = FeatureBag(features, np.zeros((3, 2)), tiles=_TILES)

    with pytest.raises(BagError, match=r"features hold -65520\.0 in row 1; expected at most 65504"):
        bag.export(tmp_path / "slide.h5", layout="stamp")
    assert list(tmp_path.iterdir()) == []
    features[1, 2] = -65_519
    FeatureBag(features, np.zeros((3, 2)), tiles=_TILES).export(tmp_path / "a.h5", layout="stamp")
    assert _stamp_reads(tmp_path / "a.h5")[0].min() == -65_504


def test_without_tiles_there_are_no_micrometres(tmp_path):
    with pytest.raises(BagError, match="size of its tiles"):
        _bag(tiles=None).export(tmp_path / "slide.h5", layout="stamp")
    _bag(tiles=None).export(tmp_path / "slide.pt", layout="clam")


@pytest.mark.parametrize(
    ("name", "layout", "reason"),
    [
        ("slide.h5", "clam", r"expected a path that ends in '\.pt'"),
        ("slide", "clam", r"expected a path that ends in '\.pt'"),
        ("slide.pt", "stamp", r"expected a path that ends in '\.h5'"),
        ("slide.pt", "trident", r"layout is 'trident'; expected one of \['clam', 'stamp'\]"),
    ],
)
def test_a_layout_or_suffix_that_does_not_fit_is_refused(tmp_path, name, layout, reason):
    with pytest.raises(InputError, match=reason):
        _bag().export(tmp_path / name, layout=layout)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "layout"), [("slide.pt", "clam"), ("slide.h5", "stamp")])
def test_a_place_that_cannot_be_written_is_an_output_error(tmp_path, name, layout):
    with pytest.raises(OutputError, match="create the folder"):
        _bag().export(tmp_path / "missing" / name, layout=layout)


@pytest.mark.parametrize(("name", "layout"), [("slide.pt", "clam"), ("slide.h5", "stamp")])
def test_the_same_bag_gives_the_same_bytes(tmp_path, name, layout):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        _bag().export(tmp_path / folder / name, layout=layout)
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(("name", "layout"), [("slide.pt", "clam"), ("slide.h5", "stamp")])
def test_an_export_the_disk_spoils_never_gets_the_name(tmp_path, monkeypatch, name, layout):
    fsync = os.fsync
    bag = _bag()
    bag.export(tmp_path / name, layout=layout)
    before = (tmp_path / name).read_bytes()
    dtype = np.float32 if layout == "clam" else np.float16
    spoil = before.index(bag.features.astype(dtype).tobytes())

    def fsync_and_spoil(descriptor):
        os.pwrite(descriptor, b"\x01", spoil)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync_and_spoil)
    with pytest.raises(OutputError, match="does not read back the same"):
        bag.export(tmp_path / name, layout=layout)
    assert (tmp_path / name).read_bytes() == before
