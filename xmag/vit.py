"""The vision transformer: one module for every model that xmag loads, and no I/O.

Covers timm's plain ViTs, DINOv2 S, B, L and g with and without registers, UNI2-h, and xmag-mini.
Parameter names are those of the DINOv2 hub. Shapes in comments: B images, N patches, T tokens
(class, registers, patches), D width, H heads.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, get_args

import torch
import torch.nn.functional as F  # noqa: N812 (the name that every torch reader knows)
from torch import Tensor, nn

from xmag import records
from xmag.errors import InputError

PositionRule = Literal["offset", "size", "size_antialias"]
Mlp = Literal["gelu", "swiglu"]
Pooling = Literal["token", "token+mean", "mean"]

_MAX_DEPTH = 1_000
_MAX_SIZE = 1 << 20
"""Largest size in a configuration: blocks are made before weights are compared with them."""
_HISTORICAL_OFFSET = 0.1
"""Offset added to the wanted grid before the division: DINOv2's guard against rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ViTConfig(records.Record):
    """Configuration that defines the arithmetic of a ViT.

    `hidden` is the inner width of the MLP (of each half for "swiglu"). The table of positions has
    `position_grid` ** 2 rows, one more in front with `class_position`. `position_rule` says how it
    is brought to another grid, always bicubic: "offset" by the scale factor (n + 0.1) / grid
    (DINOv2's hub models without registers), "size" to n (Hugging Face's Dinov2Model),
    "size_antialias" to n with antialiasing (DINOv2's models with registers, timm). `pooling` makes
    the embedding of the tokens after the final norm: "token" is the class token, "mean" the mean of
    the patches (without class and registers), "token+mean" the two, one after the other.
    """

    width: int
    depth: int
    heads: int
    hidden: int
    mlp: Mlp = "gelu"
    patch_px: int = 14
    registers: int = 0
    position_grid: int = 37
    class_position: bool = True
    position_rule: PositionRule = "offset"
    eps: float = 1e-6
    layer_scale: bool = True
    pooling: Pooling = "token"

    @property
    def embed_dim(self) -> int:
        """The length of an embedding: the width, or twice that where "token+mean" is pooled."""
        return self.width * (2 if self.pooling == "token+mean" else 1)

    def __post_init__(self) -> None:
        require = functools.partial(records.require, self)
        for name in ("width", "depth", "heads", "hidden", "patch_px", "position_grid", "registers"):
            value, least = getattr(self, name), 0 if name == "registers" else 1
            most = _MAX_DEPTH if name == "depth" else _MAX_SIZE
            # type and not isinstance: True is an int, and 1, but no size to torch.
            fits = type(value) is int and least <= value <= most
            least_said = "an int from 0" if name == "registers" else "a positive int"
            require(name, fits, f"{least_said}, at most {most}")
        for name in ("class_position", "layer_scale"):
            require(name, isinstance(getattr(self, name), bool), "True or False")
        is_number = isinstance(self.eps, float) and math.isfinite(self.eps)
        require("eps", is_number and self.eps > 0, "a positive number")
        if self.width % self.heads:
            raise InputError(
                f"ViTConfig.width {self.width} is no multiple of heads {self.heads}; expected one"
            )
        for name, kind in (("mlp", Mlp), ("position_rule", PositionRule), ("pooling", Pooling)):
            require(name, getattr(self, name) in get_args(kind), f"one of {get_args(kind)}")


def _configs() -> dict[str, ViTConfig]:
    dinov2 = {
        "dinov2_vits14": ViTConfig(width=384, depth=12, heads=6, hidden=1536),
        "dinov2_vitb14": ViTConfig(width=768, depth=12, heads=12, hidden=3072),
        "dinov2_vitl14": ViTConfig(width=1024, depth=24, heads=16, hidden=4096),
        "dinov2_vitg14": ViTConfig(width=1536, depth=40, heads=24, hidden=4096, mlp="swiglu"),
    }
    with_registers = {
        f"{name}_reg": replace(config, registers=4, position_rule="size_antialias")
        for name, config in dinov2.items()
    }
    uni2_h = replace(
        dinov2["dinov2_vitg14"],
        depth=24,
        registers=8,
        position_grid=16,
        class_position=False,
        position_rule="size_antialias",
    )
    mini = ViTConfig(width=192, depth=12, heads=3, hidden=768, position_grid=16)
    return {**dinov2, **with_registers, "uni2_h": uni2_h, "xmag_mini": mini}


CONFIGS: Mapping[str, ViTConfig] = MappingProxyType(_configs())


def interpolate_positions(table: Tensor, grid: tuple[int, int], rule: PositionRule) -> Tensor:
    """The position table (1, n * n, D) brought to `grid` (rows, columns): (1, rows * columns, D).

    Bicubic in float32, by the rule that ViTConfig describes. "offset" is
    `interpolate_pos_encoding` of facebookresearch/dinov2 with its interpolate_offset of 0.1.
    """
    side = round(table.shape[1] ** 0.5)
    if grid == (side, side):
        return table
    square = table.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)  # (1, D, n, n)
    if rule == "offset":
        scale = tuple((n + _HISTORICAL_OFFSET) / side for n in grid)
        resized = F.interpolate(square, scale_factor=scale, mode="bicubic")
    else:
        antialias = rule == "size_antialias"
        resized = F.interpolate(square, size=grid, mode="bicubic", antialias=antialias)
    return resized.flatten(2).transpose(1, 2).to(table.dtype)


class _PatchEmbed(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.patch_px = config.patch_px
        self.proj = nn.Conv2d(3, config.width, config.patch_px, config.patch_px)

    def forward(self, images: Tensor) -> Tensor:
        # A matrix product and no convolution: on CUDA cuDNN would take TF32 for float32 unless a
        # global flag is changed, and the product is faster.
        p, (batch, channels, height, width) = self.patch_px, images.shape
        x = images.reshape(batch, channels, height // p, p, width // p, p)
        x = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, N, 3 p p)
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias)  # (B, N, D)


class _Attention(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, keep: int | None) -> Tensor:
        batch, count, _ = x.shape
        qkv = self.qkv(x).view(batch, count, 3, self.heads, -1)  # (B, T, 3, H, D / H)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, H, T, D / H)
        x = F.scaled_dot_product_attention(q[:, :, :keep], k, v)
        return self.proj(x.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class _LayerScale(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((config.width,), 1e-5))


class _GeluMlp(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.hidden)
        self.fc2 = nn.Linear(config.hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))  # type: ignore[no-any-return]


class _SwiGluMlp(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.w12 = nn.Linear(config.width, 2 * config.hidden)
        self.w3 = nn.Linear(config.hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)  # type: ignore[no-any-return]


class _Block(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=config.eps)
        self.attn = _Attention(config)
        self.ls1 = _LayerScale(config) if config.layer_scale else None
        self.norm2 = nn.LayerNorm(config.width, eps=config.eps)
        self.mlp = _SwiGluMlp(config) if config.mlp == "swiglu" else _GeluMlp(config)
        self.ls2 = _LayerScale(config) if config.layer_scale else None

    def forward(self, x: Tensor, first: Tensor, keep: int | None = None) -> tuple[Tensor, Tensor]:
        x, first = _add(x[:, :keep], first, self.attn(self.norm1(x), keep), self.ls1)
        return _add(x, first, self.mlp(self.norm2(x)), self.ls2)


def _add(
    x: Tensor, first: Tensor, branch: Tensor, scale: _LayerScale | None
) -> tuple[Tensor, Tensor]:
    """The sum x + scale * branch, (B, T, D), and that of the class token alone, (B, 1, D).

    The class token is summed in float32 whatever the dtype of the model: in bfloat16 the rounding
    of its sum is most of the error of an embedding, more than that of all weights. The other
    tokens reach it averaged, their rounding with them, and need no more than half the memory.
    """
    if scale is None:
        first, x = first + branch[:, :1], x + branch
    else:
        first = torch.addcmul(first, branch[:, :1], scale.gamma)
        x = torch.addcmul(x, branch, scale.gamma)  # in one pass over memory
    x[:, :1] = first
    return x, first


class ViT(nn.Module):
    """A vision transformer with the parameters that `config` describes."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        rows = config.position_grid**2 + config.class_position
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        if config.registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, config.registers, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, rows, config.width))
        self.patch_embed = _PatchEmbed(config)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=config.eps)
        # On the meta device there is nothing to fill, and normal_() would import torch._dynamo,
        # which takes a second and sets environment variables.
        if not self.cls_token.is_meta:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
            nn.init.normal_(self.cls_token, std=1e-6)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The position table for a grid of patches, (1, rows * columns [+ 1], D)."""
        patches = self.pos_embed[:, int(self.config.class_position) :]
        resized = interpolate_positions(patches, grid, self.config.position_rule)
        if not self.config.class_position:
            return resized
        return torch.cat((self.pos_embed[:, :1], resized), dim=1)

    def forward(
        self, images: Tensor, positions: Tensor | None = None, *, keep: int | None = None
    ) -> Tensor:
        """The tokens after the final norm, (B, T, D): class token, registers, patches row by row.

        They are float32 (float64 of a float64 model), also where the model is half precision.
        `images` is (B, 3, height, width), normalised, its sides multiples of the patch. Whoever
        calls often gives the `positions` of its grid, worked out once. With `keep` only the first
        so many tokens come back, and the last block does not compute the others: the same values,
        a twelfth block almost free where only the class token is wanted.
        """
        height, width = images.shape[2:]
        p = self.config.patch_px
        if height % p or width % p or images.shape[1] != 3:
            raise InputError(
                f"images are {tuple(images.shape)}; expected (B, 3, height, width) with sides that"
                f" are multiples of {p}. Crop or resize them"
            )
        if positions is None:
            positions = self.positions((height // p, width // p))
        x = self._tokens(self.patch_embed(images), positions)
        wide = torch.promote_types(x.dtype, torch.float32)
        first = x[:, :1].to(wide)
        *front, last = self.blocks
        for block in front:
            x, first = block(x, first)
        x, first = last(x, first, keep)
        x = x.to(wide)
        x[:, :1] = first
        scale, shift = self.norm.weight.to(wide), self.norm.bias.to(wide)
        return F.layer_norm(x, self.norm.normalized_shape, scale, shift, self.norm.eps)

    def embed(self, images: Tensor, positions: Tensor | None = None) -> Tensor:
        """The embeddings (B, embed_dim): the tokens of `forward`, pooled as the configuration says.

        Float32 as they are; takes and raises what `forward` does.
        """
        if self.config.pooling == "token":
            return self(images, positions, keep=1)[:, 0]  # type: ignore[no-any-return]
        tokens = self(images, positions)
        mean = tokens[:, 1 + self.config.registers :].mean(dim=1)
        return mean if self.config.pooling == "mean" else torch.cat((tokens[:, 0], mean), dim=1)

    def _tokens(self, patches: Tensor, positions: Tensor) -> Tensor:
        count = patches.shape[1]
        parts = [self.cls_token, patches + positions[:, -count:]]
        if self.config.class_position:
            parts[0] = self.cls_token + positions[:, :1]
        if self.config.registers:
            parts.insert(1, self.register_tokens)  # registers have no position
        return torch.cat([part.expand(patches.shape[0], -1, -1) for part in parts], dim=1)


def empty_vit(config: ViTConfig) -> ViT:
    """A ViT without storage (on the meta device), to be filled by load_state_dict(assign=True).

    Draws no random numbers, so that loading a model leaves torch's generators as they were.
    """
    with torch.device("meta"):
        return ViT(config)
