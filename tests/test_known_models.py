"""The registry: one table of known models, to which other packages add."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from support.models import TINY, random_state

from xmag.encoder import load_model
from xmag.errors import InputError, XmagWarning
from xmag.geometry import TileSpec
from xmag.hub import fetch, registry
from xmag.hub.configs import resolve_config
from xmag.hub.fetch import LocalModel
from xmag.hub.registry import DEFAULT_MODEL, KNOWN, KnownModel, ModelConfig, known_models
from xmag.vit import ViTConfig, empty_vit


def _on_the_hub(
    repo: str,
    vit: ViTConfig,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    config: dict[str, Any] | None = None,
) -> None:
    """Let a repository have random weights of this ViT, and this config.json."""
    save_file(random_state(vit), folder / "model.safetensors")
    path = folder / "config.json" if config else None
    if path:
        path.write_text(json.dumps(config))

    def from_hub(name: str, *_: object, **__: object) -> LocalModel:
        assert name == repo
        return LocalModel(name=name, weights=folder / "model.safetensors", config_json=path)

    monkeypatch.setattr(fetch, "_from_hub", from_hub)


class _EntryPoint:
    """Stands for what importlib.metadata finds."""

    def __init__(self, given: object) -> None:
        self.value, self.given = "other.package:models", given

    def load(self) -> object:
        if isinstance(self.given, Exception):
            raise self.given
        return self.given


THEIRS = KnownModel(
    name="Theirs",
    repo="theirs/vit",
    config=ModelConfig(vit=TINY, tile_spec=TileSpec(mpp=1.0, size_px=70), mean=(0.5, 0.5, 0.5)),
    mpp_source="stated",
    terms="MIT",
    gated=False,
    checked="by them",
)


@pytest.mark.parametrize("given", [THEIRS, (THEIRS,)], ids=["one", "several"])
def test_an_installed_package_adds_models(
    given: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "entry_points", lambda group: [_EntryPoint(given)])
    assert known_models()[-1] == THEIRS
    _on_the_hub("theirs/vit", TINY, tmp_path, monkeypatch)
    for name in ("Theirs", "theirs/vit", "hf-hub:theirs/vit"):
        encoder = load_model(name, device="cpu")
        assert encoder.config == THEIRS.config
        assert encoder.provenance["terms"] == "MIT"
        assert encoder.provenance["name"] == "theirs/vit"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (RuntimeError("broken"), r"other\.package:models.*cannot be read.*broken"),
        ([3], "gives 3, which is no KnownModel"),
        (replace(THEIRS, name="UNI"), "'UNI'.*name of another"),
        (replace(THEIRS, repo=DEFAULT_MODEL), "name of another"),
    ],
)
def test_a_package_whose_models_make_no_sense_is_left_out_with_a_warning(
    given: object, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "entry_points", lambda group: [_EntryPoint(given)])
    with pytest.warns(XmagWarning, match=said):
        assert list(known_models()) == list(KNOWN.values())


def test_known_models_are_a_table_and_the_page_shows_it() -> None:
    models = known_models()
    assert isinstance(models, tuple)
    lines = repr(models).splitlines()
    assert len(lines) == 1 + len(models)
    assert lines[0].split()[:2] == ["name", "repository"]
    page = (Path(__file__).parents[1] / "docs" / "models.md").read_text("utf-8")
    assert models.to_markdown() in page, "put xmag.known_models().to_markdown() into docs/models.md"


def test_known_models_can_be_built_and_say_what_they_rest_on() -> None:
    names = [name for model in known_models() for name in {model.name, model.repo}]
    assert len(set(names)) == len(names)
    for model in known_models():
        assert model.terms
        assert model.checked
        assert model.revision is None or len(model.revision) == 40
        if model.config is not None:
            assert model.config.tile_spec.size_px % model.config.vit.patch_px == 0


# Millions of parameters, as their authors or hubs state them.
PARAMETERS = {
    "UNI": 303, "UNI2-h": 681, "Virchow2": 631, "H-optimus-0": 1135, "H0-mini": 86,
    "Prov-GigaPath": 1135, "GigaPath-Flash": 21.7, "Phikon-v2": 303, "Hibou-B": 85.7,
    "kaiko-S16": 21.7, "DistillPath-KS16": 21.7, "Midnight-12k": 1136,
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_known_model_has_the_published_number_of_parameters(name: str) -> None:
    config = registry.find_known(name).config  # type: ignore[union-attr]
    count = sum(t.numel() for t in empty_vit(config.vit).parameters())  # type: ignore[union-attr]
    assert count / 1e6 == pytest.approx(PARAMETERS[name], rel=0.01)


def test_a_known_name_brings_pooling_and_normalisation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the size of its table of positions comes from its repository, where that tells."""
    known = registry.find_known("Midnight-12k")
    small = replace(known.config.vit, width=32, depth=2, heads=2, hidden=88)  # type: ignore[union-attr]
    midnight = replace(known, config=replace(known.config, vit=small))  # type: ignore[type-var]
    monkeypatch.setattr(registry, "KNOWN", {**KNOWN, midnight.repo: midnight})
    config = {"model_type": "dinov2", "hidden_size": 32, "num_hidden_layers": 2,
              "num_attention_heads": 2, "patch_size": 14, "image_size": 224,
              "use_swiglu_ffn": True}  # fmt: skip
    saved = replace(small, position_grid=16)
    _on_the_hub("kaiko-ai/midnight", saved, tmp_path, monkeypatch, config)
    encoder = load_model("kaiko-ai/midnight", device="cpu")
    assert (encoder.embed_dim, encoder.pooling, encoder.tile_spec.mpp) == (64, "token+mean", 0.5)
    assert encoder.config.mean == (0.5, 0.5, 0.5)
    assert encoder.provenance["config_source"] == "registry"


def test_a_known_model_that_xmag_cannot_run_says_why() -> None:
    for name in ("RudolfV-2-S", "Aignostics/RudolfV-2-S"):
        with pytest.raises(InputError, match=r"cannot run it: it has rotary.*object of your own"):
            load_model(name)


def test_a_tile_spec_takes_the_place_of_the_known_one(tmp_path: Path) -> None:
    spec = TileSpec(mpp=1.0, size_px=112)
    found = resolve_config(DEFAULT_MODEL, None, None, spec)
    assert (found.config.tile_spec, found.source) == (spec, "given")
    with pytest.raises(InputError, match="113 px do not divide"):
        resolve_config(DEFAULT_MODEL, None, None, TileSpec(size_px=113))
