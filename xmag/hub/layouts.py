"""Conversion of checkpoints in DINOv2, timm or Hugging Face layout to the state dict of our ViT.

Three layouts of the same model are known, each under any prefix:
"dinov2" (facebookresearch/dinov2: blocks.0.attn.qkv, ls1.gamma, mlp.w12, register_tokens),
"timm" (the same but for reg_token, positions of registers, and a packed SwiGLU in mlp.fc1 and
mlp.fc2; a plain ViT has the names of "dinov2"), and "huggingface" (of Dinov2Model and ViTModel:
encoder.layer.0.attention.attention.query of transformers 4, .q_proj of 5).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from xmag.errors import WeightsError
from xmag.vit import ViTConfig, empty_vit

_ANCHORS = {
    "patch_embed.proj.weight": "dinov2",
    "embeddings.patch_embeddings.projection.weight": "huggingface",
}
"""A parameter that every model of a layout has once; what stands before it is the prefix."""

_Names = tuple[tuple[re.Pattern[str], str], ...]


def _names(*pairs: tuple[str, str]) -> _Names:
    return tuple((re.compile(pattern), ours) for pattern, ours in pairs)


_CHUNKS = _names((r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."))
"""DINOv2's training checkpoints group blocks for sharding: blocks.<chunk>.<block>."""

_TIMM = _names((r"^reg_token$", "register_tokens"))
_TIMM_SWIGLU = _names((r"\.mlp\.fc1\.", ".mlp.w12."), (r"\.mlp\.fc2\.", ".mlp.w3."))
_HUGGINGFACE = _names(
    (r"^embeddings\.(cls_token|register_tokens|mask_token)$", r"\1"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^layernorm\.", "norm."),
    (r"^(?:encoder\.layer|layers)\.(\d+)\.", r"blocks.\1."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.attention\.(?:attention\.query|q_proj)\.", ".attn.qkv[0]."),
    (r"\.attention\.(?:attention\.key|k_proj)\.", ".attn.qkv[1]."),
    (r"\.attention\.(?:attention\.value|v_proj)\.", ".attn.qkv[2]."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.gate_proj\.", ".mlp.w12[0]."),
    (r"\.mlp\.up_proj\.", ".mlp.w12[1]."),
    (r"\.mlp\.(?:weights_out|down_proj)\.", ".mlp.w3."),
)
_PART = re.compile(r"\[(\d)\]")
_LISTED = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class ViTState:
    """Parameters for our ViT, float32, and where they were found.

    `left_out` names the other parts of a training checkpoint (heads, teacher, optimizer).
    """

    state: dict[str, Tensor]
    layout: str
    prefix: str
    left_out: tuple[str, ...]


def to_vit_state(
    tensors: Mapping[str, Tensor], config: ViTConfig, *, where: str, heads: tuple[str, ...] = ()
) -> ViTState:
    """The state dict of a ViT of this configuration, from a checkpoint in any known layout.

    Raises WeightsError that lists every key that is missing, unexpected, misshapen or not finite;
    nothing is loaded in part. `where` names the checkpoint in messages, `heads` the parts of the
    model ("head", "pooler") that are left out.
    """
    prefix, anchor = _choose_model(tensors, where)
    ends = tuple(f"{prefix}{head}." for head in heads)
    inside = {key for key in tensors if key.startswith(prefix) and not key.startswith(ends)}
    model = {key.removeprefix(prefix): t for key, t in tensors.items() if key in inside}
    outside = (key for key in tensors if key not in inside)
    layout = _ANCHORS[anchor]
    if layout == "huggingface":
        state: dict[str, Tensor] = {}
        for key, part in sorted(_renamed(model, _HUGGINGFACE).items()):
            whole = _PART.sub("", key)  # of name[0], name[1], ..., along the first axis
            state[whole] = torch.cat((state[whole], part)) if whole in state else part
    else:
        dinov2 = _renamed(model, _CHUNKS)
        state = _renamed(dinov2, _TIMM + (_TIMM_SWIGLU if config.mlp == "swiglu" else ()))
        layout = "dinov2" if state.keys() == dinov2.keys() else "timm"
    state.pop("mask_token", None)  # of pre-training: no embedding depends on it
    _settle_positions(state, config)
    _check(state, config, where=where, prefix=prefix, layout=layout)
    return ViTState(
        state={key: t.to(torch.float32, copy=True).contiguous() for key, t in state.items()},
        layout=layout,
        prefix=prefix,
        left_out=tuple(sorted({".".join(key.split(".")[:2]) for key in outside})),
    )


def _settle_positions(state: dict[str, Tensor], config: ViTConfig) -> None:
    """Bring a table of positions without the class's, or with the registers', to our rows."""
    table, patches, registers = state.get("pos_embed"), config.position_grid**2, config.registers
    if table is None or table.ndim != 3 or not config.class_position:
        return
    if table.shape[1] == patches:
        # timm adds the class position to the token: a row of zeros stands for it.
        state["pos_embed"] = torch.cat((torch.zeros_like(table[:, :1]), table), dim=1)
    tokens = state.get("register_tokens")
    if registers and tokens is not None and table.shape[1] == 1 + registers + patches:
        # timm without no_embed_class: a register is always at its position, so that they add up.
        state["register_tokens"] = tokens.float() + table[:, 1 : 1 + registers].float()
        state["pos_embed"] = torch.cat((table[:, :1], table[:, 1 + registers :]), dim=1)


def _choose_model(tensors: Mapping[str, Tensor], where: str) -> tuple[str, str]:
    """The prefix and anchor of the model to take: the only one, else the EMA student."""
    found: dict[str, str] = {}
    for key in tensors:
        for anchor in _ANCHORS:
            if key == anchor or key.endswith(f".{anchor}"):
                found[key.removesuffix(anchor)] = anchor
    if not found:
        raise WeightsError(
            f"{where} holds no ViT in a layout that xmag knows; expected a key ending in"
            f" {' or '.join(_ANCHORS)}, seen {_listed(sorted(tensors))}"
        )
    averaged, students, teachers = (
        [prefix for prefix in found if word in re.split(r"[._]", prefix.lower())]
        for word in ("ema", "student", "teacher")
    )
    shapes = {prefix: tensors[prefix + anchor].shape for prefix, anchor in found.items()}
    # A teacher of the student's shape is self-distillation's: the student's own running average.
    twins = [t for t in teachers if any(shapes[t] == shapes[s] for s in students)]
    for candidates in (list(found), averaged, twins, students):
        if len(candidates) == 1:
            return candidates[0], found[candidates[0]]
    raise WeightsError(
        f"{where} holds {len(found)} models, under {_listed(sorted(found))}; expected one, or one"
        " that is marked as ema. Save the one you mean in a file of its own"
    )


def _renamed(state: Mapping[str, Tensor], names: _Names) -> dict[str, Tensor]:
    renamed = {}
    for key, tensor in state.items():
        for pattern, ours in names:
            key = pattern.sub(ours, key)  # noqa: PLW2901
        renamed[key] = tensor
    return renamed


def _check(
    state: Mapping[str, Tensor], config: ViTConfig, *, where: str, prefix: str, layout: str
) -> None:
    if listed := misfits(state, empty_vit(config).state_dict()):
        raise WeightsError(
            f"{where} (layout {layout}, prefix {prefix!r}) does not fit a ViT of width"
            f" {config.width}, depth {config.depth}, {config.registers} registers and mlp"
            f" {config.mlp!r}. {listed}. Give config= for the model that these weights are of"
        )
    check_finite(state, where)


def misfits(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """The keys that are missing, unexpected or of another shape, in words; empty without any."""
    shapes = {key: tuple(t.shape) for key, t in expected.items()}
    problems = {
        "missing": sorted(set(expected) - set(state)),
        "unexpected": sorted(set(state) - set(expected)),
        "misshapen": [
            f"{key} {tuple(state[key].shape)} for {shape}"
            for key, shape in shapes.items()
            if key in state and tuple(state[key].shape) != shape
        ],
    }
    return "; ".join(f"{what}: {', '.join(keys)}" for what, keys in problems.items() if keys)


def check_finite(state: Mapping[str, Tensor], where: str) -> None:
    """Raise WeightsError for values that are not finite floating-point numbers."""
    bad = [k for k, t in state.items() if not (t.is_floating_point() and t.isfinite().all())]
    if bad:
        raise WeightsError(
            f"{where} has values that are not finite floating-point numbers in {', '.join(bad)};"
            " expected none. Fetch it again, or take a checkpoint from before training diverged"
        )


def _listed(keys: list[str]) -> str:
    more = f" and {len(keys) - _LISTED} more" if len(keys) > _LISTED else ""
    return f"{keys[:_LISTED]}{more}"
