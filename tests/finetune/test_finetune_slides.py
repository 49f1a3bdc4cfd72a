"""Fine-tuning as a whole: from slides to a result that both loaders read."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.finetuning import LABELS, PATIENTS, QUICK, small_encoder, stores
from support.models import default_dtype, random_tiles
from support.slides import write_svs
from torch import nn

from xmag.encoder import load_model
from xmag.errors import InputError, MismatchError, ModelError, SlideError, XmagWarning
from xmag.extract import extract_features
from xmag.files import sha256_of
from xmag.finetune import (
    Augmentation,
    FinetuneResult,
    Settings,
    TileOptions,
    TileStore,
    finetune_slides,
    stored_tiles,
)
from xmag.finetune.gradients import seed_of
from xmag.finetune.network import TileNetwork
from xmag.mil import MILClassifier, MILOutput, aggregator
from xmag.training.augmentation import augment, draw

SMALL = {"aggregator": "mean", "groups": PATIENTS, "device": "cpu", "progress": False}


def tuned(**options: Any) -> FinetuneResult:
    options = {"settings": QUICK, **SMALL, **options}
    if "model" not in options:
        options["model"] = small_encoder()
    return finetune_slides(stores(), LABELS, **options)


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("slides")
    for number in range(4):
        write_svs(folder / f"{number}.svs", size=(1000, 600 + 224 * number), mpp=0.25)
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def from_slides(slides: list[Path]) -> FinetuneResult:
    return finetune_slides(
        slides, [1, 2, 1, 2], model=small_encoder(), validation=None,
        settings=QUICK, tiles=TileOptions(tissue=None), device="cpu",
    )  # fmt: skip


def test_a_folder_is_read_by_both_loaders_and_predicts_the_same(
    slides: list[Path], from_slides: FinetuneResult, tmp_path: Path
) -> None:
    from_slides.save(tmp_path / "tuned")
    encoder = load_model(tmp_path / "tuned", device="cpu")
    classifier = MILClassifier.load(tmp_path / "tuned", device="cpu")
    made, loaded = (
        [extract_features(path, model=e, tissue=None) for path in slides]
        for e in (from_slides.encoder, encoder)
    )
    for one, other in zip(made, loaded, strict=True):
        assert np.array_equal(one.features, other.features)
        assert one.provenance.fingerprint == other.provenance.fingerprint
    expected = from_slides.classifier.predict_proba(made)
    assert np.abs(classifier.predict_proba(loaded) - expected).max() < 1e-6
    assert expected.shape == (4, 2)
    assert classifier.classes_.tolist() == [1, 2]
    assert classifier.history_[-1]["train_loss"] == from_slides.history[-1].train_loss
    assert classifier.attention(loaded[0]).scores.sum() == pytest.approx(1, abs=1e-5)


def test_the_encoder_says_what_it_was_made_from(
    from_slides: FinetuneResult, tmp_path: Path
) -> None:
    about = from_slides.encoder.provenance
    assert about["name"] == "random, fine-tuned"
    assert about["lineage"]["from"] == {
        "name": "random", "revision": None, "weights_sha256": "seed 0"
    }  # fmt: skip
    assert about["lineage"]["method"] == "finetune"
    assert about["lineage"]["settings"]["learning_rate"] == 1e-3
    assert about["lineage"]["train_slides"] == 4
    from_slides.save(tmp_path)
    assert about["weights_sha256"] == sha256_of(tmp_path / "model.safetensors")
    loaded = load_model(tmp_path, device="cpu").provenance
    for key in ("weights_sha256", "lineage", "terms", "trained", "key_layout", "config"):
        assert loaded[key] == about[key]
    assert json.loads(json.dumps(dict(loaded))) == loaded


def test_bags_of_another_encoder_are_refused(
    slides: list[Path], from_slides: FinetuneResult
) -> None:
    bag = extract_features(slides[0], model=small_encoder(), tissue=None)
    with pytest.raises(MismatchError, match="weights_sha256"):
        from_slides.classifier.predict([bag])


def test_the_given_encoder_and_aggregator_stay_as_they_are() -> None:
    encoder, head = small_encoder(), aggregator("mean", in_dim=32, classes=2)
    before = [t.clone() for m in (encoder.vit, head) for t in m.state_dict().values()]
    result = tuned(model=encoder, aggregator=head)
    after = [t for m in (encoder.vit, head) for t in m.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not torch.equal(result.encoder.vit.norm.weight, encoder.vit.norm.weight)
    assert not torch.equal(result.classifier.aggregator_.head.weight, head.head.weight)


def test_nothing_of_the_program_changes() -> None:
    encoder = small_encoder()
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    tuned(model=encoder, aggregator="abmil")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    assert torch.is_grad_enabled()


def weights_of(result: FinetuneResult) -> list[torch.Tensor]:
    modules = (result.encoder.vit, result.classifier.aggregator_)
    return [t for module in modules for t in module.state_dict().values()]


def test_the_same_seed_gives_the_same_weights_and_another_does_not() -> None:
    one, same, other = (tuned(random_state=seed) for seed in (3, 3, 4))
    pairs = list(zip(weights_of(one), weights_of(same), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert [r.train_loss for r in one.history] == [r.train_loss for r in same.history]
    assert not torch.equal(weights_of(one)[0], weights_of(other)[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_of_the_program_changes_no_number(dtype: torch.dtype) -> None:
    settings = replace(QUICK, augmentation=Augmentation())
    model = small_encoder()
    options = {"model": model, "settings": settings, "aggregator": "abmil", "random_state": 3}
    expected = tuned(**options)
    with default_dtype(dtype):
        found = tuned(**options)
    pairs = zip(weights_of(found), weights_of(expected), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_size_of_chunks_changes_no_more_than_rounding() -> None:
    whole, small = (
        tuned(
            settings=Settings(
                **{**QUICK.to_dict(), "chunk_tiles": n, "augmentation": Augmentation()}
            )
        )
        for n in (64, 2)
    )
    for a, b in zip(weights_of(whole), weights_of(small), strict=True):
        assert (a - b).abs().max() < 2e-3  # AdamW's first steps are as large for any gradient
    assert small.history[0].train_loss == pytest.approx(whole.history[0].train_loss, rel=1e-4)


@pytest.mark.parametrize("mode", ["exact", "sampled"])
def test_it_learns_and_returns_the_best_epoch(mode: str) -> None:
    settings = Settings(
        epochs=12, patience=None, slides_per_step=2, sampled_tiles=3, learning_rate=1e-3,
        classifier_learning_rate=5e-3, ema=0.5,
    )  # fmt: skip
    result = tuned(mode=mode, settings=settings)
    losses = [row.validation_loss for row in result.history]
    assert losses[-1] < 0.5 * losses[0]
    assert result.best_epoch == int(np.argmin(losses))
    assert result.history[-1].train_loss < 0.5 * result.history[0].train_loss
    assert result.history[result.best_epoch].validation_auroc == 1.0
    train = [n for n in range(8) if n not in held_out(result)]
    per_slide = [min(3, len(s)) if mode == "sampled" else len(s) for s in stores()]
    assert {row.tiles for row in result.history} == {sum(per_slide[n] for n in train)}


def held_out(result: FinetuneResult) -> list[int]:
    """A quarter of four patients is one: the slides that one of them has."""
    count = result.encoder.provenance["lineage"]["validation_slides"]
    tiles = sum(len(s) for s in stores()) - max(row.tiles for row in result.history)
    for first in range(0, 8, 2):
        if count == 2 and sum(len(s) for s in stores()[first : first + 2]) == tiles:
            return [first, first + 1]
    return [0, 1]


def test_training_stops_when_validation_does_not_improve() -> None:
    settings = Settings(
        epochs=30, patience=2, slides_per_step=2, learning_rate=0, classifier_learning_rate=0,
        augmentation=None,
    )  # fmt: skip
    with pytest.warns(XmagWarning, match="epoch 6 of 8 is kept, the first that may be") as found:
        result = tuned(settings=settings)
    assert found[0].filename == __file__  # where finetune_slides is called
    assert result.best_epoch == 5
    assert [row.epoch for row in result.history] == list(range(8))


def test_returned_are_the_weights_of_the_best_epoch() -> None:
    """A learning rate at which later epochs are worse."""
    settings = Settings(
        epochs=6, patience=None, slides_per_step=2, learning_rate=0.1,
        classifier_learning_rate=0.3, ema=None, warmup=0.5,
    )  # fmt: skip
    whole = tuned(settings=settings, random_state=5)
    assert whole.best_epoch < 5
    validation = held_out_by_loss(whole)
    assert validation == pytest.approx(whole.history[whole.best_epoch].validation_loss, rel=1e-3)


def held_out_by_loss(result: FinetuneResult) -> float:
    """The log loss of the result on the pair of slides where it is what history says."""
    expected = result.history[result.best_epoch].validation_loss
    losses = []
    for first in range(0, 8, 2):
        bags = [result.encoder.embed(s.tiles).numpy() for s in stores()[first : first + 2]]
        proba = result.classifier.predict_proba(bags)
        losses.append(float(-np.log(proba[[0, 1], [0, 1]]).mean()))
    return min(losses, key=lambda loss: abs(loss - expected))


def test_frozen_blocks_stay_and_the_rest_learns() -> None:
    encoder = small_encoder()
    settings = Settings(epochs=1, slides_per_step=2, frozen_blocks=1, learning_rate=1e-2)
    state = tuned(model=encoder, settings=settings).encoder.vit.state_dict()
    for key, before in encoder.vit.state_dict().items():
        trains = key.startswith(("blocks.1.", "norm."))
        assert torch.equal(state[key], before) != trains, key


def test_class_weights_balance_the_loss() -> None:
    """Without learning the loss is known: each class counts the same, whatever its slides."""
    labels = ["a", "b", "b", "b"]
    given = stores(4)
    still = {"epochs": 1, "learning_rate": 0, "classifier_learning_rate": 0, "augmentation": None}
    found = {}
    for how in ("balanced", None, {"a": 3.0}):
        settings = Settings(**still, class_weight=how)
        head = aggregator("mean", in_dim=32, classes=2, dropout=0.0)
        result = finetune_slides(
            given, labels, model=small_encoder(), aggregator=head, validation=None,
            settings=settings, device="cpu",
        )  # fmt: skip
        bags = [result.encoder.embed(s.tiles).numpy() for s in given]
        own = result.classifier.predict_proba(bags)[range(4), [0, 1, 1, 1]]
        weights = {"balanced": [2, 2 / 3, 2 / 3, 2 / 3], None: [1] * 4}.get(
            how if not isinstance(how, dict) else "", [3, 1, 1, 1]
        )
        found[str(how)] = result.history[0].train_loss
        assert found[str(how)] == pytest.approx(float((-np.log(own) * weights).mean()), rel=1e-4)
    assert len(set(found.values())) == 3


class Mine(nn.Module):
    """An aggregator of the user's own: the mean, without more."""

    batched = True

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(32, 2)

    def forward(self, features, mask, labels=None):
        return MILOutput(logits=self.head(features.mean(dim=1)), attention=None)


@pytest.mark.parametrize("slide", [0, 3])
def test_the_first_step_learns_from_the_tiles_as_drawn(slide: int) -> None:
    """Its loss is that of the untouched weights on tiles that are augmented here, by hand."""
    head = aggregator("mean", in_dim=32, classes=2, dropout=0.0)
    given = stores(2, seed=slide)
    settings = Settings(epochs=1, slides_per_step=2, learning_rate=1e-3, class_weight=None)
    result = finetune_slides(
        given, ["a", "b"], model=small_encoder(), aggregator=head, validation=None,
        settings=settings, random_state=7, device="cpu",
    )  # fmt: skip
    encoder = small_encoder()
    mean, std = (np.array(v) for v in (encoder.config.mean, encoder.config.std))
    losses = []
    colours = dict.fromkeys(("brightness", "contrast", "saturation"), 0.05)
    mild = Augmentation(turns=True, hue=0.02, **colours)
    for index, store in enumerate(given):
        draws = draw(seed_of("augment", 7), 0, range(len(store)), index, augmentation=mild)
        tiles = torch.from_numpy(store.tiles)
        pixels = augment(tiles, draws, dtype=torch.float32).numpy()
        images = torch.from_numpy(((pixels / 255 - mean) / std).transpose(0, 3, 1, 2)).float()
        features = encoder.vit(images)[None, :, 0]
        logits = head.eval()(features, torch.ones(1, len(store), dtype=torch.bool)).logits
        losses.append(-torch.log_softmax(logits[0], 0)[index].item())
    assert result.history[0].train_loss == pytest.approx(sum(losses) / 2, rel=1e-4)


def test_an_aggregator_of_the_users_own_is_trained_and_saved(tmp_path: Path) -> None:
    result = tuned(aggregator=Mine())
    result.save(tmp_path)
    loaded = MILClassifier.load(tmp_path, aggregator=Mine(), device="cpu")
    bag = result.encoder.embed(stores()[0].tiles).numpy()
    assert np.array_equal(loaded.predict_proba([bag]), result.classifier.predict_proba([bag]))


def test_slides_to_validate_with_may_be_given() -> None:
    others = stores(2, seed=50)
    result = tuned(validation=(others, ["a", "b"]))
    assert result.encoder.provenance["lineage"]["train_slides"] == 8
    assert result.encoder.provenance["lineage"]["validation_slides"] == 2
    assert result.history[0].validation_loss is not None
    with pytest.raises(InputError, match=r"'slide 3'.*has content that the training"):
        tuned(validation=(stores()[3:5], ["a", "b"]))
    with pytest.raises(InputError, match="patient 0 that the training"):
        tuned(validation=(others, ["a", "b"], [0, 99]))


def test_without_groups_a_warning_says_what_may_be_wrong() -> None:
    with pytest.warns(XmagWarning, match="no groups were given") as caught:
        tuned(groups=None)
    assert caught[0].filename == __file__


def test_no_validation_trains_all_epochs_on_all_slides() -> None:
    result = tuned(validation=None)
    assert result.best_epoch is None
    assert [row.validation_loss for row in result.history] == [None, None]
    assert result.history[0].tiles == sum(len(s) for s in stores())


def test_tiles_that_are_kept_serve_several_runs(slides: list[Path]) -> None:
    encoder = small_encoder()
    options = TileOptions(tissue=None)
    with stored_tiles(slides, spec=encoder.tile_spec, options=options) as kept:
        one, other = (
            finetune_slides(
                source, [1, 2, 1, 2], model=encoder, validation=None, settings=QUICK,
                tiles=options, device="cpu",
            )
            for source in (kept, slides)
        )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(weights_of(one), weights_of(other), strict=True))
    assert one.classifier.fingerprint_ == other.classifier.fingerprint_ is not None


def test_out_of_memory_halves_the_chunk_and_changes_no_weight(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = tuned(
        settings=Settings(**{**QUICK.to_dict(), "chunk_tiles": 2, "augmentation": None})
    )
    forward = TileNetwork.forward

    def limited(self, tiles, draws=None):
        if len(tiles) > 3:
            raise torch.cuda.OutOfMemoryError("no room")
        return forward(self, tiles, draws)

    monkeypatch.setattr(TileNetwork, "forward", limited)
    found = tuned(settings=Settings(**{**QUICK.to_dict(), "chunk_tiles": 8, "augmentation": None}))
    assert all(
        torch.equal(a, b) for a, b in zip(weights_of(found), weights_of(expected), strict=True)
    )
    assert [r.getMessage().rsplit(" ", 2)[-2] for r in caplog.records] == ["4", "2"]


def test_a_single_tile_that_does_not_fit_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(self, tiles, draws=None):
        raise torch.cuda.OutOfMemoryError("no room")

    monkeypatch.setattr(TileNetwork, "forward", never)
    with pytest.raises(ModelError, match="no memory left for the graph of a single tile"):
        tuned()


def test_a_loss_that_is_not_finite_names_the_slide() -> None:
    settings = Settings(epochs=3, slides_per_step=1, learning_rate=1e20, clip=None, ema=None)
    with pytest.raises(ModelError, match="the loss is nan at slide 'slide"):
        tuned(settings=settings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": ["a"] * 8}, "two or more"),
        ({"labels": ["a", "b"]}, "2 entries for 8"),
        ({"groups": [1, 2]}, "2 entries for 8"),
        ({"groups": [*PATIENTS[:-1], f" {PATIENTS[-1]}"]}, r"groups\[7\] is .*with blanks"),
        ({"labels": [*LABELS[:-1], "nan"]}, r"labels\[7\] is 'nan', a missing value"),
        ({"labels": np.linspace(0, 1, 8)}, "not whole.*MILRegressor"),
        ({"validation": 1.5}, "expected a fraction"),
        ({"validation": (stores(2, seed=9), ["a", "c"])}, r"'c'.*expected one of the classes"),
        ({"groups": [0] * 8}, "can be held out"),
        ({"mode": "all"}, "expected one of exact, sampled"),
        ({"model": 3}, "expected an Encoder"),
        ({"slides": [*stores(7), TileStore(random_tiles(2, size_px=28), "s")]}, "wants 56 px"),
        ({"aggregator": "median"}, "expected one of"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    given = {
        "slides": stores(), "labels": LABELS, "model": small_encoder(), "settings": QUICK,
        **SMALL, **options,
    }  # fmt: skip
    with pytest.raises(InputError, match=message):
        finetune_slides(given.pop("slides"), given.pop("labels"), **given)


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 0}, {"slides_per_step": 1.5}, {"patience": 0}, {"chunk_tiles": 0},
        {"learning_rate": -1}, {"layer_decay": 0}, {"warmup": 1}, {"clip": 0}, {"ema": 1},
        {"precision": "half"},
    ],
)  # fmt: skip
def test_a_setting_out_of_range_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=rf"Settings\.{next(iter(options))} is"):
        Settings(**options)


def test_a_slide_that_is_missing_is_named(slides: list[Path]) -> None:
    with pytest.raises(SlideError, match=r"gone\.svs"):
        finetune_slides(
            [*slides, "gone.svs"], [1, 2, 1, 2, 1], model=small_encoder(), validation=None
        )


def test_a_rounded_encoder_is_taken_with_a_warning() -> None:
    with pytest.warns(XmagWarning, match=r"bfloat16.*load it with dtype") as caught:
        tuned(model=small_encoder(dtype="bfloat16"))
    assert caught[0].filename == __file__
