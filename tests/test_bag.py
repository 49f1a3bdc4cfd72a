import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import xmag
from xmag.bag import FeatureBag
from xmag.bag.bag import SCHEMA_VERSION
from xmag.errors import BagError, InputError, OutputError
from xmag.geometry import TileGeometry
from xmag.provenance import Provenance

_TILES = TileGeometry(
    size_px=224,
    mpp=2.02,
    size_level0=906,
    overlap_px=16,
    level0_mpp=0.4993,
    level0_size=(48_000, 40_001),
)
_PROVENANCE = Provenance(
    {"weights_sha256": "ab" * 32, "tile_spec": {"mpp": 2.0, "size_px": 224}},
    {"slide": {"name": "Fall 1 é.svs", "size_bytes": 7}, "mpps": [0.1, 2.02], "region": None},
)
_SUFFIXES = (".h5", ".safetensors")


def _bag(rows=5, width=8, *, provenance=_PROVENANCE, tiles=_TILES):
    rng = np.random.default_rng(rows)
    features = rng.normal(size=(rows, width)).astype(np.float32)
    return FeatureBag(features, rng.integers(0, 90_000, (rows, 2)), provenance, tiles)


def _assert_same(bag, other):
    for name, dtype in (("features", np.float32), ("coords", np.int64)):
        mine, its = getattr(bag, name), getattr(other, name)
        assert its.dtype == dtype
        np.testing.assert_array_equal(its, mine, strict=True)
        assert not its.flags.writeable
    assert other.provenance == bag.provenance
    assert other.tiles == bag.tiles


@pytest.mark.parametrize("suffix", _SUFFIXES)
@pytest.mark.parametrize("rows", [0, 1, 300])
@pytest.mark.parametrize("provenance", [_PROVENANCE, None])
@pytest.mark.parametrize("tiles", [_TILES, None])
def test_a_saved_bag_loads_as_it_was(tmp_path, suffix, rows, provenance, tiles):
    bag = _bag(rows, provenance=provenance, tiles=tiles)
    path = tmp_path / f"Fall 1 é{suffix}"

    bag.save(path)
    _assert_same(bag, FeatureBag.load(path))
    bag.save(str(path))
    _assert_same(bag, FeatureBag.load(str(path)))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", _SUFFIXES)
@settings(max_examples=30)
@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(0, 4), st.integers(1, 5)),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
    ),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(0.05, 20),
)
def test_every_bit_survives_a_file(tmp_path_factory, suffix, features, corner, mpp):
    tiles = TileGeometry(
        size_px=224, mpp=mpp, size_level0=1, overlap_px=0, level0_mpp=mpp / 3, level0_size=(1, 2)
    )
    coords = np.full((len(features), 2), corner, dtype=np.int64)
    bag = FeatureBag(features, coords, Provenance({"mpp": mpp}, {}), tiles)
    path = tmp_path_factory.mktemp("bags") / f"bag{suffix}"

    bag.save(path)
    loaded = FeatureBag.load(path)
    assert loaded.features.tobytes() == features.tobytes()
    _assert_same(bag, loaded)


@pytest.mark.parametrize("suffix", _SUFFIXES)
def test_the_same_bag_gives_the_same_bytes_in_every_process(tmp_path, suffix):
    code = """
import sys
from xmag.bag import FeatureBag
FeatureBag.load(sys.argv[1]).save(sys.argv[2])
"""
    _bag().save(tmp_path / f"0{suffix}")
    for i in range(3):
        command = [
            sys.executable,
            "-c",
            code,
            *(str(tmp_path / f"{n}{suffix}") for n in (i, i + 1)),
        ]
        subprocess.run(command, check=True, cwd=Path(xmag.__file__).parents[1])

    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_importing_bags_does_not_import_torch(tmp_path):
    code = """
import sys
import numpy
from xmag.bag import FeatureBag
bag = FeatureBag([[1.0, 2.0]], [[0, 0]])
bag.save(sys.argv[1])
FeatureBag.load(sys.argv[1])
numpy.savez(sys.argv[1] + ".npz", features=bag.features)
FeatureBag.load(sys.argv[1] + ".npz")
sys.exit("torch" in sys.modules)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "a.safetensors")]
    subprocess.run(command, check=True, cwd=Path(xmag.__file__).parents[1])


def test_numpy_sees_the_features():
    bag = _bag()
    assert len(bag) == 5
    assert np.asarray(bag) is bag.features
    assert np.asarray(bag, dtype=np.float64).dtype == np.float64
    assert np.array(bag).flags.writeable
    np.testing.assert_array_equal(np.mean(bag, axis=0), bag.features.mean(axis=0))
    if np.lib.NumpyVersion(np.__version__) >= "2.0.0":
        assert np.asarray(bag, copy=False) is bag.features
        with pytest.raises(ValueError, match="copy"):
            np.asarray(bag, dtype=np.float64, copy=False)


def test_a_bag_says_how_large_it_is():
    assert repr(_bag(5, 8)) == "<FeatureBag of 5 tiles, 8 features each>"


def test_a_bag_cannot_be_changed_even_after_a_pickle():
    features = np.ones((2, 3), np.float32)
    bag = FeatureBag(features, [[0, 0], [448, 0]], _PROVENANCE, _TILES)
    features[0] = 7

    for one in (bag, pickle.loads(pickle.dumps(bag))):
        _assert_same(bag, one)
        assert one.features.tolist() == [[1, 1, 1], [1, 1, 1]]
        with pytest.raises(ValueError, match="read-only"):
            one.features[0] = 7
        with pytest.raises(ValueError, match="read-only"):
            one.coords[0] = 7
        with pytest.raises(AttributeError):
            one.features = features
    assert features.flags.writeable


@pytest.mark.parametrize("dtype", ["float16", ">f4", "float64", "int32", "uint8"])
def test_numbers_that_float32_holds_are_converted(dtype):
    bag = FeatureBag(np.array([[1, 2], [3, 4]], dtype=dtype), np.zeros((2, 2), np.uint16))
    assert bag.features.dtype == np.float32
    assert bag.features.tolist() == [[1, 2], [3, 4]]
    assert bag.coords.dtype == np.int64


def test_whole_numbers_serve_as_coords_whatever_their_dtype():
    assert FeatureBag([[1.0]], np.array([[448.0, 2.0]])).coords.tolist() == [[448, 2]]


@pytest.mark.parametrize(
    ("features", "coords", "reason"),
    [
        ([[1, 2], [np.nan, 4], [5, 6]], 3, r"features hold nan in row 1 \(1 such values in all\)"),
        ([[1, 2], [3, 4], [np.inf, -np.inf]], 3, r"hold inf in row 2 \(2 such values"),
        ([[1, 2], [0.1, 4]], 2, r"features hold 0\.1 in row 1 .* float32 can hold; round with"),
        ([[1e300, 2]], 1, "hold 1e\\+300 in row 0"),
        ([[2**24 + 1]], 1, "hold 16777217 in row 0"),
        ([1, 2, 3], 3, r"features are an array of int64 with shape \(3,\)"),
        (3.0, 1, r"shape \(\)"),
        (np.zeros((1, 2, 3)), 2, r"shape \(1, 2, 3\)"),
        ([["a", "b"]], 1, "features are an array of <U1"),
        ([[True, False]], 1, "features are an array of bool"),
        ([[1j]], 1, "features are an array of complex128"),
        ([[1, 2], [3, 4]], 3, r"shape \(2, 2\) and coords of shape \(3, 2\)"),
        ([[1, 2]], np.zeros((1, 3)), r"coords of shape \(1, 3\)"),
        ([[1, 2]], [[0.5, 0]], r"coords hold 0\.5 in row 0"),
        ([[1, 2]], [[0, np.nan]], "coords hold nan in row 0"),
        ([[1, 2]], np.array([[0, 2**63]], np.uint64), "coords hold 9223372036854775808"),
    ],
)
def test_what_is_no_bag_is_refused_with_the_reason(features, coords, reason):
    if isinstance(coords, int):
        coords = np.zeros((coords, 2))
    with pytest.raises(BagError, match=reason):
        FeatureBag(features, coords)


@pytest.mark.parametrize("name", ["bag", "bag.pt", "bag.H5", "bag.hdf5", "bag.npz"])
def test_another_suffix_is_refused(tmp_path, name):
    with pytest.raises(InputError, match=r"expected '\.h5' or '\.safetensors'"):
        _bag().save(tmp_path / name)
    if name not in ("bag.pt", "bag.npz"):  # of other software
        with pytest.raises(InputError, match=r"'\.h5', '\.safetensors', '\.pt' or '\.npz'"):
            FeatureBag.load(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_an_output_error(tmp_path):
    with pytest.raises(OutputError, match="create the folder"):
        _bag().save(tmp_path / "missing" / "bag.h5")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(BagError, match=r"no file .*bag\.h5"):
        FeatureBag.load(tmp_path / "bag.h5")


@pytest.mark.parametrize("suffix", _SUFFIXES)
def test_what_the_disk_spoils_never_gets_the_name(tmp_path, monkeypatch, suffix):
    """A bit that flips on the way to the disk, which the parsers of the formats cannot see."""
    _bag().save(tmp_path / f"bag{suffix}")
    before = (tmp_path / f"bag{suffix}").read_bytes()
    spoil = before.index(_bag().features.tobytes())
    fsync = os.fsync

    def fsync_and_spoil(descriptor):
        os.pwrite(descriptor, b"\x01", spoil)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync_and_spoil)
    with pytest.raises(OutputError, match="does not read back the same"):
        _bag().save(tmp_path / f"bag{suffix}")
    assert (tmp_path / f"bag{suffix}").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def _spoiled(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return data[: rng.randrange(len(data))]
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 8])):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


@pytest.mark.parametrize("suffix", _SUFFIXES)
def test_a_damaged_file_is_a_bag_error_or_a_bag(tmp_path, suffix):
    """Never another exception, never another bag; some bytes of an .h5 are of no account."""
    _bag().save(tmp_path / f"whole{suffix}")
    whole = (tmp_path / f"whole{suffix}").read_bytes()
    path, rng, refused = tmp_path / f"bag{suffix}", random.Random(0), 0
    for _ in range(400):
        path.write_bytes(_spoiled(whole, rng))
        try:
            bag = FeatureBag.load(path)
        except BagError:
            refused += 1
        else:
            _assert_same(_bag(), bag)
    assert refused > 100


@pytest.mark.parametrize("suffix", _SUFFIXES)
@pytest.mark.parametrize("size", [0, 1, 8, 100])
def test_a_file_of_something_else_is_refused(tmp_path, suffix, size):
    (tmp_path / f"bag{suffix}").write_bytes(os.urandom(size))
    with pytest.raises(BagError, match=r"truncated, damaged, or something else .* copy it again"):
        FeatureBag.load(tmp_path / f"bag{suffix}")


@pytest.mark.parametrize("suffix", _SUFFIXES)
def test_a_file_that_lost_its_end_is_refused(tmp_path, suffix):
    path = tmp_path / f"bag{suffix}"
    _bag().save(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BagError, match="truncated"):
        FeatureBag.load(path)


def _write(path, arrays):
    if path.suffix == ".h5":
        with h5py.File(path, "w") as file:
            for name, array in arrays.items():
                file[name] = array
    else:
        safetensors.numpy.save_file(arrays, path)


_ARRAYS = {"features": np.ones((2, 3), np.float32), "coords": np.zeros((2, 2), np.int64)}


def _change_header(path, change):
    """Rewrite a file with `change` made to its header, and the rest as it is."""
    if path.suffix == ".h5":
        with h5py.File(path, "r+") as file:
            header = dict(file.attrs)
            change(header)
            for key in list(file.attrs):
                del file.attrs[key]
            for key, value in header.items():
                file.attrs[key] = np.bytes_(value)
    else:
        with safetensors.safe_open(path, framework="numpy") as file:
            header, arrays = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        change(header)
        safetensors.numpy.save_file(arrays, path, metadata=header)


@pytest.mark.parametrize("suffix", _SUFFIXES)
def test_a_file_of_a_newer_schema_is_refused_with_the_remedy(tmp_path, suffix):
    path = tmp_path / f"bag{suffix}"
    _bag().save(path)
    _change_header(path, lambda header: header.update(schema_version=str(SCHEMA_VERSION + 1)))

    reason = r"bag\.\w+: the file has schema_version 2, .* pip install --upgrade xmag"
    with pytest.raises(BagError, match=reason):
        FeatureBag.load(path)


@pytest.mark.parametrize("suffix", _SUFFIXES)
@pytest.mark.parametrize(
    "change",
    [
        lambda header: header.update(schema_version="one"),
        lambda header: header.update(format="xmag.FeatureBug"),
        lambda header: header.update(provenance='{"fingerprint": {}, "record": {}}'),
        lambda header: header.update(tiles=header["tiles"].replace(*_as(header, "2.02", "2.03"))),
        lambda header: header.update(bag_sha256="ab" * 32),
        lambda header: header.pop("provenance"),
        lambda header: header.pop("tiles"),
        lambda header: header.pop("bag_sha256"),
        lambda header: header.pop("format"),
        lambda header: header.pop("schema_version"),
    ],
)
def test_a_header_that_was_changed_is_refused(tmp_path, suffix, change):
    path = tmp_path / f"bag{suffix}"
    _bag().save(path)
    _change_header(path, lambda header: None)
    _assert_same(_bag(), FeatureBag.load(path))

    _change_header(path, change)
    with pytest.raises(BagError, match=r"bag\.\w+: .* checksum .* make it again"):
        FeatureBag.load(path)


def _as(header, *texts):
    return [t.encode() for t in texts] if isinstance(header["tiles"], bytes) else texts


@pytest.mark.parametrize("suffix", _SUFFIXES)
@pytest.mark.parametrize("name", ["features", "coords"])
def test_a_value_that_changed_in_the_file_is_noticed(tmp_path, suffix, name):
    path = tmp_path / f"bag{suffix}"
    _bag().save(path)
    data = bytearray(path.read_bytes())
    data[data.index(getattr(_bag(), name).tobytes()) + 3] ^= 1
    path.write_bytes(data)

    with pytest.raises(BagError, match="checksum"):
        FeatureBag.load(path)


@pytest.mark.parametrize("suffix", _SUFFIXES)
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"features": None}, r"no dataset 'features'; found \['coords'\]"),
        ({"coords": np.zeros((3, 2), np.int64)}, r"coords of shape \(3, 2\)"),
        ({"features": np.full((2, 3), np.nan, np.float32)}, "hold nan in row 0"),
        ({"features": np.ones((2, 2, 3), np.float32)}, r"shape \(2, 2, 3\)"),
    ],
)
def test_a_foreign_file_that_holds_no_bag_is_refused(tmp_path, suffix, changes, reason):
    arrays = {k: v for k, v in (_ARRAYS | changes).items() if v is not None}
    _write(tmp_path / f"bag{suffix}", arrays)
    with pytest.raises(BagError, match=reason):
        FeatureBag.load(tmp_path / f"bag{suffix}")


@pytest.mark.parametrize("suffix", _SUFFIXES)
def test_a_foreign_file_without_coords_is_a_bag_without_and_ours_is_damaged(tmp_path, suffix):
    path = tmp_path / f"bag{suffix}"
    _write(path, {"features": _ARRAYS["features"]})
    assert FeatureBag.load(path).coords is None
    assert FeatureBag.load(path).features.tolist() == [[1, 1, 1], [1, 1, 1]]

    _bag().save(path)
    if suffix == ".h5":
        with h5py.File(path, "r+") as file:
            del file["coords"]
    else:
        with safetensors.safe_open(path, framework="numpy") as file:
            header, features = file.metadata(), file.get_tensor("features")
        safetensors.numpy.save_file({"features": features}, path, metadata=header)
    with pytest.raises(BagError, match=r"no dataset 'coords'; found \['features'\]"):
        FeatureBag.load(path)


@pytest.mark.parametrize("chunks", [None, (1, 3)])
def test_a_foreign_file_whose_writer_died_is_refused(tmp_path, chunks):
    """Rows that were announced and never written read as zeros."""
    with h5py.File(tmp_path / "bag.h5", "w") as file:
        features = file.create_dataset("features", (9, 3), np.float32, chunks=chunks)
        file["coords"] = np.zeros((9, 2), np.int64)
        if chunks:
            features[:5] = 1
    with pytest.raises(BagError, match="a part of 'features' was never written"):
        FeatureBag.load(tmp_path / "bag.h5")


@pytest.mark.parametrize("options", [{"compression": "gzip"}, {"chunks": (4, 2)}, {}])
def test_a_foreign_file_may_be_compressed_or_chunked(tmp_path, options):
    with h5py.File(tmp_path / "bag.h5", "w") as file:
        file.create_dataset("features", data=np.ones((9, 3), np.float32), **options)
        file.create_dataset("coords", data=np.zeros((9, 2)), **options)
    assert FeatureBag.load(tmp_path / "bag.h5").features.sum() == 27


def test_a_group_where_a_dataset_should_be_is_refused(tmp_path):
    with h5py.File(tmp_path / "bag.h5", "w") as file:
        file["features/0"] = np.ones(3)
        file["coords"] = np.zeros((1, 2))
    with pytest.raises(BagError, match="no dataset 'features'"):
        FeatureBag.load(tmp_path / "bag.h5")


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("batched", [False, True])
def test_a_file_of_clam_or_trident_loads_without_provenance(tmp_path, dtype, batched):
    """Laid out as those tools do: resizable, a chunk a row, at times with a leading axis of 1."""
    features = np.arange(12).reshape(4, 3).astype(dtype)
    coords = np.arange(8).reshape(4, 2)
    arrays = {"features": features, "coords": coords}
    with h5py.File(tmp_path / "slide.h5", "w") as file:
        for name, array in arrays.items():
            array = array[None] if batched else array  # noqa: PLW2901
            dataset = file.create_dataset(
                name, array.shape, array.dtype, maxshape=(None, *array.shape[1:]), chunks=True
            )
            dataset[:] = array
        file["coords"].attrs["patch_size"] = 256
        file.attrs["schema_version"] = 99  # of somebody else

    bag = FeatureBag.load(tmp_path / "slide.h5")
    np.testing.assert_array_equal(bag.features, features.astype(np.float32), strict=True)
    np.testing.assert_array_equal(bag.coords, coords, strict=True)
    assert bag.provenance is None
    assert bag.tiles is None


def test_the_h5_reads_as_clam_reads_it(tmp_path):
    """CLAM: dataset_modules/dataset_generic.py, Generic_MIL_Dataset with load_from_h5(True)."""
    torch = pytest.importorskip("torch")
    bag = _bag()
    (tmp_path / "h5_files").mkdir()
    bag.save(tmp_path / "h5_files" / "slide.h5")

    with h5py.File(tmp_path / "h5_files" / "slide.h5", "r") as hdf5_file:
        features = hdf5_file["features"][:]
        coords = hdf5_file["coords"][:]
        patch_size = hdf5_file["coords"].attrs["patch_size"]
        # Files are also read dataset by dataset, so each must be sliceable.
        assets = {key: hdf5_file[key][:] for key in hdf5_file}
    features = torch.from_numpy(features)
    assert (features.dtype, features.shape) == (torch.float32, (5, 8))
    assert (coords.dtype, coords.shape) == (np.int64, (5, 2))
    assert patch_size == 224
    assert set(assets) == {"features", "coords"}
    np.testing.assert_array_equal(features, bag.features)
    np.testing.assert_array_equal(coords, bag.coords)


@pytest.mark.parametrize("name", ["features", "coords"])
def test_the_h5_reads_as_torchmil_reads_it(tmp_path, name):
    """torchmil 1.0.2: datasets/processed_mil_dataset.py, default_read_file; then from_numpy."""
    torch = pytest.importorskip("torch")
    _bag().save(tmp_path / "slide.h5")
    with h5py.File(tmp_path / "slide.h5", "r") as f:
        array = f[name][:]
    assert torch.from_numpy(array).dtype == {"features": torch.float32, "coords": torch.int64}[name]
    np.testing.assert_array_equal(array, getattr(_bag(), name), strict=True)


def test_the_h5_reads_as_trident_reads_it(tmp_path):
    """TRIDENT: IO.read_coords, WSI.extract_slide_features and the encoders of slides."""
    torch = pytest.importorskip("torch")
    bag = _bag()
    bag.save(tmp_path / "slide.h5")

    with h5py.File(tmp_path / "slide.h5", "r") as f:
        coords = f["coords"][:]
        patch_features = f["features"][:]
        attributes = dict(f["coords"].attrs)
    batch = torch.from_numpy(patch_features).float().unsqueeze(0)
    assert batch.shape == (1, 5, 8)
    assert torch.from_numpy(coords).unsqueeze(0).dtype == torch.int64
    assert attributes == {
        "patch_size": 224,
        "patch_size_level0": 906,
        "level0_magnification": 10 / 0.4993,
        "target_magnification": 10 / 2.02,
        "overlap": 16,
        "name": "Fall 1 é",
        "savetodir": "",
        "level0_width": 48_000,
        "level0_height": 40_001,
    }
    for name in ("patch_size", "patch_size_level0", "overlap", "level0_width", "level0_height"):
        assert isinstance(attributes[name], np.int64)
    assert isinstance(attributes["name"], str)
    # A patcher turns magnifications back into µm/px, and copies every attribute on.
    assert 10 / attributes["target_magnification"] == pytest.approx(2.02)
    with h5py.File(tmp_path / "copy.h5", "w") as copy:
        copy["coords"] = coords
        for key, value in attributes.items():
            copy["coords"].attrs[key] = value


def test_what_another_model_makes_of_our_coords_does_not_inherit_our_provenance(tmp_path):
    """TRIDENT copies the attributes of `coords` into the features it writes."""
    _bag().save(tmp_path / "ours.h5")
    with h5py.File(tmp_path / "ours.h5") as ours, h5py.File(tmp_path / "theirs.h5", "w") as theirs:
        theirs["coords"], theirs["features"] = ours["coords"][:], np.zeros((5, 4), np.float32)
        theirs["coords"].attrs.update(ours["coords"].attrs)

    assert FeatureBag.load(tmp_path / "theirs.h5").provenance is None


def test_without_tiles_the_h5_says_nothing_about_them(tmp_path):
    _bag(tiles=None).save(tmp_path / "bag.h5")
    with h5py.File(tmp_path / "bag.h5") as file:
        assert dict(file["coords"].attrs) == {}


def test_without_a_slide_in_the_record_the_name_is_that_of_the_file(tmp_path):
    _bag(provenance=None).save(tmp_path / "biopsy 3.h5")
    with h5py.File(tmp_path / "biopsy 3.h5") as file:
        assert file["coords"].attrs["name"] == "biopsy 3"


def test_the_header_is_there_for_others_to_read(tmp_path):
    bag = _bag()
    bag.save(tmp_path / "bag.h5")
    bag.save(tmp_path / "bag.safetensors")

    with h5py.File(tmp_path / "bag.h5") as file:
        headers = [{k: v.decode() if isinstance(v, bytes) else v for k, v in file.attrs.items()}]
    with safetensors.safe_open(tmp_path / "bag.safetensors", framework="numpy") as file:
        headers.append(file.metadata())
    for header in headers:
        assert Provenance.from_json(header["provenance"]) == _PROVENANCE
        assert json.loads(header["tiles"]) == _TILES.to_dict()
        assert int(header["schema_version"]) == SCHEMA_VERSION
        assert header["format"] == "xmag.FeatureBag"


def test_a_slide_whose_name_is_not_utf8_keeps_it(tmp_path):
    provenance = Provenance({}, {"slide": {"name": os.fsdecode(b"Pr\xe4parat.svs")}})
    for suffix in _SUFFIXES:
        _bag(provenance=provenance).save(tmp_path / f"bag{suffix}")
        assert FeatureBag.load(tmp_path / f"bag{suffix}").provenance == provenance


def test_provenance_may_be_larger_than_an_hdf5_attribute_usually_is(tmp_path):
    large = Provenance({}, {"roi": "x" * 1_000_000})
    _bag(provenance=large).save(tmp_path / "bag.h5")
    assert FeatureBag.load(tmp_path / "bag.h5").provenance == large


def test_safetensors_readers_find_the_arrays(tmp_path):
    bag = _bag()
    bag.save(tmp_path / "bag.safetensors")
    arrays = safetensors.numpy.load_file(tmp_path / "bag.safetensors")
    np.testing.assert_array_equal(arrays["features"], bag.features, strict=True)
    np.testing.assert_array_equal(arrays["coords"], bag.coords, strict=True)
