"""Small and whole models of timm, with random weights that make every part count."""

from typing import Any

import torch
from support.models import random_parameter
from torch import Tensor, nn

SMALL = {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 64}
SMALL_14 = {**SMALL, "img_size": 56}

Case = tuple[str, dict[str, Any]]
PLAIN: dict[str, Case] = {
    "class token": ("vit_small_patch16_224", SMALL),
    "mean": ("vit_base_patch16_224", {**SMALL, "global_pool": "avg", "fc_norm": False}),
    "classifier": ("vit_tiny_patch16_224", {**SMALL, "num_classes": 5}),
    "layer scale": ("vit_large_patch16_224", {**SMALL, "init_values": 1e-5}),
    "patch 8": ("vit_small_patch8_224", {**SMALL, "img_size": 32}),
    "registers": ("vit_base_patch14_reg4_dinov2", SMALL_14),
    "registers with positions": ("vit_small_patch16_224", {**SMALL, "reg_tokens": 4}),
    "swiglu": ("vit_giant_patch14_dinov2", {**SMALL_14, "embed_dim": 24}),
    "swiglu with registers": ("vit_giant_patch14_reg4_dinov2", {**SMALL_14, "embed_dim": 24}),
}
"""ViTs that xmag runs itself, as architecture and arguments."""

WHOLE: dict[str, Case] = {
    "ViT-S/16": ("vit_small_patch16_224", {}),
    "ViT-B/16": ("vit_base_patch16_224", {}),
    "ViT-L/16": ("vit_large_patch16_224", {}),
    "ViT-B/14 with registers": ("vit_base_patch14_reg4_dinov2", {}),
    "ViT-g/14, SwiGLU, 4 blocks": ("vit_giant_patch14_reg4_dinov2", {"depth": 4}),
}

BY_TIMM: dict[str, Case] = {
    "mean, then norm": ("vit_small_patch16_224", {**SMALL, "global_pool": "avg"}),
    "convolutions": ("resnet10t", {}),
    "windows": ("swin_tiny_patch4_window7_224", {"embed_dim": 24, "depths": [1, 1, 1, 1]}),
}
"""Models that timm alone can run."""


def timm_model(architecture: str, args: dict[str, Any], seed: int = 0) -> nn.Module:
    """A model of timm in eval mode, its parameters drawn as those of `random_state`."""
    import timm

    model = timm.create_model(architecture, pretrained=False, **{"num_classes": 0, **args})
    generator = torch.Generator().manual_seed(seed)
    parameters: dict[str, Tensor] = {}
    for key, tensor in model.state_dict().items():
        drawn = tensor.is_floating_point() and ("bn" not in key and "running" not in key)
        parameters[key] = random_parameter(key, tensor.shape, generator) if drawn else tensor
    model.load_state_dict(parameters)
    return model.eval().requires_grad_(False)
