"""Registry of known models: one table of where they are, the tiles they take, and their terms."""

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import entry_points
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from xmag import records
from xmag.errors import InputError, WeightsError, XmagWarning
from xmag.geometry import TileSpec
from xmag.vit import CONFIGS, Pooling, ViTConfig

DEFAULT_MODEL = "AI4PATH/XMAG"
SCHEMA = "xmag-encoder"
"""The value of "format" in a config.json that xmag wrote."""
FORMAT = records.Format(
    name=SCHEMA, version=1, writer="Encoder.save", remedy="save the model again", error=WeightsError
)

MINI = "xmag-mini"
"""A small trained ViT inside the package, so that everything runs without a network.

Its model card is docs/models.md. The weights are stored in float16, and computed with in float32.
"""
MINI_WEIGHTS = Path(__file__).with_name("mini.safetensors")
MINI_SHA256 = "a5c321236231b5f5303c501d31df3efea9aa5cad1cfc0d566e4d77ef2364462b"

ENTRY_POINTS = "xmag.models"
"""Entry point group by which other packages add models: a KnownModel, or several."""

RGB = tuple[float, float, float]
IMAGENET: tuple[RGB, RGB] = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of RGB in [0, 1] that most models are normalised with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig(records.Record):
    """A ViT, the tiles it wants, and how RGB in [0, 1] is normalised for it."""

    vit: ViTConfig
    tile_spec: TileSpec = field(default_factory=TileSpec)
    mean: RGB = IMAGENET[0]
    std: RGB = IMAGENET[1]

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
class KnownModel(records.Record):
    """A model that is known by name: where it is, the tiles it takes, its terms, what was checked.

    `load_model` takes `name` and `repo`, which is a name on the Hub. `revision` is the commit that
    the rest is documented for, where it is known. `mpp_source` says whether the µm/px is "stated"
    by those who made the model, "inferred" from a magnification or from what others use, or
    "assumed". `config` is None for a model that xmag cannot run, for the reason `unsupported`;
    otherwise `tile_spec`, `pooling` and `embed_dim` are the configuration's.
    """

    name: str
    repo: str
    mpp_source: Literal["stated", "inferred", "assumed"]
    terms: str
    gated: bool
    checked: str
    config: ModelConfig | None = None
    revision: str | None = None
    unsupported: str | None = None
    tile_spec: TileSpec | None = None
    pooling: Pooling | None = None
    embed_dim: int | None = None

    def __post_init__(self) -> None:
        if (self.config is None) == (self.unsupported is None):
            raise InputError(
                f"{self.name} has config={self.config} and unsupported={self.unsupported!r};"
                " expected one of the two"
            )
        if self.config is not None:
            object.__setattr__(self, "tile_spec", self.config.tile_spec)
            object.__setattr__(self, "pooling", self.config.vit.pooling)
            object.__setattr__(self, "embed_dim", self.config.vit.embed_dim)

    def row(self) -> dict[str, str]:
        """The row of this model in a table, by column."""
        spec = self.tile_spec
        return {
            "name": self.name,
            "repository": self.repo + (f" @ {self.revision[:7]}" if self.revision else ""),
            "µm/px": "?" if spec is None else f"{spec.mpp:g} ({self.mpp_source})",
            "px": "?" if spec is None else str(spec.size_px),
            "pooling": self.pooling or "?",
            "width": str(self.embed_dim or "?"),
            "terms": self.terms,
            "gated": "yes" if self.gated else "no",
            "checked": self.checked + (f"; {self.unsupported}" if self.unsupported else ""),
        }


class KnownModels(tuple[KnownModel, ...]):
    """Known models as a table, which shows itself in a terminal and in a notebook."""

    __slots__ = ()

    def to_markdown(self) -> str:
        """The table in Markdown, a row a model."""
        rows = [model.row() for model in self]
        columns = list(rows[0]) if rows else []
        lines = [columns, ["---"] * len(columns), *(list(row.values()) for row in rows)]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    _repr_markdown_ = to_markdown

    def __repr__(self) -> str:
        rows = [model.row() for model in self]
        table = [list(row)[:-1] for row in rows[:1]] + [list(row.values())[:-1] for row in rows]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ("  ".join(map(str.ljust, line, widths)).rstrip() for line in table)
        return "\n".join(lines)


_NOT_CHECKED = "not against real weights: configuration from public documentation"
_ARCHITECTURE = "architecture, with random weights, against {}; not against real weights"
_CC_BY_NC_ND = "CC-BY-NC-ND 4.0: non-commercial academic research only, no sharing"
_HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
_H_OPTIMUS = (0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517)
_HIBOU = (0.7068, 0.5755, 0.722), (0.195, 0.2316, 0.1816)

_DINOV2_G = replace(CONFIGS["dinov2_vitg14_reg"], position_grid=16, class_position=False)
_TIMM_S16 = ViTConfig(
    width=384, depth=12, heads=6, hidden=1536, patch_px=16, position_grid=14,
    position_rule="size_antialias", layer_scale=False,
)  # fmt: skip
_TIMM_B16 = replace(_TIMM_S16, width=768, heads=12, hidden=3072)
_TIMM_L16 = replace(_TIMM_S16, width=1024, depth=24, heads=16, hidden=4096, layer_scale=True)
_VIRCHOW2 = ViTConfig(
    width=1280, depth=32, heads=16, hidden=3416, mlp="swiglu", registers=4, position_grid=16,
    position_rule="size_antialias", pooling="token+mean",
)  # fmt: skip
_H0_MINI = replace(
    CONFIGS["dinov2_vitb14_reg"], mlp="swiglu", hidden=2048, position_grid=16, pooling="token+mean"
)
_HIBOU_B = replace(_H0_MINI, pooling="token")
_HIBOU_L = replace(_HIBOU_B, width=1024, depth=24, heads=16, hidden=2736)
_GIGAPATH = replace(
    CONFIGS["dinov2_vitg14"], patch_px=16, position_grid=14, position_rule="size_antialias"
)
_GIGAPATH_FLASH = replace(_TIMM_S16, mlp="swiglu", hidden=1024, layer_scale=True)
_PHIKON_V2 = replace(_TIMM_L16, position_rule="size")
_MIDNIGHT = replace(CONFIGS["dinov2_vitg14"], position_rule="size", pooling="token+mean")


def _known(
    name: str,
    repo: str,
    vit: ViTConfig,
    terms: str,
    checked: str = _NOT_CHECKED,
    *,
    mpp: float = 0.5,
    mpp_source: Literal["stated", "inferred", "assumed"] = "inferred",
    rgb: tuple[RGB, RGB] = IMAGENET,
    gated: bool = False,
    revision: str | None = None,
) -> KnownModel:
    config = ModelConfig(vit=vit, tile_spec=TileSpec(mpp=mpp), mean=rgb[0], std=rgb[1])
    return KnownModel(
        name=name, repo=repo, config=config, mpp_source=mpp_source, terms=terms, gated=gated,
        checked=checked, revision=revision,
    )  # fmt: skip


def _kaiko(name: str, architecture: str, vit: ViTConfig) -> KnownModel:
    repo = f"1aurent/{architecture}.kaiko_ai_towards_large_pathology_fms"
    return _known(name, repo, vit, "kaiko.ai's own, non-commercial", rgb=_HALF)


def _models() -> Iterable[KnownModel]:
    yield _known(
        "XMAG", DEFAULT_MODEL, CONFIGS["dinov2_vitb14"],
        "PolyForm Noncommercial 1.0.0, as the reference code; read the model's page",
        "not against real weights: examples/verify_official.py does that",
        mpp=2.0, mpp_source="stated",
    )  # fmt: skip
    yield _known(
        MINI, MINI, replace(CONFIGS["xmag_mini"], pooling="token+mean"),
        "Apache-2.0; made from images under CC BY 4.0, BSD-3 and unconfirmed terms: see its card",
        "trained with xmag, for trying things out", mpp=2.0, mpp_source="stated",
    )  # fmt: skip
    yield _known("UNI", "MahmoodLab/UNI", _TIMM_L16, _CC_BY_NC_ND, gated=True)
    yield _known(
        "UNI2-h", "MahmoodLab/UNI2-h", CONFIGS["uni2_h"], _CC_BY_NC_ND,
        _ARCHITECTURE.format("timm"), gated=True,
        revision="d517a8dd47902dd7c308b3c36f63bce47e7b9a43",
    )  # fmt: skip
    yield _known(
        "Virchow2", "paige-ai/Virchow2", _VIRCHOW2, _CC_BY_NC_ND, gated=True,
        revision="3158645804b69e3f3bc4439d4116edddf0840a72",
    )  # fmt: skip
    yield _known(
        "H-optimus-0", "bioptimus/H-optimus-0", _DINOV2_G, "Apache-2.0", mpp_source="stated",
        rgb=_H_OPTIMUS, gated=True, revision="b145cc1e6c6b30d3251aa8b1f844e6974188a743",
    )  # fmt: skip
    yield _known("H0-mini", "bioptimus/H0-mini", _H0_MINI, _CC_BY_NC_ND, rgb=_H_OPTIMUS, gated=True)
    yield _known(
        "Prov-GigaPath", "prov-gigapath/prov-gigapath", _GIGAPATH,
        "Apache-2.0, with conditions: read its page", mpp_source="stated", gated=True,
    )  # fmt: skip
    yield _known(
        "GigaPath-Flash", "prov-gigapath/prov-gigapath-flash", _GIGAPATH_FLASH,
        "Apache-2.0, for research: read its page", gated=True,
    )  # fmt: skip
    yield _known(
        "Phikon-v2", "owkin/phikon-v2", _PHIKON_V2, "Owkin's own, non-commercial",
        revision="2ae989a9c40cffaa27f0a6cb29cc94d1d6f9a5fd",
    )  # fmt: skip
    yield _known("Hibou-B", "histai/hibou-b", _HIBOU_B, "Apache-2.0", rgb=_HIBOU)
    yield _known("Hibou-L", "histai/hibou-L", _HIBOU_L, "Apache-2.0", rgb=_HIBOU, gated=True)
    eighth: Any = {"patch_px": 8, "position_grid": 28}
    yield _kaiko("kaiko-S16", "vit_small_patch16_224", _TIMM_S16)
    yield _kaiko("kaiko-S8", "vit_small_patch8_224", replace(_TIMM_S16, **eighth))
    yield _kaiko("kaiko-B16", "vit_base_patch16_224", _TIMM_B16)
    yield _kaiko("kaiko-B8", "vit_base_patch8_224", replace(_TIMM_B16, **eighth))
    large = replace(CONFIGS["dinov2_vitl14_reg"], class_position=False)
    yield _kaiko("kaiko-L14", "vit_large_patch14_reg4_dinov2", large)
    yield _known(
        "Midnight-12k", "kaiko-ai/midnight", _MIDNIGHT, "MIT", rgb=_HALF,
        revision="adc6b15679c981cce6f9b018bbad09d16eeeda9f",
    )  # fmt: skip
    yield _known(
        "DistillPath-KS16", "RamonK/DistillPath-KS16-Virchow2", _TIMM_S16,
        "not known to xmag, its teacher's are CC-BY-NC-ND 4.0: read its page", rgb=_HALF,
    )  # fmt: skip
    yield KnownModel(
        name="RudolfV-2-S", repo="Aignostics/RudolfV-2-S", mpp_source="inferred", gated=True,
        terms="not known to xmag: read its page", checked="no",
        revision="76abacd512a98c72a6db6192af9fc98313c3bd78",
        tile_spec=TileSpec(mpp=0.5), pooling="token+mean", embed_dim=768,
        unsupported="it has rotary positions and runs by code of its repository alone",
    )  # fmt: skip
    against = _ARCHITECTURE.format("transformers")
    for size in ("small", "base", "large", "giant"):
        vit = replace(CONFIGS[f"dinov2_vit{size[0]}14"], position_rule="size")
        options: Any = {"mpp": 2.0, "mpp_source": "assumed"}
        name = f"dinov2-{size}"
        yield _known(name, f"facebook/{name}", vit, "Apache-2.0", against, **options)
        vit, name = CONFIGS[f"dinov2_vit{size[0]}14_reg"], f"dinov2-with-registers-{size}"
        yield _known(name, f"facebook/{name}", vit, "Apache-2.0", against, **options)


KNOWN: Mapping[str, KnownModel] = MappingProxyType({model.repo: model for model in _models()})
"""The models that xmag itself knows, by repository.

facebook/dinov2-* follow the code that their repositories are made for (Hugging Face's
Dinov2Model), which resizes positions by "size".
"""


def known_models() -> KnownModels:
    """The table of known models: xmag's own, and those that installed packages add.

    A package adds some by an entry point of the group "xmag.models", which names a KnownModel or an
    iterable of them. One that cannot be read is left out with a warning, and so is a model by the
    name of one that is known already.
    """
    found = list(KNOWN.values())
    taken = {name for model in found for name in (model.name, model.repo)}
    for entry in entry_points(group=ENTRY_POINTS):
        said = f"the entry point {entry.value!r} of {ENTRY_POINTS}"
        try:
            given = entry.load()
            added = [given] if isinstance(given, KnownModel) else list(given)
        except Exception as error:  # noqa: BLE001 (other people's code raises anything)
            warnings.warn(f"{said} cannot be read: {error!r}", XmagWarning, stacklevel=2)
            continue
        for model in added:
            if isinstance(model, KnownModel) and not {model.name, model.repo} & taken:
                found.append(model)
                taken |= {model.name, model.repo}
            else:
                warnings.warn(
                    f"{said} gives {getattr(model, 'name', model)!r}, which is no KnownModel or has"
                    " the name of another; it is left out",
                    XmagWarning,
                    stacklevel=2,
                )
    return KnownModels(found)


def find_known(name: str) -> KnownModel | None:
    """The known model of this name or repository; None where there is none."""
    if name in KNOWN:
        return KNOWN[name]
    return next((m for m in known_models() if name in (m.name, m.repo)), None)
