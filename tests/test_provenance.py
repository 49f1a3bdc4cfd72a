import copy
import hashlib
import json
import math
import pickle
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xmag.errors import InputError
from xmag.provenance import (
    PREPROCESSING_VERSION,
    Provenance,
    dtype_class,
    file_fingerprint,
    mixing_fingerprint,
)

_text = st.text(st.characters(categories=None))  # file names may hold lone surrogates
_json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | _text,
    lambda inner: st.lists(inner) | st.dictionaries(_text, inner),
    max_leaves=20,
)
_json_objects = st.dictionaries(st.text(), _json_values, max_size=5)


def _fingerprint(**changes):
    settings = {
        "weights_sha256": "ab" * 32,
        "tile_spec": {"mpp": 2.0, "size_px": 224},
        "plan": {"overlap": 0, "min_tissue": 0.25},
        "dtype": "float32",
    }
    return mixing_fingerprint(**(settings | changes))


@given(_json_objects, _json_objects)
def test_json_and_pickle_give_back_what_went_in(fingerprint, record):
    provenance = Provenance(fingerprint, record)

    assert Provenance.from_json(provenance.to_json()) == provenance
    assert Provenance.from_json(provenance.to_json()).to_json() == provenance.to_json()
    assert pickle.loads(pickle.dumps(provenance)) == provenance
    assert copy.deepcopy(provenance) == provenance
    assert json.loads(provenance.to_json()) == {"fingerprint": fingerprint, "record": record}


def test_the_order_of_keys_does_not_reach_the_json():
    one = Provenance({"a": 1, "b": {"c": 2, "d": 3}}, {})
    other = Provenance({"b": {"d": 3, "c": 2}, "a": 1}, {})

    assert one == other
    assert one.to_json() == other.to_json()


def test_nothing_in_it_can_be_changed():
    settings = {"plan": {"overlap": 0, "roi": [[1, 2]]}}
    provenance = Provenance(settings, {})

    settings["plan"]["overlap"] = 5
    settings["plan"]["roi"][0].append(3)
    assert provenance.fingerprint["plan"]["overlap"] == 0
    assert provenance.fingerprint["plan"]["roi"] == ((1, 2),)
    with pytest.raises(TypeError):
        provenance.fingerprint["plan"]["overlap"] = 5
    with pytest.raises(AttributeError):
        provenance.record = {}


@pytest.mark.parametrize(
    ("value", "place"),
    [(math.nan, "a.b[1]"), (math.inf, "a.b[1]"), (b"x", "a.b[1]"), (np.arange(2), "a.b[1]")],
)
def test_a_value_that_json_cannot_hold_is_refused_with_its_place(value, place):
    with pytest.raises(InputError) as caught:
        Provenance({}, {"a": {"b": [1, value]}})
    assert f"record.{place} is" in str(caught.value)


def test_a_key_that_is_not_text_is_refused():
    with pytest.raises(InputError, match=r"fingerprint\.plan has the key 3"):
        Provenance({"plan": {3: 1}}, {})


def test_numpy_numbers_become_plain_ones():
    provenance = Provenance({}, {"tiles": np.int64(7), "mpp": np.float32(0.5)})

    assert type(provenance.record["tiles"]) is int
    assert type(provenance.record["mpp"]) is float


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"fingerprint": {}}', '{"fingerprint": {"mpp": NaN}, "record": {}}',
     '{"fingerprint": 3, "record": {}}'],
)  # fmt: skip
def test_text_that_is_no_provenance_is_refused(text):
    with pytest.raises(InputError, match=r"provenance|fingerprint"):
        Provenance.from_json(text)


def test_differences_name_the_key_and_both_values():
    here = Provenance(_fingerprint(tile_spec={"mpp": 1.0, "size_px": 224}), {"time": "now"})
    there = Provenance(
        _fingerprint(plan={"overlap": 0, "min_tissue": 0.25, "roi": [1, 2]}, transform="macenko"),
        {"time": "then"},
    )

    assert here.differences(there) == [
        "plan.roi: [1, 2] there, nothing here",
        "tile_spec.mpp: 2.0 there, 1.0 here",
        "transform: 'macenko' there, None here",
    ]


def test_the_record_alone_makes_no_difference():
    assert Provenance(_fingerprint(), {"a": 1}).differences(Provenance(_fingerprint(), {})) == []


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("weights_sha256", "cd" * 32),
        ("tile_spec", {"mpp": 2.0, "size_px": 256}),
        ("plan", {"overlap": 8, "min_tissue": 0.25}),
        ("dtype", "bfloat16"),
        ("transform", "macenko"),
    ],
)
def test_each_setting_decides_what_may_be_mixed(setting, value):
    here, there = _fingerprint(), _fingerprint(**{setting: value})
    assert len(Provenance(here, {}).differences(Provenance(there, {}))) == 1


def test_the_preprocessing_version_is_in_the_fingerprint():
    assert _fingerprint()["preprocessing_version"] == PREPROCESSING_VERSION


def test_half_precisions_may_be_mixed_but_not_with_full():
    assert _fingerprint(dtype="torch.float16") == _fingerprint(dtype="bfloat16")
    assert dtype_class("torch.float32") == dtype_class("fp32") == "fp32"
    with pytest.raises(InputError, match="'int8'"):
        dtype_class("int8")


@pytest.mark.parametrize("size", [0, 1, 65_536, 1_048_576, 1_048_577, 5_000_003])
def test_a_file_is_known_by_its_content_and_not_by_its_folder(tmp_path, size):
    data = random.Random(size).randbytes(size)
    (tmp_path / "there").mkdir()
    paths = tmp_path / "Fall 1 é.svs", tmp_path / "there" / "Fall 1 é.svs"
    for path in paths:
        path.write_bytes(data)

    here, there = file_fingerprint(paths[0]), file_fingerprint(str(paths[1]))
    assert here == there
    assert here["name"] == "Fall 1 é.svs"
    assert here["size_bytes"] == size
    assert str(tmp_path) not in json.dumps(here)


def test_a_small_file_is_hashed_whole(tmp_path):
    data = random.Random(0).randbytes(1_048_576)
    (tmp_path / "a").write_bytes(data)

    sample = file_fingerprint(tmp_path / "a")["content_sample_sha256"]
    assert sample == hashlib.sha256(b"1048576" + data).hexdigest()


@pytest.mark.parametrize("at", [0, 65_535, -1, -65_536])
def test_a_changed_byte_at_either_end_of_a_large_file_is_seen(tmp_path, at):
    data = bytearray(random.Random(0).randbytes(3_000_001))
    (tmp_path / "slide").write_bytes(data)
    before = file_fingerprint(tmp_path / "slide")
    data[at] ^= 1
    (tmp_path / "slide").write_bytes(data)

    assert file_fingerprint(tmp_path / "slide") != before


def test_a_changed_size_is_seen_though_the_sampled_bytes_are_equal(tmp_path):
    for name, size in (("a", 3_000_000), ("b", 3_000_001)):
        (tmp_path / name).write_bytes(bytes(size))

    one, other = (file_fingerprint(tmp_path / n)["content_sample_sha256"] for n in "ab")
    assert one != other


def test_a_sparse_file_of_many_gigabytes_costs_next_to_nothing(tmp_path):
    with (tmp_path / "huge.tif").open("wb") as file:
        file.truncate(200 * 2**30)

    assert file_fingerprint(tmp_path / "huge.tif")["size_bytes"] == 200 * 2**30
