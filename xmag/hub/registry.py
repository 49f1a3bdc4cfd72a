"""Registry of known models, and configuration of any: ViT, tiles it takes, terms of its weights."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from xmag import records
from xmag.errors import InputError, WeightsError
from xmag.geometry import TileSpec
from xmag.vit import CONFIGS, ViTConfig

DEFAULT_MODEL = "AI4PATH/XMAG"
MINI = "xmag-mini"
SCHEMA = "xmag-encoder"
"""The value of "format" in a config.json that xmag wrote."""

_OFFICIAL_TYPE = "xmag"
"""The "model_type" in the config.json of `DEFAULT_MODEL`."""

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A ViT, the tiles it wants, and how RGB in [0, 1] is normalised for it."""

    vit: ViTConfig
    tile_spec: TileSpec = field(default_factory=TileSpec)
    mean: tuple[float, float, float] = _IMAGENET_MEAN
    std: tuple[float, float, float] = _IMAGENET_STD

    def __post_init__(self) -> None:
        if self.tile_spec.size_px % self.vit.patch_px:
            raise InputError(
                f"tiles of {self.tile_spec.size_px} px do not divide into patches of"
                f" {self.vit.patch_px} px; expected a multiple"
            )
        numbers = (*self.mean, *self.std)
        known = all(isinstance(n, int | float) and math.isfinite(n) for n in numbers)
        if not known or len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise InputError(
                f"mean {self.mean} and std {self.std} do not normalise RGB; expected three numbers"
                " each, those of std positive"
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return records.to_dict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """The ModelConfig that `to_dict` described; InputError where a field does not fit.

        All of its fields have to be there. Others are left out: a config.json holds more.
        """
        return records.from_dict(cls, {item.name: values.get(item.name) for item in fields(cls)})


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownModel:
    """A model of the registry: its configuration and the terms of its weights."""

    config: ModelConfig
    terms: str


def _known() -> dict[str, KnownModel]:
    models = {
        DEFAULT_MODEL: KnownModel(
            config=ModelConfig(vit=CONFIGS["dinov2_vitb14"]),
            terms="PolyForm Noncommercial 1.0.0, as the reference code; read the model's page",
        ),
        "MahmoodLab/UNI2-h": KnownModel(
            config=ModelConfig(vit=CONFIGS["uni2_h"], tile_spec=TileSpec(mpp=0.5)),
            terms="CC-BY-NC-ND 4.0, gated: non-commercial academic research only, no sharing",
        ),
        MINI: KnownModel(
            config=ModelConfig(vit=CONFIGS["xmag_mini"]),
            terms="Apache-2.0; made from images under CC BY 3.0, see the model card",
        ),
    }
    for size, letter in (("small", "s"), ("base", "b"), ("large", "l"), ("giant", "g")):
        plain = replace(CONFIGS[f"dinov2_vit{letter}14"], position_rule="size")
        models[f"facebook/dinov2-{size}"] = KnownModel(
            config=ModelConfig(vit=plain), terms="Apache-2.0"
        )
        models[f"facebook/dinov2-with-registers-{size}"] = KnownModel(
            config=ModelConfig(vit=CONFIGS[f"dinov2_vit{letter}14_reg"]), terms="Apache-2.0"
        )
    return models


KNOWN: Mapping[str, KnownModel] = MappingProxyType(_known())
"""The models that need no configuration from the user, by Hub name.

facebook/dinov2-* follow the code that their repositories are made for (Hugging Face's
Dinov2Model), which resizes positions by "size".
"""

_BY_NAME: Mapping[str, ModelConfig] = MappingProxyType(
    {name: ModelConfig(vit=vit) for name, vit in CONFIGS.items()}
    | {"uni2_h": KNOWN["MahmoodLab/UNI2-h"].config}
)


def given_config(config: "ModelConfig | ViTConfig | str") -> ModelConfig:
    """The ModelConfig that a `config=` argument means; InputError where it means none."""
    if isinstance(config, ModelConfig):
        return config
    if isinstance(config, ViTConfig):
        return ModelConfig(vit=config)
    if isinstance(config, str) and config in _BY_NAME:
        return _BY_NAME[config]
    raise InputError(
        f"config={config!r} is unknown; expected one of {sorted(_BY_NAME)}, a ViTConfig or a"
        " ModelConfig"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedConfig:
    """Configuration of a model, its source, terms and lineage.

    `source` is "given" (config=), "read" (config.json), "registry" (known by name) or "assumed".
    """

    config: ModelConfig
    source: str
    terms: str | None = None
    trained: bool = True
    lineage: Mapping[str, Any] | None = None


def resolve_config(
    name: str, config_json: Path | None, given: "ModelConfig | ViTConfig | str | None"
) -> ResolvedConfig:
    """The configuration of a model: the given one, the registry's, config.json's, or an assumed.

    Assumed is `dinov2_vitb14`, for a bare checkpoint file and beside a config.json that names no
    model that xmag knows. Raises WeightsError for a config.json that is broken.
    """
    known = KNOWN.get(name)
    read = None if config_json is None else _read_config(config_json)
    terms = known.terms if known else (read.terms if read else None)
    trained = read.trained if read else True
    lineage = read.lineage if read else None
    if given is not None:
        return ResolvedConfig(
            config=given_config(given),
            source="given",
            terms=terms,
            trained=trained,
            lineage=lineage,
        )
    if known:
        return ResolvedConfig(config=known.config, source="registry", terms=terms)
    if read:
        return read
    return ResolvedConfig(config=_BY_NAME["dinov2_vitb14"], source="assumed")


def _read_config(path: Path) -> ResolvedConfig | None:
    try:
        values = records.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(
            f"{path} is no JSON ({error}); expected a model's config.json"
        ) from error
    if not isinstance(values, dict):
        raise WeightsError(
            f"{path} is neither a config of xmag nor of any other model; expected a JSON object"
        )
    try:
        if values.get("format") == SCHEMA:
            return ResolvedConfig(
                config=ModelConfig.from_dict(values),
                source="read",
                terms=values.get("terms"),
                trained=bool(values.get("trained", True)),
                lineage=values.get("lineage"),
            )
        if values.get("model_type") == _OFFICIAL_TYPE:
            # A copy of the official repository, whose own code reads the rest of its config.
            official = KNOWN[DEFAULT_MODEL]
            return ResolvedConfig(config=official.config, source="registry", terms=official.terms)
        if values.get("model_type") in ("dinov2", "dinov2_with_registers"):
            return ResolvedConfig(config=ModelConfig(vit=_dinov2_config(values)), source="read")
    except (InputError, KeyError, TypeError) as error:
        raise WeightsError(f"{path} describes no model that xmag can build: {error!r}") from error
    return None


def _dinov2_config(values: Mapping[str, Any]) -> ViTConfig:
    """The ViTConfig of a Hugging Face Dinov2Config, by the defaults of transformers."""
    expected = {"hidden_act": "gelu", "qkv_bias": True, "num_channels": 3}
    for key, value in expected.items():
        if values.get(key, value) != value:
            raise InputError(f"{key} is {values[key]!r}; expected {value!r}")
    registers = values["model_type"] == "dinov2_with_registers"
    width, patch_px = values["hidden_size"], values["patch_size"]
    swiglu = values.get("use_swiglu_ffn", False)
    hidden = int(width * values.get("mlp_ratio", 4))
    return ViTConfig(
        width=width,
        depth=values["num_hidden_layers"],
        heads=values["num_attention_heads"],
        mlp="swiglu" if swiglu else "gelu",
        # transformers' Dinov2SwiGLUFFN: two thirds, rounded up to a multiple of 8
        hidden=(int(hidden * 2 / 3) + 7) // 8 * 8 if swiglu else hidden,
        patch_px=patch_px,
        registers=values.get("num_register_tokens", 4) if registers else 0,
        position_grid=values["image_size"] // patch_px,
        position_rule="size_antialias" if registers else "size",
        eps=values.get("layer_norm_eps", 1e-6),
    )
