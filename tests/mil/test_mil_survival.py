"""MILSurvival: losses written out, finite differences, a planted hazard, scikit-survival."""

import itertools

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, cross_val_score
from sksurv.linear_model.coxph import BreslowEstimator
from sksurv.metrics import (
    as_concordance_index_ipcw_scorer,
    as_integrated_brier_score_scorer,
    concordance_index_censored,
)
from sksurv.util import Surv

from xmag.errors import InputError, ModelError
from xmag.mil import MILSurvival
from xmag.mil.survival import CoxObjective, SurvivalHead, cox_loss, discrete_losses

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
    objective(risk.detach().float()[:, None], range(24))  # all have had a step
    objective._risk = objective._risk.double()
    objective._risk[:] = risk.detach()
    live = risk.detach().clone().requires_grad_()
    for rows in np.array_split(np.arange(8), parts):
        objective(live[rows, None], rows.tolist()).sum().backward()
    np.testing.assert_allclose(live.grad[:8] / 24, expected[:8], atol=1e-12)
    assert not live.grad[8:].any()


def test_the_loss_of_a_bag_is_that_of_the_cohort():
    risk, event, time = _times(5, 10, ties=False)
    objective = CoxObjective(event, time)
    found = objective(risk[:, None], range(10))
    np.testing.assert_allclose(found.detach(), cox_loss(risk, event, time).item(), rtol=1e-6)


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
    head = SurvivalHead.of(labels, loss="nll", intervals=4)
    counts = np.bincount(head.interval_of(y["time"][y["event"]]), minlength=4)
    np.testing.assert_array_equal(counts, 5)
    assert head.interval_of(np.array([0, 1e9])).tolist() == [0, 3]


def _planted(seed: int, n: int = 150) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Bags of 100 tiles, 2 of which say how large the hazard is; (bags, y, true log hazard)."""
    rng = np.random.default_rng(seed)
    bags = [rng.normal(size=(100, 16)).astype(np.float32) for _ in range(n)]
    hazard = rng.normal(size=n) * 1.5
    for bag, value in zip(bags, hazard, strict=True):
        bag[rng.choice(100, 2, replace=False), :2] = (6, 2 * value)
    time = rng.exponential(np.exp(-hazard))
    censored = rng.exponential(3, n)
    y = Surv.from_arrays(event=time <= censored, time=np.minimum(time, censored))
    return bags, y, hazard


def _model(**options: object) -> MILSurvival:
    defaults = {"epochs": 30, "lr": 1e-3, "random_state": 0, "device": "cpu", "progress": False}
    return MILSurvival(**(defaults | options))


@pytest.fixture(scope="module")
def cohort():
    return _planted(0, 240)


@pytest.fixture(scope="module")
def fitted(cohort):
    bags, y, _ = cohort
    return _model().fit(bags[:160], y[:160], groups=range(160))


@pytest.mark.parametrize("loss", ["cox", "nll"])
def test_a_planted_hazard_is_found(cohort, loss):
    bags, y, hazard = cohort
    model = _model(loss=loss).fit(bags[:160], y[:160], groups=range(160))
    found = model.score(bags[160:], y[160:])
    of_the_truth = concordance_index_censored(y["event"][160:], y["time"][160:], hazard[160:])[0]
    assert 0.75 <= found <= of_the_truth + 0.03
    assert model.history_[-1]["validation_concordance"] > 0.6


def test_score_is_harrells_c_of_the_risks(fitted, cohort):
    bags, y, _ = cohort
    risk = fitted.predict(bags[160:])
    expected = concordance_index_censored(y["event"][160:], y["time"][160:], risk)[0]
    assert fitted.score(bags[160:], y[160:]) == pytest.approx(expected)


def test_survival_functions_are_breslows(fitted, cohort):
    bags, y, _ = cohort
    train = fitted.predict(bags[:160])
    # Those that were trained on: the baseline leaves the validation set out.
    baseline = fitted._head
    assert baseline.times[-1] <= y["time"][:160].max()
    every = _model(epochs=3).fit(bags[:60], y[:60], validation=None, groups=range(60))
    risk = every.predict(bags[:60])
    theirs = BreslowEstimator().fit(risk, y["event"][:60], y["time"][:60])
    for ours, other in zip(
        every.predict_survival_function(bags[60:65]),
        theirs.get_survival_function(every.predict(bags[60:65])),
        strict=True,
    ):
        np.testing.assert_allclose(ours(other.x), other.y, rtol=1e-5)
    assert train.shape == (160,)


@pytest.mark.parametrize("loss", ["cox", "nll"])
def test_higher_risk_is_lower_survival(cohort, loss):
    bags, y, _ = cohort
    model = _model(loss=loss, epochs=5).fit(bags[:80], y[:80], groups=range(80))
    functions = model.predict_survival_function(bags[80:120])
    for one in functions:
        assert one(0) <= 1
        assert (np.diff(one.y) <= 1e-12).all()
    if loss == "cox":
        middle = functions[0].x[len(functions[0].x) // 2]
        shares = [float(one(middle)) for one in functions]
        assert np.array_equal(np.argsort(model.predict(bags[80:120])), np.argsort(shares)[::-1])
    with pytest.raises(InputError, match="which the training knows of"):
        functions[0](functions[0].domain[1] * 2)


@pytest.mark.parametrize("loss", ["cox", "nll"])
def test_a_saved_model_is_the_same(cohort, tmp_path, loss):
    bags, y, _ = cohort
    model = _model(loss=loss, epochs=3).fit(bags[:60], y[:60], groups=range(60))
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


def test_scikit_learn_and_scikit_survival_take_it(cohort):
    bags, y, _ = cohort
    bags, y = bags[:60], y[:60]
    model = _model(epochs=2)
    assert clone(model).get_params() == model.get_params()
    scores = cross_val_score(model, bags, y, cv=3, params={"groups": range(60)})
    assert ((scores >= 0) & (scores <= 1)).all()
    search = GridSearchCV(model, {"lr": [1e-3, 1e-4]}, cv=2).fit(bags, y, groups=range(60))
    assert search.best_params_["lr"] in (1e-3, 1e-4)
    times = np.quantile(y["time"][y["event"]], [0.3, 0.5, 0.6])
    for scorer in (
        as_concordance_index_ipcw_scorer(model, tau=times[-1]),
        as_integrated_brier_score_scorer(model, times=times),
    ):
        scorer.fit(bags, y, groups=range(60))
        assert np.isfinite(scorer.score(bags, y))


def test_the_order_of_events_does_not_change_with_units_of_time(cohort):
    bags, y, _ = cohort
    days = y.copy()
    days["time"] = y["time"] * 365.25
    one, other = (
        _model(epochs=3).fit(bags[:60], times[:60], groups=range(60)).predict(bags[60:70])
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
    bags, y, _ = cohort
    with pytest.raises(InputError, match=words):
        _model(**change).fit(bags[:20], y[:20], groups=range(20))


def test_targets_that_make_no_sense_are_refused(cohort):
    bags, y, _ = cohort
    nobody = y[:20].copy()
    nobody["event"] = False
    with pytest.raises(InputError, match="0 events among 20 bags"):
        _model().fit(bags[:20], nobody, groups=range(20))
    with pytest.raises(InputError, match="19 values for 20 bags"):
        _model().fit(bags[:20], y[:19], groups=range(20))
    swapped = np.column_stack([y["time"], y["event"]])[:20]
    with pytest.raises(InputError, match="first column is the event"):
        _model().fit(bags[:20], swapped, groups=range(20))
    with pytest.raises(InputError, match="to validate with has an event"):
        _model(epochs=1).fit(
            bags[:20], y[:20], groups=range(20), validation=(bags[20:24], nobody[:4], range(20, 24))
        )


def test_one_event_after_another_is_all_that_counts():
    """The risk set of an event are those still observed: all orders of four cases, written out."""
    for order in itertools.permutations(range(4)):
        risk = torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64)
        time = torch.tensor(order, dtype=torch.float64)
        event = torch.tensor([True, False, True, True])
        expected = _written_out(risk.numpy(), event.numpy(), time.numpy())
        assert cox_loss(risk, event, time).item() == pytest.approx(expected, abs=1e-12)
