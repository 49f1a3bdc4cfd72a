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
SCHEMA = "xmag-encoder"
"""The value of "format" in a config.json that xmag wrote."""
FORMAT = records.Format(
    name=SCHEMA,
    version=1,
    writer="Encoder.save",
    remedy="save the model again",
    error=WeightsError,
)

MINI = "xmag-mini"
"""A small trained ViT inside the package, so that everything runs without a network.

Its model card is docs/models.md. The weights are stored in float16, and computed with in float32.
"""
MINI_WEIGHTS = Path(__file__).with_name("mini.safetensors")
MINI_SHA256 = "7c70c6c0caf86dca66cfea67a9de99532cb88ea82f298902753d45ea0f77ac4e"

_OFFICIAL_TYPE = "xmag"
"""The "model_type" in the config.json of `DEFAULT_MODEL`."""

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig(records.Record):
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

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """The ModelConfig that `to_dict` described; InputError where a field does not fit.

        All of its fields have to be there. Others are left out: a config.json holds more.
        """
        return records.from_dict(cls, {item.name: values.get(item.name) for item in fields(cls)})


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


def _known(vit: ViTConfig, terms: str, *, mpp: float = 2.0) -> ResolvedConfig:
    config = ModelConfig(vit=vit, tile_spec=TileSpec(mpp=mpp))
    return ResolvedConfig(config=config, source="registry", terms=terms)


_UNI = "MahmoodLab/UNI2-h"
_SIZES = ("small", "base", "large", "giant")

KNOWN: Mapping[str, ResolvedConfig] = MappingProxyType(
    {
        DEFAULT_MODEL: _known(
            CONFIGS["dinov2_vitb14"],
            "PolyForm Noncommercial 1.0.0, as the reference code; read the model's page",
        ),
        _UNI: _known(
            CONFIGS["uni2_h"],
            "CC-BY-NC-ND 4.0, gated: non-commercial academic research only, no sharing",
            mpp=0.5,
        ),
        MINI: _known(
            CONFIGS["xmag_mini"],
            "Apache-2.0; made from images under CC BY 3.0, see the model card",
        ),
    }
    | {
        f"facebook/dinov2-{size}": _known(
            replace(CONFIGS[f"dinov2_vit{size[0]}14"], position_rule="size"), "Apache-2.0"
        )
        for size in _SIZES
    }
    | {
        f"facebook/dinov2-with-registers-{size}": _known(
            CONFIGS[f"dinov2_vit{size[0]}14_reg"], "Apache-2.0"
        )
        for size in _SIZES
    }
)
"""The models that need no configuration from the user, by Hub name.

facebook/dinov2-* follow the code that their repositories are made for (Hugging Face's
Dinov2Model), which resizes positions by "size".
"""


def given_config(config: ModelConfig | ViTConfig | str) -> ModelConfig:
    """The ModelConfig that a `config=` argument means; InputError where it means none."""
    if isinstance(config, ModelConfig):
        return config
    if isinstance(config, ViTConfig):
        return ModelConfig(vit=config)
    if isinstance(config, str) and config in CONFIGS:
        # UNI2-h alone is not for tiles at 2.0 µm/px.
        return KNOWN[_UNI].config if config == "uni2_h" else ModelConfig(vit=CONFIGS[config])
    raise InputError(
        f"config={config!r} is unknown; expected one of {sorted(CONFIGS)}, a ViTConfig or a"
        " ModelConfig"
    )


def resolve_config(
    name: str, config_json: Path | None, given: ModelConfig | None
) -> ResolvedConfig:
    """The configuration of a model: the given one, the registry's, config.json's, or an assumed.

    Assumed is `dinov2_vitb14`, for a bare checkpoint file and beside a config.json that names no
    model that xmag knows. Raises WeightsError for a config.json that is broken.
    """
    read = None if config_json is None else _read_config(config_json)
    assumed = ResolvedConfig(config=given_config("dinov2_vitb14"), source="assumed")
    found = KNOWN.get(name) or read or assumed
    return found if given is None else replace(found, config=given, source="given")


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
            # Those that earlier versions wrote do not say which version they have.
            values = FORMAT.opened({"schema_version": 1, **values}, str(path))
            return ResolvedConfig(
                config=ModelConfig.from_dict(values),
                source="read",
                terms=values.get("terms"),
                trained=bool(values.get("trained", True)),
                lineage=values.get("lineage"),
            )
        if values.get("model_type") == _OFFICIAL_TYPE:
            # A copy of the official repository, whose own code reads the rest of its config.
            return KNOWN[DEFAULT_MODEL]
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
