"""The student: encoder and heads, pretrained or fresh."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the name that every torch reader knows)
from torch import Tensor, nn

from xmag.devices import Float32
from xmag.distill.losses import Projection, block_means, summed
from xmag.distill.views import LOW_MPP, SIDE
from xmag.errors import InputError
from xmag.geometry import Resample
from xmag.hub import read_model
from xmag.hub.registry import ModelConfig
from xmag.vit import CONFIGS, ViT, ViTConfig, empty_vit

_INIT_STD = 0.02
_TOKEN_STD = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentStart:
    """Initial student: a ViT, its configuration, and the provenance of its weights (JSON)."""

    vit: ViT
    config: ModelConfig
    provenance: dict[str, Any]


class Student(nn.Module):
    """Student model: a ViT with heads for each teacher; uint8 images to projections.

    `teacher_dims` are the widths of the teachers' features. Each teacher has a global head for what
    the configuration pools, class token or mean of patch tokens (two for "token+mean"), and a local
    one. A level that carries no weight in the loss (`with_global`, `with_local`) has no heads.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        vit: ViT,
        config: ModelConfig,
        *,
        teacher_dims: Sequence[int],
        with_global: bool = True,
        with_local: bool = True,
    ) -> None:
        super().__init__()
        side = config.tile_spec.size_px // config.vit.patch_px
        if side % SIDE:
            raise InputError(
                f"the student has {side} x {side} tokens; expected a multiple of {SIDE} a side,"
                " so that each of the teacher's 16 tiles has a block of tokens. Choose another"
                " patch_px or size_px"
            )
        self.vit = vit
        self._teachers, self._pooling = len(teacher_dims), config.vit.pooling
        self._pooled = 2 if self._pooling == "token+mean" else 1
        self._patch_px, self._block_px = config.vit.patch_px, config.tile_spec.size_px // SIDE
        self._first_patch = 1 + config.vit.registers
        self.global_heads, self.local_heads = (
            nn.ModuleList(
                ProjectionHead(config.vit.width, dim) for dim in teacher_dims for _ in range(count)
            )
            for count in (self._pooled * with_global, int(with_local))
        )
        std, mean = (
            torch.tensor(rgb, dtype=torch.float32).view(3, 1, 1)
            for rgb in (config.std, config.mean)
        )
        # Not in the state: they are in the configuration.
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)

    def forward(self, low: Tensor) -> list[Projection]:
        """The projections of uint8 images (B, S, S, 3), one for each teacher; B may be 0.

        S is that of a region's low view, or half of it: a quarter of a region has 4 tiles.
        """
        blocks_a_side = low.shape[1] // self._block_px
        grid = (low.shape[1] // self._patch_px,) * 2
        # The ViT takes no empty batch; with an image in its place, which is dropped again, a rank
        # with none takes part in what all ranks compute together.
        images = low if len(low) else low.new_zeros((1, *low.shape[1:]))
        images = images.permute(0, 3, 1, 2) * self.scale + self.shift
        tokens = self.vit(images, self.vit.positions(grid))[: len(low)]
        patches = tokens[:, self._first_patch :]
        pooled = {"token": tokens[:, :1], "mean": patches.mean(1, keepdim=True)}
        regions = torch.cat([pooled[name] for name in self._pooling.split("+")], dim=1)
        blocks = block_means(patches, blocks_a_side)
        return [
            Projection(
                region=self._region(i, regions) if self.global_heads else None,
                tiles=self.local_heads[i](blocks.flatten(0, 1)).unflatten(0, blocks.shape[:2])
                if self.local_heads
                else None,
            )
            for i in range(self._teachers)
        ]

    def _region(self, teacher: int, pooled: Tensor) -> Tensor:
        """Pooled tokens (B, P, D) through the global heads of a teacher: (B, Dt), or (B, 2, Dt)."""
        first = teacher * self._pooled
        heads = self.global_heads[first : first + self._pooled]
        found = [head(rows) for head, rows in zip(heads, pooled.unbind(1), strict=True)]
        return found[0] if len(found) == 1 else torch.stack(found, dim=1)


def fresh_student(
    config: ModelConfig | ViTConfig | str,
    *,
    layer_scale: float = 0.1,
    seed: int = 0,
    resample: Resample = "lanczos",
) -> StudentStart:
    """Randomly initialised student, reproducible by seed; torch's own generator is untouched.

    Matrices are drawn from a normal distribution of 0.02 cut at two of them, biases are 0, as
    DINOv2 begins; LayerScale begins at `layer_scale`, since DINOv2's 1e-5 keeps a ViT that is
    trained from nothing close to a linear map for thousands of steps. `resample` is the kernel that
    its tiles are made with.
    """
    model = student_config(config, resample)
    if not 0 < layer_scale <= 1:
        raise InputError(f"layer_scale is {layer_scale!r}; expected a number in (0, 1]")
    with Float32():
        vit = empty_vit(model.vit).to_empty(device="cpu")
    rng = torch.Generator().manual_seed(seed)
    for name, parameter in vit.named_parameters():
        if name.endswith("gamma"):
            nn.init.constant_(parameter, layer_scale)
        elif name in ("cls_token", "register_tokens"):
            nn.init.normal_(parameter, std=_TOKEN_STD, generator=rng)
        elif parameter.ndim > 1:
            cut = 2 * _INIT_STD
            nn.init.trunc_normal_(parameter, std=_INIT_STD, a=-cut, b=cut, generator=rng)
        else:
            is_norm_scale = "norm" in name and name.endswith("weight")
            nn.init.constant_(parameter, 1.0 if is_norm_scale else 0.0)
    return StudentStart(
        vit=vit,
        config=model,
        provenance={"name": None, "seed": seed, "layer_scale": layer_scale},
    )


def pretrained_student(
    name_or_path: str,
    *,
    config: ModelConfig | ViTConfig | str | None = None,
    resample: Resample = "lanczos",
    **options: Any,
) -> StudentStart:
    """Student initialised from a model that `load_model` reads, such as DINOv2.

    `resample` is the kernel that its tiles are made with. `options` are revision, token, cache_dir
    and local_files_only, as for `load_model`. Raises InputError where the model is for tiles of
    another scale than the student's 2.0 µm/px, and HubError or WeightsError where it cannot be
    read.
    """
    loaded = read_model(name_or_path, config=config, **options)
    if not isinstance(loaded.config, ModelConfig):
        raise InputError(
            f"the student {name_or_path} is a model that timm runs; expected a ViT that xmag runs"
        )
    model = student_config(loaded.config, resample)
    vit = empty_vit(model.vit)
    vit.load_state_dict(loaded.state, assign=True)
    known = ("name", "revision", "weights_sha256", "terms")
    return StudentStart(
        vit=vit.requires_grad_(True),
        config=model,
        provenance={key: loaded.provenance.get(key) for key in known},
    )


def student_config(
    config: ModelConfig | ViTConfig | str, resample: Resample = "lanczos"
) -> ModelConfig:
    """ModelConfig of a student, whose tiles are at 2.0 µm/px, made with the kernel `resample`.

    Raises InputError for an unknown name and for a tile specification of another scale.
    """
    if isinstance(config, str):
        if config not in CONFIGS:
            raise InputError(
                f"the student's config is {config!r}; expected one of {sorted(CONFIGS)}, a"
                " ViTConfig or a ModelConfig"
            )
        config = CONFIGS[config]
    if isinstance(config, ViTConfig):
        config = ModelConfig(vit=config)
    spec = config.tile_spec
    if spec.mpp != LOW_MPP:
        raise InputError(
            f"the student's tiles are at {spec.mpp:g} µm/px; expected {LOW_MPP:g}, a quarter of the"
            " teacher's resolution. Start from other weights, or give a ModelConfig with"
            f" TileSpec(mpp={LOW_MPP:g}) if these may learn that scale"
        )
    # The kernel of the pixels it learns from: what it is given later has to be made with it too.
    return replace(config, tile_spec=replace(spec, resample=resample))


class SyncedBatchNorm(nn.Module):
    """Synchronised BatchNorm1d: statistics over the rows of all ranks, on any device.

    PyTorch's SyncBatchNorm refuses the CPU. The names, the defaults and the running statistics are
    those of BatchNorm1d. A rank may have no row; where none has, the running statistics stay.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, width: int, *, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, rows: Tensor) -> Tensor:
        """The normalised rows (N, C), at least float32."""
        with torch.autocast(rows.device.type, enabled=False):
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
            if not self.training:
                centred, variance = rows - self.running_mean, self.running_var
            else:
                centred, variance = self._centred(rows)
            scale = self.weight * (variance + self.eps).rsqrt()
            return centred * scale + self.bias

    def _centred(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Centred rows and biased variance over all ranks; updates the running statistics.

        The variance is summed over what is centred already: E[x^2] - E[x]^2 would cancel.
        """
        total = summed(torch.cat((rows.sum(0), rows.new_full((1,), len(rows)))))
        count = total[-1].detach().clamp(min=1)
        mean = total[:-1] / count
        centred = rows - mean
        variance = summed(centred.square().sum(0)) / count
        with torch.no_grad():
            share = self.momentum * (total[-1] > 0).to(mean.dtype)
            unbiased = variance * (count / (count - 1).clamp(min=1))
            self.running_mean += share * (mean - self.running_mean)
            self.running_var += share * (unbiased - self.running_var)
            self.num_batches_tracked += 1
        return centred, variance


class ProjectionHead(nn.Module):
    """Projection head (Linear, BatchNorm, GELU, Linear): a student's width to a teacher's.

    The heads of arXiv 2509.23097, with statistics over all ranks.
    """

    def __init__(self, width: int, teacher_dim: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, teacher_dim)
        self.norm = SyncedBatchNorm(teacher_dim)
        self.last = nn.Linear(teacher_dim, teacher_dim)

    def forward(self, rows: Tensor) -> Tensor:
        """Project rows (N, width) to float32 (N, teacher_dim)."""
        projected: Tensor = self.last(F.gelu(self.norm(self.first(rows))))
        return projected.to(torch.promote_types(projected.dtype, torch.float32))
