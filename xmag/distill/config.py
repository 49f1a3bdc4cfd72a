"""TOML configuration of a distillation, read and checked; examples/distill.toml has every key."""

import difflib
import os
import tomllib
import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

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

Config_ = TypeVar("Config_")


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
    try:
        text = Path(path).read_text(encoding="utf-8")
        values = tomllib.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{os.fspath(path)!r} cannot be read ({error}); check the path") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{os.fspath(path)!r} is no TOML: {error}") from error
    return _built(DistillConfig, values, "")


def _built(kind: type[Config_], values: Mapping[str, Any], where: str) -> Config_:
    """Build the dataclass `kind` from values; `where` is the place in the file, for errors."""
    known = {item.name: item for item in fields(kind)}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise InputError(f"{_at(where, key)} is no known key; {_nearest(key, list(known))}")
    missing = [
        name
        for name, item in known.items()
        if name not in values and item.default is MISSING and item.default_factory is MISSING
    ]
    if missing:
        raise InputError(f"{_at(where, missing[0])} is missing; expected a value for it")
    hints = get_type_hints(kind)
    return kind(
        **{key: _converted(value, hints[key], _at(where, key)) for key, value in values.items()}
    )


def _converted(value: Any, hint: Any, where: str) -> Any:
    """Convert a value of the file to a field's type; InputError where it is of another."""
    if is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        return _built(hint, value, where)
    if get_origin(hint) is list and isinstance(value, list):
        inner = get_args(hint)[0]
        return [_converted(item, inner, f"{where}[{at}]") for at, item in enumerate(value)]
    if get_origin(hint) is Literal and value in get_args(hint):
        return value
    if get_origin(hint) in (Union, types.UnionType):
        for choice in get_args(hint):
            if _fits(value, choice):
                return _converted(value, choice, where)
    elif _fits(value, hint):
        return float(value) if hint is float else value
    raise InputError(f"{where} is {value!r}; expected {_described(hint)}")


def _fits(value: Any, hint: Any) -> bool:
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if get_origin(hint) is list:
        return isinstance(value, list)
    if is_dataclass(hint):
        return isinstance(value, dict)
    return isinstance(hint, type) and isinstance(value, hint)


_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
}


def _described(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(value) for value in get_args(hint))
    if get_origin(hint) in (Union, types.UnionType):
        choices = [choice for choice in get_args(hint) if choice is not type(None)]
        return " or ".join(_described(choice) for choice in choices)
    if get_origin(hint) is list:
        inner = get_args(hint)[0]
        return "a list of tables" if is_dataclass(inner) else "a list of texts"
    return "a table" if is_dataclass(hint) else _NAMES.get(hint, str(hint))


def _nearest(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"expected one of {sorted(known)}"


def _at(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key
