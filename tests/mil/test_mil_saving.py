"""The folder of a classifier: it comes back whole, or says what is wrong with it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.mil_cohort import planted_cohort
from torch import nn

from xmag.bag import FeatureBag
from xmag.errors import InputError, MismatchError, ModelError, OutputError, WeightsError
from xmag.files import sha256_of
from xmag.mil import (
    AGGREGATORS,
    MILClassifier,
    MILOutput,
    MILRegressor,
    MILSurvival,
    aggregator,
    load_estimator,
)
from xmag.provenance import Provenance

COHORT = planted_cohort(12, tiles=6, dim=4)
OPTIONS: dict[str, dict] = {
    "abmil": {"embed_dim": 4, "attention_dim": 2},
    "mean": {"embed_dim": 4},
    "max": {"embed_dim": 4},
    "transmil": {"embed_dim": 4, "heads": 2, "landmarks": 4},
    "clam_sb": {"embed_dim": 4, "attention_dim": 2, "k_sample": 2, "subtyping": True},
}


def fitted(name: str = "abmil", labels: object = None, **params: object) -> MILClassifier:
    defaults = {
        "aggregator": name, "aggregator_options": OPTIONS.get(name), "epochs": 2,
        "random_state": 0, "device": "cpu",
    }  # fmt: skip
    classifier = MILClassifier(**{**defaults, **params})  # type: ignore[arg-type]
    return classifier.fit(
        COHORT.bags, COHORT.labels if labels is None else labels, groups=COHORT.patients
    )


@pytest.mark.parametrize("name", AGGREGATORS)
def test_a_classifier_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    classifier = fitted(name)
    classifier.save(tmp_path / "new" / "folder")
    again = MILClassifier.load(tmp_path / "new" / "folder", device="cpu")
    np.testing.assert_array_equal(
        again.predict_proba(COHORT.bags), classifier.predict_proba(COHORT.bags)
    )
    assert sorted(file.name for file in (tmp_path / "new" / "folder").iterdir()) == [
        "classifier.json", "classifier.safetensors",
    ]  # fmt: skip
    assert again.history_ == classifier.history_
    assert again.best_epoch_ == classifier.best_epoch_
    assert (again.class_prior_ == classifier.class_prior_).all()
    assert again.n_features_in_ == 4
    assert not again.aggregator_.training
    params = classifier.get_params()
    options = params.pop("aggregator_options")
    found = again.get_params()
    assert options.items() <= found.pop("aggregator_options").items()
    assert found == params
    # What was loaded can be trained again, and saved again to the same bytes.
    again.save(tmp_path / "second")
    for file in ("classifier.json", "classifier.safetensors"):
        first = (tmp_path / "new" / "folder" / file).read_bytes()
        assert (tmp_path / "second" / file).read_bytes() == first
    again.fit(COHORT.bags, COHORT.labels, validation=None)


@pytest.mark.parametrize(
    "labels",
    [(1, 2), ("a", "b"), (True, False), (1.0, 2.0), (("a", 1), ("b", (2, True))), (1, "1")],
)
def test_classes_keep_their_types(labels: tuple, tmp_path: Path) -> None:
    y = [labels[i % 2] for i in range(12)]
    classifier = fitted(labels=y, class_weight={labels[0]: 2.0})
    classifier.save(tmp_path)
    again = MILClassifier.load(tmp_path, device="cpu")
    assert again.classes_.dtype == classifier.classes_.dtype
    assert [(type(v), v) for v in again.classes_.tolist()] == [
        (type(v), v) for v in classifier.classes_.tolist()
    ]
    assert again.class_weight == classifier.class_weight
    assert again.score(COHORT.bags, y) == classifier.score(COHORT.bags, y)


def test_a_label_that_json_cannot_tell_is_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    classifier = fitted(labels=[frozenset({i % 2}) for i in range(12)])
    with pytest.raises(OutputError, match=r"class frozenset\(\{0\}\) is a frozenset"):
        classifier.save(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_loaded_classifier_still_knows_what_its_bags_were_made_with(tmp_path: Path) -> None:
    def bag(features: np.ndarray, model: str) -> FeatureBag:
        made = Provenance({"weights_sha256": model, "tile_spec": {"mpp": 2.0, "side": [1, 2]}}, {})
        return FeatureBag(features, np.zeros((len(features), 2), int), provenance=made)

    ours = [bag(x, "model-a") for x in COHORT.bags]
    classifier = MILClassifier(
        aggregator_options=OPTIONS["abmil"], epochs=1, random_state=0, device="cpu"
    ).fit(ours, COHORT.labels, validation=None)
    classifier.save(tmp_path)
    again = MILClassifier.load(tmp_path, device="cpu")
    assert again.fingerprint_ == classifier.fingerprint_
    np.testing.assert_array_equal(again.predict_proba(ours), classifier.predict_proba(ours))
    with pytest.raises(MismatchError, match="weights_sha256: 'model-b' there, 'model-a' here"):
        again.predict([bag(COHORT.bags[0], "model-b")])


class Own(nn.Module):
    batched = True

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.head = nn.Linear(width, 2)

    def forward(self, features, mask, labels=None):
        return MILOutput(logits=self.head(features.mean(dim=1)), attention=mask / mask.sum(1))


def test_a_module_of_ones_own_is_given_again_to_load(tmp_path: Path) -> None:
    classifier = fitted(aggregator=Own(), aggregator_options=None, batch_size=1)
    classifier.save(tmp_path)
    given = Own()
    again = MILClassifier.load(tmp_path, aggregator=given, device="cpu")
    np.testing.assert_array_equal(
        again.predict_proba(COHORT.bags), classifier.predict_proba(COHORT.bags)
    )
    assert not torch.equal(given.head.weight, again.aggregator_.head.weight)
    assert again.attention(COHORT.bags[0]).kind == "custom"
    with pytest.raises(InputError, match=r"aggregator of your own, Own; give one"):
        MILClassifier.load(tmp_path)
    with pytest.raises(WeightsError, match=r"head.weight has shape \(2, 4\), not \(2, 5\)"):
        MILClassifier.load(tmp_path, aggregator=Own(5))
    with pytest.raises(WeightsError, match=r"0.weight is missing"):
        MILClassifier.load(tmp_path, aggregator=nn.Sequential(nn.Linear(4, 2)))
    fitted().save(tmp_path)
    with pytest.raises(InputError, match=r"this one has 'abmil'. Leave it out"):
        MILClassifier.load(tmp_path, aggregator=Own())


def test_a_classifier_around_a_module_trained_elsewhere(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = aggregator("abmil", in_dim=4, classes=2, embed_dim=4, attention_dim=2).train()
    made = Provenance({"weights_sha256": "a"}, {})
    classifier = MILClassifier.from_module(
        module, classes=["no", "yes"], in_dim=4, provenance=made, device="cpu", epochs=7
    )
    features = torch.from_numpy(COHORT.bags[0])[None]
    with torch.no_grad():
        expected = module.eval()(features, torch.ones(1, 6, dtype=torch.bool)).logits.softmax(1)
    np.testing.assert_allclose(classifier.predict_proba(COHORT.bags[:1]), expected, atol=1e-6)
    assert classifier.classes_.tolist() == ["no", "yes"]
    assert classifier.class_prior_.tolist() == [0.5, 0.5]
    assert classifier.get_params()["aggregator"] == "abmil"
    assert classifier.epochs == 7
    assert classifier.fingerprint_ == {"weights_sha256": "a"}
    classifier.save(tmp_path)
    again = MILClassifier.load(tmp_path, device="cpu")
    np.testing.assert_array_equal(
        again.predict_proba(COHORT.bags), classifier.predict_proba(COHORT.bags)
    )
    with pytest.raises(InputError, match="each one once"):
        MILClassifier.from_module(module, classes=["a", "b", "a"], in_dim=4)


@pytest.mark.parametrize("prior", [[0.2, 0.3, 0.5], [0.5, 0.6]])
def test_frequencies_of_other_classes_are_refused(prior: list) -> None:
    module = aggregator("mean", in_dim=4, classes=2)
    with pytest.raises(InputError, match="expected 2 that sum to 1"):
        MILClassifier.from_module(module, classes=[0, 1], in_dim=4, class_prior=prior)


def test_what_is_not_fitted_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not fitted; call fit"):
        MILClassifier().save(tmp_path)


def test_a_generator_as_seed_is_not_saved(tmp_path: Path) -> None:
    fitted(random_state=np.random.default_rng(0)).save(tmp_path)
    assert MILClassifier.load(tmp_path).random_state is None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    fitted().save(tmp_path / "classifier")
    return tmp_path / "classifier"


def edit(folder: Path, **fields: object) -> None:
    path = folder / "classifier.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "classifier.safetensors")
    edit(folder, weights_sha256=sha256_of(folder / "classifier.safetensors"))


def test_a_save_that_did_not_end_is_never_read(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    fitted(random_state=1).save(other)
    (folder / "classifier.safetensors").write_bytes((other / "classifier.safetensors").read_bytes())
    with pytest.raises(WeightsError, match=r"does not belong to classifier.json.*interrupted"):
        MILClassifier.load(folder)
    (folder / "classifier.json").unlink()
    with pytest.raises(ModelError, match=r"has no classifier.json"):
        MILClassifier.load(folder)
    with pytest.raises(ModelError, match=r"has no classifier.json"):
        MILClassifier.load(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["classifier.json", "classifier.safetensors"])
def test_damage_anywhere_is_noticed_or_harmless(folder: Path, name: str) -> None:
    path = folder / name
    whole = path.read_bytes()
    expected = MILClassifier.load(folder, device="cpu").predict_proba(COHORT.bags)
    rng = np.random.default_rng(0)
    for place in rng.integers(len(whole), size=60):
        other = bytes([whole[place] ^ 0xFF])
        for damaged in (whole[:place], whole[:place] + other + whole[place + 1 :]):
            path.write_bytes(damaged)
            with pytest.raises(ModelError):
                MILClassifier.load(folder)
    path.write_bytes(whole)
    np.testing.assert_array_equal(
        MILClassifier.load(folder, device="cpu").predict_proba(COHORT.bags), expected
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schema_version": 2}, "schema_version 2, and this xmag reads up to 1.*upgrade"),
        ({"schema_version": "1"}, "schema_version '1'"),
        ({"format": "other"}, "it has format 'other', not 'xmag.MILClassifier'"),
        ({"classes": [["str", "a"]]}, "is damaged or was changed"),
        ({"classes": [["str", "a"], ["str", "a"]]}, "is damaged"),
        ({"classes": [["str", "a"], ["eval", "b"]]}, "is damaged"),
        ({"classes": [["int", True], ["int", 2]]}, "is damaged"),
        ({"classes": [["str", "a"], ["str", "b"], ["str", "c"]]}, "is damaged"),
        ({"classes": None}, "is damaged"),
        ({"class_prior": [0.5, 0.6]}, "is damaged"),
        ({"class_prior": [1.5, -0.5]}, "is damaged"),
        ({"in_dim": "4"}, "is damaged"),
        ({"in_dim": 5}, r"embed.0.weight has shape \(4, 4\), not \(4, 5\)"),
        ({"in_dim": 10**9}, "in_dim is 1000000000"),
        ({"in_dim": -4}, "in_dim is -4"),
        ({"aggregator": {"name": "abmil", "options": {"embed_dim": 2**20}}}, "has shape"),
        ({"aggregator": {"name": "abmil", "options": {"embed_dim": 10**30}}}, "embed_dim of"),
        ({"aggregator": {"name": "abmil", "options": {"depth": 1}}}, "no option 'depth'"),
        ({"aggregator": {"name": "abmil", "options": {"in_dim": 1}}}, "damaged"),
        ({"aggregator": {"name": "os.system", "options": {}}}, "aggregator is 'os.system'"),
        ({"aggregator": {"name": ["abmil"], "options": {}}}, "aggregator is"),
        ({"aggregator": {"name": "mean", "options": {"embed_dim": 4}}}, "is not expected"),
        ({"aggregator": ["abmil"]}, "is damaged"),
        ({"params": {"epochs": 3, "shell": "x"}}, r"parameters \['shell'\].*upgrade"),
        ({"params": []}, "is damaged"),
        ({"params": {"fusion": "middle"}}, r"fusion is 'middle'.*is damaged"),
        ({"fingerprint": [1]}, "is damaged"),
        ({"history": 3}, "is damaged"),
        ({"weights_sha256": None}, "does not belong"),
    ],
)
def test_a_description_that_was_changed_is_refused(
    folder: Path, fields: dict, message: str
) -> None:
    edit(folder, **fields)
    with pytest.raises(ModelError, match=message):
        MILClassifier.load(folder)


@pytest.mark.parametrize("text", ["", "[]", "3", "{", '{"format": NaN}', "[" * 100_000])
def test_what_is_no_description_is_refused(folder: Path, text: str) -> None:
    (folder / "classifier.json").write_text(text)
    with pytest.raises(ModelError, match=r"classifier.json"):
        MILClassifier.load(folder)


def test_weights_that_are_not_finite_or_not_these_are_refused(folder: Path) -> None:
    tensors = load_file(folder / "classifier.safetensors")
    rewrite(folder, {**tensors, "head.bias": torch.tensor([0.0, torch.nan])})
    with pytest.raises(WeightsError, match=r"values in 'head.bias' that are not finite"):
        MILClassifier.load(folder)
    rewrite(folder, {**tensors, "more": torch.zeros(1)})
    with pytest.raises(WeightsError, match="more is not expected"):
        MILClassifier.load(folder)
    rewrite(folder, {k: v for k, v in tensors.items() if k != "head.bias"})
    with pytest.raises(WeightsError, match=r"head.bias is missing"):
        MILClassifier.load(folder)
    rewrite(folder, {**tensors, "head.bias": torch.zeros(2, dtype=torch.int64)})
    with pytest.raises(WeightsError, match=r"head.bias is torch.int64, not torch.float32"):
        MILClassifier.load(folder)


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot be made"):
        fitted().save(tmp_path / "file")


@pytest.mark.parametrize("kind", [MILClassifier, MILRegressor, MILSurvival])
def test_a_folder_says_which_estimator_it_holds(kind: type, tmp_path: Path) -> None:
    y = {
        MILClassifier: COHORT.labels,
        MILRegressor: np.arange(12.0),
        MILSurvival: np.stack([np.arange(12) % 2, np.arange(12.0)], axis=1),
    }[kind]
    options = {"aggregator_options": OPTIONS["abmil"], "epochs": 2, "device": "cpu"}
    kind(**options).fit(COHORT.bags, y, validation=None).save(tmp_path)
    again = load_estimator(tmp_path, device="cpu")
    assert type(again) is kind
    np.testing.assert_array_equal(
        again.predict(COHORT.bags), kind.load(tmp_path, device="cpu").predict(COHORT.bags)
    )


def test_a_folder_of_no_estimator_or_several_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has none of them; expected one of classifier\.json"):
        load_estimator(tmp_path)
    fitted().save(tmp_path)
    (tmp_path / "survival.json").write_text("{}")
    with pytest.raises(ModelError, match=r"has classifier\.json and survival\.json"):
        load_estimator(tmp_path)
    own = fitted(aggregator=Own(), aggregator_options=None, batch_size=1)
    own.save(tmp_path / "own")
    again = load_estimator(tmp_path / "own", aggregator=Own(), device="cpu")
    np.testing.assert_array_equal(again.predict(COHORT.bags), own.predict(COHORT.bags))


def test_weights_lie_in_memory_as_those_that_were_trained(tmp_path: Path) -> None:
    """Elsewhere kernels take another way, and round otherwise."""
    fitted().save(tmp_path)
    again = MILClassifier.load(tmp_path, device="cpu")
    assert all(tensor.data_ptr() % 64 == 0 for tensor in again.aggregator_.state_dict().values())


def test_a_folder_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    """One whose parameters and head lack what later versions brought."""
    classifier = fitted()
    classifier.save(tmp_path)
    file = tmp_path / "classifier.json"
    values = json.loads(file.read_text())
    assert "head" not in values
    for name in ("ordinal", "fusion"):
        del values["params"][name]
    del values["temperature"]
    file.write_text(json.dumps(values))
    tensors = load_file(tmp_path / "classifier.safetensors")
    of_confidence = [name for name in tensors if name.startswith("xmag.confidence.")]
    assert of_confidence
    rewrite(tmp_path, {name: tensors[name] for name in tensors if name not in of_confidence})
    again = MILClassifier.load(tmp_path, device="cpu")
    assert (again.ordinal, again.fusion) == (False, "early")
    with pytest.raises(InputError, match="cannot tell what is novel"):
        again.novelty(COHORT.bags)
    np.testing.assert_array_equal(
        again.predict_proba(COHORT.bags), classifier.predict_proba(COHORT.bags)
    )
