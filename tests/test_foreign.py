"""Files laid out as CLAM, TRIDENT, STAMP and slide2vec write them, and what is read of them.

The writers are written out from those projects' code: CLAM 53e2409, TRIDENT a91fa84, STAMP c54ce06
(2.4), slide2vec 7cfa6bf.
"""

import io
import os
import pickle
import tracemalloc
import zipfile

import h5py
import numpy as np
import pytest
import safetensors.numpy
import torch
from support.fake_reader import FakeTileReader

from xmag import draw
from xmag.bag import FeatureBag
from xmag.errors import BagError, InputError, SlideScaleError
from xmag.evaluate.samples import digests
from xmag.geometry import TileGeometry
from xmag.mil import Attention
from xmag.slide import Slide

FEATURES = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
COORDS = np.array([(x, y) for y in (0, 400) for x in (0, 400, 800)])
SIZE = (1200, 800)


@pytest.fixture
def slide():
    pixels = np.full((SIZE[1], SIZE[0], 3), 200, np.uint8)
    return Slide.from_reader(FakeTileReader(pixels, mpp=0.5), name="slide.svs")


def write_clam(path, chunk=32):
    """CLAM: utils/file_utils.py, save_hdf5, from extract_features_fp.py (no attributes)."""
    with h5py.File(path, "w") as file:
        for key, val in {"features": FEATURES, "coords": COORDS}.items():
            dset = file.create_dataset(
                key, val.shape, val.dtype, maxshape=(None, *val.shape[1:]),
                chunks=(chunk, *val.shape[1:]),
            )  # fmt: skip
            dset[:] = val


TRIDENT = {
    "patch_size": 200,
    "patch_size_level0": 400,
    "level0_magnification": 20,
    "target_magnification": 10,
    "overlap": 0,
    "name": "slide",
    "savetodir": "/data/out",
    "level0_width": SIZE[0],
    "level0_height": SIZE[1],
}


def write_trident(path, attributes=TRIDENT):
    """TRIDENT: IO.save_h5 and coords_to_h5, from WSI.extract_patch_features; None is a text."""
    write_clam(path, chunk=1)
    with h5py.File(path, "r+") as file:
        file["features"].attrs.update({"name": "slide", "savetodir": "/x", "encoder": "None"})
        file["coords"].attrs.update({k: "None" if v is None else v for k, v in attributes.items()})


STAMP = {
    "stamp_version": "2.4.0",
    "extractor": "chief-ctranspath",
    "unit": "um",
    "tile_size_um": 200.0,
    "tile_size_px": 224,
    "code_hash": "abcd1234",
    "feat_type": "tile",
}


def write_stamp(path, coords=COORDS * 0.5, attributes=STAMP):
    """STAMP: preprocessing/__init__.py, extract_."""
    with h5py.File(path, "w") as h5_fp:
        h5_fp["coords"] = coords.astype(np.float32)
        h5_fp["feats"] = FEATURES.astype(np.float16)
        h5_fp.attrs.update(attributes)


def attention(bag):
    scores = np.full(len(bag), 1 / max(len(bag), 1), np.float32)
    return Attention(scores=scores, coords=bag.coords, tiles=bag.tiles, kind="custom")


def test_tridents_attributes_are_the_geometry_of_its_tiles(tmp_path, slide):
    write_trident(tmp_path / "slide.h5")
    bag = FeatureBag.load(tmp_path / "slide.h5")
    np.testing.assert_array_equal(bag.features, FEATURES, strict=True)
    np.testing.assert_array_equal(bag.coords, COORDS)
    assert bag.tiles == TileGeometry(
        size_px=200, mpp=1.0, size_level0=400, overlap_px=0, level0_mpp=0.5, level0_size=SIZE
    )
    assert draw.heatmap(slide, attention(bag)).width >= 1200
    draw.feature_map(slide, bag)
    draw.gallery(slide, attention(bag), count=2)
    assert len(draw.attention_geojson(attention(bag))["features"]) == 6


def test_tridents_rounded_scale_gives_way_to_that_of_the_slide(tmp_path):
    pixels = np.full((SIZE[1], SIZE[0], 3), 200, np.uint8)
    slide = Slide.from_reader(FakeTileReader(pixels, mpp=0.4), name="slide.svs")
    write_trident(tmp_path / "slide.h5")
    bag = FeatureBag.load(tmp_path / "slide.h5").on(slide)
    assert (bag.tiles.level0_mpp, bag.tiles.mpp, bag.tiles.size_level0) == (0.4, 0.8, 400)
    bag.save(tmp_path / "ours.h5")
    assert FeatureBag.load(tmp_path / "ours.h5").on(slide).tiles == bag.tiles


@pytest.mark.parametrize(
    "change",
    [
        {"patch_size_level0": 399.0 + 1.0},  # // of floats gives a float
        {"level0_magnification": np.float32(20), "target_magnification": 10.0},
        {"overlap": np.uint8(0)},
    ],
)
def test_numbers_of_any_type_are_a_geometry(tmp_path, change):
    write_trident(tmp_path / "slide.h5", TRIDENT | change)
    assert FeatureBag.load(tmp_path / "slide.h5").tiles.size_level0 == 400


@pytest.mark.parametrize(
    "change",
    [
        {"level0_magnification": None},
        {"level0_magnification": 0},
        {"target_magnification": float("nan")},
        {"patch_size": -200},
        {"patch_size_level0": 0},
        {"patch_size_level0": 400.5},
        {"patch_size_level0": 300},  # 200 px at 10x of 20x are 400
        {"level0_width": float("inf")},
        {"level0_height": [800, 800]},
        {"overlap": "NA"},
    ],
)
def test_attributes_that_make_no_sense_are_no_geometry_and_named_when_needed(
    tmp_path, slide, change
):
    write_trident(tmp_path / "slide.h5", TRIDENT | change)
    bag = FeatureBag.load(tmp_path / "slide.h5")
    assert bag.tiles is None
    np.testing.assert_array_equal(bag.coords, COORDS)
    with pytest.raises(BagError, match=r"tiles is None.*tiles="):
        draw.heatmap(slide, attention(bag))


def test_a_bag_of_clam_has_places_and_no_sizes(tmp_path, slide):
    write_clam(tmp_path / "slide.h5")
    bag = FeatureBag.load(tmp_path / "slide.h5")
    np.testing.assert_array_equal(bag.coords, COORDS)
    assert bag.tiles is None
    with pytest.raises(BagError, match=r"bag\.tiles is None.*FeatureBag\(\.\.\., tiles=\)"):
        draw.feature_map(slide, bag)
    with pytest.raises(BagError, match="size of its tiles"):
        bag.export(tmp_path / "stamp.h5", layout="stamp")
    bag.save(tmp_path / "ours.h5")


def test_a_bag_of_stamp_is_placed_on_its_slide(tmp_path, slide):
    write_stamp(tmp_path / "slide.h5")
    bag = FeatureBag.load(tmp_path / "slide.h5")
    np.testing.assert_array_equal(bag.features, FEATURES.astype(np.float16).astype(np.float32))
    assert (bag.coords, bag.tiles, bag.provenance) == (None, None, None)
    np.testing.assert_array_equal(bag.tiles_um.coords, COORDS * 0.5)
    assert (bag.tiles_um.size_um, bag.tiles_um.size_px) == (200.0, 224)
    assert pickle.loads(pickle.dumps(bag)).tiles_um.size_um == 200.0

    for needs in (
        lambda: bag.save(tmp_path / "x.h5"),
        lambda: bag.export(tmp_path / "x.h5", layout="stamp"),
        lambda: draw.feature_map(slide, bag),
        lambda: draw.heatmap(slide, attention(bag)),
    ):
        with pytest.raises(BagError, match=r"coords is None|size of its tiles"):
            needs()
    assert not (tmp_path / "x.h5").exists()

    placed = bag.on(slide)
    np.testing.assert_array_equal(placed.coords, COORDS)
    assert placed.tiles == TileGeometry(
        size_px=224, mpp=200 / 224, size_level0=400, overlap_px=0, level0_mpp=0.5, level0_size=SIZE
    )
    draw.heatmap(slide, attention(placed))
    draw.gallery(slide, attention(placed), count=2)
    placed.save(tmp_path / "ours.h5")
    assert FeatureBag.load(tmp_path / "ours.h5").tiles == placed.tiles
    assert placed.on(slide) is placed


def test_a_bag_in_micrometres_needs_the_scale_of_its_own_slide(tmp_path):
    write_stamp(tmp_path / "slide.h5")
    bag = FeatureBag.load(tmp_path / "slide.h5")
    pixels = np.full((400, 600, 3), 200, np.uint8)
    with pytest.raises(SlideScaleError, match=r"'a\.svs' does not say .* mpp="):
        bag.on(Slide.from_reader(FakeTileReader(pixels, mpp=None), name="a.svs"))
    with pytest.raises(InputError, match=r"'b\.svs' has \(600, 400\) px of 0\.5 µm"):
        bag.on(Slide.from_reader(FakeTileReader(pixels, mpp=0.5), name="b.svs"))


@pytest.mark.parametrize(
    ("coords", "attributes", "expected"),
    [
        # 2.0 wrote tile_size; STAMP does not know the px of these either.
        (COORDS * 0.5, {"unit": "um", "tile_size": 200.0, "extractor": "x"}, (200.0, None)),
        # Before that, steps of 224 stood for 256 µm.
        (COORDS / 400 * 224, {"extractor": "x"}, (256.0, 224)),
    ],
)
def test_older_files_of_stamp(tmp_path, coords, attributes, expected):
    write_stamp(tmp_path / "slide.h5", coords, attributes)
    um = FeatureBag.load(tmp_path / "slide.h5").tiles_um
    assert (um.size_um, um.size_px) == expected
    step = 256 if expected[1] else 200
    np.testing.assert_allclose(um.coords, COORDS / 400 * step, rtol=1e-6)


def test_coords_in_a_unit_that_nobody_knows_are_no_places(tmp_path):
    write_stamp(tmp_path / "slide.h5", COORDS, {"extractor": "x"})
    bag = FeatureBag.load(tmp_path / "slide.h5")
    assert (bag.coords, bag.tiles_um) == (None, None)
    assert len(bag) == 6


def test_our_own_export_for_stamp_comes_back_with_places_and_tiles(tmp_path):
    tiles = TileGeometry(
        size_px=224, mpp=2.02, size_level0=906, overlap_px=16, level0_mpp=0.4993,
        level0_size=(180_000, 120_001),
    )  # fmt: skip
    coords = np.random.default_rng(1).integers(0, 120_000, (6, 2))
    bag = FeatureBag(FEATURES, coords, None, tiles)
    bag.export(tmp_path / "slide.h5", layout="stamp")
    back = FeatureBag.load(tmp_path / "slide.h5")
    np.testing.assert_array_equal(back.coords, coords)
    assert back.tiles == tiles
    np.testing.assert_array_equal(back.features, FEATURES.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("shape", [(4,), (1, 4)])
def test_an_embedding_of_a_whole_slide_is_no_bag(tmp_path, shape):
    """STAMP: encoding/encoder/__init__.py, _save_features_."""
    with h5py.File(tmp_path / "patient.h5", "w") as f:
        f["feats"] = FEATURES[0].reshape(shape)
        f.attrs.update({"version": "2.4.0", "encoder": "titan", "feat_type": "patient"})
    with pytest.raises(BagError, match="embedding of a whole slide or patient; expected a row for"):
        FeatureBag.load(tmp_path / "patient.h5")


def _slide2vec_pt(path, dtype):
    torch.save(torch.as_tensor(FEATURES).to(dtype), path)


def _slide2vec_npz(path, dtype):
    np.savez_compressed(path, features=FEATURES.astype(dtype), tile_index=np.arange(6))


@pytest.mark.parametrize(
    ("name", "write", "dtype"),
    [
        ("slide.pt", _slide2vec_pt, torch.float32),  # CLAM's is the same
        ("slide.pt", _slide2vec_pt, torch.float16),
        ("slide.pt", _slide2vec_pt, torch.bfloat16),
        ("slide.pt", _slide2vec_pt, torch.float64),
        ("slide.npz", _slide2vec_npz, np.float32),
        ("slide.npz", _slide2vec_npz, np.float16),
        ("slide.npz", _slide2vec_npz, np.float64),
    ],
)
def test_features_alone_are_a_bag_that_says_what_it_lacks(tmp_path, slide, name, write, dtype):
    """slide2vec: artifacts.py, write_tile_embeddings. CLAM: extract_features_fp.py."""
    write(tmp_path / name, dtype)
    bag = FeatureBag.load(tmp_path / name)
    rounding = {torch.float16: 2**-10, torch.bfloat16: 2**-7, np.float16: 2**-10}.get(dtype, 0)
    np.testing.assert_allclose(bag.features, FEATURES, rtol=rounding, atol=rounding)
    assert bag.features.dtype == np.float32
    assert (bag.coords, bag.tiles, bag.provenance) == (None, None, None)
    assert bag.on(slide) is bag
    with pytest.raises(BagError, match=r"coords is None.*FeatureBag\(bag\.features, coords, til"):
        draw.heatmap(slide, attention(bag))
    with pytest.raises(BagError, match=r"save needs the places of the tiles"):
        bag.save(tmp_path / "x.h5")
    bag.export(tmp_path / "clam.pt", layout="clam")
    again = FeatureBag.load(tmp_path / "clam.pt")
    np.testing.assert_array_equal(again.features, bag.features)
    # slide2vec's places lie in another file: tiles/<slide>.coordinates.npz, x and y.
    whole = FeatureBag(bag.features, COORDS, tiles=TileGeometry.from_dict(_GEOMETRY))
    draw.heatmap(slide, attention(whole))


_GEOMETRY = {
    "size_px": 200, "mpp": 1.0, "size_level0": 400, "overlap_px": 0, "level0_mpp": 0.5,
    "level0_size": [1200, 800],
}  # fmt: skip


def test_coords_beside_the_features_are_taken(tmp_path):
    torch.save({"features": torch.as_tensor(FEATURES), "coords": torch.as_tensor(COORDS)},
               tmp_path / "a.pt")  # fmt: skip
    np.savez(tmp_path / "a.npz", features=np.asfortranarray(FEATURES), coords=COORDS)
    for name in ("a.pt", "a.npz"):
        bag = FeatureBag.load(tmp_path / name)
        np.testing.assert_array_equal(bag.features, FEATURES, strict=True)
        np.testing.assert_array_equal(bag.coords, COORDS, strict=True)


@pytest.mark.parametrize("name", ["features", "feats"])
def test_features_go_by_either_name_in_every_format(tmp_path, name):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file[name] = FEATURES
    safetensors.numpy.save_file({name: FEATURES}, tmp_path / "a.safetensors")
    torch.save({name: torch.as_tensor(FEATURES)}, tmp_path / "a.pt")
    np.savez(tmp_path / "a.npz", **{name: FEATURES})
    for suffix in (".h5", ".safetensors", ".pt", ".npz"):
        bag = FeatureBag.load(tmp_path / f"a{suffix}")
        np.testing.assert_array_equal(bag.features, FEATURES, strict=True)
        assert bag.coords is None


def test_features_of_regions_are_no_bag(tmp_path):
    """slide2vec: hierarchical_embeddings, (regions, tiles, D), and slide_embeddings, (D,)."""
    for array in (np.zeros((2, 3, 4), np.float32), np.zeros(4, np.float32)):
        torch.save(torch.as_tensor(array), tmp_path / "a.pt")
        np.savez_compressed(tmp_path / "a.npz", features=array)
        for name in ("a.pt", "a.npz"):
            with pytest.raises(BagError, match="with one row for each tile"):
                FeatureBag.load(tmp_path / name)


def test_equal_features_are_equal_cases_in_whatever_file(tmp_path):
    write_clam(tmp_path / "a.h5")
    _slide2vec_pt(tmp_path / "a.pt", torch.float32)
    _slide2vec_npz(tmp_path / "a.npz", np.float32)
    torch.save({"x": torch.zeros(2)}, tmp_path / "other.pt")
    names = ("a.h5", "a.pt", "a.npz", "other.pt")
    found = digests([tmp_path / name for name in names])
    assert found[0] == found[1] == found[2] != found[3]


class _Code:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def _npz_of(members, compression=zipfile.ZIP_DEFLATED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def _npy_header(shape, descr="<f4", version=b"\x01\x00"):
    text = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode().ljust(117)
    return b"\x93NUMPY" + version + (len(text) + 1).to_bytes(2, "little") + text + b"\n"


def _torch_bytes(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.pt", lambda: _torch_bytes({"features": _Code()})),
        ("a.pt", lambda: pickle.dumps(_Code(), protocol=2)),
        ("a.pt", lambda: _torch_bytes(torch.zeros(1, 1).expand(1 << 20, 1 << 14))),
        ("a.pt", lambda: _torch_bytes(torch.zeros(3, 4).to_sparse())),
        ("a.pt", lambda: _torch_bytes(torch.zeros(3, 4, device="meta"))),
        ("a.pt", lambda: _torch_bytes(torch.zeros(3, 4, dtype=torch.complex64))),
        ("a.pt", lambda: _torch_bytes({"features": torch.zeros(3, 4), "coords": torch.zeros(2)})),
        ("a.pt", lambda: _torch_bytes(FEATURES)),  # a pickled array, as TRIDENT's saveas="pt"
        ("a.pt", lambda: b""),
        ("a.npz", lambda: b""),
        ("a.npz", lambda: _npz_of({"x.npy": _npy_header((0,)), "y.npy": _npy_header((0,))})),
        ("a.npz", lambda: _npz_of({"features.npy": pickle.dumps(_Code())})),
        ("a.npz", lambda: _npz_of({"features.npy": _npy_header((1,), "|O") + b"\x80\x02."})),
        ("a.npz", lambda: _npz_of({"features.npy": _npy_header((1 << 40, 1 << 20))})),
        ("a.npz", lambda: _npz_of({"features.npy": _npy_header((-4, -4)) + bytes(64)})),
        ("a.npz", lambda: _npz_of({"features.npy": _npy_header((1 << 24, 1)) + bytes(1 << 26)})),
        ("a.npz", lambda: _npz_of({"features.npy": _npy_header((2, 2)) + bytes(1 << 26)})),
        ("a.npz", lambda: _npz_of({"features.npy": _npy_header((2, 2)) + bytes(12)})),
        ("a.npz", lambda: _npz_of({"features.npy": _npy_header((1, 1), version=b"\x03\x00")})),
        ("a.npz", lambda: _npz_of({"features.npy": _npy_header((0, 2))}, zipfile.ZIP_BZIP2)),
    ],
)
def test_a_hostile_file_is_refused_before_it_takes_memory_or_runs_code(
    tmp_path, monkeypatch, name, data
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(data())
    tracemalloc.start()
    try:
        with pytest.raises(BagError, match=rf"{name}: .{{20}}"):
            FeatureBag.load(tmp_path / name)
        assert tracemalloc.get_traced_memory()[1] < 1 << 25
    finally:
        tracemalloc.stop()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", [".npz", ".pt", ".h5"])
def test_a_damaged_file_of_other_software_is_a_bag_error_or_a_bag(tmp_path, suffix):
    rng = np.random.default_rng(0)
    path = tmp_path / f"bag{suffix}"
    {".npz": _slide2vec_npz, ".pt": _slide2vec_pt, ".h5": lambda p, _: write_stamp(p)}[suffix](
        path, torch.float32 if suffix == ".pt" else np.float32
    )
    whole = path.read_bytes()
    for _ in range(150):
        data = bytearray(whole[: rng.integers(len(whole) // 2, len(whole) + 1)])
        for at in rng.integers(0, len(data), rng.integers(1, 4)):
            data[at] = rng.integers(256)
        path.write_bytes(data)
        try:
            assert np.isfinite(FeatureBag.load(path).features).all()
        except BagError:
            continue
