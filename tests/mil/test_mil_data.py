"""What may stand for a bag, a label and a patient, and what is refused, with the bag's name."""

import enum
import math
import warnings
from fractions import Fraction
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from support.mil_cohort import planted_cohort

from xmag.bag import FeatureBag
from xmag.errors import BagError, InputError, MismatchError, XmagWarning
from xmag.geometry import TileGeometry
from xmag.metrics.labels import class_array
from xmag.mil import MILClassifier
from xmag.mil.heads import ordered
from xmag.provenance import Provenance
from xmag.training.splits import held_out, units

GEOMETRY = TileGeometry(
    size_px=224, mpp=2.0, size_level0=896, overlap_px=0, level0_mpp=0.5, level0_size=(9000, 9000)
)
COHORT = planted_cohort(12, tiles=6, dim=4)


def tiny(**params: object) -> MILClassifier:
    defaults = {
        "aggregator_options": {"embed_dim": 4, "attention_dim": 2}, "epochs": 2,
        "random_state": 0, "device": "cpu",
    }  # fmt: skip
    return MILClassifier(**{**defaults, **params})  # type: ignore[arg-type]


def fitted(bags: object = None, labels: object = None, **params: object) -> MILClassifier:
    return tiny(**params).fit(
        COHORT.bags if bags is None else bags,
        COHORT.labels if labels is None else labels,
        validation=None,
    )


def feature_bag(features: np.ndarray, model: str | None = None) -> FeatureBag:
    coords = np.stack([np.arange(len(features)) * 896, np.zeros(len(features), int)], axis=1)
    provenance = model and Provenance({"weights_sha256": model, "tile_spec": {"mpp": 2.0}}, {})
    return FeatureBag(features, coords, provenance=provenance or None, tiles=GEOMETRY)


def test_every_kind_of_bag_gives_the_same_classifier(tmp_path: Path) -> None:
    kinds: dict[str, list] = {"arrays": COHORT.bags}
    kinds["tensors"] = [torch.from_numpy(x) for x in COHORT.bags]
    kinds["FeatureBags"] = [feature_bag(x) for x in COHORT.bags]
    kinds["double"] = [x.astype(np.float64) for x in COHORT.bags]
    kinds["gradients"] = [torch.from_numpy(x).requires_grad_() for x in COHORT.bags]
    for suffix in (".h5", ".safetensors", ".pt"):
        kinds[suffix] = []
        for index, bag in enumerate(kinds["FeatureBags"]):
            path = tmp_path / f"{index}{suffix}"
            bag.export(path, layout="clam") if suffix == ".pt" else bag.save(path)
            kinds[suffix].append(str(path) if index % 2 else path)
    expected = fitted()
    probabilities = expected.predict_proba(COHORT.bags)
    for name, bags in kinds.items():
        classifier = fitted(bags)
        np.testing.assert_array_equal(classifier.predict_proba(bags), probabilities, err_msg=name)
        np.testing.assert_array_equal(
            classifier.attention(bags[3]).scores, expected.attention(COHORT.bags[3]).scores
        )


def test_bags_may_come_in_any_sequence() -> None:
    expected = fitted().predict_proba(COHORT.bags)
    stacked = np.stack(COHORT.bags)
    objects = np.empty(12, object)
    objects[:] = COHORT.bags
    for bags in (tuple(COHORT.bags), stacked, objects, torch.from_numpy(stacked)):
        np.testing.assert_array_equal(fitted(bags).predict_proba(bags), expected)


@pytest.mark.parametrize("content", ["tensor", "features", "feats", "batch", "half"])
def test_a_pt_file_may_hold_a_tensor_or_a_dictionary(content: str, tmp_path: Path) -> None:
    features = torch.from_numpy(COHORT.bags[0])
    value = {
        "tensor": features, "features": {"features": features, "coords": torch.zeros(6, 2)},
        "feats": {"feats": features}, "batch": features[None], "half": features.half(),
    }[content]  # fmt: skip
    path = tmp_path / "bag.pt"
    torch.save(value, path)
    found = fitted().predict_proba([path])
    np.testing.assert_allclose(found, fitted().predict_proba(COHORT.bags[:1]), atol=1e-3)


def test_files_are_read_when_they_are_needed_and_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    feature_bag(COHORT.bags[0]).save(path)
    classifier = fitted()
    first = classifier.predict_proba([path])
    feature_bag(COHORT.bags[1]).save(path)
    assert not np.array_equal(classifier.predict_proba([path]), first)


def test_attention_lines_up_with_the_coordinates(tmp_path: Path) -> None:
    bag = feature_bag(COHORT.bags[1])
    bag.save(tmp_path / "a.h5")
    classifier = fitted()
    for source in (bag, tmp_path / "a.h5"):
        attention = classifier.attention(source)
        assert attention.kind == "softmax"
        assert attention.scores.dtype == np.float32
        assert attention.scores.sum() == pytest.approx(1, abs=1e-6)
        np.testing.assert_array_equal(attention.coords, bag.coords)
        assert attention.tiles == GEOMETRY
        assert len(attention) == 6
    alone = classifier.attention(COHORT.bags[1])
    assert (alone.coords, alone.tiles) == (None, None)
    order = np.array([3, 1, 5, 0, 2, 4])
    permuted = classifier.attention(COHORT.bags[1][order]).scores
    np.testing.assert_allclose(permuted, alone.scores[order], atol=1e-6)


@pytest.mark.parametrize("name", ["mean", "max"])
def test_an_aggregator_without_attention_says_which_have_it(name: str) -> None:
    classifier = fitted(aggregator=name, aggregator_options={"embed_dim": 4})
    with pytest.raises(InputError, match=r"no attention.*aggregator=\"abmil\""):
        classifier.attention(COHORT.bags[0])


def test_an_empty_bag_is_left_out_of_training_and_predicted_as_the_labels_are_frequent() -> None:
    empty = np.zeros((0, 4), np.float32)
    bags, labels = [*COHORT.bags[:8], empty, empty], ["b"] * 3 + ["a"] * 5 + ["a", "b"]
    with pytest.warns(XmagWarning, match=r"X\[8\], X\[9\] have no tiles; they are left out"):
        classifier = fitted(bags, labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = fitted(bags[:8], labels[:8])
    np.testing.assert_array_equal(
        classifier.predict_proba(bags[:8]), expected.predict_proba(bags[:8])
    )
    with pytest.warns(XmagWarning, match=r"X\[1\] have no tiles; .* how frequent each class was"):
        probabilities = classifier.predict_proba([bags[0], feature_bag(empty)])
    np.testing.assert_allclose(probabilities[1], [0.6, 0.4])
    with pytest.warns(XmagWarning):
        assert classifier.predict([empty]).tolist() == ["a"]
    assert classifier.attention(feature_bag(empty)).scores.shape == (0,)
    assert classifier.attention(feature_bag(empty)).coords.shape == (0, 2)


def test_a_class_that_has_only_empty_bags_is_refused() -> None:
    empty = np.zeros((0, 4), np.float32)
    with (
        pytest.warns(XmagWarning),
        pytest.raises(InputError, match="no bag of the class 'c' has any tile"),
    ):
        fitted([*COHORT.bags, empty], [*COHORT.labels, "c"])


class Grade(enum.Enum):
    LOW = 1
    HIGH = 2


@pytest.mark.parametrize(
    ("labels", "dtype"),
    [
        (("a", "b", "c"), "<U1"),
        ((0, 1, 5), "int64"),
        ((False, True), "bool"),
        ((0.0, 1.0), "float64"),
        ((("LUAD", 1), ("LUAD", 2)), "object"),
        ((1, "a"), "object"),
        ((1, 2.0), "object"),
        ((frozenset({1}), frozenset({2})), "object"),
        ((Grade.LOW, Grade.HIGH), "object"),
        ((2**70, 3), "object"),
        (("a", "a\0"), "object"),
    ],
)
def test_labels_of_any_hashable_kind_come_back_as_they_were(labels: tuple, dtype: str) -> None:
    y = [labels[i % len(labels)] for i in range(12)]
    classifier = fitted(labels=y)
    assert classifier.classes_.dtype == dtype
    assert set(classifier.classes_.tolist()) == set(labels)
    predicted = classifier.predict(COHORT.bags).tolist()
    assert {type(value) for value in predicted} <= {type(value) for value in labels}
    right = [a == b for a, b in zip(predicted, y, strict=True)]
    assert classifier.score(COHORT.bags, y) == pytest.approx(sum(right) / 12)
    assert classifier.predict_proba(COHORT.bags).sum(axis=1) == pytest.approx(np.ones(12))


def test_labels_come_in_lists_arrays_and_tensors() -> None:
    y = [i % 3 for i in range(12)]
    expected = fitted(labels=y).predict_proba(COHORT.bags)
    for labels in (np.array(y, np.int8), torch.tensor(y), tuple(y), np.array(y, object)):
        classifier = fitted(labels=labels)
        assert classifier.classes_.tolist() == [0, 1, 2]
        assert [type(v) for v in classifier.classes_.tolist()] == [int] * 3
        np.testing.assert_array_equal(classifier.predict_proba(COHORT.bags), expected)


def test_classes_are_in_an_order_that_does_not_depend_on_the_cohort() -> None:
    assert ordered(["b", "a", "B"]) == ["B", "a", "b"]
    assert ordered([10, 9, -1]) == [-1, 9, 10]
    assert ordered([("b", 1), ("a", 2)]) == [("a", 2), ("b", 1)]
    mixed = [("a", 1), (2, "b"), "z", 3]
    assert ordered(mixed) == ordered(mixed[::-1])
    sets = [frozenset({1, 2}), frozenset({3}), frozenset({1})]
    assert ordered(sets) == ordered(sets[::-1])
    assert class_array([("a", 1), ("b", 2)]).shape == (2,)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a"] * 12, r"labels are of 1 class \('a'\); expected two or more"),
        (["a", "b"] * 5, "y has 10 entries for 12 cases"),
        ("ab" * 6, "y is 'abababababab'; expected a sequence with one label for each case"),
        ([None, *"ababababab", "a"], r"y\[0\] is None, a missing value"),
        ([*"ababababab", "a", float("nan")], r"y\[11\] is nan, a missing value"),
        ([["a"], *"ababababab", "a"], r"y\[0\] is .*, a list that cannot be hashed"),
        ([("a", []), *"ababababab", "a"], r"y\[0\] is .*, a tuple that cannot be hashed"),
        ([*"ababababab", "a", ""], r"y\[11\] is '', a missing value"),
        ([*"ababababab", "a", "nan"], r"y\[11\] is 'nan', a missing value"),
        (np.array([*"ababababab", "a", None]).astype(str), r"is 'None', a missing value"),
        ([*"ababababab", "a", ("a", None)], r"\('a', None\), a missing value"),
        ([*"ababababab", "a", "b "], r"y\[11\] is 'b ', with blanks around it"),
        ([("a", " x"), ("a", "x")] * 6, r"y\[0\] is \('a', ' x'\), with blanks"),
        (np.linspace(0, 1, 12), r"y holds 0\.09.*not whole.*MILRegressor is for continuous labels"),
        (torch.linspace(0, 1, 12).half(), "not whole.*MILRegressor"),
        ([1, 2.5] * 6, r"y holds 2\.5, .*not whole.*give them as text"),
        ([Fraction(1, 2), Fraction(3, 2)] * 6, "not whole.*MILRegressor"),
        ([(0.5, 1.5), (1.5, 2.5)] * 6, "not whole.*MILRegressor"),
        ([0.0, math.inf] * 6, "y holds inf"),
        ([1, True] * 6, "both 1 and True, which Python takes for the same"),
    ],
)
def test_labels_that_make_no_sense_are_refused(labels: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fitted(labels=labels)


@pytest.mark.parametrize(
    ("last", "message"),
    [
        ("p1 ", r"groups\[11\] is 'p1 ', with blanks"),
        ("", r"groups\[11\] is '', a missing"),
        ("<NA>", r"groups\[11\] is '<NA>', a missing"),
        (float("nan"), r"groups\[11\] is nan, a missing"),
    ],
)
def test_patients_that_are_missing_or_would_be_two_are_refused(last: object, message: str) -> None:
    patients = [*(f"p{i}" for i in range(11)), last]
    with pytest.raises(InputError, match=message):
        MILClassifier(device="cpu").fit(COHORT.bags, COHORT.labels, groups=patients)


def test_numbers_as_text_are_names() -> None:
    assert fitted(labels=["1.5", "2.5"] * 6).classes_.tolist() == ["1.5", "2.5"]


def with_bag(bag: object) -> list:
    return [*COHORT.bags[:5], bag, *COHORT.bags[6:]]


@pytest.mark.parametrize(
    ("bag", "error", "message"),
    [
        (np.zeros((3, 5)), BagError, r"X\[5\] has 5 features a tile, and X\[0\] 4"),
        (np.array([[0, 1, np.nan, 3]]), BagError, r"X\[5\]: it holds nan in row 0 \(1 such"),
        (np.array([[0, 1, 1e300, 3]]), BagError, r"X\[5\]: it holds 1e\+300 in row 0.*float32"),
        (torch.tensor([[0, 1, torch.inf, 3]]), BagError, r"X\[5\]: it holds inf"),
        (np.zeros(4), BagError, r"X\[5\]: it is an array of float64 with shape \(4,\)"),
        (np.zeros((2, 3, 4)), BagError, r"X\[5\].*shape \(2, 3, 4\)"),
        (np.zeros((0, 0)), BagError, r"X\[5\].*shape \(0, 0\)"),
        (np.array([["a"] * 4]), BagError, r"X\[5\]: it is an array of <U1"),
        (torch.zeros(3, 4, dtype=torch.complex64), BagError, r"X\[5\]: it is a tensor of"),
        ([[0.0] * 4], InputError, r"X\[5\]: it is a list; expected a list of FeatureBags"),
        ("no/such.h5", BagError, r"X\[5\] \(no/such.h5\): there is no file"),
        ("no/such.pt", BagError, r"X\[5\] \(no/such.pt\): there is no file"),
        ("such.csv", InputError, r"X\[5\] \(such.csv\): 'such.csv' ends in '.csv'"),
    ],
)
def test_a_bag_that_is_none_is_named(bag: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fitted(with_bag(bag))
    classifier = fitted()
    message = message.replace(r"X\[0\]", "those of the training")
    with pytest.raises(error, match=message):
        classifier.predict_proba(with_bag(bag))


@pytest.mark.parametrize("bags", ["a.h5", feature_bag(COHORT.bags[0]), {}, 3])
def test_a_single_bag_is_no_list_of_bags(bags: object) -> None:
    with pytest.raises(InputError, match=r"X is a .*; expected a list of FeatureBags"):
        fitted(bags)


def test_a_table_of_numbers_is_no_list_of_bags() -> None:
    with pytest.raises(BagError, match=r"X\[0\]: it is an array of float32 with shape \(4,\)"):
        fitted().predict(COHORT.bags[0])


def test_damaged_files_are_named(tmp_path: Path) -> None:
    pickle = tmp_path / "code.pt"
    torch.save({"features": Path("a")}, pickle)
    other = tmp_path / "other.pt"
    torch.save({"weights": torch.zeros(2, 4)}, other)
    broken = tmp_path / "broken.pt"
    broken.write_bytes(b"PK\3\4 and no more")
    nan = tmp_path / "nan.h5"
    with h5py.File(nan, "w") as file:
        file["features"] = np.full((2, 4), np.nan)
        file["coords"] = np.zeros((2, 2), int)
    for path, message in (
        (pickle, "more than tensors"), (other, "expected a tensor"), (broken, "no whole"),
        (nan, "hold nan in row 0"),
    ):  # fmt: skip
        with pytest.raises(BagError, match=rf"X\[5\] \(.*{path.name}\): .*{message}"):
            fitted(with_bag(path))


def test_bags_made_with_different_models_are_not_mixed() -> None:
    ours = [feature_bag(x, "model-a") for x in COHORT.bags]
    mixed = [*ours[:5], feature_bag(COHORT.bags[5], "model-b"), *ours[6:]]
    with pytest.raises(
        MismatchError, match=r"X\[5\] was made otherwise than X\[0\]: weights_sha256: 'model-b'"
    ):
        fitted(mixed)
    classifier = fitted(ours)
    assert classifier.fingerprint_ == {"weights_sha256": "model-a", "tile_spec": {"mpp": 2.0}}
    for predict in (classifier.predict, lambda bags: classifier.attention(bags[0])):
        with pytest.raises(MismatchError, match="than those of the training: weights_sha256"):
            predict(mixed[5:6])
    # What does not say how it was made is taken on trust.
    np.testing.assert_array_equal(
        classifier.predict_proba(COHORT.bags), classifier.predict_proba(ours)
    )
    with pytest.raises(MismatchError, match=r"validation X\[0\] was made otherwise"):
        tiny().fit(ours[:10], COHORT.labels[:10], validation=(mixed[5:6], COHORT.labels[5:6]))
    assert fitted(COHORT.bags).fingerprint_ is None


def test_an_explicit_validation_set_that_shares_a_patient_or_features_is_refused() -> None:
    train = COHORT.subset(range(8))
    check = COHORT.subset(range(8, 12))
    given = {"groups": train.patients}

    def fit(bags: list, labels: list, patients: list) -> MILClassifier:
        return tiny().fit(train.bags, train.labels, validation=(bags, labels, patients), **given)

    assert fit(check.bags, check.labels, check.patients).history_[0]["validation_loss"]
    with pytest.raises(InputError, match=r"validation X\[1\] has the patient '0-3' that the"):
        fit(check.bags, check.labels, [check.patients[0], "0-3", *check.patients[2:]])
    twin = feature_bag(train.bags[5])
    with pytest.raises(InputError, match=r"validation X\[0\] has features that the training bags"):
        fit([twin, *check.bags[1:]], check.labels, check.patients)
    with pytest.warns(XmagWarning, match="no groups were given"):
        tiny().fit(train.bags, train.labels, validation=(check.bags, check.labels))
    with pytest.raises(InputError, match=r"validation y\[0\] is 'other'; expected one of"):
        fit(check.bags, ["other", *check.labels[1:]], check.patients)
    with pytest.raises(InputError, match="validation y has 3 entries for 4 cases"):
        fit(check.bags, check.labels[1:], check.patients)
    with pytest.raises(BagError, match=r"validation X\[0\] has 5 features a tile"):
        fit([np.zeros((3, 5))] * 4, check.labels, check.patients)


@pytest.mark.parametrize("validation", [0, 1, 1.5, -0.1, True, "half", (1, 2, 3, 4), ([1],)])
def test_a_validation_that_makes_no_sense_is_refused(validation: object) -> None:
    with pytest.raises(InputError, match=r"validation is .*; expected a fraction between 0 and 1"):
        tiny().fit(COHORT.bags, COHORT.labels, groups=COHORT.patients, validation=validation)


def test_too_few_patients_to_hold_one_out_is_an_error_that_names_the_way_out() -> None:
    with pytest.raises(InputError, match=r"can be held out.*validation=None"):
        tiny().fit(COHORT.bags, COHORT.labels, groups=["one"] * 12)
    with pytest.raises(InputError, match=r"groups has 3 entries for 12 cases"):
        tiny().fit(COHORT.bags, COHORT.labels, groups=["a", "b", "c"])


@pytest.mark.parametrize("seed", range(20))
def test_a_split_keeps_patients_whole_and_classes_in_proportion(seed: int) -> None:
    rng = np.random.default_rng(seed)
    patients = rng.integers(60, size=200)
    labels = (rng.random(60) < 0.25).astype(np.int64)[patients]
    digests = [bytes([i]) for i in range(200)]
    unit = units([f"p{p}" for p in patients], digests)
    held = held_out(unit, labels, 0.2, rng)
    assert not set(patients[held]) & set(patients[~held])
    for label in (0, 1):
        assert 0.12 < held[labels == label].mean() < 0.28
    assert not np.array_equal(held, held_out(unit, labels, 0.2, np.random.default_rng(seed + 99)))


def test_a_split_leaves_the_last_patient_of_a_class_to_train_on() -> None:
    unit, labels = np.arange(10), np.array([0] * 9 + [1])
    for seed in range(20):
        held = held_out(unit, labels, 0.9, np.random.default_rng(seed))
        assert held.any()
        assert not held[9]
        assert not held[:9].all()


def test_a_rare_class_is_validated_where_it_has_two_patients() -> None:
    unit, labels = np.arange(20), np.array([0] * 18 + [1] * 2)
    for seed in range(20):
        held = held_out(unit, labels, 0.1, np.random.default_rng(seed))
        assert held[18:].sum() == 1
        assert held[:18].sum() == 2


def test_slides_with_identical_features_stay_on_one_side() -> None:
    digests = [b"a", b"b", b"c", b"a", b"d", b"e"]
    assert units(None, digests).tolist() == [0, 1, 2, 0, 3, 4]
    # The patient of the second ties it to the last, whose features are those of the third.
    chained = units(["p", "q", "r", "s", "t", "q"], [b"a", b"b", b"c", b"d", b"e", b"c"])
    assert chained.tolist() == [0, 1, 1, 2, 3, 1]


def test_a_validation_split_without_a_class_is_a_warning() -> None:
    labels = ["a"] * 6 + ["b"] * 5 + ["rare"]
    with pytest.warns(XmagWarning, match="no bag to validate with is of the class 'rare'"):
        tiny().fit(COHORT.bags, labels, groups=COHORT.patients)


def test_a_stratum_without_any_bag_does_not_count():
    """As in a cohort where nobody is censored."""
    unit, labels = np.arange(20) // 2, np.ones(20, np.int64)
    for seed in range(5):
        held = held_out(unit, labels, 0.2, np.random.default_rng(seed))
        assert np.count_nonzero(held) == 4
