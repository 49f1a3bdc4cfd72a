"""Hyperparameters of fine-tuning."""

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from xmag import records
from xmag.mil.heads import ClassWeight
from xmag.training import Augmentation

Mode = Literal["exact", "sampled"]
Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Hyperparameters of a fine-tuning run.

    Attributes:
        epochs: Passes over the training slides, at most.
        patience: Epochs after the best so far at which training ends; None never. See
            `xmag.training.best_epoch`.
        slides_per_step: Slides whose gradients one step of the optimizer adds up, over all GPUs.
        sampled_tiles: Tiles a slide and step in mode "sampled".
        chunk_tiles: Tiles that have an autograd graph at the same time, which decides the memory
            needed. By default 64 on CUDA and 16 elsewhere. Halved where CUDA runs out of memory.
        learning_rate: Of the last block of the encoder, at its peak.
        classifier_learning_rate: Of the aggregator, at its peak.
        layer_decay: The rate of each block over that of the next.
        frozen_blocks: None trains everything; 0 leaves the embedding of patches and the positions
            as they are, k the first k blocks too, all of them the whole encoder.
        weight_decay: Of matrices.
        warmup: The part of all steps in which the rate rises; it then falls by half a cosine.
        clip: The largest norm of the gradient of a step; None does not clip.
        ema: Decay of the moving average of weights that is validated and returned, None to return
            the weights themselves. It is lower in the first steps: (1 + step) / (10 + step).
        augmentation: Drawn for each tile; hue changes less than in distillation. None leaves tiles
            as they are.
        class_weight: Weight of a slide in the loss: "balanced" gives each class the same weight,
            None each slide; or {class: weight}.
        precision: "auto" is bfloat16 (autocast, float32 weights) on CUDA that has it, else float32.
        checkpoint_steps: Steps between checkpoints within an epoch; there always is one after each
            epoch.
    """

    epochs: int = 20
    patience: int | None = 5
    slides_per_step: int = 4
    sampled_tiles: int = 256
    chunk_tiles: int | None = None
    learning_rate: float = 5e-5
    classifier_learning_rate: float = 2e-4
    layer_decay: float = 0.75
    frozen_blocks: int | None = None
    weight_decay: float = 0.05
    warmup: float = 0.1
    clip: float | None = 1.0
    ema: float | None = 0.99
    augmentation: Augmentation | None = field(default_factory=lambda: Augmentation(hue=0.02))
    class_weight: ClassWeight = "balanced"
    precision: Precision = "auto"
    checkpoint_steps: int | None = None

    def __post_init__(self) -> None:
        require = functools.partial(records.require, self)
        for name in ("epochs", "slides_per_step", "sampled_tiles"):
            require(name, isinstance(getattr(self, name), int), "an int")
            require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("patience", "chunk_tiles", "checkpoint_steps"):
            value = getattr(self, name)
            require(name, value is None or value >= 1, "None or at least 1")
        for name in ("learning_rate", "classifier_learning_rate", "weight_decay"):
            require(name, getattr(self, name) >= 0, "at least 0")
        require("layer_decay", 0 < self.layer_decay <= 1, "0 < layer_decay <= 1")
        require("warmup", 0 <= self.warmup < 1, "0 <= warmup < 1, a part of all steps")
        require("clip", self.clip is None or self.clip > 0, "None or more than 0")
        require("ema", self.ema is None or 0 <= self.ema < 1, "None, or 0 <= ema < 1")
        require("precision", self.precision in get_args(Precision), str(get_args(Precision)))

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        values = asdict(self)
        if isinstance(self.class_weight, Mapping):  # JSON has no keys but text
            pairs = [[repr(label), float(w)] for label, w in self.class_weight.items()]
            values["class_weight"] = sorted(pairs)
        return values
