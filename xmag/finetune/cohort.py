"""Labelled slides of a run: classes, the validation split, and sharding over ranks."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from xmag.finetune.gradients import seed_of
from xmag.finetune.tilestore import Source
from xmag.mil.heads import ClassWeight, class_weights, distinct, hashables, indices
from xmag.training.splits import held_out, require_disjoint, units, warn_without_groups


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """Labels and patients of the slides, before any slide is opened.

    The slides from `count` on are for validation only: `validation=(slides, labels, groups)`.
    """

    classes: tuple[Hashable, ...]
    targets: tuple[int, ...]
    groups: list[Hashable] | None
    other_groups: list[Hashable] | None
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Cohort:
    """Slides of a run with class indices, and the indices of those to train and validate on.

    `weights` are the loss weights of the classes.
    """

    sources: tuple[Source, ...]
    targets: tuple[int, ...]
    classes: tuple[Hashable, ...]
    weights: tuple[float, ...]
    train: tuple[int, ...]
    validation: tuple[int, ...]

    def shard(self, rank: int, world: int) -> list[int]:
        """Indices of the slides that a rank trains and validates on."""
        return [
            *shards(self.train, self.targets, world=world)[rank],
            *self.validation[rank::world],
        ]


def read_labels(
    labels: Any, groups: Any, other_labels: Any, other_groups: Any, *, slides: int, others: int
) -> Labels:
    """Check labels and groups of `slides` slides, and of `others` given for validation.

    Raises InputError for one class only, for counts that do not match, and for a label that no
    training slide has.
    """

    def checked(values: Any, count: int, what: str) -> list[Hashable] | None:
        return None if values is None else hashables(values, count=count, what=what)

    found = hashables(labels, count=slides, what="labels")
    classes = distinct(found)
    targets = indices(found, classes, "labels").tolist()
    if others:
        what = "the labels of validation"
        targets += indices(hashables(other_labels, count=others, what=what), classes, what).tolist()
    return Labels(
        classes=tuple(classes),
        targets=tuple(targets),
        groups=checked(groups, slides, "groups"),
        other_groups=checked(other_groups, others, "the groups of validation"),
        count=slides,
    )


def make_cohort(
    sources: Sequence[Source],
    labels: Labels,
    *,
    share: float | None,
    class_weight: ClassWeight,
    seed: int,
) -> Cohort:
    """Cohort of opened slides, with about `share` of each class held out for validation.

    Slides of one patient, and slides with the same content, stay on one side. Raises InputError
    where nothing can be held out, and where a slide that was given to validate also trains.
    """
    validation = range(labels.count, len(sources))
    targets = np.array(labels.targets)
    digests = [source.identity.encode() for source in sources]
    held = np.arange(len(sources)) >= labels.count
    if validation:
        names = [f"the validation slide {sources[i].name!r}" for i in validation]
        own, others = digests[: labels.count], digests[labels.count :]
        require_disjoint(own, others, names=names, what="content")
        if labels.groups is not None and labels.other_groups is not None:
            require_disjoint(labels.groups, labels.other_groups, names=names, what="the patient")
    elif share is not None:
        if labels.groups is None:
            warn_without_groups()
        rng = np.random.default_rng(seed_of("split", seed))
        held = held_out(units(labels.groups, digests), targets, share, rng)
    counts = np.bincount(targets[~held], minlength=len(labels.classes)).astype(np.float64)
    return Cohort(
        sources=tuple(sources),
        targets=labels.targets,
        classes=labels.classes,
        weights=tuple(class_weights(class_weight, labels.classes, counts).tolist()),
        train=tuple(np.flatnonzero(~held).tolist()),
        validation=tuple(np.flatnonzero(held).tolist()),
    )


def shards(slides: Sequence[int], targets: Sequence[int], *, world: int) -> list[list[int]]:
    """Shard the slides over `world` ranks, balanced by class: the slides of each rank."""
    dealt = sorted(slides, key=lambda i: (targets[i], i))
    return [dealt[rank::world] for rank in range(world)]


def steps_of_epoch(
    parts: Sequence[Sequence[int]], *, slides_per_step: int, seed: int, epoch: int
) -> list[list[list[int]]]:
    """The batches of an epoch: for each step, for each rank, its slides; each slide once."""
    each = slides_per_step // len(parts)
    orders = []
    for rank, part in enumerate(parts):
        rng = torch.Generator().manual_seed(seed_of("order", seed, epoch, rank))
        orders.append([part[i] for i in torch.randperm(len(part), generator=rng).tolist()])
    count = max(-(-len(part) // each) for part in parts)
    return [[order[s * each : (s + 1) * each] for order in orders] for s in range(count)]
