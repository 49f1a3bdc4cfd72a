"""Networks to train: encoder (uint8 tiles to embeddings) and aggregator; parameter groups."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from xmag.devices import full_precision, resolve_dtype
from xmag.errors import InputError
from xmag.finetune.settings import Precision, Settings
from xmag.hub.registry import ModelConfig
from xmag.mil import MILOutput
from xmag.training.augmentation import Draws, augment
from xmag.vit import ViT

_WITHOUT_DECAY = ("pos_embed", "cls_token", "register_tokens")


class TileNetwork(nn.Module):
    """Trainable float32 copy of a ViT, preceded by the normalisation of its model."""

    scale: Tensor
    shift: Tensor

    def __init__(self, vit: ViT, config: ModelConfig, *, half: bool = False) -> None:
        super().__init__()
        self.vit = copy.deepcopy(vit).float().requires_grad_(True)
        self.half_precision = half
        std, mean = (torch.tensor(rgb, dtype=torch.float32) for rgb in (config.std, config.mean))
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)

    def forward(self, tiles: Tensor, draws: Draws | None = None) -> Tensor:
        """`Encoder.embed` of uint8 tiles (B, S, S, 3), augmented by `draws`: float32 (B, D)."""
        device = self.scale.device
        tiles = tiles.to(device, non_blocking=True)
        with full_precision(device):
            if draws is not None:
                tiles = augment(tiles, draws, dtype=torch.float32)
            images = (tiles * self.scale + self.shift).permute(0, 3, 1, 2)  # (B, 3, S, S)
            if not self.half_precision:
                return self.vit.embed(images)
        # Without its cache: weights that were cast in a pass without a graph would have none in
        # the next, and each is used once a pass anyway.
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            return self.vit.embed(images)


class Network(nn.Module):
    """The trained module: the encoder, and the aggregator on its embeddings."""

    def __init__(self, encoder: TileNetwork, aggregator: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.aggregator = aggregator

    def classify(self, features: Tensor, labels: Tensor | None = None) -> MILOutput:
        """Aggregator output for one bag of embeddings (N, D), computed in float32."""
        mask = torch.ones(1, len(features), dtype=torch.bool, device=features.device)
        with full_precision(features.device):
            return self.aggregator(features.unsqueeze(0), mask, labels)  # type: ignore[no-any-return]


def uses_half(precision: Precision, device: torch.device) -> bool:
    """Whether the encoder computes in bfloat16, for CUDA alone; "auto" does if it is native."""
    if precision == "bfloat16" and device.type != "cuda":
        raise InputError(
            f'precision="bfloat16" is for CUDA, and this run is on {device}; use "auto"'
        )
    native = resolve_dtype("auto", device) == torch.bfloat16
    return precision == "bfloat16" or (precision == "auto" and native)


def freeze(vit: ViT, blocks: int | None) -> None:
    """Freeze patch embedding, positions and the first `blocks` blocks; None freezes nothing."""
    if blocks is None:
        return
    if not 0 <= blocks <= vit.config.depth:
        raise InputError(
            f"frozen_blocks is {blocks!r}; expected None, or 0 to {vit.config.depth}, the depth"
        )
    for name, parameter in vit.named_parameters():
        layer = _layer_of(name, vit.config.depth)
        # With all blocks frozen, the last norm alone would still train.
        if layer <= blocks or blocks == vit.config.depth:
            parameter.requires_grad_(False)


def parameter_groups(vit: ViT, aggregator: nn.Module, settings: Settings) -> list[dict[str, Any]]:
    """Parameter groups of AdamW with layer-wise learning-rate decay, at their peak rates.

    The rate of each layer is `layer_decay` times that of the next (Clark et al. 2020, arXiv
    2003.10555). Vectors, positions and tokens have no weight decay.
    """
    depth, rates = vit.config.depth, []
    for name, parameter in vit.named_parameters():
        above = max(depth - _layer_of(name, depth), 0)  # the last norm goes with the last block
        rates.append((name, parameter, settings.learning_rate * settings.layer_decay**above))
    for name, parameter in aggregator.named_parameters():
        rates.append((name, parameter, settings.classifier_learning_rate))
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter, rate in rates:
        if not parameter.requires_grad:
            continue
        bare = parameter.ndim < 2 or name in _WITHOUT_DECAY
        decay = 0.0 if bare else settings.weight_decay
        fresh = {"params": [], "lr": rate, "weight_decay": decay}
        groups.setdefault((rate, decay), fresh)["params"].append(parameter)
    return list(groups.values())


def _layer_of(name: str, depth: int) -> int:
    """Layer index of a parameter: 0 before the blocks, 1 to `depth` in them, then the norm."""
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return depth + 1 if name.startswith("norm.") else 0
