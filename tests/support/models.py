"""Small models for tests: random ViTs of any configuration, and checkpoints in every layout."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xmag.encoder import Encoder
from xmag.hub.registry import ModelConfig
from xmag.vit import ViT, ViTConfig

TINY = ViTConfig(width=32, depth=2, heads=2, hidden=128, position_grid=5)
TINY_SWIGLU = replace(TINY, mlp="swiglu", hidden=88)
TINY_REGISTERS = replace(TINY, registers=4, position_rule="size_antialias")


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """A program that has set torch's default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def random_state(config: ViTConfig, seed: int = 0) -> dict[str, Tensor]:
    """Parameters that make every part count.

    LayerScale about 0.5 and positions about 0.3: at the 1e-5 of a fresh DINOv2 the blocks hardly
    reach the output, and a swapped q and v goes unseen. What writes into the
    residual stream is small, or the eps of a norm goes unseen; what reads from it is large, or the
    curve of the GELU does.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {key: t.shape for key, t in ViT(config).state_dict().items()}
    return {key: random_parameter(key, shape, generator) for key, shape in shapes.items()}


def random_parameter(key: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    if key.endswith("gamma"):
        return 0.5 + 0.1 * noise
    if "norm" in key and key.endswith("weight"):
        return 1 + 0.1 * noise
    if len(shape) == 1:
        return 0.05 * noise
    if key.endswith("weight"):
        writes = "proj" in key or "fc2" in key or "w3" in key
        return (0.15 if writes else 1.5) * noise * noise[0].numel() ** -0.5
    return 0.3 * noise


def random_vit(config: ViTConfig, seed: int = 0) -> ViT:
    vit = ViT(config)
    vit.load_state_dict(random_state(config, seed))
    return vit.eval().requires_grad_(False)


def random_encoder(config: ViTConfig = TINY, seed: int = 0, **options: Any) -> Encoder:
    """An Encoder with random weights, for tiles of 224 px."""
    return Encoder(
        random_vit(config, seed),
        ModelConfig(vit=config),
        provenance={"name": "random", "weights_sha256": f"seed {seed}", "trained": True},
        **options,
    )


def random_tiles(count: int, size_px: int = 224, seed: int = 0) -> np.ndarray:
    """uint8 (count, size_px, size_px, 3): blotches, as white noise looks alike to a ViT."""
    rng = np.random.default_rng(seed)
    cells = -(-size_px // 14)
    coarse = rng.integers(0, 256, (count, cells, cells, 3), dtype=np.uint8)
    return coarse.repeat(14, axis=1).repeat(14, axis=2)[:, :size_px, :size_px].copy()


def to_timm(state: dict[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    """Our parameters by timm's names, written out independently of xmag.hub.layouts."""
    renamed = {}
    for key, tensor in state.items():
        name = "reg_token" if key == "register_tokens" else key
        if config.mlp == "swiglu":
            name = name.replace("mlp.w12", "mlp.fc1").replace("mlp.w3", "mlp.fc2")
        renamed[name] = tensor
    return renamed


def to_huggingface(state: dict[str, Tensor], *, major: int = 4) -> dict[str, Tensor]:
    """Our parameters by the names of transformers 4 or 5, written out independently."""
    old = major < 5
    attention = "attention.attention." if old else "attention."
    qkv = ("query", "key", "value") if old else ("q_proj", "k_proj", "v_proj")
    renamed: dict[str, Tensor] = {}
    for key, tensor in state.items():
        head, _, leaf = key.rpartition(".")
        if key in ("cls_token", "register_tokens"):
            renamed[f"embeddings.{key}"] = tensor
        elif key == "pos_embed":
            renamed["embeddings.position_embeddings"] = tensor
        elif head == "patch_embed.proj":
            renamed[f"embeddings.patch_embeddings.projection.{leaf}"] = tensor
        elif head == "norm":
            renamed[f"layernorm.{leaf}"] = tensor
        else:
            _, index, *path = head.split(".")
            layer = f"encoder.layer.{index}."
            match path:
                case ["attn", "qkv"]:
                    for name, part in zip(qkv, tensor.chunk(3), strict=True):
                        renamed[f"{layer}{attention}{name}.{leaf}"] = part
                case ["attn", "proj"]:
                    name = "attention.output.dense" if old else "attention.o_proj"
                    renamed[f"{layer}{name}.{leaf}"] = tensor
                case ["ls1" | "ls2" as name]:
                    renamed[f"{layer}layer_scale{name[-1]}.lambda1"] = tensor
                case ["mlp", "w12"] if not old:
                    for name, part in zip(("gate", "up"), tensor.chunk(2), strict=True):
                        renamed[f"{layer}mlp.{name}_proj.{leaf}"] = part
                case ["mlp", "w12" | "w3" as name]:
                    new = {"w12": "weights_in", "w3": "weights_out" if old else "down_proj"}[name]
                    renamed[f"{layer}mlp.{new}.{leaf}"] = tensor
                case _:
                    renamed[f"{layer}{'.'.join(path)}.{leaf}"] = tensor
    return renamed
