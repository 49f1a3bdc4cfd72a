"""Encoders loaded by name or path."""

import os
import threading
import warnings
from functools import lru_cache
from typing import Any

import torch

from xmag.devices import resolve_device, resolve_dtype
from xmag.encoder.model import Encoder
from xmag.encoder.timm import TimmEncoder
from xmag.errors import XmagWarning
from xmag.geometry import TileSpec
from xmag.hub import read_model
from xmag.hub.configs import TimmConfig
from xmag.hub.registry import DEFAULT_MODEL, ModelConfig
from xmag.vit import ViTConfig, empty_vit


def load_model(
    name_or_path: str | os.PathLike[str] = DEFAULT_MODEL,
    *,
    revision: str | None = None,
    config: ModelConfig | TimmConfig | ViTConfig | str | None = None,
    tile_spec: TileSpec | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Encoder:
    """The Encoder of a model: a known name, a path (folder or checkpoint file), or a Hub name.

    Never runs code that came with weights. Plain ViTs of timm and transformers are run by xmag's
    own, other models of timm by timm (extra "timm").

    Args:
        name_or_path: An existing path beats a Hub name ("owner/model", "hf-hub:owner/model"),
            "xmag-mini" beats both; a name of `known_models()`; or "timm:NAME" for a pretrained
            model of timm.
        revision: Of a Hub model: a branch or tag, which is looked up, or a commit. Without it, a
            model in the cache is used without a request.
        config: The name of a known configuration, "timm:NAME", a ViTConfig or a ModelConfig, for
            weights that xmag does not know; without it a bare checkpoint is assumed to be
            `dinov2_vitb14`.
        tile_spec: The tiles that the model is to be given, instead of those that are known; needed
            where nothing says at which µm/px it takes them.
        device: "auto" takes CUDA, then MPS, then the CPU.
        dtype: "auto" takes bfloat16 on CUDA that has it, float16 on older CUDA, float32 elsewhere.
        token: For gated and private models; by default HF_TOKEN, or what `hf auth login` stored.
        cache_dir: Instead of the cache of huggingface_hub (HF_HOME).
        local_files_only: Make no request.

    Raises:
        HubError: The model cannot be fetched.
        WeightsError: The weights do not fit, are damaged, or are not finite.
        InputError: An argument makes no sense, no µm/px is known, or this machine lacks the device.
        MissingExtraError: timm is needed, and cannot be imported.
    """
    device = resolve_device(device)
    dtype = resolve_dtype(dtype, device)
    model = read_model(
        name_or_path, config=config, tile_spec=tile_spec, revision=revision, token=token,
        cache_dir=cache_dir, local_files_only=local_files_only,
    )  # fmt: skip
    options: dict[str, Any] = {"provenance": model.provenance, "device": device, "dtype": dtype}
    if isinstance(model.config, TimmConfig):
        return TimmEncoder(model.state, model.config, **options)
    vit = empty_vit(model.config.vit)
    vit.load_state_dict(model.state, assign=True)
    encoder = Encoder(vit, model.config, **options)
    if not encoder.provenance["trained"]:
        warnings.warn(
            f"{encoder.provenance['name']} is UNTRAINED: its embeddings carry no knowledge of"
            " tissue. It is there to try the software; load another model for results",
            XmagWarning,
            stacklevel=2,
        )
    return encoder


@lru_cache(maxsize=1)
def _load_default() -> Encoder:
    return load_model()


_default_lock = threading.Lock()


def default_encoder() -> Encoder:
    """The Encoder of AI4PATH/XMAG, loaded once a process, whichever thread asks first."""
    with _default_lock:
        return _load_default()
