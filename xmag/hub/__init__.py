"""Model files: found or fetched by name, read, and converted to a state dict of our ViT.

fetch      a name or path -> local files
weights    a local file <-> tensors, or a refusal with its reason
layouts    tensors in anyone's layout -> the state dict of our ViT
registry   the known models: configuration, tile specification, terms
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from xmag.errors import InputError, WeightsError
from xmag.hub.fetch import locate_model
from xmag.hub.layouts import to_vit_state
from xmag.hub.registry import MINI, MINI_SHA256, ModelConfig, given_config, resolve_config
from xmag.hub.weights import file_sha256, read_tensors
from xmag.vit import ViTConfig

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """The float32 parameters of a ViT, its configuration, and the provenance of both."""

    state: dict[str, Tensor]
    config: ModelConfig
    provenance: Mapping[str, Any]


def read_model(
    name_or_path: str | os.PathLike[str],
    *,
    config: ModelConfig | ViTConfig | str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> LoadedModel:
    """The model of this name: "xmag-mini", else an existing path, else a Hub repository.

    Raises HubError, WeightsError or InputError.
    """
    is_mini = name_or_path == MINI
    if is_mini and (config is not None or revision is not None):
        raise InputError(
            f'"{MINI}" ships with xmag and takes no config= ({config!r}) and no revision='
            f" ({revision!r}). Leave them out"
        )
    given = None if config is None else given_config(config)
    files = locate_model(
        name_or_path,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    resolved = resolve_config(files.name, files.config_json, given)
    sha256 = file_sha256(files.weights)
    if is_mini and sha256 != MINI_SHA256:
        raise WeightsError(
            f"{files.weights} is damaged: its SHA-256 is {sha256}, expected {MINI_SHA256}. Install"
            " xmag again"
        )
    tensors = read_tensors(files.weights)
    found = to_vit_state(tensors, resolved.config.vit, where=str(files.weights))
    if found.left_out:
        _logger.info("%s: left out %s", files.weights, ", ".join(found.left_out))
    provenance: dict[str, Any] = {
        "name": files.name,
        "revision": files.revision,
        "weights_sha256": sha256,
        "key_layout": found.layout,
        "config": resolved.config.to_dict(),
        "config_source": resolved.source,
        "terms": resolved.terms,
        "trained": resolved.trained,
    }
    if resolved.lineage is not None:
        provenance["lineage"] = resolved.lineage
    return LoadedModel(state=found.state, config=resolved.config, provenance=provenance)
