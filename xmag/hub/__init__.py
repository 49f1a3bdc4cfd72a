"""Model files: found or fetched by name, read, and converted to a state dict of our ViT.

fetch      a name or path -> local files
weights    a local file <-> tensors, or a refusal with its reason
layouts    tensors in anyone's layout -> the state dict of our ViT
registry   the known models, in one table: configuration, tile specification, terms
configs    what was given, is known or was read -> the configuration of a model
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from xmag.errors import HubError, InputError, WeightsError
from xmag.geometry import TileSpec
from xmag.hub.configs import TIMM, TimmConfig, given_config, resolve_config, timm_values
from xmag.hub.fetch import locate_model
from xmag.hub.layouts import check_finite, to_vit_state
from xmag.hub.registry import MINI, MINI_SHA256, ModelConfig
from xmag.hub.weights import file_sha256, read_tensors
from xmag.vit import ViTConfig

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """The float32 parameters of a model, its configuration, and the provenance of both.

    They are those of our ViT, or with a TimmConfig those of timm's module, by its names.
    """

    state: dict[str, Tensor]
    config: ModelConfig | TimmConfig
    provenance: Mapping[str, Any]


def read_model(
    name_or_path: str | os.PathLike[str],
    *,
    config: ModelConfig | TimmConfig | ViTConfig | str | None = None,
    tile_spec: TileSpec | None = None,
    revision: str | None = None,
    **access: Any,
) -> LoadedModel:
    """The model of this name: "xmag-mini", else an existing path, else a Hub repository.

    `access` is what `locate_model` takes besides. Raises HubError, WeightsError, InputError, or
    MissingExtraError where timm is needed.
    """
    if isinstance(name_or_path, str) and name_or_path.startswith(TIMM):
        repository = timm_values(name_or_path)["hf_hub_id"]
        if repository is None:
            raise HubError(
                f"{name_or_path!r} has no weights on the Hub by what timm says; fetch them, and"
                f" give their path and config={name_or_path!r}"
            )
        name_or_path = repository
    is_mini = name_or_path == MINI
    if is_mini and (config is not None or revision is not None):
        raise InputError(
            f'"{MINI}" ships with xmag and takes no config= ({config!r}) and no revision='
            f" ({revision!r}). Leave them out"
        )
    values = given = None
    if isinstance(config, str) and config.startswith(TIMM):
        values = timm_values(config)
    elif config is not None:
        given = given_config(config)
    files = locate_model(name_or_path, revision=revision, **access)
    resolved = resolve_config(files.name, values or files.config_json, given, tile_spec)
    sha256 = file_sha256(files.weights)
    if is_mini and sha256 != MINI_SHA256:
        raise WeightsError(
            f"{files.weights} is damaged: its SHA-256 is {sha256}, expected {MINI_SHA256}. Install"
            " xmag again"
        )
    tensors = read_tensors(files.weights)
    where, layout, state = str(files.weights), "timm", tensors
    if isinstance(resolved.config, ModelConfig):
        found = to_vit_state(tensors, resolved.config.vit, where=where, heads=resolved.heads)
        layout, state = found.layout, found.state
        if found.left_out:
            _logger.info("%s: left out %s", files.weights, ", ".join(found.left_out))
    else:
        # Integers are counters and indices of timm's modules.
        check_finite({key: t for key, t in tensors.items() if t.is_floating_point()}, where)
    provenance: dict[str, Any] = {
        "name": files.name,
        "revision": files.revision,
        "weights_sha256": sha256,
        "key_layout": layout,
        "config": resolved.config.to_dict(),
        "config_source": resolved.source,
        "terms": resolved.terms,
        "trained": resolved.trained,
    }
    if resolved.lineage is not None:
        provenance["lineage"] = resolved.lineage
    return LoadedModel(state=state, config=resolved.config, provenance=provenance)
