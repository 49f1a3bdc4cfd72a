"""Teacher models: features of tiles at 0.5 µm/px, for a student to learn.

`load_teacher` makes a `Teacher` from a name, an Encoder, or any function from tiles to features.
Training asks `TeacherFeatures` for those of augmented regions: computed online here, or cached.
"""

import hashlib
import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from xmag.distill.views import HIGH_MPP, SIDE, TILE_PX, teacher_tiles
from xmag.encoder import Encoder, load_model
from xmag.errors import InputError, ModelError
from xmag.geometry import TileSpec
from xmag.hub.configs import TIMM
from xmag.hub.registry import ModelConfig
from xmag.provenance import dtype_class
from xmag.training.augmentation import Draws
from xmag.urls import base_name
from xmag.vit import ViTConfig

TILE_SPEC = TileSpec(mpp=HIGH_MPP, size_px=TILE_PX)
"""Tile specification of all teachers."""

PYTHON = "python:"
"""Prefix of a teacher that a function of the reader's own makes: python:MODULE:FUNCTION."""

_SAME_MPP = 1e-6
_BATCH_TILES = 256
"""Batch size of a teacher in tiles: enough to fill a GPU."""


@runtime_checkable
class Teacher(Protocol):
    """Protocol of a teacher model."""

    @property
    def name(self) -> str:
        """Name in logs and checkpoints; unique among the teachers of a student."""
        ...

    @property
    def dim(self) -> int:
        """Length of a feature vector."""
        ...

    @property
    def identity(self) -> Mapping[str, Any]:
        """Identity of the model as plain JSON values: name, weights_sha256, and more."""
        ...

    @property
    def tile_spec(self) -> TileSpec:
        """Size and scale of the tiles that it takes."""
        ...

    def features(self, tiles: Tensor, /) -> Tensor:
        """The features of uint8 tiles (M, 224, 224, 3): float32 (M, dim), on the same device."""
        ...


class TileTeacher:
    """Teacher from a function of tiles; checks shape and finiteness of its features."""

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        *,
        name: str,
        dim: int,
        identity: Mapping[str, Any],
        tile_spec: TileSpec = TILE_SPEC,
    ) -> None:
        check_tile_spec(tile_spec, name)
        self.name, self.dim, self.tile_spec = name, dim, tile_spec
        self.identity: Mapping[str, Any] = MappingProxyType({"name": name, **identity})
        self._function = function

    def __repr__(self) -> str:
        return f"<TileTeacher {self.name!r} of {self.dim} features>"

    def features(self, tiles: Tensor, /) -> Tensor:
        """The features of uint8 tiles (M, 224, 224, 3): float32 (M, dim), on the same device.

        Raises InputError for other tiles, ModelError for features of another shape, and for values
        that are not finite: a student must not learn them.
        """
        size = self.tile_spec.size_px
        if tiles.dtype != torch.uint8 or tiles.ndim != 4 or tiles.shape[1:] != (size, size, 3):
            raise InputError(
                f"tiles are {tiles.dtype} {tuple(tiles.shape)}; {self.name} expects uint8"
                f" (M, {size}, {size}, 3)"
            )
        result = tiles.new_empty((len(tiles), self.dim), dtype=torch.float32)
        for first in range(0, len(tiles), _BATCH_TILES):
            part = tiles[first : first + _BATCH_TILES]
            with torch.no_grad():
                found = torch.as_tensor(self._function(part))
            if found.shape != (len(part), self.dim) or not found.is_floating_point():
                raise ModelError(
                    f"{self.name} returned {found.dtype} {tuple(found.shape)} for {len(part)}"
                    f" tiles; expected floating point ({len(part)}, {self.dim})"
                )
            result[first : first + len(part)] = found
        finite = torch.isfinite(result).all(1)
        if not finite.all():
            row = int(finite.int().argmin())
            raise ModelError(
                f"{self.name} gave features that are not finite (first for tile {row} of"
                f' {len(tiles)}); load it with dtype="float32", and check its weights'
            )
        return result


class TeacherFeatures(Protocol):
    """Protocol of teacher features for training: `OnlineFeatures`, `CachedFeatures`, or others.

    `name` is the teacher's name in logs and checkpoints, `dim` the length of a feature vector,
    `identity` that of the teacher (and cache) as plain JSON values, `weight` that of its losses;
    `needs_pixels` says whether `targets` needs the augmented high views.
    """

    name: str
    dim: int
    identity: Mapping[str, Any]
    weight: float
    needs_pixels: bool

    def available(self, regions: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Mask of the regions that have features: bool (B,); others are left out of batches."""
        ...

    def targets(self, regions: NDArray[np.int64], draws: Draws, high: Tensor | None) -> Tensor:
        """Features of augmented regions: (B, 16, dim), float32 or float16, on any device.

        `high` are the high views, augmented by `draws`, where `needs_pixels`. B may be 0.
        """
        ...

    def check(self, student: TileSpec) -> None:
        """Raise InputError where a student of this tile specification cannot use the features."""
        ...


class OnlineFeatures:
    """Teacher features computed online, of every augmented view; `weight` is of its losses."""

    needs_pixels = True

    def __init__(self, teacher: Teacher, weight: float = 1.0) -> None:
        if not 0 < weight < float("inf"):
            raise InputError(
                f"the weight of {teacher.name} is {weight!r}; expected a positive number"
            )
        self.teacher, self.weight = teacher, weight
        self.name, self.dim, self.identity = teacher.name, teacher.dim, teacher.identity

    def __repr__(self) -> str:
        return f"<OnlineFeatures of {base_name(self.name)!r}: {self.dim} features>"

    def available(self, regions: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Mask of the regions that have features: all, bool (B,)."""
        return np.ones(len(regions), np.bool_)

    def targets(
        self,
        regions: NDArray[np.int64],
        draws: Draws,  # noqa: ARG002 (the high views are augmented already)
        high: Tensor | None,
    ) -> Tensor:
        """Compute the features of the 16 tiles of each view in `high`: float32 (B, 16, dim)."""
        assert high is not None
        if not len(regions):
            return torch.empty(0, SIDE**2, self.dim, dtype=torch.float32, device=high.device)
        features = self.teacher.features(teacher_tiles(high)).float()
        return features.view(len(high), SIDE**2, self.dim)

    def check(self, student: TileSpec) -> None:
        """Raise InputError where a tile of the student is not 4 x 4 of the teacher's."""
        seen = self.teacher.tile_spec
        if seen.size_px != student.size_px or abs(seen.mpp * SIDE / student.mpp - 1) > 1e-6:
            raise InputError(
                f"the teacher {self.name} sees {seen.size_px} px at {seen.mpp:g} µm/px and the"
                f" student {student.size_px} px at {student.mpp:g} µm/px; expected the same px at"
                f" {SIDE} times the µm/px, so that a tile of the student is {SIDE} x {SIDE} of the"
                " teacher's"
            )


def check_teachers(teachers: Sequence[TeacherFeatures], student: TileSpec) -> None:
    """Raise InputError where teachers share a name, or do not fit the student's tiles."""
    names = [teacher.name for teacher in teachers]
    if not names or len(set(names)) < len(names):
        raise InputError(
            f"the teachers are {names}; expected at least one, and a name of its own for each"
        )
    for teacher in teachers:
        teacher.check(student)


def load_teacher(
    teacher: str | os.PathLike[str] | Teacher | Encoder | Callable[[Tensor], Tensor],
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    name: str | None = None,
    dim: int | None = None,
    identity: Mapping[str, Any] | None = None,
    config: ModelConfig | ViTConfig | str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Teacher:
    """Load a teacher from a model name, an Encoder or a function.

    Args:
        teacher: A name or path for `load_model` ("MahmoodLab/UNI2-h", whose terms are logged when
            it is fetched; a path); "timm:NAME" for a pretrained model of timm; an Encoder; a
            Teacher, which is returned as it is; a function from uint8 tiles (M, 224, 224, 3), on
            the device where they are, to features (M, dim); or "python:MODULE:FUNCTION", which is
            called with `device` and `dtype` and returns a Teacher.
        device: Device of a model loaded by name.
        dtype: Its compute dtype: "auto" takes bfloat16 on CUDA that has it.
        name: Name of a function in logs and checkpoints.
        dim: The length of a function's features.
        identity: More of a function's identity, as JSON values. The SHA-256 of its weights
            is added for a torch.nn.Module.
        config: As in `load_model`, and so are the rest.
        revision: As in `load_model`.
        token: As in `load_model`.
        cache_dir: As in `load_model`.
        local_files_only: As in `load_model`.

    Raises:
        InputError: The model wants other tiles than 224 px at 0.5 µm/px, or arguments are missing.
        MissingExtraError: timm is asked for and not installed.
        ModelError: The model cannot be loaded.
    """
    if isinstance(teacher, str) and teacher.startswith(PYTHON):
        teacher = _made_by(teacher)(device=device, dtype=dtype)
    if isinstance(teacher, str | os.PathLike):
        by_timm = isinstance(teacher, str) and teacher.startswith(TIMM)
        loaded = load_model(
            teacher,
            config=config,
            tile_spec=TILE_SPEC if by_timm else None,  # nobody else says at which scale it is used
            device=device,
            dtype=dtype,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        return _encoder_teacher(loaded.named(str(teacher)) if by_timm else loaded)
    if isinstance(teacher, Encoder):
        return _encoder_teacher(teacher)
    if isinstance(teacher, Teacher):
        check_tile_spec(teacher.tile_spec, teacher.name)
        return teacher
    if not callable(teacher):
        raise InputError(
            f"teacher is a {type(teacher).__name__}; expected a name, a path, an Encoder, or a"
            " function from tiles to features"
        )
    if name is None or dim is None:
        raise InputError(
            f"a function as a teacher needs name= (now {name!r}) and dim= (now {dim!r}): what to"
            " call it in records, and the length of its features"
        )
    about = dict(identity or {})
    if isinstance(teacher, nn.Module):
        about.setdefault("weights_sha256", module_sha256(teacher))
    return TileTeacher(teacher, name=name, dim=dim, identity={"kind": "function", **about})


def _made_by(name: str) -> Callable[..., Any]:
    """The function that "python:MODULE:FUNCTION" names; InputError where there is none."""
    module, _, function = name.removeprefix(PYTHON).partition(":")
    try:
        found = getattr(importlib.import_module(module), function, None)
    except (ImportError, ValueError) as error:
        raise InputError(f"the teacher {name!r} cannot be imported: {error}") from error
    if not callable(found):
        raise InputError(
            f"{module!r} has no function {function!r}; expected python:MODULE:FUNCTION, of a"
            " function that takes device= and dtype= and returns a Teacher"
        )
    return found  # type: ignore[no-any-return]


def check_tile_spec(spec: TileSpec, name: str) -> None:
    """Raise InputError where a teacher's tile specification is not `TILE_SPEC`."""
    if spec.size_px != TILE_PX or abs(spec.mpp / HIGH_MPP - 1) > _SAME_MPP:
        raise InputError(
            f"{name} wants tiles of {spec.size_px} px at {spec.mpp:g} µm/px; a teacher sees"
            f" {TILE_PX} px at {HIGH_MPP} µm/px, 16 of which are one tile of the student. If it was"
            " trained at that scale, say so: load_teacher(NAME, config=ModelConfig(vit=...,"
            f" tile_spec=TileSpec(mpp={HIGH_MPP})))"
        )


def module_sha256(module: nn.Module) -> str:
    """SHA-256 of the names, types, shapes and values of a module's state."""
    digest = hashlib.sha256()
    for key, tensor in sorted(module.state_dict().items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{key} {values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(values.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _encoder_teacher(encoder: Encoder) -> TileTeacher:
    about = encoder.provenance
    name = str(about["name"])
    if Path(name).expanduser().exists():
        name = Path(name).name  # records travel, and hold no paths
    return TileTeacher(
        encoder.embed,
        name=name,
        dim=encoder.embed_dim,
        tile_spec=encoder.tile_spec,
        identity={
            "kind": "encoder",
            "revision": about.get("revision"),
            "weights_sha256": about.get("weights_sha256"),
            "config": about.get("config") or encoder.config.to_dict(),
            "dtype_class": dtype_class(str(encoder.dtype)),
        },
    )
