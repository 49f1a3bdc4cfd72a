"""MILSurvival: losses written out, finite differences, a planted hazard, scikit-survival."""

import itertools

import numpy as np
import pandas as pd
import pytest
import sklearn
import torch
from lifelines import CoxPHFitter
from sklearn.base import clone
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, GroupKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sksurv.linear_model.coxph import BreslowEstimator
from sksurv.metrics import (
    as_concordance_index_ipcw_scorer,
    as_cumulative_dynamic_auc_scorer,
    as_integrated_brier_score_scorer,
    concordance_index_censored,
    concordance_index_ipcw,
    cumulative_dynamic_auc,
    integrated_brier_score,
)
from sksurv.nonparametric import kaplan_meier_estimator
from sksurv.util import Surv
from support.mil_cohort import outcome_cohort

from xmag.errors import BagError, InputError, ModelError, XmagWarning
from xmag.mil import MILSurvival
from xmag.mil.survival import (
    CoxObjective,
    DiscreteHead,
    SurvivalHead,
    cox_loss,
    discrete_losses,
    interval_of,
)
from xmag.mil.trainer import BagTrainer

CPU = torch.device("cpu")


def _times(seed: int, n: int, *, ties: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    time = rng.integers(1, 6, n).astype(float) if ties else rng.exponential(3, n)
    event = rng.random(n) < 0.6
    event[0] = True
    risk = torch.from_numpy(rng.normal(size=n)).requires_grad_()
    return risk, torch.from_numpy(event), torch.from_numpy(time)


def _written_out(risk: np.ndarray, event: np.ndarray, time: np.ndarray) -> float:
    terms = [
        np.log(sum(np.exp(risk[j]) for j in range(len(time)) if time[j] >= time[i])) - risk[i]
        for i in range(len(time))
        if event[i]
    ]
    return float(np.mean(terms))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_the_cox_loss_is_the_partial_likelihood_written_out(seed, ties):
    risk, event, time = _times(seed, 30, ties=ties)
    expected = _written_out(risk.detach().numpy(), event.numpy(), time.numpy())
    assert cox_loss(risk, event, time).item() == pytest.approx(expected, abs=1e-12)


def test_the_cox_loss_of_one_event():
    """The share of its hazard of those at risk; censored before it, a case says nothing."""
    risk = torch.tensor([0.5, -1.0, 2.0, 3.0], dtype=torch.float64)
    event = torch.tensor([False, True, False, False])
    time = torch.tensor([1.0, 2.0, 2.0, 5.0])
    expected = np.log(np.exp([-1.0, 2.0, 3.0]).sum()) + 1
    assert cox_loss(risk, event, time).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.filterwarnings("ignore:Starting with pandas")
def test_the_cox_loss_is_the_log_likelihood_of_lifelines():
    risk, event, time = _times(6, 50, ties=False)
    covariate = risk.detach()
    table = pd.DataFrame({"x": covariate.numpy(), "event": event.numpy(), "time": time.numpy()})
    theirs = CoxPHFitter().fit(table, "time", "event")
    ours = cox_loss(float(theirs.params_["x"]) * covariate, event, time)
    assert -ours.item() * int(event.sum()) == pytest.approx(theirs.log_likelihood_, abs=1e-6)


@pytest.mark.parametrize("ties", [False, True])
def test_the_gradient_of_the_cox_loss_is_a_finite_difference(ties):
    risk, event, time = _times(3, 12, ties=ties)
    assert torch.autograd.gradcheck(lambda r: cox_loss(r, event, time), risk)


@pytest.mark.parametrize("parts", [1, 3])
def test_bags_of_a_batch_have_the_gradient_of_the_whole_cohort(parts):
    """Also in parts, and also where most of the cohort is not in the batch."""
    risk, event, time = _times(4, 24, ties=True)
    (expected,) = torch.autograd.grad(cox_loss(risk, event, time), risk)
    objective = CoxObjective(event, time)
    objective(risk.detach()[:, None], range(24))  # all have had a step
    live = risk.detach().clone().requires_grad_()
    for rows in np.array_split(np.arange(8), parts):
        objective(live[rows, None], rows.tolist()).sum().backward()
    np.testing.assert_allclose(live.grad[:8] / 24, expected[:8], atol=1e-12)
    assert not live.grad[8:].any()


def test_the_loss_of_a_bag_is_that_of_the_cohort():
    risk, event, time = _times(5, 10, ties=False)
    objective = CoxObjective(event, time)
    found = objective(risk[:, None], range(10))
    np.testing.assert_allclose(found.detach(), cox_loss(risk, event, time).item(), atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_the_discrete_loss_is_the_likelihood_written_out(seed):
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(size=(20, 5))).requires_grad_()
    interval, event = rng.integers(0, 5, 20), rng.random(20) < 0.5
    hazards = 1 / (1 + np.exp(-logits.detach().numpy()))
    expected = []
    for row, k, died in zip(hazards, interval, event, strict=True):
        alive = np.prod(1 - row[:k])
        expected.append(-np.log(alive * (row[k] if died else 1 - row[k])))
    places, events = torch.from_numpy(interval), torch.from_numpy(event)
    found = discrete_losses(logits, places, events)
    np.testing.assert_allclose(found.detach(), expected, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: discrete_losses(x, places, events), logits)


def test_intervals_hold_as_many_events_each():
    y = Surv.from_arrays(event=np.arange(40) % 2 == 0, time=np.linspace(1, 80, 40))
    labels = SurvivalHead.read(y, 40, "y")
    head = DiscreteHead.of(labels, intervals=4)
    _model(loss="nll", intervals=np.int64(3))._require_params()
    counts = np.bincount(interval_of(y["time"][y["event"]], head.edges), minlength=4)
    np.testing.assert_array_equal(counts, 5)
    assert interval_of(np.array([0, 1e9]), head.edges).tolist() == [0, 3]


def _model(**options: object) -> MILSurvival:
    defaults = {
        "aggregator_options": {"embed_dim": 32, "attention_dim": 16}, "batch_size": 16,
        "epochs": 40, "lr": 3e-3, "random_state": 0, "device": "cpu", "progress": False,
    }  # fmt: skip
    return MILSurvival(**(defaults | options))


@pytest.fixture(scope="module")
def train():
    return outcome_cohort(300, seed=0)


@pytest.fixture(scope="module")
def test():
    return outcome_cohort(400, seed=1)


@pytest.fixture(scope="module")
def cohort(train):
    """100 bags, for what needs no good model."""
    return train.bags[:100], train.survival[:100]


@pytest.fixture(scope="module")
def fitted(train):
    return _model().fit(train.bags, train.survival, groups=range(300))


def test_a_planted_hazard_is_found(fitted, train, test):
    y = test.survival
    of_the_truth = concordance_index_censored(y["event"], y["time"], test.drive)[0]
    assert 0.75 <= fitted.score(test.bags, y) <= of_the_truth + 0.01
    ranked = [
        roc_auc_score(planted, fitted.attention(bag).scores)
        for bag, planted in zip(test.bags[:50], test.planted, strict=False)
    ]
    assert np.mean(ranked) > 0.9
    discrete = _model(loss="nll").fit(train.bags, train.survival, groups=range(300))
    assert 0.75 <= discrete.score(test.bags, y) <= of_the_truth + 0.01


def test_shuffled_times_are_learned_by_heart_and_say_nothing_of_others(train, test):
    """Two shuffles of 400 cases: a standard error of 0.013, and four of those."""
    found = []
    for seed in range(2):
        rng = np.random.default_rng(seed)
        y, others = rng.permutation(train.survival[:80]), rng.permutation(test.survival)
        model = _model(random_state=seed, epochs=60, batch_size=8).fit(
            train.bags[:80], y, validation=None
        )
        assert model.score(train.bags[:80], y) > 0.75
        found.append(model.score(test.bags, others))
    assert abs(np.mean(found) - 0.5) < 0.05


def test_score_is_harrells_c_of_the_risks(fitted, test):
    y, risk = test.survival, fitted.predict(test.bags)
    expected = concordance_index_censored(y["event"], y["time"], risk)[0]
    assert fitted.score(test.bags, y) == pytest.approx(expected, abs=1e-12)
    weights = np.random.default_rng(0).integers(0, 3, len(y))
    again = np.repeat(np.arange(len(y)), weights)
    expected = concordance_index_censored(y["event"][again], y["time"][again], risk[again])[0]
    found = fitted.score(test.bags, y, sample_weight=weights)
    # Copies of a case are tied with each other, and are no pair with themselves.
    assert found == pytest.approx(expected, abs=2e-3)


def test_survival_functions_are_breslows(cohort):
    bags, y = cohort
    model = _model(epochs=2).fit(bags[:60], y[:60], validation=None)
    risk = model.predict(bags[:60])
    assert risk.mean() == pytest.approx(0, abs=1e-9)
    theirs = BreslowEstimator().fit(risk, y["event"][:60], y["time"][:60])
    for ours, other in zip(
        model.predict_survival_function(bags[60:65]),
        theirs.get_survival_function(model.predict(bags[60:65])),
        strict=True,
    ):
        np.testing.assert_allclose(ours(other.x), other.y, rtol=1e-6)


def test_a_bag_without_tiles_has_the_risk_of_the_mean(fitted, train):
    with pytest.warns(XmagWarning, match="no tiles"):
        assert fitted.predict([np.zeros((0, 16))]).tolist() == [0]
    y = train.survival
    discrete = _model(loss="nll", epochs=1).fit(train.bags[:100], y[:100], groups=range(100))
    with pytest.warns(XmagWarning, match="no tiles"):
        (function,) = discrete.predict_survival_function([np.zeros((0, 16))])
    # All cases together: Kaplan-Meier, but for those censored within an interval.
    times, shares = kaplan_meier_estimator(y["event"][:100], y["time"][:100])
    expected = shares[np.searchsorted(times, function.x[:-1], side="right") - 1]
    np.testing.assert_allclose(function.y[:-1], expected, atol=0.08)


@pytest.mark.parametrize("loss", ["cox", "nll"])
def test_higher_risk_is_lower_survival(cohort, loss):
    bags, y = cohort
    model = _model(loss=loss, epochs=2).fit(bags[:80], y[:80], groups=range(80))
    functions = model.predict_survival_function(bags[80:])
    for one in functions:
        assert one(0) <= 1
        assert (np.diff(one.y) <= 1e-12).all()
    if loss == "cox":
        middle = functions[0].x[len(functions[0].x) // 2]
        shares = [float(one(middle)) for one in functions]
        assert np.array_equal(np.argsort(model.predict(bags[80:])), np.argsort(shares)[::-1])
    with pytest.raises(InputError, match="which the training knows of"):
        functions[0](functions[0].domain[1] * 2)


def test_several_slides_have_the_mean_of_their_predictions(cohort):
    bags, y = cohort
    logits = 2 * np.random.default_rng(0).normal(size=(5, 4))
    head = DiscreteHead.of(SurvivalHead.read(y, 100, "y"), intervals=4)
    expected = head.survived(logits).mean(axis=0)
    np.testing.assert_allclose(head.survived(head.fuse(logits)[None])[0], expected, atol=1e-12)
    cox = _model(epochs=1).fit(bags[:40], y[:40], validation=None)._head
    expected = cox.predictions(logits[:, :1]).mean()
    assert cox.predictions(cox.fuse(logits[:, :1])[None])[0] == pytest.approx(expected)


def test_a_file_that_vanishes_in_training_loses_nothing(cohort, tmp_path, monkeypatch):
    """Not the baseline either, though its risks cannot be computed again."""
    bags, y = cohort
    paths = [tmp_path / f"{index}.pt" for index in range(40)]
    for path, features in zip(paths, bags, strict=False):
        torch.save(torch.from_numpy(features), path)

    def gone(self, epoch):
        if epoch == 2:
            paths[3].unlink()
        return steps(self, epoch)

    steps = BagTrainer.steps
    monkeypatch.setattr(BagTrainer, "steps", gone)
    model = _model()
    with pytest.raises(BagError, match=r"3\.pt.*there is no file") as stop:
        model.fit(paths, y[:40], validation=None)
    assert "keeps the weights of epoch 2" in stop.value.__notes__[0]
    model.save(tmp_path / "model")
    again = MILSurvival.load(tmp_path / "model", device="cpu")
    kaplan_meier = kaplan_meier_estimator(y["event"][:40], y["time"][:40])[1]
    for function in again.predict_survival_function(bags[:5]):
        np.testing.assert_allclose(function.y, kaplan_meier, atol=0.2)


@pytest.mark.parametrize("loss", ["cox", "nll"])
def test_a_saved_model_is_the_same(cohort, tmp_path, loss):
    bags, y = cohort
    model = _model(loss=loss, epochs=2).fit(bags[:60], y[:60], groups=range(60))
    model.save(tmp_path / "model")
    again = MILSurvival.load(tmp_path / "model", device="cpu")
    np.testing.assert_array_equal(model.predict(bags[60:70]), again.predict(bags[60:70]))
    for one, other in zip(
        model.predict_survival_function(bags[60:63]),
        again.predict_survival_function(bags[60:63]),
        strict=True,
    ):
        np.testing.assert_array_equal(one.x, other.x)
        np.testing.assert_allclose(one.y, other.y)
    assert again.get_params() == {**model.get_params(), "aggregator_options": {
        **(again.aggregator_options or {})}, "progress": again.progress}  # fmt: skip
    text = (tmp_path / "model" / "survival.json").read_text()
    (tmp_path / "model" / "survival.json").write_text(text.replace('"in_dim": 16', '"in_dim": "x"'))
    with pytest.raises(ModelError):
        MILSurvival.load(tmp_path / "model")


def test_scikit_learn_takes_it(cohort):
    bags, y = cohort
    bags, y = bags[:60], y[:60]
    model = _model(epochs=2)
    assert clone(model).get_params() == model.get_params()
    scores = cross_val_score(model, bags, y, cv=3, params={"groups": range(60)})
    assert ((scores >= 0) & (scores <= 1)).all()
    search = GridSearchCV(model, {"lr": [1e-3, 1e-4]}, cv=GroupKFold(2))
    assert search.fit(bags, y, groups=range(60), validation=None).best_params_["lr"] in (1e-3, 1e-4)
    scorer = as_concordance_index_ipcw_scorer(model)
    search = GridSearchCV(scorer, {"estimator__lr": [1e-3]}, cv=GroupKFold(2), error_score="raise")
    search.fit(bags, y, groups=range(60), validation=None)
    assert 0 <= search.best_score_ <= 1
    with sklearn.config_context(enable_metadata_routing=True):
        pipeline = make_pipeline(
            FunctionTransformer(lambda bags: [2 * x for x in bags]),
            _model(epochs=2).set_fit_request(groups=True).set_score_request(sample_weight=True),
        )
        routed = {"groups": np.arange(60), "sample_weight": np.ones(60)}
        found = cross_val_score(
            pipeline, bags, y, cv=GroupKFold(3), params=routed, error_score="raise"
        )
    assert np.isfinite(found).all()


@pytest.mark.parametrize("loss", ["cox", "nll"])
def test_the_scorers_of_scikit_survival_take_it(train, test, loss):
    """Their value is that of their own metric on what the model predicts."""
    bags, y = train.bags[:100], train.survival[:100]
    seen = test.survival[:200]
    times = np.quantile(y["time"][y["event"]], [0.3, 0.5, 0.6])
    model = _model(epochs=2, loss=loss)
    options = {"groups": range(100)}
    scorer = as_concordance_index_ipcw_scorer(model, tau=times[-1]).fit(bags, y, **options)
    risk = scorer.estimator_.predict(test.bags[:200])
    expected = concordance_index_ipcw(y, seen, risk, tau=times[-1])[0]
    assert scorer.score(test.bags[:200], seen) == pytest.approx(expected)
    dynamic = as_cumulative_dynamic_auc_scorer(model, times=times).fit(bags, y, **options)
    expected = cumulative_dynamic_auc(y, seen, risk, times)[1]
    assert dynamic.score(test.bags[:200], seen) == pytest.approx(expected)
    brier = as_integrated_brier_score_scorer(model, times=times).fit(bags, y, **options)
    functions = brier.estimator_.predict_survival_function(test.bags[:200])
    shares = np.array([function(times) for function in functions])
    expected = -integrated_brier_score(y, seen, shares, times)
    assert brier.score(test.bags[:200], seen) == pytest.approx(expected)


def test_the_order_of_events_does_not_change_with_units_of_time(cohort):
    bags, y = cohort
    days = y.copy()
    days["time"] = y["time"] * 365.25
    one, other = (
        _model(epochs=2).fit(bags[:60], times[:60], groups=range(60)).predict(bags[60:70])
        for times in (y, days)
    )
    np.testing.assert_allclose(one, other, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"loss": "hazard"}, '"cox" or "nll"'),
        ({"intervals": 1}, "an int from 2 on"),
    ],
)
def test_options_that_make_no_sense_are_refused(cohort, change, words):
    bags, y = cohort
    with pytest.raises(InputError, match=words):
        _model(**change).fit(bags[:20], y[:20], groups=range(20))


def test_targets_that_make_no_sense_are_refused(cohort):
    bags, y = cohort
    nobody = y[:20].copy()
    nobody["event"] = False
    for loss in ("cox", "nll"):
        with pytest.raises(InputError, match="0 events among 20 bags"):
            _model(loss=loss).fit(bags[:20], nobody, groups=range(20))
    nobody["event"][0] = True
    with pytest.raises(InputError, match="1 event among 20 bags"):
        _model().fit(bags[:20], nobody, groups=range(20))
    nobody["event"] = False
    with pytest.raises(InputError, match="19 entries for 20 cases"):
        _model().fit(bags[:20], y[:19], groups=range(20))
    swapped = np.column_stack([y["time"], y["event"]])[:20]
    with pytest.raises(InputError, match="first column is the event"):
        _model().fit(bags[:20], swapped, groups=range(20))
    untrained = _model()
    with pytest.raises(InputError, match="to validate with has an event"):
        untrained.fit(
            bags[:20], y[:20], groups=range(20), validation=(bags[20:24], nobody[:4], range(20, 24))
        )
    assert not hasattr(untrained, "history_")


def test_one_event_after_another_is_all_that_counts():
    """The risk set of an event are those still observed: all orders of four cases, written out."""
    for order in itertools.permutations(range(4)):
        risk = torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64)
        time = torch.tensor(order, dtype=torch.float64)
        event = torch.tensor([True, False, True, True])
        expected = _written_out(risk.numpy(), event.numpy(), time.numpy())
        assert cox_loss(risk, event, time).item() == pytest.approx(expected, abs=1e-12)
