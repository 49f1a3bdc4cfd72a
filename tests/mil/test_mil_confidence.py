"""Temperature and novelty, against scikit-learn's."""

import io
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import logit, softmax
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV, _TemperatureScaling
from sklearn.covariance import LedoitWolf
from sklearn.frozen import FrozenEstimator
from sklearn.metrics import log_loss, roc_auc_score
from support.mil_cohort import planted_cohort

from xmag.errors import BagError, InputError, ModelError, WeightsError, XmagWarning
from xmag.mil import MILClassifier, MILRegressor, MILSurvival, aggregator
from xmag.mil.confidence import Known, Novelty, fit_temperature
from xmag.mil.heads import class_losses


def _losses(targets: np.ndarray) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda logits: class_losses(logits, torch.from_numpy(targets))


def _logits(seed: int, classes: int, *, sharpness: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    true = rng.normal(size=(300, classes)) * 1.5
    targets = np.array([rng.choice(classes, p=row) for row in softmax(true, axis=1)])
    return true * sharpness, targets


@pytest.mark.parametrize("classes", [2, 3, 6])
@pytest.mark.parametrize("sharpness", [0.3, 1, 4])
def test_the_temperature_is_scikit_learns(classes, sharpness):
    logits, targets = _logits(0, classes, sharpness=sharpness)
    theirs = _TemperatureScaling().fit(logits, targets)
    assert fit_temperature(logits, _losses(targets)) == pytest.approx(1 / theirs.beta_, rel=1e-6)


def test_the_temperature_undoes_what_made_logits_too_sharp():
    logits, targets = _logits(1, 3, sharpness=4)
    assert fit_temperature(logits, _losses(targets)) == pytest.approx(4, rel=0.2)


def test_logits_that_are_always_right_get_the_lowest_temperature():
    logits = np.eye(3)[[0, 1, 2, 0]] * 5
    with pytest.warns(XmagWarning, match="4 cases to calibrate with are all predicted right"):
        found = fit_temperature(logits, _losses(np.array([0, 1, 2, 0])))
    assert found == pytest.approx(np.exp(-10), rel=1e-3)
    with pytest.warns(XmagWarning, match="no better than by chance"):
        found = fit_temperature(logits, _losses(np.array([1, 2, 0, 1])))
    assert found == pytest.approx(np.exp(10), rel=1e-3)


def _covariance(novelty: Novelty) -> np.ndarray:
    return novelty.factor.T @ novelty.factor + novelty.floor * np.eye(len(novelty.mean))


@pytest.mark.parametrize(("count", "width"), [(30, 5), (20, 60), (200, 12)])
def test_the_covariance_is_ledoit_and_wolfs(count, width):
    rng = np.random.default_rng(count)
    vectors = rng.normal(size=(count, width)) @ rng.normal(size=(width, width)) + 3
    found = Novelty.of(vectors, groups=np.arange(count), rng=np.random.default_rng(0))
    theirs = LedoitWolf().fit(vectors)
    np.testing.assert_allclose(_covariance(found), theirs.covariance_, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(found.mean, theirs.location_)
    assert len(found.factor) == min(count, width)
    new = vectors[::-1] * 1.5
    far = np.sqrt(theirs.mahalanobis(new))
    expected = [100 * np.mean(found.reference < distance) for distance in far]
    np.testing.assert_allclose(found.percentiles(new), expected)


@pytest.mark.parametrize("count", [20, 50, 200])
def test_a_shifted_cohort_is_novel_and_an_unshifted_one_is_not(count):
    rng = np.random.default_rng(7)
    mixing = rng.normal(size=(64, 64)) / 8

    def cohort(n: int, *, shift: float) -> np.ndarray:
        return (rng.normal(size=(n, 64)) + shift * np.eye(64)[0]) @ mixing

    found = Novelty.of(cohort(count, shift=0), groups=np.arange(count), rng=rng)
    same, new, far = (found.percentiles(cohort(300, shift=s)) for s in (0, 0, 12))
    is_new = np.repeat([False, True], 300)
    assert roc_auc_score(is_new, np.concatenate([same, far])) >= 0.9
    assert 0.4 <= roc_auc_score(is_new, np.concatenate([same, new])) <= 0.6
    # A case like those of the training is at any percentile.
    assert 35 <= np.median(same) <= 75


def test_slides_of_a_patient_are_no_reference_for_each_other():
    """Twins would otherwise be found near each other, and every new patient far away."""
    rng = np.random.default_rng(0)
    patients = rng.normal(size=(20, 30))
    vectors = np.repeat(patients, 3, axis=0) + 0.01 * rng.normal(size=(60, 30))
    found = Novelty.of(vectors, groups=np.repeat(np.arange(20), 3), rng=rng)
    assert np.median(found.percentiles(rng.normal(size=(200, 30)))) < 97


def test_too_few_patients_are_an_error():
    with pytest.raises(InputError, match="9 patients"):
        Novelty.of(np.eye(9), groups=np.arange(9), rng=np.random.default_rng(0))


def _overconfident(seed: int, count: int) -> tuple[list, list, list]:
    """Cases of which a fifth has the other label, but for seed 0: that promises certainty."""
    cohort = planted_cohort(count, seed=seed, slides=2, tiles=10, dim=8, planted=0.2)
    rng = np.random.default_rng(seed)
    other = {"negative": "positive", "positive": "negative"}
    labels = [
        label if not seed or rng.random() < 0.8 else other[label] for label in cohort.labels[::2]
    ]
    cases = [cohort.bags[i : i + 2] for i in range(0, 2 * count, 2)]
    return cases, labels, cohort.patients[::2]


PARAMS = {
    "aggregator_options": {"embed_dim": 16, "attention_dim": 8}, "lr": 5e-3, "epochs": 60,
    "random_state": 0, "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def overconfident() -> MILClassifier:
    cases, labels, patients = _overconfident(0, 40)
    return MILClassifier(**PARAMS).fit(cases, labels, groups=patients, validation=None)


@pytest.fixture
def classifier(overconfident: MILClassifier) -> MILClassifier:
    own = MILClassifier()
    own.__dict__.update(overconfident.__dict__)  # copy.copy leaves patients out, as a pickle does
    return own


def calibration_error(probabilities: np.ndarray, right: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error: Guo et al. 2017, equation 3."""
    confidence, error = probabilities.max(axis=1), 0.0
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    for bin_ in range(bins):
        inside = place == bin_
        if inside.any():
            error += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    return error


@pytest.mark.parametrize("fusion", ["early", "late"])
def test_calibration_lowers_the_calibration_error_and_changes_no_prediction(
    classifier: MILClassifier, fusion: str
) -> None:
    classifier.set_params(fusion=fusion)
    cases, labels, patients = _overconfident(1, 200)
    others, truth, _ = _overconfident(2, 200)
    before, predicted = classifier.predict_proba(others), classifier.predict(others)
    assert classifier.calibrate(cases, labels, groups=patients) is classifier
    after = classifier.predict_proba(others)
    right = predicted == np.array(truth)
    assert classifier.temperature_ > 1
    assert calibration_error(after, right) < calibration_error(before, right) / 2
    assert log_loss(truth, after) < log_loss(truth, before)
    np.testing.assert_array_equal(classifier.predict(others), predicted)
    np.testing.assert_allclose(
        after, softmax(np.log(before) / classifier.temperature_, axis=1), atol=1e-9
    )


def test_calibration_is_scikit_learns(classifier: MILClassifier) -> None:
    cases, labels, _ = _overconfident(1, 60)
    theirs = CalibratedClassifierCV(FrozenEstimator(classifier), method="temperature", cv=5)
    expected = theirs.fit(cases, labels).predict_proba(cases)
    np.testing.assert_allclose(
        classifier.calibrate(cases, labels).predict_proba(cases), expected, atol=1e-6
    )


def test_a_temperature_is_saved_and_dropped_by_clone_and_refit(
    classifier: MILClassifier, tmp_path: Path
) -> None:
    cases, labels, patients = _overconfident(1, 30)
    assert not hasattr(classifier, "temperature_")
    classifier.save(tmp_path)
    assert not hasattr(MILClassifier.load(tmp_path, device="cpu"), "temperature_")
    classifier.calibrate(cases, labels)
    first = classifier.temperature_
    # A second calibration starts from the logits, and not from what the first made of them.
    assert classifier.calibrate(cases, labels).temperature_ == first
    assert not hasattr(clone(classifier), "temperature_")
    classifier.save(tmp_path)
    again = MILClassifier.load(tmp_path, device="cpu")
    assert again.temperature_ == first
    expected = classifier.predict_proba(cases)
    np.testing.assert_array_equal(again.predict_proba(cases), expected)
    pickled = pickle.loads(pickle.dumps(classifier))
    np.testing.assert_array_equal(pickled.predict_proba(cases), expected)
    classifier.set_params(epochs=2).fit(cases, labels, groups=patients)
    assert not hasattr(classifier, "temperature_")


@pytest.mark.parametrize("value", ["1.5", -1.0, 0.0, [1.0], True])
def test_a_temperature_that_makes_no_sense_is_refused(
    classifier: MILClassifier, tmp_path: Path, value: object
) -> None:
    classifier.save(tmp_path)
    path = tmp_path / "classifier.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "temperature": value}))
    with pytest.raises(ModelError, match=r"classifier.json.*is damaged"):
        MILClassifier.load(tmp_path)


def test_cases_of_the_training_are_refused(classifier: MILClassifier, tmp_path: Path) -> None:
    cases, labels, patients = _overconfident(1, 20)
    old, _, known = _overconfident(0, 40)
    leak = [cases[0], [cases[1][0], old[3][1]], *cases[2:]]
    with pytest.raises(InputError, match=r"X\[1\]\[1\] has the features of a bag of the training"):
        classifier.calibrate(leak, labels)
    with pytest.raises(InputError, match=r"X\[2\] is of the patient '0-7' of the training"):
        classifier.calibrate(cases, labels, groups=[*patients[:2], known[7], *patients[3:]])
    classifier.save(tmp_path)
    unpickled = pickle.loads(pickle.dumps(classifier))
    for again in (MILClassifier.load(tmp_path, device="cpu"), unpickled):
        with pytest.raises(InputError, match=r"X\[1\]\[1\] has the features"):
            again.calibrate(leak, labels)
        with pytest.warns(XmagWarning, match="patients of the training are not known"):
            again.calibrate(cases, labels, groups=[known[7], *patients[1:]])
    for file in (*tmp_path.iterdir(), io.BytesIO(pickle.dumps(classifier))):
        content = file.read_bytes() if isinstance(file, Path) else file.getvalue()
        assert not any(patient.encode() in content for patient in known)


def test_cases_that_chose_the_epoch_are_refused_too() -> None:
    cases, labels, patients = _overconfident(1, 30)
    model = MILClassifier(**{**PARAMS, "epochs": 2}).fit(
        cases[:20], labels[:20], groups=patients[:20],
        validation=(cases[20:], labels[20:], patients[20:]),
    )  # fmt: skip
    with pytest.raises(InputError, match=r"X\[0\]\[0\] has the features"):
        model.calibrate(cases[20:], labels[20:])
    inside = MILClassifier(**{**PARAMS, "epochs": 2}).fit(cases, labels, groups=patients)
    for case, label in zip(cases, labels, strict=True):
        with pytest.raises(InputError, match=r"X\[0\]\[0\] has the features"):
            inside.calibrate([case], [label])


def test_what_was_trained_elsewhere_cannot_tell_its_training() -> None:
    cases, labels, _ = _overconfident(1, 20)
    module = aggregator("abmil", in_dim=8, classes=2, embed_dim=4, attention_dim=2)
    model = MILClassifier.from_module(
        module, classes=["negative", "positive"], in_dim=8, device="cpu"
    )
    with pytest.warns(XmagWarning) as found:
        model.calibrate(cases, labels)
    assert "nobody knows what this estimator was trained on" in str(found[0].message)
    with pytest.raises(InputError, match="this MILClassifier cannot tell what is novel"):
        model.novelty(cases)


def test_calibration_needs_labels_and_tiles(classifier: MILClassifier) -> None:
    cases, labels, _ = _overconfident(1, 4)
    with pytest.raises(InputError, match=r"y\[1\] is 'other'; expected one of the classes"):
        classifier.calibrate(cases, [labels[0], "other", *labels[2:]])
    with pytest.raises(InputError, match="X is empty"):
        classifier.calibrate([], [])
    with pytest.raises(
        BagError, match=r"X\[0\]\[0\] has 9 features a tile, and those of the train"
    ):
        classifier.calibrate([[np.ones((2, 9), np.float32)]] * 4, labels)
    empty = np.zeros((0, 8), np.float32)
    with (
        pytest.warns(XmagWarning, match="are left out"),
        pytest.raises(InputError, match="no case"),
    ):
        classifier.calibrate([[empty]], ["positive"])
    with pytest.raises(InputError, match="not fitted"):
        MILClassifier().calibrate(cases, labels)


@pytest.mark.parametrize("kind", [MILRegressor, MILSurvival])
def test_what_has_no_probabilities_has_no_temperature(kind: type) -> None:
    cases, _, _ = _overconfident(1, 12)
    y = np.stack([np.arange(12) % 2, np.arange(1, 13)], axis=1).astype(float)
    model = kind(**{**PARAMS, "epochs": 1}).fit(cases, y, validation=None)
    with pytest.raises(InputError, match=f"{kind.__name__} predicts no probabilities"):
        model.calibrate(cases, y)
    assert model.novelty(cases).shape == (12,)


@pytest.mark.parametrize("count", [20, 50, 200])
def test_a_fitted_classifier_tells_a_shifted_cohort(count: int) -> None:
    """Features as wide as these let a network learn its training cases by heart."""
    shape = {"tiles": 12, "dim": 64, "planted": 0.1}
    train = planted_cohort(count, seed=0, **shape)
    new = planted_cohort(150, seed=1, **shape).bags
    shift = np.sign(np.random.default_rng(5).normal(size=64)).astype(np.float32)
    model = MILClassifier(**{**PARAMS, "epochs": 10})
    model.fit(train.bags, train.labels, validation=None)
    novelty = model.novelty(new)
    assert novelty.dtype == np.float64
    assert 40 <= novelty.mean() <= 60  # the AUROC against the held-out training cases, in percent
    shifted = model.novelty([bag + shift for bag in new])
    area = roc_auc_score(np.repeat([0, 1], len(new)), np.concatenate([novelty, shifted]))
    assert area >= 0.9


def test_novelty_is_of_the_mean_of_all_tiles_and_saved(
    classifier: MILClassifier, tmp_path: Path
) -> None:
    train, (cases, _, _) = _overconfident(0, 40)[0], _overconfident(1, 30)
    found = classifier.novelty(cases)
    means = np.stack([np.concatenate(case).mean(axis=0, dtype=np.float64) for case in train])
    known = classifier._known.novelty
    theirs = LedoitWolf().fit(means)
    np.testing.assert_allclose(_covariance(known), theirs.covariance_, rtol=1e-6, atol=1e-9)
    distances = np.sqrt(
        theirs.mahalanobis([np.concatenate(case).mean(axis=0, dtype=np.float64) for case in cases])
    )
    expected = [100 * np.mean(known.reference < distance) for distance in distances]
    np.testing.assert_allclose(found, expected)
    assert len(known.reference) == 40
    classifier.save(tmp_path)
    again = MILClassifier.load(tmp_path, device="cpu")
    np.testing.assert_array_equal(again.novelty(cases), found)
    again.save(tmp_path / "again")
    files = [path / "classifier.safetensors" for path in (tmp_path, tmp_path / "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_cohort_of_nine_patients_is_fitted_and_has_no_novelty() -> None:
    cases, labels, patients = _overconfident(1, 18)
    pairs = [f"p{i // 2}" for i in range(18)]
    model = MILClassifier(**{**PARAMS, "epochs": 1}).fit(
        cases, labels, groups=pairs, validation=None
    )
    with pytest.raises(InputError, match=r"cannot tell what is novel; .* to 10 patients"):
        model.novelty(cases)
    model.fit(cases, labels, groups=patients, validation=None)
    assert model.novelty(cases).shape == (18,)


def test_tensors_of_the_novelty_that_do_not_fit_are_refused() -> None:
    good = {
        "xmag.confidence.mean": torch.zeros(3), "xmag.confidence.factor": torch.zeros(2, 3),
        "xmag.confidence.floor": torch.tensor(1.0), "xmag.confidence.reference": torch.zeros(5),
    }  # fmt: skip
    assert Known.from_tensors(dict(good)).novelty is not None
    for name, value in (
        ("mean", torch.zeros(4)), ("floor", torch.tensor(0.0)), ("floor", torch.ones(1)),
        ("reference", None), ("factor", torch.zeros(3)),
    ):  # fmt: skip
        wrong = {**good, f"xmag.confidence.{name}": value}
        with pytest.raises(WeightsError, match="novelty have the shapes"):
            Known.from_tensors({key: part for key, part in wrong.items() if part is not None})
    known = Known.from_tensors({"embed.weight": torch.zeros(2)})
    assert (known.digests, known.novelty) == (None, None)


@pytest.mark.parametrize("fusion", ["early", "late"])
def test_slides_of_a_patient_in_several_cases_are_no_reference_for_each_other(fusion: str) -> None:
    rng = np.random.default_rng(0)
    patients = rng.normal(size=(40, 1, 30))
    bags = [
        (patient + 0.01 * rng.normal(size=(4, 30))).astype(np.float32)
        for patient in patients[:20] for _ in range(3)
    ]  # fmt: skip
    model = MILClassifier(**{**PARAMS, "epochs": 1, "fusion": fusion})
    model.fit(bags, [0, 1] * 30, groups=np.repeat(np.arange(20), 3), validation=None)
    assert np.median(model.novelty(list(patients[20:].astype(np.float32)))) < 97


LABELLED = {
    "ordinal": (lambda i: i % 3, {"ordinal": True}),
    "labels": (lambda i: [i % 2, i // 2 % 2], {}),
}


@pytest.mark.parametrize("fusion", ["early", "late"])
@pytest.mark.parametrize("kind", list(LABELLED))
def test_ordered_classes_and_labels_are_fused_and_calibrated(kind: str, fusion: str) -> None:
    label, params = LABELLED[kind]
    cases, _, _ = _overconfident(1, 30)
    model = MILClassifier(**{**PARAMS, "epochs": 5}, fusion=fusion, **params)
    model.fit(cases, np.array([label(i) for i in range(30)]), validation=None)
    if fusion == "late":
        slides = [model.predict_proba(case).mean(axis=0) for case in cases]
        np.testing.assert_allclose(model.predict_proba(cases), slides, atol=1e-12)
    new, _, _ = _overconfident(2, 40)
    truth = np.array([label(7 * i + i // 5) for i in range(40)])
    before, predicted = model.predict_proba(new), model.predict(new)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", XmagWarning)
        if kind == "ordinal":
            theirs = CalibratedClassifierCV(FrozenEstimator(model), method="temperature")
            expected = theirs.fit(new, truth).predict_proba(new)
        model.calibrate(new, truth)
    after = model.predict_proba(new)
    if kind == "ordinal":
        np.testing.assert_allclose(after, expected, atol=1e-6)
    else:
        np.testing.assert_allclose(logit(after), logit(before) / model.temperature_, atol=1e-9)
    np.testing.assert_array_equal(model.predict(new), predicted)
