"""The training: what it learns, what it repeats, what it leaves alone, and how it ends early."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, log_loss, roc_auc_score
from support.mil_cohort import planted_cohort
from support.models import default_dtype
from torch import nn

from xmag.errors import BagError, InputError, ModelError, XmagWarning
from xmag.mil import MILClassifier, MILOutput
from xmag.mil.batches import BagSampler, groups_of_like_size
from xmag.mil.heads import ClassHead

TINY = {"embed_dim": 8, "attention_dim": 4}


def tiny(**params: object) -> MILClassifier:
    defaults = {"aggregator_options": TINY, "epochs": 3, "random_state": 0, "device": "cpu"}
    return MILClassifier(**{**defaults, **params})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def cohort():
    return planted_cohort(24, tiles=20, dim=6)


def weights(classifier: MILClassifier) -> dict[str, torch.Tensor]:
    return classifier.aggregator_.state_dict()


def same(a: MILClassifier, b: MILClassifier) -> bool:
    return all(torch.equal(v, weights(b)[k]) for k, v in weights(a).items())


class Probe(nn.Module):
    """A mean of tiles that calls `hook(training step)` first: to see, and to go wrong on time."""

    batched = True

    def __init__(self, hook: Callable[..., None], dim: int = 6, classes: int = 2) -> None:
        super().__init__()
        self.head = nn.Linear(dim, classes)
        self.hook, self.steps = hook, 0

    def __deepcopy__(self, memo: dict) -> "Probe":
        other = Probe(self.hook, self.head.in_features, self.head.out_features)
        other.load_state_dict(self.state_dict())
        return other

    def forward(self, features, mask, labels=None):
        if self.training:
            self.steps += 1
            self.hook(self, features, mask, labels)
        total = (features * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        return MILOutput(logits=self.head(total), attention=None)


@pytest.mark.parametrize("aggregator", ["abmil", "transmil", "clam_sb"])
def test_two_fits_with_one_seed_are_equal_to_the_last_bit(cohort, aggregator: str) -> None:
    options = {"transmil": {"embed_dim": 8, "heads": 2, "landmarks": 4}}.get(aggregator, TINY)
    fits = [
        tiny(aggregator=aggregator, aggregator_options=options, random_state=seed).fit(
            cohort.bags, cohort.labels, groups=cohort.patients
        )
        for seed in (7, 7, 8)
    ]
    assert same(fits[0], fits[1])
    assert fits[0].history_ == fits[1].history_
    assert not same(fits[0], fits[2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("aggregator", ["abmil", "mean", "max", "transmil", "clam_sb"])
def test_the_default_dtype_of_the_program_changes_no_number(
    cohort, aggregator: str, dtype: torch.dtype
) -> None:
    def fit() -> MILClassifier:
        options = {"embed_dim": 8, **({"landmarks": 4} if aggregator == "transmil" else {})}
        classifier = tiny(aggregator=aggregator, aggregator_options=options)
        return classifier.fit(cohort.bags, cohort.labels, groups=cohort.patients)

    expected = fit()
    with default_dtype(dtype):
        found = fit()
        probabilities = found.predict_proba(cohort.bags)
    assert same(found, expected)
    assert found.history_ == expected.history_
    np.testing.assert_array_equal(probabilities, expected.predict_proba(cohort.bags))


def test_without_a_seed_fits_differ(cohort) -> None:
    first, second = (
        tiny(random_state=None).fit(cohort.bags, cohort.labels, validation=None) for _ in range(2)
    )
    assert not same(first, second)


def test_numpys_generators_are_seeds_too(cohort) -> None:
    for kind in (np.random.RandomState, np.random.default_rng):
        first, second = (
            tiny(random_state=kind(3)).fit(cohort.bags, cohort.labels, validation=None)
            for _ in range(2)
        )
        assert same(first, second)


def test_a_fit_leaves_the_generators_and_settings_of_the_program_alone(cohort) -> None:
    torch.manual_seed(5)
    np.random.seed(6)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    expected = tiny().fit(cohort.bags, cohort.labels, validation=None)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            odd = tiny().fit(cohort.bags, cohort.labels, validation=None)
            assert torch.is_inference_mode_enabled()
            probabilities = odd.predict_proba(cohort.bags)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {value.dtype for value in weights(odd).values()} == {torch.float32}
    np.testing.assert_array_equal(probabilities, odd.predict_proba(cohort.bags))
    assert odd.history_[-1]["train_loss"] == pytest.approx(
        expected.history_[-1]["train_loss"], abs=0.2
    )


def test_the_history_is_that_of_the_validation_bags(cohort) -> None:
    other = planted_cohort(11, seed=1, tiles=20, dim=6)
    classifier = tiny(epochs=6, patience=6).fit(
        cohort.bags, cohort.labels, groups=cohort.patients,
        validation=(other.bags, other.labels, other.patients),
    )  # fmt: skip
    assert [row["epoch"] for row in classifier.history_] == [1, 2, 3, 4, 5, 6]
    best = min(classifier.history_, key=lambda row: row["validation_loss"])
    assert classifier.best_epoch_ == best["epoch"]
    probabilities, truth = classifier.predict_proba(other.bags), np.array(other.labels)
    positive = truth == "positive"
    balance = np.where(positive, 1 / positive.sum(), 1 / (~positive).sum())
    assert best["validation_loss"] == pytest.approx(
        log_loss(truth, probabilities, sample_weight=balance), abs=1e-6
    )
    assert best["validation_auroc"] == pytest.approx(roc_auc_score(positive, probabilities[:, 1]))
    assert best["validation_balanced_accuracy"] == pytest.approx(
        balanced_accuracy_score(truth, classifier.predict(other.bags))
    )


def test_the_rate_warms_up_and_decays_to_nothing(cohort) -> None:
    classifier = tiny(epochs=20, batch_size=8, lr=0.01).fit(
        cohort.bags, cohort.labels, validation=None
    )
    rates = [row["lr"] for row in classifier.history_]
    assert max(rates) == pytest.approx(0.01, rel=0.02)
    assert rates[-1] == pytest.approx(0, abs=1e-9)
    assert (np.diff(rates[1:]) < 0).all()


def test_training_stops_when_validation_no_longer_improves(cohort) -> None:
    noise = planted_cohort(40, seed=2, tiles=20, dim=6, shift=0.0)
    with pytest.warns(XmagWarning, match="epoch 40 of 44 is kept, the first that may be"):
        classifier = tiny(epochs=200, patience=4, lr=0.02).fit(
            noise.bags, noise.labels, groups=noise.patients
        )
    assert len(classifier.history_) == classifier.best_epoch_ + 4 < 200


def test_a_lucky_loss_of_the_first_epochs_is_not_kept() -> None:
    """Three of eight validation labels are wrong: whoever has learned something is punished."""
    train, check, test = (
        planted_cohort(n, seed=seed, dim=16, tiles=20, planted=0.1)
        for n, seed in ((30, 30), (8, 31), (100, 32))
    )
    other = {"negative": "positive", "positive": "negative"}
    wrong = [other[label] for label in check.labels[:3]] + check.labels[3:]
    classifier = tiny(
        aggregator_options={"embed_dim": 16, "attention_dim": 8}, epochs=100, lr=0.01,
        random_state=3,
    )  # fmt: skip
    with pytest.warns(XmagWarning, match=r"epoch 20 of 40 is kept, the first that may be"):
        classifier.fit(
            train.bags, train.labels, groups=train.patients,
            validation=(check.bags, wrong, check.patients),
        )  # fmt: skip
    losses = [row["validation_loss"] for row in classifier.history_]
    assert np.argmin(losses) < 3
    assert classifier.best_epoch_ == 20
    positive = np.array(test.labels) == "positive"
    assert roc_auc_score(positive, classifier.predict_proba(test.bags)[:, 1]) > 0.95


def test_without_validation_the_last_epoch_is_kept(cohort) -> None:
    classifier = tiny(epochs=5, patience=1).fit(cohort.bags, cohort.labels, validation=None)
    assert (len(classifier.history_), classifier.best_epoch_) == (5, 5)
    assert classifier.history_[0]["validation_loss"] is None


def test_no_groups_is_a_warning_that_says_what_to_give(cohort) -> None:
    with pytest.warns(XmagWarning, match=r"split is by slide.*groups="):
        tiny().fit(cohort.bags, cohort.labels)


def test_balanced_sampling_draws_classes_equally_and_bags_in_turn() -> None:
    labels = np.array([0] * 30 + [1] * 5 + [2] * 13)
    sampler = BagSampler(48, np.random.default_rng(0), strata=labels)
    drawn = [list(sampler) for _ in range(50)]
    assert all(len(epoch) == len(sampler) == 48 for epoch in drawn)
    every = np.concatenate(drawn)
    counts = np.bincount(labels[every])
    assert (counts == 800).all()
    times = np.bincount(every, minlength=48)
    for label in range(3):
        own = times[labels == label]
        assert own.max() - own.min() <= 1


def test_shuffled_sampling_takes_each_bag_once() -> None:
    sampler = BagSampler(4, np.random.default_rng(0))
    for _ in range(3):
        assert sorted(sampler) == [0, 1, 2, 3]


def test_odd_epochs_favour_no_class() -> None:
    labels = np.array([0, 1, 0, 1, 0])
    sampler = BagSampler(5, np.random.default_rng(0), strata=labels)
    counts = np.bincount(labels[np.concatenate([list(sampler) for _ in range(400)])])
    assert counts.sum() == 2000
    assert abs(counts[0] - counts[1]) < 4 * np.sqrt(400)


def test_class_weights_move_predictions_towards_a_class(cohort) -> None:
    noise = planted_cohort(40, seed=3, tiles=5, dim=6, shift=0.0)

    def share(weight: object) -> float:
        classifier = tiny(aggregator="mean", aggregator_options=None, class_weight=weight, lr=0.01)
        classifier.fit(noise.bags, noise.labels, validation=None)
        return float(classifier.predict_proba(noise.bags)[:, 1].mean())

    assert share({"positive": 20.0}) > 0.8
    assert share({"negative": 20.0}) < 0.2
    assert 0.4 < share("balanced") < 0.6


def test_balanced_weights_and_balanced_sampling_do_not_count_twice() -> None:
    noise = planted_cohort(40, seed=4, tiles=5, dim=6, shift=0.0)
    rows = [i for i in range(40) if i % 2 == 0 or i < 10]
    few = noise.subset(rows)  # 20 negative, 5 positive
    means = {}
    for sampling in ("balanced", "shuffled"):
        for weight in (None, "balanced"):
            classifier = tiny(
                aggregator="mean", aggregator_options={"embed_dim": 4}, class_weight=weight,
                sampling=sampling, lr=0.01, epochs=30,
            ).fit(few.bags, few.labels, validation=None)  # fmt: skip
            means[sampling, weight] = classifier.predict_proba(noise.bags)[:, 1].mean()
    assert means["shuffled", None] < 0.35
    for key in (("balanced", None), ("balanced", "balanced"), ("shuffled", "balanced")):
        assert 0.33 < means[key] < 0.67, means


def test_max_tiles_trains_on_part_of_a_bag_and_predicts_on_all(cohort) -> None:
    seen = []

    def hook(module, features, mask, labels):
        seen.append((mask.sum(dim=1).tolist(), float(features.sum())))

    classifier = tiny(aggregator=Probe(hook), aggregator_options=None, max_tiles=7).fit(
        cohort.bags, cohort.labels, validation=None
    )
    assert {count for counts, _ in seen for count in counts} == {7}
    assert len({total for _, total in seen}) == len(seen)
    expected = classifier.aggregator_(
        torch.from_numpy(cohort.bags[0])[None], torch.ones(1, 20, dtype=torch.bool)
    )
    np.testing.assert_allclose(
        classifier.predict_proba(cohort.bags[:1]),
        expected.logits.softmax(dim=1).detach(), atol=1e-6,
    )  # fmt: skip


def test_a_module_of_ones_own_is_copied_and_learns(cohort) -> None:
    module = Probe(lambda *_: None)
    start = copy.deepcopy(module.state_dict())
    classifier = tiny(aggregator=module, aggregator_options=None).fit(
        cohort.bags, cohort.labels, validation=None
    )
    assert all(torch.equal(v, start[k]) for k, v in module.state_dict().items())
    assert not torch.equal(classifier.aggregator_.head.weight, module.head.weight)


def test_parts_of_a_batch_give_the_step_of_the_whole_batch(cohort) -> None:
    """Memory that is short for the whole batch changes how it is computed, and not what."""
    sizes = []

    def enough_for(tiles: int) -> Callable[..., None]:
        def hook(module, features, mask, labels):
            if mask.numel() > tiles:
                raise torch.cuda.OutOfMemoryError("no memory (by the test)")
            sizes.append(len(mask))

        return hook

    torch.manual_seed(0)
    module = Probe(lambda *_: None)
    fits = []
    for limit in (10_000, 50):
        module.hook = enough_for(limit)
        sizes.clear()
        fits.append(
            tiny(aggregator=module, aggregator_options=None, class_weight={"positive": 3.0}).fit(
                cohort.bags, cohort.labels, validation=None
            )
        )
        assert max(sizes) == (8 if limit == 10_000 else 2)
    for key, value in weights(fits[0]).items():
        torch.testing.assert_close(value, weights(fits[1])[key], atol=1e-6, rtol=1e-5)


def test_a_bag_that_does_not_fit_alone_is_a_clear_error(cohort) -> None:
    def hook(module, features, mask, labels):
        raise torch.cuda.OutOfMemoryError("no memory (by the test)")

    classifier = tiny(aggregator=Probe(hook), aggregator_options=None)
    with pytest.raises(ModelError, match=r"no memory left for a bag of 20 tiles alone.*max_tiles"):
        classifier.fit(cohort.bags, cohort.labels, validation=None)
    assert not hasattr(classifier, "classes_")


def test_bags_of_like_size_share_a_part() -> None:
    sizes = [10, 1000, 9, 990, 400, 600, 3]
    groups = groups_of_like_size(sizes, 2000)
    assert sorted(i for group in groups for i in group) == list(range(7))
    for group in groups:
        longest = max(sizes[i] for i in group)
        assert len(group) * longest <= 2000
        assert 2 * min(sizes[i] for i in group) >= longest
    assert groups_of_like_size([5000, 10, 10], 2000) == [[0], [1, 2]]
    assert groups_of_like_size([5, 5, 1], 1) == [[0], [1], [2]]


def interrupt_at(step: int, what: BaseException) -> Callable[..., None]:
    def hook(module, *_):
        if module.steps == step:
            raise what

    return hook


def test_an_interrupted_fit_keeps_the_best_weights_so_far(cohort) -> None:
    """24 bags in steps of 8: the seventh step is the first of epoch 3."""
    stopped = tiny(aggregator=Probe(interrupt_at(7, KeyboardInterrupt())), aggregator_options=None)
    stopped.aggregator.head.weight.data.zero_()
    stopped.aggregator.head.bias.data.zero_()
    whole = copy.deepcopy(stopped).set_params(epochs=3)
    whole.aggregator.hook = lambda *_: None
    with pytest.raises(KeyboardInterrupt) as stop:
        stopped.fit(cohort.bags, cohort.labels, validation=None)
    assert "keeps the weights of epoch 2, the best of 2" in stop.value.__notes__[0]
    whole.fit(cohort.bags, cohort.labels, validation=None)
    assert stopped.history_ == whole.history_[:2]
    assert stopped.predict(cohort.bags).shape == (24,)
    assert not stopped.aggregator_.training


def test_a_fit_interrupted_before_an_epoch_changes_nothing(cohort) -> None:
    fresh = tiny(aggregator=Probe(interrupt_at(2, KeyboardInterrupt())), aggregator_options=None)
    with pytest.raises(KeyboardInterrupt):
        fresh.fit(cohort.bags, cohort.labels, validation=None)
    with pytest.raises(InputError, match="not fitted"):
        fresh.predict(cohort.bags)
    fitted = tiny().fit(cohort.bags, cohort.labels, validation=None)
    before = fitted.predict_proba(cohort.bags)
    fitted.set_params(aggregator=fresh.aggregator, aggregator_options=None)
    with pytest.raises(KeyboardInterrupt):
        fitted.fit(cohort.bags, cohort.labels, validation=None)
    np.testing.assert_array_equal(fitted.predict_proba(cohort.bags), before)


def test_a_file_that_vanishes_in_training_is_named_and_nothing_is_lost(
    cohort, tmp_path: Path
) -> None:
    paths = []
    for index, features in enumerate(cohort.bags):
        paths.append(tmp_path / f"{index}.pt")
        torch.save(torch.from_numpy(features), paths[-1])

    def hook(module, *_):
        if module.steps == 7:
            for path in paths[3:9]:
                path.unlink(missing_ok=True)

    classifier = tiny(aggregator=Probe(hook), aggregator_options=None)
    with pytest.raises(BagError, match=r"X\[\d\] \(.*\d\.pt\): there is no file"):
        classifier.fit(paths, cohort.labels, validation=None)
    assert len(classifier.history_) == classifier.best_epoch_ == 2
    assert classifier.predict(cohort.bags).shape == (24,)


def test_a_file_that_changes_in_training_is_named(cohort, tmp_path: Path) -> None:
    paths = []
    for index, features in enumerate(cohort.bags):
        paths.append(tmp_path / f"{index}.pt")
        torch.save(torch.from_numpy(features), paths[-1])

    def hook(module, *_):
        for path in paths:
            torch.save(torch.zeros(3, 6), path)

    with pytest.raises(BagError, match=r"has changed while training: features \(3, 6\)"):
        tiny(aggregator=Probe(hook), aggregator_options=None).fit(
            paths, cohort.labels, validation=None
        )


def test_a_loss_that_explodes_is_an_error_that_names_the_rate(cohort) -> None:
    class Exploding(Probe):
        def forward(self, features, mask, labels=None):
            output = super().forward(features, mask, labels)
            return MILOutput(logits=output.logits * float("inf"), attention=None)

        def __deepcopy__(self, memo):
            return Exploding(self.hook)

    with pytest.raises(ModelError, match=r"training loss became nan in epoch 1.*smaller lr"):
        tiny(aggregator=Exploding(lambda *_: None), aggregator_options=None).fit(
            cohort.bags, cohort.labels, validation=None
        )


def test_an_aggregator_that_returns_something_else_is_an_error(cohort) -> None:
    class Tuple(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(6, 2)

        def forward(self, features, mask, labels=None):
            return self.head(features.mean(dim=1)), None

    with pytest.raises(ModelError, match=r"Tuple returned <class 'tuple'>.*expected a MILOutput"):
        tiny(aggregator=Tuple(), aggregator_options=None).fit(
            cohort.bags, cohort.labels, validation=None
        )
    three = Probe(lambda *_: None, classes=3)
    with pytest.raises(ModelError, match=r"returned logits \(1, 3\) .*logits \(1, 2\)"):
        tiny(aggregator=three, aggregator_options=None, batch_size=1).fit(
            cohort.bags, cohort.labels, validation=None
        )
    with pytest.raises(InputError, match="Identity has no parameters to train"):
        tiny(aggregator=nn.Identity(), aggregator_options=None).fit(
            cohort.bags, cohort.labels, validation=None
        )


def test_the_bar_shows_epochs_on_stderr(cohort, capsys) -> None:
    tiny(progress=True).fit(cohort.bags, cohort.labels, validation=None)
    shown = capsys.readouterr()
    assert "3/3" in shown.err
    assert "train_loss" in shown.err
    assert shown.out == ""
    tiny().fit(cohort.bags, cohort.labels, validation=None)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["abmil", "mean", "max"])
def test_a_hundred_thousand_tiles_are_a_bag(name: str) -> None:
    rng = np.random.default_rng(0)
    bags = [rng.normal(size=(n, 8)).astype(np.float32) for n in (100_000, 5, 60_000, 7)]
    options = TINY if name == "abmil" else {"embed_dim": 8}
    classifier = tiny(aggregator=name, aggregator_options=options, epochs=1).fit(
        bags, [0, 0, 1, 1], validation=None
    )
    assert np.isfinite(classifier.predict_proba(bags)).all()
    if name == "abmil":
        attention = classifier.attention(bags[0])
        assert attention.scores.sum(dtype=np.float64) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", ["transmil", "clam_sb"])
def test_a_hundred_thousand_tiles_are_a_bag_for_those_that_take_one_at_a_time(name: str) -> None:
    options = {"embed_dim": 4, "heads": 1, "landmarks": 8} if name == "transmil" else TINY
    bags = [np.random.default_rng(0).normal(size=(n, 4)).astype("f4") for n in (100_000, 30)]
    classifier = tiny(aggregator=name, aggregator_options=options, epochs=1).fit(
        bags, [0, 1], validation=None
    )
    assert np.isfinite(classifier.predict_proba(bags)).all()


def test_auroc_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=60)
    logits = rng.normal(size=(60, 3)) + np.eye(3)[labels]
    logits[::7] = 0  # ties
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = roc_auc_score(labels, probabilities, multi_class="ovr")
    head = ClassHead.of([0, 1, 2])
    found = head.validate(logits, labels, np.ones(60))
    assert found["validation_auroc"] == pytest.approx(expected, abs=1e-12)
    alone = head.validate(logits[:4], np.zeros(4, int), np.ones(4))
    assert alone["validation_auroc"] is None


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"epochs": 0}, "epochs is 0; expected an int from 1"),
        ({"epochs": 2.5}, "epochs is 2.5"),
        ({"patience": True}, "patience is True"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"max_tiles": 0}, "max_tiles is 0"),
        ({"lr": 0}, "lr is 0; expected a number above 0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"weight_decay": -1}, "weight_decay is -1; expected a number from 0"),
        ({"sampling": "even"}, "sampling is 'even'"),
        ({"class_weight": "even"}, "class_weight is 'even'"),
        ({"class_weight": {"other": 1.0}}, "class_weight has the class 'other'"),
        ({"class_weight": {"positive": 0.0}}, r"class_weight\['positive'\] is 0.0"),
        ({"random_state": -1}, "random_state is -1"),
        ({"random_state": "a"}, "random_state is 'a'"),
        ({"device": "tpu9"}, "device='tpu9' is unknown"),
        ({"dtype": "int8"}, "dtype='int8' is unknown"),
        ({"aggregator": "abmill"}, "aggregator is 'abmill'"),
        ({"aggregator_options": {"depth": 3}}, "no option 'depth'"),
    ],
)
def test_parameters_are_taken_as_they_are_and_refused_by_fit(
    cohort, params: dict, message: str
) -> None:
    classifier = tiny(**params)
    with pytest.raises(InputError, match=message):
        classifier.fit(cohort.bags, cohort.labels, validation=None)
    assert not hasattr(classifier, "classes_")


def test_a_fit_warns_of_nothing_when_it_knows_the_patients(cohort) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny().fit(cohort.bags, cohort.labels, groups=cohort.patients)
