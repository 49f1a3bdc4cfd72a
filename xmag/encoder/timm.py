"""TimmEncoder: a model of any architecture, run by timm."""

import json
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from xmag.devices import full_precision, resolve_device, resolve_dtype
from xmag.encoder.model import Encoder, Normalised, Tiles
from xmag.errors import InputError, MissingExtraError, WeightsError
from xmag.geometry import TileSpec
from xmag.hub.configs import TimmConfig
from xmag.hub.layouts import misfits
from xmag.hub.registry import ModelConfig
from xmag.vit import ViT


class _TimmForward(Normalised):
    """uint8 tiles (B, S, S, 3) -> embeddings, float32 (B, D)."""

    def __init__(
        self, model: nn.Module, config: TimmConfig, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(config.mean, config.std, device)
        self.model, self.dtype = model.to(device, dtype), dtype

    def forward(self, tiles: Tensor, pooled: bool = True) -> Tensor:  # noqa: ARG002 (as our ViT's)
        return self.model(self.images(tiles, self.dtype)).float()  # type: ignore[no-any-return]


class TimmEncoder(Encoder):
    """An Encoder whose model timm runs; its embeddings are timm's, pooled as its config says.

    There is no ViT of ours in it: it has no patch tokens, and is neither saved nor fine-tuned.
    float32 on CUDA is what the program lets cuDNN make of it (TF32 in convolutions, by default).
    """

    def __init__(
        self,
        state: Mapping[str, Tensor],
        config: TimmConfig,
        *,
        provenance: Mapping[str, Any],
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "float32",
    ) -> None:
        self._timm, self._device = config, resolve_device(device)
        self._dtype = resolve_dtype(dtype, self._device)
        model = _module(config, state, str(provenance.get("name")))
        self._take(_TimmForward(model, config, self._device, self._dtype), provenance)
        side = config.tile_spec.size_px
        with torch.inference_mode(), full_precision(self._device):
            tile = torch.zeros((1, side, side, 3), dtype=torch.uint8, device=self._device)
            try:
                found = self._forward(tile)
            except (AssertionError, RuntimeError, ValueError) as error:
                raise InputError(
                    f"{config.architecture} does not take tiles of {side} px ({error}); give"
                    " tile_spec= the size that it was made for"
                ) from error
        if found.ndim != 2:
            raise InputError(
                f"{config.architecture} gives {tuple(found.shape)} for a tile, not pooled; expected"
                ' (1, D). Give a config.json whose "model_args" name a "global_pool"'
            )
        self._embed_dim = int(found.shape[1])

    @property
    def tile_spec(self) -> TileSpec:
        """The tiles that the model takes."""
        return self._timm.tile_spec

    @property
    def embed_dim(self) -> int:
        """The length D of an embedding."""
        return self._embed_dim

    @property
    def pooling(self) -> str:
        """The architecture and arguments of timm, which decide it."""
        return f"timm: {self._timm.architecture} {self._timm.model_args}"

    @property
    def config(self) -> ModelConfig:
        """None: raises InputError."""
        self._refuse("a configuration of xmag's ViT, by which workers load a model")

    @property
    def vit(self) -> ViT:
        """None: raises InputError."""
        self._refuse("a ViT of xmag's, which could be fine-tuned or saved")

    def embed_tokens(self, tiles: Tiles) -> NoReturn:  # noqa: ARG002
        """None: raises InputError."""
        self._refuse("patch tokens")

    def _refuse(self, what: str) -> NoReturn:
        raise InputError(
            f"{self._provenance.get('name')} is run by timm ({self._timm.architecture}) and has no"
            f" {what.removeprefix('a ')}. Take one of timm's plain ViTs, which xmag runs itself"
        )


def _module(config: TimmConfig, state: Mapping[str, Tensor], name: str) -> nn.Module:
    """The module of timm with these parameters, for tiles of the wanted size."""
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # RuntimeError: of a torchvision that does not fit
        raise MissingExtraError(
            f"{config.architecture} is run by timm, which cannot be imported ({error}): run pip"
            " install 'xmag[timm]'"
        ) from error
    with torch.random.fork_rng(devices=[]):  # initial weights are drawn, and replaced
        try:
            args = json.loads(config.model_args)
            model: Any = timm.create_model(
                config.architecture, pretrained=False, **args, num_classes=0
            )
        except (RuntimeError, TypeError, ValueError) as error:
            what = f"{config.architecture} with {config.model_args}"
            raise WeightsError(f"timm {timm.__version__} cannot build {what}: {error}") from error
    own, about = model.state_dict(), getattr(model, "pretrained_cfg", None) or {}
    head = about.get("classifier") or ()
    heads = tuple(f"{name}." for name in ([head] if isinstance(head, str) else head))
    left = {k: t for k, t in state.items() if k in own or not (heads and k.startswith(heads))}
    if listed := misfits(left, own):
        raise WeightsError(f"{name} does not fit timm's {config.architecture}. {listed}")
    model.load_state_dict(left)
    size = (config.tile_spec.size_px,) * 2
    if tuple(about.get("input_size", (3, *size))[1:]) != size and hasattr(model, "set_input_size"):
        model.set_input_size(size)
    return model  # type: ignore[no-any-return]
