"""Multi-label MILClassifier: binary cross-entropy written out, scikit-learn's conventions."""

import numpy as np
import pytest
import torch
from sklearn.calibration import CalibratedClassifierCV
from sklearn.metrics import accuracy_score, roc_auc_score
from sklearn.model_selection import GridSearchCV, GroupKFold, cross_val_score
from sklearn.utils.class_weight import compute_sample_weight
from support.mil_cohort import outcome_cohort

from xmag.errors import InputError, XmagWarning
from xmag.mil import MILClassifier
from xmag.mil.multilabel import LabelsHead

CPU = torch.device("cpu")
TINY = outcome_cohort(40, seed=3, dim=4, tiles=5, planted=0.2)


def labels_of(cohort):
    return np.stack([cohort.drive > 0, cohort.number > 120, cohort.grade > 0], axis=1).astype(int)


Y = labels_of(TINY)


def tiny(**options: object) -> MILClassifier:
    defaults = {
        "aggregator_options": {"embed_dim": 4, "attention_dim": 2}, "epochs": 2,
        "random_state": 0, "device": "cpu",
    }  # fmt: skip
    return MILClassifier(**{**defaults, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("balanced", [False, True])
def test_the_loss_is_the_cross_entropy_written_out(balanced):
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(3 * rng.normal(size=(40, 3))).requires_grad_()
    objective = LabelsHead.of(Y, balanced=balanced).objective(Y, CPU)
    p = 1 / (1 + np.exp(-logits.detach().numpy()))
    losses = -np.where(Y, np.log(p), np.log(1 - p))
    if balanced:
        losses *= np.stack([compute_sample_weight("balanced", y) for y in Y.T], axis=1)
    found = objective(logits, range(40))
    np.testing.assert_allclose(found.detach(), losses.mean(axis=1), atol=1e-9)
    assert torch.autograd.gradcheck(lambda x: objective(x, range(5)), logits[:5])


def test_several_slides_have_the_mean_of_their_probabilities():
    head, logits = LabelsHead.of(Y), 3 * np.random.default_rng(0).normal(size=(5, 3))
    expected = (1 / (1 + np.exp(-logits))).mean(axis=0)
    found = np.exp(head.log_probabilities(head.fuse(logits)[None]))[0]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    divided, losses = head.calibration(logits, Y[:5])
    p = 1 / (1 + np.exp(-logits / 2))
    expected = -np.where(Y[:5], np.log(p), np.log(1 - p)).mean(axis=1)
    np.testing.assert_allclose(losses(torch.from_numpy(divided / 2)), expected, atol=1e-12)


def test_planted_labels_are_found_each():
    train, test = outcome_cohort(200, seed=0), outcome_cohort(300, seed=1)
    small = {"embed_dim": 32, "attention_dim": 16}
    fitted = tiny(aggregator_options=small, epochs=30, lr=3e-3, batch_size=16)
    fitted.fit(train.bags, labels_of(train), groups=range(200))
    found = roc_auc_score(labels_of(test), fitted.predict_proba(test.bags), average=None)
    drive = np.repeat(test.drive[:, None], 3, axis=1)
    of_the_truth = roc_auc_score(labels_of(test), drive, average=None)
    assert (found > 0.75).all()
    assert (found < of_the_truth + 0.03).all()
    assert fitted.history_[-1]["validation_auroc"] > 0.7


def test_predictions_are_those_of_scikit_learns_multi_label_classifiers(tmp_path):
    fitted = tiny().fit(TINY.bags, Y, groups=range(40))
    probabilities = fitted.predict_proba(TINY.bags)
    assert probabilities.shape == (40, 3)
    np.testing.assert_array_equal(fitted.predict(TINY.bags), (probabilities > 0.5).astype(int))
    np.testing.assert_allclose(np.exp(fitted.predict_log_proba(TINY.bags)), probabilities)
    assert fitted.classes_.tolist() == [0, 1, 2]
    expected = accuracy_score(Y, fitted.predict(TINY.bags))
    assert fitted.score(TINY.bags, Y) == pytest.approx(expected)
    weights = np.arange(40.0)
    expected = accuracy_score(Y, fitted.predict(TINY.bags), sample_weight=weights)
    assert fitted.score(TINY.bags, Y, sample_weight=weights) == pytest.approx(expected)
    np.testing.assert_allclose(fitted.class_prior_, Y.mean(axis=0))
    with pytest.warns(XmagWarning, match="no tiles"):
        np.testing.assert_allclose(fitted.predict_proba([np.zeros((0, 4))])[0], Y.mean(axis=0))
    fitted.save(tmp_path)
    again = MILClassifier.load(tmp_path, device="cpu")
    np.testing.assert_array_equal(again.predict_proba(TINY.bags), probabilities)
    assert again.class_prior_.tolist() == fitted.class_prior_.tolist()
    assert set(fitted.history_[0]) == {
        "epoch", "train_loss", "validation_loss", "validation_auroc", "lr",
    }  # fmt: skip


@pytest.mark.parametrize("kind", [list, torch.tensor, np.asarray, lambda y: np.asarray(y, bool)])
def test_an_indicator_matrix_is_known_in_any_form(kind):
    fitted = tiny(sampling="shuffled").fit(TINY.bags, kind(Y.tolist()), validation=None)
    expected = tiny(sampling="balanced").fit(TINY.bags, Y, validation=None)
    np.testing.assert_array_equal(
        fitted.predict_proba(TINY.bags), expected.predict_proba(TINY.bags)
    )


def test_labels_of_tuples_are_still_classes():
    y = [("a", int(one)) for one in Y[:, 0]]
    assert tiny().fit(TINY.bags, y, validation=None).predict(TINY.bags[:1])[0] in y


def test_rare_labels_are_on_both_sides_of_the_split():
    y = np.zeros((40, 3), int)
    y[:, 0], y[:10, 1], y[:5, 2] = np.arange(40) % 2, 1, 1
    head = LabelsHead.of(y)
    assert head.strata(y).tolist() == [2] * 5 + [1] * 5 + [3, 0] * 15
    assert head.strata(np.eye(3, dtype=int)[[0, 2]]).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda y: np.where(y == 1, np.nan, y), r"y\[.*\] is nan .*a label is missing"),
        (lambda y: y * 2, r"is 2 .*expected 0 or 1"),
        (lambda y: y[:, :1], r"shape \(40, 1\).*two labels or more"),
        (lambda y: y[:10], r"shape \(10, 3\) for 40 bags"),
        (lambda y: y * [1, 1, 0], "column 2 of y is 0 in all 40 bags"),
        (lambda y: np.full(y.shape, "yes"), "no indicator matrix"),
    ],
)
def test_a_matrix_of_other_values_is_refused(change, words):
    with pytest.raises(InputError, match=words):
        tiny().fit(TINY.bags, change(Y.astype(float)), validation=None)


def test_options_of_classes_are_refused():
    with pytest.raises(InputError, match="no order"):
        tiny(ordinal=True).fit(TINY.bags, Y, validation=None)
    with pytest.raises(InputError, match="no weights"):
        tiny(class_weight={0: 2.0}).fit(TINY.bags, Y, validation=None)
    with pytest.raises(InputError, match="class_weight is 'even'"):
        tiny(class_weight="even").fit(TINY.bags, Y, validation=None)
    fitted = tiny().fit(TINY.bags, Y, validation=None)
    with pytest.raises(InputError, match="y has 2 labels, and the training 3"):
        fitted.score(TINY.bags, Y[:, :2])
    with pytest.raises(InputError, match="2 labels, and the training 3"):
        tiny().fit(TINY.bags[:30], Y[:30], validation=(TINY.bags[30:], Y[30:, :2], range(10)))


def test_scikit_learn_takes_it():
    options = {"params": {"groups": range(40)}, "error_score": "raise"}
    for scoring in (None, "roc_auc", "average_precision", "f1_macro"):
        scores = cross_val_score(tiny(), TINY.bags, Y, cv=2, scoring=scoring, **options)
        assert np.isfinite(scores).all()
    search = GridSearchCV(
        tiny(), {"lr": [1e-3]}, cv=GroupKFold(2), scoring="roc_auc", error_score="raise"
    )
    search.fit(TINY.bags, Y, groups=range(40), validation=None)
    assert search.best_estimator_.predict(TINY.bags).shape == (40, 3)
    # scikit-learn's calibration is of one label a case.
    with pytest.raises(ValueError, match=r"1d array|bad input shape|multilabel"):
        CalibratedClassifierCV(tiny(), cv=2).fit(TINY.bags, Y, validation=None)
