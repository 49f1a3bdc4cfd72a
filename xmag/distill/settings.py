"""Settings of a distillation, and its TOML configuration."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from types import MappingProxyType
from typing import Any, ClassVar

import torch

from xmag import records
from xmag.cores import usable_cores
from xmag.distill.export import Card
from xmag.errors import InputError
from xmag.geometry import Resample
from xmag.training import Augmentation
from xmag.vit import ViTConfig

_MOST_CORES = 16
_PRECISIONS = ("auto", "float32", "bfloat16")
_NO_AUGMENTED = (
    "cached features of unaugmented regions did as well with a fraction of the disk; expected"
    ' "plain" for those, or "no" for features of every augmented view'
)


def _require(record: Any, names: Sequence[str], fits: Callable[[Any], bool], expected: str) -> None:
    """Raise InputError, with the section of the file, where one of some fields does not fit."""
    section = type(record).__name__.removesuffix("Settings").removesuffix("Config").lower()
    for name in names:
        records.require(record, name, fits(getattr(record, name)), expected, section)


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSettings:
    """Loss settings: levels, distances, their weights, and centring.

    The loss is `global_weight` times the distance of regions plus `local_weight` times that of
    their 16 tiles; a level of weight 0 is left out. A distance is the sum of "cosine", "smooth_l1"
    and "relational", each times its weight. With `centre` the mean of the teacher's features is
    subtracted first, so that the cosine measures differences of regions, not what they share; the
    mean is that of `centre_regions` regions, computed once and kept. With `standardise` each
    dimension is then divided by its standard deviation over the tiles of the same regions, so that
    a teacher's few large dimensions do not decide the cosine alone.
    """

    global_weight: float = 1.0
    local_weight: float = 0.5
    cosine: float = 1.0
    smooth_l1: float = 0.0
    relational: float = 0.0
    centre: bool = False
    standardise: bool = False
    centre_regions: int = 512

    def __post_init__(self) -> None:
        weights = ("global_weight", "local_weight", "cosine", "smooth_l1", "relational")
        _require(self, weights, lambda x: 0 <= x < math.inf, "a number from 0 on")
        _require(self, ("centre_regions",), lambda x: x > 0, "a positive number")
        if self.standardise and not self.centre:
            raise InputError("loss.standardise is true without loss.centre; expected both, or none")
        if not (self.global_weight + self.local_weight and any(self.distances().values())):
            raise InputError(
                f"the loss is 0 whatever the student does: {self}; expected a positive"
                " global_weight or local_weight, and a positive cosine, smooth_l1 or relational"
            )

    def distances(self) -> dict[str, float]:
        """The weight of each distance by name."""
        names = ("cosine", "smooth_l1", "relational")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """Training settings: length, batch size, learning-rate schedule, optimizer, EMA.

    A step is `batch` regions over all GPUs, whatever their number, `micro_batch` of them at once on
    each (by default its whole share); `batch` is thus what an optimizer step averages over, and the
    number of GPUs changes nothing but the time. A region gives `views` augmented views, and of each
    `quarters` of its four quarters (0 to 4) as smaller views, with the features of their 4 tiles,
    so that tiles of half the size are no surprise to the student. The rate rises to `lr` over the
    fraction `warmup` of all steps, and then decays by half a cosine to the fraction `floor` of it:
    the `schedule` "cosine", which is the only one. Weight decay is for matrices and tables alone:
    not for biases, norms and LayerScale. With `ema_ramp` the EMA forgets its start faster: its
    decay is at most (1 + step) / (10 + step).
    """

    epochs: float = 10.0
    steps: int | None = None
    batch: int = 48
    micro_batch: int | None = None
    views: int = 2
    quarters: int = 0
    lr: float = 5e-4
    weight_decay: float = 0.05
    schedule: str = "cosine"
    warmup: float = 0.05
    floor: float = 0.0
    clip: float = 1.0
    ema: float = 0.999
    ema_ramp: bool = True
    precision: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        numbers = ("epochs", "batch", "views", "lr", "clip")
        _require(self, numbers, lambda x: x > 0, "a positive number")
        optional = ("steps", "micro_batch")
        _require(self, optional, lambda x: x is None or x > 0, "a positive number, or none")
        _require(self, ("quarters",), lambda x: 0 <= x <= 4, "a number from 0 to 4")
        _require(self, ("weight_decay", "seed"), lambda x: x >= 0, "a number from 0 on")
        _require(self, ("warmup", "floor", "ema"), lambda x: 0 <= x < 1, "a number in [0, 1)")
        if self.schedule == "paper":
            raise InputError(
                'train.schedule is "paper", which is gone: it repeated a fault of the code of arXiv'
                " 2509.23097, a warm-up as long as the run, so that the rate never decayed and was"
                ' 1/24 of lr at most; expected "cosine", which warms up and decays'
            )
        _require(self, ("schedule",), lambda x: x == "cosine", "'cosine'")
        _require(self, ("precision",), lambda x: x in _PRECISIONS, f"one of {_PRECISIONS}")

    def total_steps(self, regions: int) -> int:
        """The number of steps of a run over `regions` regions."""
        return self.steps or max(1, round(self.epochs * regions / self.batch))


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSettings:
    """Logging settings: intervals in steps; 0 is at the end only.

    `every`: a row of metrics. `checkpoint_every`: a checkpoint. `validate_every`: validation.
    """

    every: int = 20
    checkpoint_every: int = 500
    validate_every: int = 500
    tensorboard: bool = True

    def __post_init__(self) -> None:
        _require(self, ("every",), lambda x: x > 0, "a positive number of steps")
        optional = ("checkpoint_every", "validate_every")
        _require(self, optional, lambda x: x >= 0, "a number of steps, or 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderSettings:
    """Data-loader settings: threads, child processes, prefetched batches.

    Each rank has `threads` (None: one for each of its cores) and as many child `processes`, which
    go further than threads of one interpreter can (None: one for each of its cores where it trains
    on a GPU, and none on a CPU; 0: the threads decode).
    """

    threads: int | None = None
    processes: int | None = None
    prefetch: int = 3

    def __post_init__(self) -> None:
        _require(self, ("threads",), lambda x: x is None or x > 0, "a positive number")
        _require(self, ("processes",), lambda x: x is None or x >= 0, "a number from 0 on")
        _require(self, ("prefetch",), lambda x: x > 0, "a positive number of batches")

    def processes_on(self, device: torch.device) -> int:
        """The number of decoding child processes of a rank that trains on `device`."""
        if self.processes is not None:
            return self.processes
        return _cores_of_a_rank() if device.type == "cuda" and os.name == "posix" else 0

    def threads_on(self, device: torch.device) -> int:
        """The number of threads of a rank: enough to keep all of its processes busy."""
        return self.threads or max(_cores_of_a_rank(), self.processes_on(device))


def _cores_of_a_rank() -> int:
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(_MOST_CORES, usable_cores() // sharing))


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All settings of a distillation; see the parts."""

    loss: LossSettings = field(default_factory=LossSettings)
    augment: Augmentation = field(default_factory=Augmentation)
    train: TrainSettings = field(default_factory=TrainSettings)
    loader: LoaderSettings = field(default_factory=LoaderSettings)
    log: LogSettings = field(default_factory=LogSettings)

    def decisive(self) -> dict[str, Any]:
        """The settings that determine the weights: all but loader and logging, as JSON values."""
        return {key: value for key, value in asdict(self).items() if key not in ("loader", "log")}


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
        _require(self, ("hold_out",), lambda x: 0 <= x < 1, "a share in [0, 1)")


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherConfig:
    """Teacher section: name for `load_teacher`, loss weight, and feature caching.

    With `keep` "no" features are computed online for every augmented view, with "plain" those of
    unaugmented regions are computed once and cached, and with "turned" the mean of those of each
    tile in its eight positions (four turns, and mirrored). `keep_low` caches the low views too, so
    that no slide is read while training.
    """

    REMOVED: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"variants": f'it went with keep = "augmented": {_NO_AUGMENTED}. Delete the line'}
    )

    name: str
    weight: float = 1.0
    dtype: str = "auto"
    keep: str = "no"
    keep_low: bool = False

    def __post_init__(self) -> None:
        if self.keep == "augmented":
            raise InputError(f'teachers.keep is "augmented", which is gone: {_NO_AUGMENTED}')
        fits = ("no", "plain", "turned")
        _require(self, ("keep",), lambda x: x in fits, "one of 'no', 'plain', 'turned'")


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentConfig:
    """Student section: initial weights of a model, or random ones of a configuration.

    `weights` is a name or path that `load_model` takes, such as "facebook/dinov2-base". `config` is
    the name of an architecture or the fields of a ViTConfig; `layer_scale` and `seed` are those of
    `fresh_student`, for a student without weights. `resample` is the kernel that its tiles are made
    with, while it is trained and later: "lanczos" or "area".
    """

    weights: str | None = None
    config: str | ViTConfig | None = None
    layer_scale: float = 0.1
    seed: int = 0
    resample: Resample = "lanczos"

    def __post_init__(self) -> None:
        if self.weights is None and self.config is None:
            raise InputError(
                "student.weights and student.config are both missing; expected weights to begin"
                ' with, such as "facebook/dinov2-base", or the name of a config, such as'
                ' "dinov2_vitb14"'
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillConfig(Settings):
    """A whole configuration file; `out` is the folder of the run."""

    out: str
    data: DataConfig
    teachers: list[TeacherConfig]
    student: StudentConfig
    model: Card = field(default_factory=Card)

    @property
    def settings(self) -> Settings:
        """The training settings of the file, for `distill`."""
        return Settings(**{part.name: getattr(self, part.name) for part in fields(Settings)})


def read_config(path: str | os.PathLike[str]) -> DistillConfig:
    """Read and check the TOML configuration of a distillation.

    Raises InputError for a file that cannot be read, an unknown key (with the nearest known one), a
    missing one, and a value of the wrong type or out of range.
    """
    return records.read_toml(DistillConfig, path)
