"""MILRegressor: the loss with missing values written out, a planted number, scikit-learn."""

import json

import numpy as np
import pytest
import sklearn
import torch
from sklearn.base import clone, is_regressor
from sklearn.metrics import r2_score
from sklearn.model_selection import GridSearchCV, GroupKFold, cross_val_predict, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from support.mil_cohort import outcome_cohort

from xmag.errors import InputError, ModelError, XmagWarning
from xmag.metrics.survival import harrell_c
from xmag.mil import MILRegressor
from xmag.mil.regressor import RegressionHead, squared_errors
from xmag.training.splits import held_out

CPU = torch.device("cpu")
TINY = outcome_cohort(40, seed=3, dim=4, tiles=5, planted=0.2)
SEVERAL = np.stack([TINY.number, TINY.drive * 1e6], axis=1)
LEARNING = {
    "aggregator_options": {"embed_dim": 32, "attention_dim": 16}, "batch_size": 16, "epochs": 40,
    "lr": 3e-3, "random_state": 0, "device": "cpu",
}  # fmt: skip


def tiny(**options: object) -> MILRegressor:
    small = {"epochs": 2, "aggregator_options": {"embed_dim": 4, "attention_dim": 2}}
    return MILRegressor(**{**LEARNING, **small, **options})  # type: ignore[arg-type]


def missing(y: np.ndarray, seed: int = 0) -> np.ndarray:
    return np.where(np.random.default_rng(seed).random(y.shape) < 0.3, np.nan, y)


def test_the_loss_is_the_squared_error_of_known_targets_written_out():
    y = missing(SEVERAL)
    y[0] = np.nan
    head = RegressionHead.of(y)
    np.testing.assert_allclose(head.mean, np.nanmean(y, axis=0))
    np.testing.assert_allclose(head.scale, np.nanstd(y, axis=0))
    targets = head.encode(y, "y").astype(np.float64)
    logits = torch.from_numpy(np.random.default_rng(1).normal(size=(40, 2))).requires_grad_()
    expected = []
    for row, known in zip(logits.detach().numpy(), targets, strict=True):
        errors = [(a - b) ** 2 for a, b in zip(row, known, strict=True) if not np.isnan(b)]
        expected.append(np.mean(errors) if errors else 0.0)
    losses = head.objective(targets, CPU)(logits, range(40))
    np.testing.assert_allclose(losses.detach(), expected, atol=1e-9)
    known = torch.from_numpy(targets)
    assert torch.autograd.gradcheck(lambda x: squared_errors(x, known), logits)


def test_a_planted_number_is_found():
    train, test = outcome_cohort(300, seed=0), outcome_cohort(400, seed=1)
    fitted = MILRegressor(**LEARNING).fit(train.bags, train.number, groups=range(300))
    of_the_truth = r2_score(test.number, 100 + 20 * test.drive)
    assert 0.6 <= fitted.score(test.bags, test.number) <= of_the_truth + 0.01
    assert fitted.history_[-1]["validation_r2"] > 0.5
    several = np.stack([missing(train.number), missing(train.drive * 1e6, seed=1)], axis=1)
    both = MILRegressor(**LEARNING | {"epochs": 25}).fit(train.bags, several, groups=range(300))
    found = both.predict(test.bags)
    assert r2_score(test.number, found[:, 0]) > 0.5
    assert r2_score(test.drive * 1e6, found[:, 1]) > 0.6


def test_shuffled_numbers_are_learned_by_heart_and_say_nothing_of_others():
    """Two shuffles of 400 cases: a standard error of 0.012, and four of those."""
    train, test, found = outcome_cohort(60, seed=2, tiles=50), outcome_cohort(400, seed=3), []
    events = np.ones(400)
    for seed in range(2):
        rng = np.random.default_rng(seed)
        y, others = rng.permutation(train.number), rng.permutation(test.number)
        model = MILRegressor(**{**LEARNING, "random_state": seed, "epochs": 60, "batch_size": 8})
        model.fit(train.bags, y, validation=None)
        assert model.score(train.bags, y) > 0.3
        assert model.score(test.bags, others) < 0.05
        found.append(harrell_c(np.stack([events, others], axis=1), -model.predict(test.bags)))
    assert abs(np.mean(found) - 0.5) < 0.05


def test_a_score_is_scikit_learns_r2_of_what_is_known():
    y = missing(SEVERAL)
    fitted = tiny().fit(TINY.bags, y, groups=range(40))
    predicted, weights = fitted.predict(TINY.bags), np.arange(40.0) + 1
    known = ~np.isnan(y)
    for given in (None, weights):
        each = [
            r2_score(y[k, t], predicted[k, t], sample_weight=None if given is None else given[k])
            for t, k in enumerate(known.T)
        ]
        assert fitted.score(TINY.bags, y, sample_weight=given) == pytest.approx(np.mean(each))


@pytest.mark.parametrize("y", [TINY.number, TINY.number[:, None], SEVERAL])
def test_a_saved_model_is_the_same(tmp_path, y):
    fitted = tiny().fit(TINY.bags, y, groups=range(40))
    assert fitted.predict(TINY.bags).shape == y.shape
    assert fitted.predict(TINY.bags).dtype == np.float64
    fitted.save(tmp_path)
    again = MILRegressor.load(tmp_path, device="cpu")
    np.testing.assert_array_equal(again.predict(TINY.bags), fitted.predict(TINY.bags))
    assert again.history_ == fitted.history_
    file = tmp_path / "regressor.json"
    values = json.loads(file.read_text())
    for change in ({"scale": [0.0] * len(values["scale"])}, {"mean": []}, {"flat": 1}):
        file.write_text(json.dumps({**values, **change}))
        with pytest.raises(ModelError, match=r"is not what MILRegressor\.save wrote"):
            MILRegressor.load(tmp_path)


def test_a_bag_without_tiles_has_the_mean_of_the_training():
    fitted = tiny().fit(TINY.bags, SEVERAL, validation=None)
    with pytest.warns(XmagWarning, match="no tiles"):
        found = fitted.predict([np.zeros((0, 4))])
    np.testing.assert_allclose(found[0], SEVERAL.mean(axis=0))


@pytest.mark.parametrize(
    ("y", "words"),
    [
        (["a"] * 40, "no numbers.*MILClassifier"),
        (TINY.number[:39], r"shape \(39,\) for 40 cases"),
        (np.full(40, np.nan), "0 different known values"),
        (np.full(40, 3.0), "1 different known values"),
        (np.where(TINY.drive > 0, np.inf, 0), "infinite"),
        (np.zeros((40, 0)), "shape"),
    ],
)
def test_targets_that_make_no_sense_are_refused(y, words):
    with pytest.raises(InputError, match=words):
        tiny().fit(TINY.bags, y, validation=None)


def test_validation_is_by_what_is_known_alone():
    y = np.full(40, np.nan)
    y[:12] = TINY.number[:12]
    check = (TINY.bags[30:], np.where(np.arange(10) < 5, TINY.number[30:], np.nan), range(30, 40))
    found = tiny().fit(TINY.bags[:30], y[:30], groups=range(30), validation=check)
    expected = tiny().fit(
        TINY.bags[:30], y[:30], groups=range(30), validation=tuple(part[:5] for part in check)
    )
    losses = [[epoch["validation_loss"] for epoch in one.history_] for one in (found, expected)]
    np.testing.assert_allclose(*losses)
    for seed in range(8):  # some of those with a value are held out, by chance or not
        tiny(random_state=seed).fit(TINY.bags, y, groups=range(40))
    with pytest.raises(InputError, match="none of the 10 bags to validate with has a known target"):
        tiny().fit(
            TINY.bags[:30], y[:30], groups=range(30), validation=(check[0], y[30:], check[2])
        )


def test_of_a_target_that_is_rarely_known_some_is_trained_on():
    y = SEVERAL.copy()
    y[2:, 1] = np.nan
    head = RegressionHead.of(y)
    targets = head.encode(y, "y")
    for seed in range(50):
        rng = np.random.default_rng(seed)
        held = held_out(np.arange(40), head.strata(targets), 0.5, rng)
        assert not np.isnan(targets[~held, 1]).all()


def test_scikit_learn_takes_it():
    assert is_regressor(tiny())
    assert clone(tiny(lr=0.5)).get_params() == tiny(lr=0.5).get_params()
    options = {"params": {"groups": np.arange(40)}, "error_score": "raise"}
    for y in (TINY.number, SEVERAL):
        for scoring in (None, "neg_mean_absolute_error"):
            found = cross_val_score(tiny(), TINY.bags, y, cv=2, scoring=scoring, **options)
            assert np.isfinite(found).all()
        shape = cross_val_predict(tiny(), TINY.bags, y, cv=2, params={"validation": None}).shape
        assert shape == y.shape
    search = GridSearchCV(tiny(), {"lr": [1e-3, 1e-2]}, cv=GroupKFold(2), error_score="raise")
    search.fit(TINY.bags, TINY.number, groups=range(40), validation=None)
    assert search.best_params_["lr"] in (1e-3, 1e-2)
    with sklearn.config_context(enable_metadata_routing=True):
        pipeline = make_pipeline(
            FunctionTransformer(lambda bags: [2 * x for x in bags]),
            tiny().set_fit_request(groups=True),
        )
        found = cross_val_score(pipeline, TINY.bags, TINY.number, cv=GroupKFold(2), **options)
    assert np.isfinite(found).all()
