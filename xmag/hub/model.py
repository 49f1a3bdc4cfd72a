"""Parameters and configuration of a model by name or path, with the provenance of both."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from xmag.errors import InputError, WeightsError
from xmag.hub.fetch import locate_model
from xmag.hub.layouts import to_vit_state
from xmag.hub.mini import MINI_SHA256, MINI_WEIGHTS
from xmag.hub.registry import (
    MINI,
    ModelConfig,
    ResolvedConfig,
    given_config,
    resolve_config,
)
from xmag.hub.weights import file_sha256, read_tensors
from xmag.vit import ViTConfig

_logger = logging.getLogger("xmag.hub")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """The float32 parameters of a ViT, its configuration, and the provenance of both."""

    state: dict[str, Tensor]
    config: ModelConfig
    provenance: Mapping[str, Any]


def read_model(
    name_or_path: str | os.PathLike[str],
    *,
    config: ModelConfig | ViTConfig | str | None,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
) -> LoadedModel:
    """The model of this name: "xmag-mini", else an existing path, else a Hub repository.

    Raises HubError, WeightsError or InputError.
    """
    if name_or_path == MINI:
        return _read_mini(config, revision)
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
    tensors = read_tensors(files.weights)
    found = to_vit_state(tensors, resolved.config.vit, where=str(files.weights))
    if found.left_out:
        _logger.info("%s: left out %s", files.weights, ", ".join(found.left_out))
    return _loaded(
        found.state,
        resolved,
        name=files.name,
        revision=files.revision,
        weights_sha256=sha256,
        key_layout=found.layout,
    )


def _read_mini(config: object, revision: str | None) -> LoadedModel:
    if config is not None or revision is not None:
        raise InputError(
            f'"{MINI}" ships with xmag and takes no config= ({config!r}) and no revision='
            f" ({revision!r}). Leave them out"
        )
    resolved = resolve_config(MINI, None, None)
    sha256 = file_sha256(MINI_WEIGHTS)
    if sha256 != MINI_SHA256:
        raise WeightsError(
            f"{MINI_WEIGHTS} is damaged: its SHA-256 is {sha256}, expected {MINI_SHA256}. Install"
            " xmag again"
        )
    tensors = read_tensors(MINI_WEIGHTS)
    found = to_vit_state(tensors, resolved.config.vit, where=str(MINI_WEIGHTS))
    return _loaded(
        found.state,
        resolved,
        name=MINI,
        revision=None,
        weights_sha256=sha256,
        key_layout=found.layout,
    )


def _loaded(
    state: dict[str, Tensor], resolved: ResolvedConfig, **identity: str | None
) -> LoadedModel:
    provenance: dict[str, Any] = {
        **identity,
        "config": resolved.config.to_dict(),
        "config_source": resolved.source,
        "terms": resolved.terms,
        "trained": resolved.trained,
    }
    if resolved.lineage is not None:
        provenance["lineage"] = resolved.lineage
    return LoadedModel(state=state, config=resolved.config, provenance=provenance)
