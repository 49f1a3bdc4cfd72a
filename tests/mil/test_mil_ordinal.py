"""Ordinal MILClassifier: the likelihood written out, finite differences, planted grades."""

import json

import numpy as np
import pytest
import torch
from sklearn.calibration import CalibratedClassifierCV
from sklearn.metrics import cohen_kappa_score
from sklearn.model_selection import GridSearchCV, GroupKFold, cross_val_score
from support.mil_cohort import outcome_cohort
from torch import nn

from xmag.errors import InputError, ModelError, XmagWarning
from xmag.mil import AGGREGATORS, MILClassifier, MILOutput, OrderedLinear, aggregator
from xmag.mil.ordinal import OrdinalHead, ordinal_log_probabilities

SMALL = {
    "aggregator_options": {"embed_dim": 32, "attention_dim": 16}, "batch_size": 16, "epochs": 40,
    "lr": 3e-3, "random_state": 0, "device": "cpu",
}  # fmt: skip
TINY = outcome_cohort(40, seed=3, dim=4, tiles=5, planted=0.2)
GRADES = TINY.grade


def model(**options: object) -> MILClassifier:
    return MILClassifier(**{**SMALL, "ordinal": True, **options})  # type: ignore[arg-type]


def tiny(**options: object) -> MILClassifier:
    small = {"embed_dim": 4, "attention_dim": 2}
    return model(**{"epochs": 2, "aggregator_options": small, **options})


def falling(seed: int, n: int = 20, thresholds: int = 3) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    steps = rng.exponential(1, size=(n, thresholds))
    steps[:, 0] = 3 * rng.normal(size=n)
    return torch.from_numpy(steps[:, :1] * 2 - np.cumsum(steps, axis=1)).requires_grad_()


@pytest.mark.parametrize("seed", range(3))
def test_probabilities_are_differences_of_cumulative_ones(seed):
    logits = falling(seed)
    above = 1 / (1 + np.exp(-logits.detach().numpy()))
    ends = np.ones((len(above), 1))
    expected = np.hstack([ends, above]) - np.hstack([above, 0 * ends])
    head = OrdinalHead(classes=[0, 1, 2, 3], prior=np.full(4, 0.25))
    found = np.exp(head.log_probabilities(logits.detach().numpy()))
    np.testing.assert_allclose(found, expected, atol=1e-12)
    labels = np.random.default_rng(seed).integers(0, 4, 20)
    losses = head.objective(labels, torch.device("cpu"))(logits, range(20))
    written_out = -np.log(expected[np.arange(20), labels])
    np.testing.assert_allclose(losses.detach(), written_out, atol=1e-9)


def test_several_slides_have_the_mean_of_their_probabilities():
    logits = falling(5).detach().numpy()
    head = OrdinalHead(classes=[0, 1, 2, 3], prior=np.full(4, 0.25))
    expected = np.exp(head.log_probabilities(logits)).mean(axis=0)
    found = np.exp(head.log_probabilities(head.fuse(logits)[None]))[0]
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_a_temperature_divides_log_probabilities_and_changes_no_decision(temperature):
    logits = falling(6).detach().numpy()
    head = OrdinalHead(classes=[0, 1, 2, 3], prior=np.full(4, 0.25))
    logs = head.log_probabilities(logits)
    expected = np.exp(logs / temperature)
    expected /= expected.sum(axis=1, keepdims=True)
    found = np.exp(head.log_probabilities(head.tempered(logits, temperature)))
    np.testing.assert_allclose(found, expected, atol=1e-9)
    np.testing.assert_array_equal(found.argmax(axis=1), logs.argmax(axis=1))


def test_the_gradient_is_a_finite_difference():
    labels = torch.from_numpy(np.random.default_rng(0).integers(0, 4, 20))
    logits = falling(7)
    assert torch.autograd.gradcheck(
        lambda x: nn.functional.nll_loss(ordinal_log_probabilities(x), labels), logits
    )
    layer = OrderedLinear(5, 3).double()
    pooled = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(
        lambda x, *_: ordinal_log_probabilities(layer(x)).sum(),
        (pooled.requires_grad_(), *layer.parameters()),
    )


def test_far_logits_have_finite_losses():
    logits = torch.tensor([[900.0, 899.0], [-899.0, -900.0], [1.0, 1.0]])
    logs = ordinal_log_probabilities(logits)
    assert torch.isfinite(logs).all()
    assert logs[0, 0] == pytest.approx(-900)


def test_one_threshold_is_logistic_regression():
    logits = torch.linspace(-3, 3, 7)[:, None]
    found = ordinal_log_probabilities(logits)
    np.testing.assert_allclose(found[:, 1], nn.functional.logsigmoid(logits[:, 0]), atol=1e-6)


def test_the_last_layer_begins_with_classes_of_one_size_and_falls():
    layer = OrderedLinear(3, 3)
    nn.init.zeros_(layer.score.weight)
    probabilities = ordinal_log_probabilities(layer(torch.zeros(1, 3))).exp()
    np.testing.assert_allclose(probabilities.detach(), [[0.25] * 4], atol=1e-6)
    nn.init.normal_(layer.log_steps, std=5)
    assert (layer(torch.randn(9, 3)).diff(dim=1) < 0).all()


def test_planted_grades_are_found():
    train, test = outcome_cohort(300, seed=0), outcome_cohort(600, seed=1)
    fitted = model().fit(train.bags, train.grade, groups=range(300))
    kappa = cohen_kappa_score(test.grade, fitted.predict(test.bags), weights="quadratic")
    of_the_truth = cohen_kappa_score(
        test.grade, np.digitize(2 * test.drive, [-2, 0, 2]), weights="quadratic"
    )
    assert 0.55 <= kappa <= of_the_truth + 0.02
    names = {"validation_loss", "validation_quadratic_kappa", "validation_balanced_accuracy"}
    assert names < set(fitted.history_[-1])
    assert fitted.history_[-1]["validation_quadratic_kappa"] > 0.3


@pytest.mark.parametrize("name", AGGREGATORS)
def test_every_aggregator_is_trained_and_comes_back(name, tmp_path):
    options = {
        "abmil": {"embed_dim": 4, "attention_dim": 2},
        "transmil": {"embed_dim": 4, "heads": 2, "landmarks": 4},
        "clam_sb": {"embed_dim": 4, "attention_dim": 2, "k_sample": 2},
    }.get(name, {"embed_dim": 4})
    fitted = tiny(aggregator=name, aggregator_options=options)
    fitted.fit(TINY.bags, GRADES, groups=range(40)).save(tmp_path)
    assert isinstance(fitted.aggregator_.head, OrderedLinear)
    again = MILClassifier.load(tmp_path, device="cpu")
    found = again.predict_proba(TINY.bags)
    np.testing.assert_array_equal(found, fitted.predict_proba(TINY.bags))
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-12)
    assert again.ordinal is True
    assert again.classes_.tolist() == [0, 1, 2, 3]
    assert json.loads((tmp_path / "classifier.json").read_text())["head"] == "ordinal"
    again.save(tmp_path / "again")
    for file in ("classifier.json", "classifier.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / file).read_bytes()


def test_text_has_the_order_that_is_given(tmp_path):
    order = ["low", "middle", "high"]
    y = [order[min(grade, 2)] for grade in GRADES]
    fitted = tiny(ordinal=order, class_weight={"high": 2.0}).fit(TINY.bags, y, validation=None)
    assert fitted.classes_.tolist() == order
    assert set(fitted.predict(TINY.bags)) <= set(order)
    fitted.save(tmp_path)
    again = MILClassifier.load(tmp_path, device="cpu")
    assert again.ordinal == order
    assert again.class_weight == {"high": 2.0}
    assert again.score(TINY.bags, y) == fitted.score(TINY.bags, y)
    with pytest.raises(InputError, match=r"order is not known.*ordinal="):
        tiny().fit(TINY.bags, y, validation=None)
    with pytest.raises(InputError, match="'high'; expected one of the classes"):
        tiny(ordinal=["low", "middle"]).fit(TINY.bags, y, validation=None)
    with pytest.raises(InputError, match="expected each class once"):
        tiny(ordinal=["low", "low", "high"]).fit(TINY.bags, y, validation=None)
    with pytest.raises(InputError, match="no bag of the class 'highest'"):
        tiny(ordinal=[*order, "highest"]).fit(TINY.bags, y, validation=None)
    with pytest.raises(InputError, match="ordinal is 'low'"):
        tiny(ordinal="low").fit(TINY.bags, y, validation=None)


def test_numbers_have_their_order_whatever_their_types():
    fitted = tiny().fit(
        TINY.bags, [float(g) if g == 2 else int(g) for g in GRADES], validation=None
    )
    assert fitted.classes_.tolist() == [0, 1, 2, 3]


def test_a_bag_without_tiles_has_the_frequencies_of_the_training():
    fitted = tiny().fit(TINY.bags, GRADES, validation=None)
    with pytest.warns(XmagWarning, match="no tiles"):
        found = fitted.predict_proba([np.zeros((0, 4))])
    np.testing.assert_allclose(found[0], np.bincount(GRADES) / 40)


class Own(nn.Module):
    batched = True

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.last = last

    def forward(self, features, mask, labels=None):
        pooled = (features * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        return MILOutput(logits=self.last(pooled), attention=None)


def test_a_module_of_ones_own_ends_in_ordered_logits():
    fitted = tiny(aggregator=Own(OrderedLinear(4, 3)), aggregator_options=None)
    fitted.fit(TINY.bags, GRADES, validation=None)
    assert fitted.predict_proba(TINY.bags).shape == (40, 4)
    unordered = nn.Linear(4, 3)
    nn.init.constant_(unordered.bias, 0)
    with pytest.raises(ModelError, match=r"have to fall.*OrderedLinear"):
        tiny(aggregator=Own(unordered), aggregator_options=None).fit(
            TINY.bags, GRADES, validation=None
        )
    made = MILClassifier.from_module(
        Own(OrderedLinear(4, 3)), classes=[0, 1, 2, 3], in_dim=4, device="cpu", ordinal=True
    )
    np.testing.assert_allclose(made.predict_proba(TINY.bags).sum(axis=1), 1)
    unordered = aggregator("mean", in_dim=4, classes=3)  # could be saved, and not loaded
    with pytest.raises(InputError, match="ends in a Linear; expected OrderedLinear"):
        MILClassifier.from_module(unordered, classes=[0, 1, 2, 3], in_dim=4, ordinal=True)


def test_scikit_learn_takes_it():
    scores = cross_val_score(
        tiny(), TINY.bags, GRADES, cv=2, params={"groups": range(40)}, error_score="raise"
    )
    assert scores.shape == (2,)
    search = GridSearchCV(
        tiny(), {"ordinal": [True, False]}, cv=GroupKFold(2), error_score="raise"
    ).fit(TINY.bags, GRADES, groups=range(40), validation=None)
    assert search.best_params_["ordinal"] in (True, False)
    calibrated = CalibratedClassifierCV(tiny(), cv=2, method="sigmoid")
    calibrated.fit(TINY.bags, GRADES, validation=None)
    np.testing.assert_allclose(calibrated.predict_proba(TINY.bags).sum(axis=1), 1)
