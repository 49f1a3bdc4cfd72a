"""TOML configuration of a distillation, read and checked; examples/distill.toml has every key."""

import os
from dataclasses import dataclass, field
from typing import Literal

from xmag import records
from xmag.distill.augment import Augmentation
from xmag.distill.export import Card
from xmag.distill.settings import (
    LoaderSettings,
    LogSettings,
    LossSettings,
    Settings,
    TrainSettings,
)
from xmag.errors import InputError
from xmag.vit import ViTConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Data section: slides or images, and region sampling; paths relative to the file's folder.

    Either `slides` or `images` (large tiles of known `mpp`): a folder, or a list of paths. The rest
    is as in `plan_slides` and `plan_images`. `hold_out` is the share of the regions that validate:
    whole slides, where there is more than one.
    """

    slides: str | list[str] | None = None
    images: str | list[str] | None = None
    mpp: float | None = None
    regions: int | None = None
    min_tissue: float = 0.5
    overlap: int = 0
    seed: int = 0
    skip_refused: bool = False
    hold_out: float = 0.05

    def __post_init__(self) -> None:
        if (self.slides is None) == (self.images is None):
            raise InputError(
                f"data.slides is {self.slides!r} and data.images {self.images!r}; expected one of"
                " the two"
            )
        if self.images is not None and (self.mpp is None or self.regions is None):
            raise InputError(
                f"data.mpp is {self.mpp} and data.regions {self.regions}; images need both: their"
                " µm/px, and how many crops to draw"
            )
        if not 0 <= self.hold_out < 1:
            raise InputError(f"data.hold_out is {self.hold_out!r}; expected a share in [0, 1)")


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherConfig:
    """Teacher section: name for `load_teacher`, loss weight, and feature caching.

    With `keep` "no" features are computed online for every augmented view; with "plain" those of
    unaugmented regions are computed once and cached; with "augmented" those of `variants` augmented
    views of each. `keep_low` caches the low views too, so that no slide is read while training.
    """

    name: str
    weight: float = 1.0
    dtype: str = "auto"
    keep: Literal["no", "plain", "augmented"] = "no"
    variants: int = 4
    keep_low: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentConfig:
    """Student section: initial weights of a model, or random ones of a configuration.

    `weights` is a name or path that `load_model` takes, such as "facebook/dinov2-base". `config` is
    the name of an architecture or the fields of a ViTConfig; `layer_scale` and `seed` are those of
    `fresh_student`, for a student without weights.
    """

    weights: str | None = None
    config: str | ViTConfig | None = None
    layer_scale: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.weights is None and self.config is None:
            raise InputError(
                "student.weights and student.config are both missing; expected weights to begin"
                ' with, such as "facebook/dinov2-base", or the name of a config, such as'
                ' "dinov2_vitb14"'
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillConfig:
    """A whole configuration file; `out` is the folder of the run."""

    out: str
    data: DataConfig
    teachers: list[TeacherConfig]
    student: StudentConfig
    loss: LossSettings = field(default_factory=LossSettings)
    augment: Augmentation = field(default_factory=Augmentation)
    train: TrainSettings = field(default_factory=TrainSettings)
    loader: LoaderSettings = field(default_factory=LoaderSettings)
    log: LogSettings = field(default_factory=LogSettings)
    model: Card = field(default_factory=Card)

    @property
    def settings(self) -> Settings:
        """The training settings of the file, for `distill`."""
        return Settings(
            loss=self.loss,
            augment=self.augment,
            train=self.train,
            loader=self.loader,
            log=self.log,
        )


def read_config(path: str | os.PathLike[str]) -> DistillConfig:
    """Read and check the TOML configuration of a distillation.

    Raises InputError for a file that cannot be read, an unknown key (with the nearest known one), a
    missing one, and a value of the wrong type or out of range.
    """
    return records.read_toml(DistillConfig, path)
