"""Configuration of a model: given, known by name, or read from a config.json.

Those of xmag, of transformers and of timm are read.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from xmag import records
from xmag.errors import InputError, MissingExtraError, ModelError, WeightsError
from xmag.geometry import TileSpec
from xmag.hub.registry import (
    DEFAULT_MODEL,
    FORMAT,
    IMAGENET,
    KNOWN,
    RGB,
    SCHEMA,
    ModelConfig,
    find_known,
)
from xmag.vit import CONFIGS, ViTConfig

PREPROCESSOR = "preprocessor_config.json"
"""File beside a config.json of transformers, with the normalisation."""

TIMM = "timm:"
_OFFICIAL_TYPE = "xmag"
"""The "model_type" in the config.json of `DEFAULT_MODEL`."""

_SIZES: Mapping[str, tuple[int, int, int, float]] = {
    "tiny": (192, 12, 3, 4.0),
    "small": (384, 12, 6, 4.0),
    "base": (768, 12, 12, 4.0),
    "large": (1024, 24, 16, 4.0),
    "huge": (1280, 32, 16, 4.0),
    "giant": (1408, 40, 16, 48 / 11),
}
"""Width, depth, heads and ratio of the MLP of timm's ViTs (timm/models/vision_transformer.py)."""

_PLAIN = re.compile(r"vit_([a-z]+)_patch(\d+)_(?:reg(\d+)_)?(dinov2|\d+)")
_NEEDED = {"in_chans": 3, "class_token": True, "qkv_bias": True, "fc_norm": False}
"""Arguments of timm's ViT that have to be these for ours to compute the same."""
_TAKEN = {
    *("embed_dim", "depth", "num_heads", "mlp_ratio", "patch_size", "img_size", "init_values"),
    *("reg_tokens", "no_embed_class", "global_pool"),
}
_WITHOUT_EFFECT = {"num_classes", "dynamic_img_size", "strict_img_size", "weight_init"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TimmConfig(records.Record):
    """A model that timm itself runs, the tiles it wants, and how RGB in [0, 1] is normalised.

    `model_args` are more keyword arguments of timm.create_model, as JSON text.
    """

    architecture: str
    tile_spec: TileSpec
    model_args: str = "{}"
    mean: RGB = IMAGENET[0]
    std: RGB = IMAGENET[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedConfig:
    """Configuration of a model, its source, terms and lineage.

    `source` is "given" (config= or tile_spec=), "read" (config.json), "registry" (known by name) or
    "assumed". `heads` are the first names of parameters that no embedding depends on;
    `knows_mpp` is False where nothing says at which µm/px the model takes tiles.
    """

    config: ModelConfig | TimmConfig
    source: str
    terms: str | None = None
    trained: bool = True
    lineage: Mapping[str, Any] | None = None
    heads: tuple[str, ...] = ()
    knows_mpp: bool = True


def given_config(config: ModelConfig | TimmConfig | ViTConfig | str) -> ModelConfig | TimmConfig:
    """The configuration that a `config=` argument means; InputError where it means none."""
    if isinstance(config, ModelConfig | TimmConfig):
        return config
    if isinstance(config, ViTConfig):
        return ModelConfig(vit=config)
    if isinstance(config, str) and config in CONFIGS:
        # UNI2-h alone is not for tiles at 2.0 µm/px.
        uni = KNOWN["MahmoodLab/UNI2-h"].config
        return uni if uni and config == "uni2_h" else ModelConfig(vit=CONFIGS[config])
    raise InputError(
        f"config={config!r} is unknown; expected one of {sorted(CONFIGS)}, a ViTConfig, a"
        f' ModelConfig, or "{TIMM}NAME" for an architecture of timm'
    )


def resolve_config(
    name: str,
    config_json: Path | Mapping[str, Any] | None,
    given: ModelConfig | TimmConfig | None,
    tile_spec: TileSpec | None = None,
) -> ResolvedConfig:
    """The configuration of a model: the given one, the registry's, config.json's, or an assumed.

    Assumed is `dinov2_vitb14`, for a bare checkpoint file and beside a config.json that names no
    model that xmag knows. A `tile_spec` takes the place of the configuration's. Raises WeightsError
    for a config.json that is broken, InputError where no µm/px is known and none is given.
    """
    known = find_known(name)
    try:
        read = None if config_json is None else _read_config(config_json)
    except WeightsError:
        if known is None:
            raise
        read = None  # what is known by name needs no config.json
    assumed = ResolvedConfig(config=given_config("dinov2_vitb14"), source="assumed")
    found = read or assumed
    if known is not None and known.config is not None:
        named = known.config
        if read is not None and isinstance(read.config, ModelConfig):  # the repository knows best
            grid = read.config.vit.position_grid
            named = replace(named, vit=replace(named.vit, position_grid=grid))
        heads = () if read is None else read.heads
        found = ResolvedConfig(config=named, source="registry", terms=known.terms, heads=heads)
    if given is not None:
        found = replace(found, config=given, source="given", knows_mpp=True)
    if tile_spec is not None:
        config = replace(found.config, tile_spec=tile_spec)
        return replace(found, config=config, source="given", knows_mpp=True)
    if not found.knows_mpp:
        size_px = found.config.tile_spec.size_px
        raise InputError(
            f"nothing says at which µm/px {name} takes its tiles of {size_px} px; give it, as in"
            f" tile_spec=TileSpec(mpp=0.5, size_px={size_px})"
        )
    return found


def timm_values(name: str) -> Mapping[str, Any]:
    """Configuration of a model of timm ("timm:NAME"), as a config.json would have it.

    "hf_hub_id" is the repository of its weights. Without timm that alone is known, and only for a
    name with its tag. Raises MissingExtraError, or ModelError for a name that timm does not know.
    """
    architecture, _, tag = name.removeprefix(TIMM).partition(".")
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # RuntimeError: of a torchvision that does not fit
        if tag:
            return {"hf_hub_id": f"timm/{architecture}.{tag}"}
        raise MissingExtraError(
            f"{name!r} is a model of timm, which cannot be imported ({error}): run pip install timm"
            " (the extra xmag[timm]), or give its whole name with the tag, as in"
            f" {TIMM}{architecture}.TAG, by which xmag runs plain ViTs itself"
        ) from error
    try:
        about = timm.get_pretrained_cfg(name.removeprefix(TIMM))
    except RuntimeError as error:
        raise ModelError(f"timm refuses {name!r}: {error}") from error
    if about is None:
        raise ModelError(f"timm knows no {architecture!r}; expected one of timm.list_models()")
    values = about.to_dict()
    return {
        "architecture": architecture,
        "pretrained_cfg": values,
        "num_classes": values.get("num_classes", 0),
        "hf_hub_id": values.get("hf_hub_id"),
    }


def _read_config(source: Path | Mapping[str, Any]) -> ResolvedConfig | None:
    images: Mapping[str, Any] = {}
    if isinstance(source, Path):
        where, values = str(source), _object_in(source)
        if (beside := source.with_name(PREPROCESSOR)).is_file():
            images = _object_in(beside)
    else:
        where, values = "what timm says", source
    try:
        return _config_of(values, images, where)
    except (InputError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{where} describes no model that xmag can build: {error!r}") from error


def _object_in(path: Path) -> Mapping[str, Any]:
    try:
        values = records.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{path} is no JSON ({error}); expected a {path.name}") from error
    if not isinstance(values, dict):
        raise WeightsError(
            f"{path} is neither a config of xmag nor another's; expected a JSON object"
        )
    return values


def _config_of(
    values: Mapping[str, Any], images: Mapping[str, Any], where: str
) -> ResolvedConfig | None:
    """The configuration that a config.json and a preprocessor_config.json describe."""
    kind = values.get("model_type")
    if values.get("format") == SCHEMA:
        # Those that earlier versions wrote do not say which version they have.
        values = FORMAT.opened({"schema_version": 1, **values}, where)
        return ResolvedConfig(
            config=ModelConfig.from_dict(values),
            source="read",
            terms=values.get("terms"),
            trained=bool(values.get("trained", True)),
            lineage=values.get("lineage"),
        )
    if kind == _OFFICIAL_TYPE:
        # A copy of the official repository, whose own code reads the rest of its config.
        known = KNOWN[DEFAULT_MODEL]
        assert known.config is not None
        return ResolvedConfig(config=known.config, source="registry", terms=known.terms)
    if kind in ("vit", "dinov2", "dinov2_with_registers"):
        mean, std = images.get("image_mean", IMAGENET[0]), images.get("image_std", IMAGENET[1])
        if not images.get("do_normalize", True):
            mean, std = (0.0,) * 3, (1.0,) * 3
        config = ModelConfig(vit=_transformers_vit(values), mean=tuple(mean), std=tuple(std))
        heads = ("pooler",) if kind == "vit" else ()
        return ResolvedConfig(config=config, source="read", heads=heads, knows_mpp=kind != "vit")
    if isinstance(values.get("architecture"), str):
        terms = values.get("pretrained_cfg", {}).get("license")
        return ResolvedConfig(
            config=_timm_config(values), source="read", terms=terms, heads=("head",),
            knows_mpp=False,
        )  # fmt: skip
    return None


def _transformers_vit(values: Mapping[str, Any]) -> ViTConfig:
    """The ViTConfig of a ViTModel, Dinov2Model or Dinov2WithRegistersModel, by their defaults."""
    for key, value in {"hidden_act": "gelu", "qkv_bias": True, "num_channels": 3}.items():
        if values.get(key, value) != value:
            raise InputError(f"{key} is {values[key]!r}; expected {value!r}")
    kind, width, patch_px = values["model_type"], values["hidden_size"], values["patch_size"]
    registers, swiglu = kind == "dinov2_with_registers", values.get("use_swiglu_ffn", False)
    hidden = int(width * values.get("mlp_ratio", 4))
    if kind == "vit":
        hidden = values.get("intermediate_size", 3072)
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
        eps=values.get("layer_norm_eps", 1e-12 if kind == "vit" else 1e-6),
        layer_scale=kind != "vit",
    )


def _timm_config(values: Mapping[str, Any]) -> ModelConfig | TimmConfig:
    """The configuration in a config.json of timm: a ModelConfig for a plain ViT."""
    about = values.get("pretrained_cfg", values)  # old ones hold it all in one
    args = {**values.get("model_args", {})}
    if "global_pool" in values:
        args.setdefault("global_pool", values["global_pool"])
    size_px = args.get("img_size", about.get("input_size", (3, 224, 224))[-1])
    if isinstance(size_px, list | tuple) and len({*size_px}) == 1:  # timm 1.0.31 has both sides
        size_px = size_px[0]
    options: dict[str, Any] = {
        "tile_spec": TileSpec(size_px=size_px),
        "mean": tuple(about.get("mean", IMAGENET[0])),
        "std": tuple(about.get("std", IMAGENET[1])),
    }
    architecture = values["architecture"]
    if (vit := _timm_vit(architecture.partition(".")[0], args, size_px)) is not None:
        return ModelConfig(vit=vit, **options)
    args.pop("num_classes", None)
    text = json.dumps(args, sort_keys=True)
    return TimmConfig(architecture=architecture, model_args=text, **options)


def _timm_vit(architecture: str, args: Mapping[str, Any], image_px: int) -> ViTConfig | None:
    """The ViTConfig of one of timm's plain ViTs; None for what timm alone can run."""
    found = _PLAIN.fullmatch(architecture)
    pooling = {"token": "token", "avg": "mean"}.get(args.get("global_pool", "token"))
    if found is None or found[1] not in _SIZES or pooling is None:
        return None
    needed = {key: value for key, value in args.items() if key in _NEEDED}
    if pooling == "mean":  # timm then normalises after the mean, unless told not to
        needed.setdefault("fc_norm", None)
    others = args.keys() - _TAKEN - _WITHOUT_EFFECT - needed.keys()
    if others or any(_NEEDED[key] != value for key, value in needed.items()):
        return None
    width, depth, heads, ratio = _SIZES[found[1]]
    is_dinov2 = found[4] == "dinov2"
    if swiglu := is_dinov2 and found[1] == "giant":
        width, heads, ratio = 1536, 24, 2.66667 * 2
    width, patch_px = args.get("embed_dim", width), args.get("patch_size", int(found[2]))
    hidden = int(width * args.get("mlp_ratio", ratio))
    return ViTConfig(
        width=width,
        depth=args.get("depth", depth),
        heads=args.get("num_heads", heads),
        mlp="swiglu" if swiglu else "gelu",
        hidden=hidden // 2 if swiglu else hidden,
        patch_px=patch_px,
        registers=args.get("reg_tokens", int(found[3] or 0)),
        position_grid=image_px // patch_px,
        class_position=not args.get("no_embed_class", found[3] is not None),
        position_rule="size_antialias",
        layer_scale=args.get("init_values", 1e-5 if is_dinov2 else None) is not None,
        pooling="mean" if pooling == "mean" else "token",
    )
