"""Cases: wherever a bag is a sample, a list of a patient's bags is one too."""

import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, GroupKFold, cross_val_predict, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from support.mil_cohort import planted_cohort
from torch import nn

from xmag.bag import FeatureBag
from xmag.errors import BagError, InputError, MismatchError, XmagWarning
from xmag.geometry import TileGeometry
from xmag.mil import MILClassifier, MILOutput, MILRegressor, MILSurvival
from xmag.mil.bags import Bags, read_dataset
from xmag.provenance import Provenance

SMALL = {
    "abmil": {"embed_dim": 4, "attention_dim": 2},
    "clam_sb": {"embed_dim": 4, "attention_dim": 2, "k_sample": 1},
    "mean": {"embed_dim": 4},
    "max": {"embed_dim": 4},
    "transmil": {"embed_dim": 4, "heads": 2, "landmarks": 2},
}
FUSIONS = ("early", "late")


def grouped(count: int, seed: int = 0) -> tuple[list, list, list]:
    """Cases of one to three slides, their labels and patients."""
    cohort = planted_cohort(count, seed=seed, slides=3, tiles=6, dim=4)
    cases = [cohort.bags[3 * i : 3 * i + 1 + i % 3] for i in range(count)]
    return cases, cohort.labels[::3], cohort.patients[::3]


CASES, LABELS, PATIENTS = grouped(12)
BACKWARDS = [case[::-1] for case in CASES]


def tiny(aggregator: str = "abmil", **params: object) -> MILClassifier:
    defaults = {
        "aggregator": aggregator, "aggregator_options": SMALL[aggregator], "epochs": 2,
        "random_state": 0, "device": "cpu",
    }  # fmt: skip
    return MILClassifier(**{**defaults, **params})  # type: ignore[arg-type]


def fitted(cases: object = None, **params: object) -> MILClassifier:
    return tiny(**params).fit(CASES if cases is None else cases, LABELS, validation=None)


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("name", list(SMALL))
def test_the_order_of_the_bags_of_a_case_changes_nothing(name: str, fusion: str) -> None:
    params = {"aggregator": name, "fusion": fusion, "max_tiles": 8}
    first = tiny(**params).fit(CASES, LABELS, groups=PATIENTS, validation=0.3)
    other = tiny(**params).fit(BACKWARDS, LABELS, groups=PATIENTS, validation=0.3)
    assert first.history_ == other.history_
    for method in ("predict_proba", "embed"):
        expected = getattr(first, method)(CASES)
        for model, cases in ((first, BACKWARDS), (other, CASES)):
            np.testing.assert_array_equal(getattr(model, method)(cases), expected)
    np.testing.assert_allclose(first.novelty(BACKWARDS), first.novelty(CASES))
    if name in ("mean", "max"):
        return
    for case in CASES:
        forth, back = first.attention(case), first.attention(case[::-1])
        for one, two in zip(forth, back[::-1], strict=True):
            np.testing.assert_array_equal(one.scores, two.scores)


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("name", list(SMALL))
def test_a_case_of_one_bag_is_the_bag(name: str, fusion: str) -> None:
    bags = [case[0] for case in CASES]
    alone, listed = ([bag, [bag], (bag,)] for bag in (bags[1], bags[1]))
    model = fitted(bags, aggregator=name, fusion=fusion)
    again = fitted([[bag] for bag in bags], aggregator=name, fusion=fusion)
    for method in ("predict_proba", "embed", "novelty"):
        found = getattr(model, method)(alone)
        np.testing.assert_array_equal(found, getattr(again, method)(listed))
        np.testing.assert_array_equal(found, found[[0, 0, 0]])
    if name not in ("mean", "max"):
        (one,) = model.attention([bags[1]])
        np.testing.assert_array_equal(one.scores, model.attention(bags[1]).scores)


def test_early_fusion_is_one_bag_of_all_tiles() -> None:
    model = fitted()
    for case in CASES:
        whole = np.concatenate(case)
        np.testing.assert_allclose(
            model.predict_proba([case]), model.predict_proba([whole]), atol=1e-6
        )
        np.testing.assert_allclose(model.embed([case]), model.embed([whole]), atol=1e-6)
        parts = model.attention(case)
        scores = np.concatenate([part.scores for part in parts])
        np.testing.assert_allclose(scores, model.attention(whole).scores, atol=1e-6)


def times() -> np.ndarray:
    return np.stack([np.arange(12) % 2, np.arange(1, 13)], axis=1).astype(float)


@pytest.mark.parametrize(
    ("kind", "y", "params"),
    [
        (MILClassifier, LABELS, {}),
        (MILClassifier, [i % 3 for i in range(12)], {}),
        (MILRegressor, np.linspace(0, 9, 12), {}),
        (MILRegressor, np.linspace(0, 9, 24).reshape(12, 2), {}),
        (MILSurvival, times(), {"loss": "cox"}),
        (MILSurvival, times(), {"loss": "nll"}),
    ],
)
def test_late_fusion_is_the_mean_of_the_slides_predictions(kind, y, params) -> None:
    model = kind(
        aggregator_options=SMALL["abmil"], epochs=2, random_state=0, device="cpu", fusion="late",
        lr=0.05, **params,
    ).fit(CASES, y, validation=None)  # fmt: skip
    predict = model.predict_proba if kind is MILClassifier else model.predict
    expected = [np.mean([predict([bag])[0] for bag in case], axis=0) for case in CASES]
    np.testing.assert_allclose(predict(CASES), expected, atol=1e-12)
    vectors = [np.mean([model.embed([bag])[0] for bag in case], axis=0) for case in CASES]
    np.testing.assert_allclose(model.embed(CASES), vectors, atol=1e-7)
    parts = model.attention(CASES[2])
    for part, bag in zip(parts, CASES[2], strict=True):
        np.testing.assert_allclose(part.scores, model.attention(bag).scores / 3, rtol=1e-6)
    if kind is MILSurvival and params["loss"] == "nll":
        mean = np.mean([model.predict_survival_function([bag])[0].y for bag in CASES[2]], axis=0)
        np.testing.assert_allclose(model.predict_survival_function(CASES[2:3])[0].y, mean)


@pytest.mark.parametrize("kind", [MILClassifier, MILRegressor, MILSurvival])
@pytest.mark.parametrize("weights", [[1, 2], [-1] * 12, [np.nan] * 12])
def test_weights_of_a_score_are_one_for_each_case(kind, weights) -> None:
    y = times() if kind is MILSurvival else np.arange(12) % 2
    model = kind(epochs=1, device="cpu", random_state=0).fit(CASES[:12], y[:12], validation=None)
    with pytest.raises(InputError, match="sample_weight has shape"):
        model.score(CASES[:12], y[:12], sample_weight=weights)


def test_late_fusion_trains_on_slides_with_the_label_of_their_case() -> None:
    data = read_dataset(Bags(CASES), np.arange(12), PATIENTS, fusion="late")
    assert sorted(data.targets.tolist()) == sorted(i for i in range(12) for _ in CASES[i])
    order = [data.bags.name(row) for row in data.rows]
    assert order[0] == "X[0][0]"
    late = tiny(fusion="late").fit(CASES, LABELS, groups=PATIENTS, validation=0.3)
    # The same slides in the order of the dataset, each a case of its own.
    places = [tuple(map(int, name[2:-1].split("]["))) for name in order]
    apart = tiny().fit(
        [CASES[i][j] for i, j in places], [LABELS[i] for i, _ in places],
        groups=[PATIENTS[i] for i, _ in places], validation=0.3,
    )  # fmt: skip
    assert late.history_ == apart.history_


@pytest.mark.parametrize("fusion", FUSIONS)
def test_attention_of_a_case_sums_to_one_together(fusion: str, tmp_path: Path) -> None:
    geometry = TileGeometry(
        size_px=224, mpp=2.0, size_level0=896, overlap_px=0, level0_mpp=0.5,
        level0_size=(9000, 9000),
    )  # fmt: skip
    bags = [FeatureBag(x, np.arange(2 * len(x)).reshape(-1, 2), tiles=geometry) for x in CASES[2]]
    bags[1].save(tmp_path / "b.h5")
    empty = FeatureBag(np.zeros((0, 4), np.float32), np.zeros((0, 2), int), tiles=geometry)
    found = fitted(fusion=fusion).attention([bags[0], tmp_path / "b.h5", empty, bags[2]])
    assert [len(part) for part in found] == [6, 6, 0, 6]
    assert sum(part.scores.sum() for part in found) == pytest.approx(1, abs=1e-6)
    for part, bag in zip(found, [bags[0], bags[1], empty, bags[2]], strict=True):
        np.testing.assert_array_equal(part.coords, bag.coords)
        assert (part.tiles, part.kind) == (geometry, "softmax")
        assert part.scores.dtype == np.float32


@pytest.mark.parametrize("fusion", FUSIONS)
def test_an_empty_bag_of_a_case_says_nothing(fusion: str) -> None:
    empty = np.zeros((0, 4), np.float32)
    padded = [[empty, *case, empty] for case in CASES]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, other = fitted(fusion=fusion), fitted(padded, fusion=fusion)
        for method in ("predict_proba", "embed", "novelty"):
            expected = getattr(model, method)(CASES)
            np.testing.assert_array_equal(getattr(other, method)(padded), expected)
    with pytest.warns(XmagWarning, match=r"X\[12\] have no tiles; they are left out"):
        again = tiny(fusion=fusion).fit(
            [*padded, [empty, empty]], [*LABELS, "negative"], validation=None
        )
    with pytest.warns(XmagWarning, match=r"X\[1\] have no tiles; .* how frequent each class"):
        rows = again.predict_proba([CASES[0], [empty, empty]])
    np.testing.assert_allclose(rows[1], again.class_prior_)
    with pytest.warns(XmagWarning, match=r"X\[0\] have no tiles; their vector is 0"):
        assert not again.embed([[empty, empty]]).any()
    with pytest.warns(XmagWarning, match=r"X\[0\] have no tiles; their novelty is 100"):
        assert again.novelty([[empty]]).tolist() == [100]
    assert [len(part) for part in again.attention([empty, empty])] == [0, 0]


@pytest.mark.parametrize(
    ("case", "error", "message"),
    [
        ([], InputError, r"X\[5\] is an empty list; leave the case out"),
        ((), InputError, r"X\[5\] is an empty tuple"),
        ([[CASES[0][0]]], InputError, r"X\[5\]: it is a list; expected a list of FeatureBags"),
        ([CASES[0][0], 3], InputError, r"X\[5\]\[1\]: it is a int; expected"),
        ([CASES[0][0], np.zeros((3, 5))], BagError, r"X\[5\]\[1\] has 5 features a tile, and"),
        ([np.full((1, 4), np.nan)], BagError, r"X\[5\]\[0\]: it holds nan"),
        ([CASES[0][0], "no/such.h5"], BagError, r"X\[5\]\[1\] \(no/such.h5\): there is no file"),
    ],
)
def test_what_is_wrong_with_a_case_is_named(case: object, error: type, message: str) -> None:
    mixed = [*CASES[:5], case, *CASES[6:]]
    with pytest.raises(error, match=message):
        fitted(mixed)
    with pytest.raises(error, match=message):
        fitted().predict(mixed)


def made(features: np.ndarray, level0_mpp: float = 0.5, model: str = "a") -> FeatureBag:
    coords = np.zeros((len(features), 2), int)
    tiles = TileGeometry(
        size_px=224, mpp=2.0, size_level0=round(448 / level0_mpp), overlap_px=0,
        level0_mpp=level0_mpp, level0_size=(9000, 9000),
    )  # fmt: skip
    provenance = Provenance({"weights_sha256": model, "tile_spec": {"mpp": 2.0}}, {})
    return FeatureBag(features, coords, provenance=provenance, tiles=tiles)


def test_slides_of_a_case_may_differ_in_scale_and_not_in_how_they_were_made() -> None:
    cases = [[made(bag, mpp) for bag, mpp in zip(c, (0.5, 0.25, 1.0), strict=False)] for c in CASES]
    model = fitted(cases)
    assert model.fingerprint_ == {"weights_sha256": "a", "tile_spec": {"mpp": 2.0}}
    np.testing.assert_array_equal(model.predict_proba(cases), fitted().predict_proba(CASES))
    assert [part.tiles.level0_mpp for part in model.attention(cases[2])] == [0.5, 0.25, 1.0]
    strange = [*cases[:5], [cases[5][0], made(CASES[5][1], model="b")], *cases[6:]]
    with pytest.raises(MismatchError, match=r"X\[5\]\[1\] was made otherwise than X\[0\]\[0\]"):
        fitted(strange)
    for call in (model.predict, model.embed, model.novelty, lambda x: model.attention(x[5])):
        with pytest.raises(MismatchError, match=r"\[1\] was made otherwise than those of the tr"):
            call(strange)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_bag_in_two_cases_ties_them_to_one_side(fusion: str) -> None:
    shared = [list(case) for case in CASES]
    shared[7].append(shared[2][0])
    shared[7].insert(0, np.zeros((0, 4), np.float32))
    shared[3].append(np.zeros((0, 4), np.float32))  # empty bags are like no other
    data = read_dataset(Bags(shared), np.zeros(12, int), None, fusion=fusion)
    unit = dict(zip(data.cases[data.rows].tolist(), data.units().tolist(), strict=True))
    assert len(set(unit.values())) == 11
    assert unit[7] == unit[2]
    of_case = {}
    for case, value in zip(data.cases[data.rows].tolist(), data.units().tolist(), strict=True):
        assert of_case.setdefault(case, value) == value


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_bag_on_both_sides_of_a_validation_is_refused(fusion: str) -> None:
    def fit(bags: list) -> MILClassifier:
        return tiny(fusion=fusion).fit(
            CASES[:8], LABELS[:8], groups=PATIENTS[:8], validation=(bags, LABELS[8:], PATIENTS[8:])
        )

    assert fit(CASES[8:]).history_[0]["validation_loss"]
    leak = [CASES[8], [CASES[9][0], CASES[2][1]], *CASES[10:]]
    with pytest.raises(InputError, match=r"validation X\[1\]\[1\] has features that the training"):
        fit(leak)


def test_lists_of_bags_say_whose_they_are() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny().fit(CASES, LABELS, validation=0.3)
    with pytest.warns(XmagWarning, match="no groups were given"):
        tiny().fit([case[0] for case in CASES], LABELS, validation=0.3)


def test_an_unknown_fusion_is_refused() -> None:
    with pytest.raises(InputError, match=r"fusion is 'middle'; expected \"early\""):
        fitted(fusion="middle")

    with pytest.raises(InputError, match=r"fusion is 'middle'"):
        MILClassifier.from_module(Own(True), classes=[0, 1], in_dim=4, fusion="middle")


@pytest.mark.parametrize("fusion", FUSIONS)
def test_another_fusion_is_that_of_the_next_fit(fusion: str, tmp_path: Path) -> None:
    """A temperature that was fitted to the one would be wrong for the other."""
    model = fitted(fusion=fusion)
    before = model.predict_proba(CASES)
    model.set_params(fusion=FUSIONS[fusion == FUSIONS[0]])
    np.testing.assert_array_equal(model.predict_proba(CASES), before)
    model.save(tmp_path)
    again = MILClassifier.load(tmp_path, device="cpu")
    np.testing.assert_array_equal(again.predict_proba(CASES), before)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_fusion_is_saved(fusion: str, tmp_path: Path) -> None:
    model = fitted(fusion=fusion)
    model.save(tmp_path)
    again = MILClassifier.load(tmp_path, device="cpu")
    assert again.fusion == fusion
    for method in ("predict_proba", "embed", "novelty"):
        np.testing.assert_array_equal(getattr(again, method)(CASES), getattr(model, method)(CASES))


class Own(nn.Module):
    """An aggregator of one's own, with or without pooled vectors."""

    batched = False

    def __init__(self, pooled: bool) -> None:
        super().__init__()
        self.head, self.with_pooled = nn.Linear(4, 2), pooled

    def forward(self, features, mask, labels=None):
        mean = features.mean(dim=1)
        return MILOutput(
            logits=self.head(mean), attention=None, pooled=mean if self.with_pooled else None
        )


def test_pooled_vectors_are_what_the_last_layer_makes_logits_of() -> None:
    for name in SMALL:
        model = fitted(aggregator=name)
        vectors = model.embed(CASES)
        assert vectors.dtype == np.float32
        assert vectors.shape == (12, 4)
        with torch.no_grad():
            logits = model.aggregator_.head(torch.from_numpy(vectors)).double().softmax(1).numpy()
        np.testing.assert_allclose(model.predict_proba(CASES), logits, atol=1e-6)
        assert model.embed([]).shape == (0, 4)
    own = fitted(aggregator="abmil").set_params(aggregator=Own(True), aggregator_options=None)
    own.fit(CASES, LABELS, validation=None)
    means = [np.concatenate(case).mean(axis=0) for case in CASES]
    np.testing.assert_allclose(own.embed(CASES), means, atol=1e-6)
    own.set_params(aggregator=Own(False)).fit(CASES, LABELS, validation=None)
    with pytest.raises(InputError, match=r"Own gives no pooled vectors; let it return MILOutput"):
        own.embed(CASES)
    assert own.novelty(CASES).shape == (12,)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_scikit_learn_splits_cases(fusion: str) -> None:
    model = tiny(fusion=fusion)
    cv = GroupKFold(3)
    scores = cross_val_score(model, CASES, LABELS, groups=PATIENTS, cv=cv)
    assert scores.shape == (3,)
    shown = cross_val_predict(model, CASES, LABELS, groups=PATIENTS, cv=cv, method="predict_proba")
    assert shown.shape == (12, 2)
    pipeline = make_pipeline(FunctionTransformer(), model)
    search = GridSearchCV(pipeline, {"milclassifier__fusion": FUSIONS}, cv=cv)
    search.fit(CASES, LABELS, groups=PATIENTS)
    assert search.best_params_["milclassifier__fusion"] in FUSIONS
    np.testing.assert_array_equal(search.predict_proba(BACKWARDS), search.predict_proba(CASES))
    assert clone(model).fusion == fusion
    again = pickle.loads(pickle.dumps(fitted(fusion=fusion)))
    assert again.predict_proba(CASES).shape == (12, 2)


def one_block(count: int, seed: int) -> tuple[list, list, list, list]:
    """Cases of three slides, one of which has the planted tiles of a positive patient."""
    cohort = planted_cohort(count, seed=seed, slides=3, tiles=20, dim=16, planted=0.1)
    direction = np.random.default_rng(1234).normal(size=16)
    direction *= 8 / np.linalg.norm(direction)
    blocks = np.random.default_rng(seed).integers(3, size=count)
    for index, (bag, planted) in enumerate(zip(cohort.bags, cohort.planted, strict=True)):
        if index % 3 != blocks[index // 3]:
            bag[planted] -= direction.astype(np.float32)
            planted[:] = False
    cases, truth = (
        [part[i : i + 3] for i in range(0, 3 * count, 3)] for part in (cohort.bags, cohort.planted)
    )
    return cases, cohort.labels[::3], cohort.patients[::3], truth


@pytest.mark.parametrize(("fusion", "least"), [("early", 0.97), ("late", 0.7)])
def test_a_signal_in_one_of_three_blocks_is_found_and_pointed_at(fusion: str, least: float) -> None:
    """Late fusion trains on two slides without the signal for one with it, and learns less."""
    train, test = one_block(60, 0), one_block(60, 1)
    options = {"embed_dim": 32, "attention_dim": 16}
    model = tiny(aggregator_options=options, lr=2e-3, epochs=60, fusion=fusion)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", XmagWarning)
        model.fit(*train[:2], groups=train[2])
    positive = np.array(test[1]) == "positive"
    assert roc_auc_score(positive, model.predict_proba(test[0])[:, 1]) >= least
    ranked, weight = [], []
    for case, truth in zip(test[0], test[3], strict=True):
        if not np.concatenate(truth).any():
            continue
        scores = [part.scores for part in model.attention(case)]
        ranked.append(roc_auc_score(np.concatenate(truth), np.concatenate(scores)))
        weight.append(scores[[part.any() for part in truth].index(True)].sum())
    assert np.mean(ranked) >= 0.9
    if fusion == "early":  # in late fusion each block has a third
        assert np.mean(weight) >= 0.6
