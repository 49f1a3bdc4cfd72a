"""Labelled slides of a run: classes, the validation split, and sharding over ranks."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from xmag.errors import InputError
from xmag.finetune.gradients import seed_of
from xmag.finetune.tilestore import PlannedSlide, TileStore
from xmag.mil.heads import class_weights, distinct, hashables, indices
from xmag.training.splits import held_out, require_disjoint, units, warn_without_groups

Source = TileStore | PlannedSlide
"""Source of a slide's tiles: decoded already, or opened and planned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """Labels and patients of the slides, before any slide is opened.

    Slides `count` and up are for validation only: `validation=(slides, labels, groups)`.
    """

    classes: tuple[Hashable, ...]
    targets: tuple[int, ...]
    groups: tuple[Hashable, ...] | None
    other_groups: tuple[Hashable, ...] | None
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


def read_labels(
    labels: Any, groups: Any, other_labels: Any, other_groups: Any, *, slides: int, others: int
) -> Labels:
    """Check labels and groups of `slides` slides, and of `others` given for validation.

    Raises InputError for one class only, for counts that do not match, and for a label that no
    training slide has.
    """
    found = hashables(labels, count=slides, what="labels")
    classes = distinct(found)
    targets = indices(found, classes, "labels").tolist()
    if others:
        what = "the labels of validation"
        targets += indices(hashables(other_labels, count=others, what=what), classes, what).tolist()
    return Labels(
        classes=tuple(classes),
        targets=tuple(targets),
        groups=_groups(groups, slides, "groups"),
        other_groups=_groups(other_groups, others, "the groups of validation"),
        count=slides,
    )


def _groups(groups: Any, count: int, what: str) -> tuple[Hashable, ...] | None:
    return None if groups is None else tuple(hashables(groups, count=count, what=what))


def make_cohort(
    sources: Sequence[Source],
    labels: Labels,
    *,
    share: float | None,
    class_weight: Any,
    seed: int,
) -> Cohort:
    """Cohort of opened slides, with about `share` of each class held out for validation.

    Slides of one patient, and slides with the same content, stay on one side. Raises InputError
    where nothing can be held out, and where a slide that was given to validate also trains.
    """
    everyone = range(labels.count)
    train, validation = tuple(everyone), tuple(range(labels.count, len(sources)))
    digests = [source.identity.encode() for source in sources]
    if validation:
        names = [f"the validation slide {sources[i].name!r}" for i in validation]
        theirs = [digests[i] for i in validation]
        require_disjoint([digests[i] for i in train], theirs, names=names, what="content")
        if labels.groups is not None and labels.other_groups is not None:
            require_disjoint(labels.groups, labels.other_groups, names=names, what="the patient")
    elif share is not None:
        if labels.groups is None:
            warn_without_groups()
        chosen = held_out(
            units(labels.groups, digests),
            np.array(labels.targets),
            share,
            np.random.default_rng(seed_of("split", seed)),
        )
        train = tuple(i for i in everyone if not chosen[i])
        validation = tuple(i for i in everyone if chosen[i])
    counts = np.bincount([labels.targets[i] for i in train], minlength=len(labels.classes))
    weights = class_weights(class_weight, labels.classes, counts.astype(np.float64))
    return Cohort(
        sources=tuple(sources),
        targets=labels.targets,
        classes=labels.classes,
        weights=tuple(weights.tolist()),
        train=train,
        validation=validation,
    )


def split_validation(validation: Any) -> tuple[float | None, tuple[Any, Any, Any]]:
    """The `validation=` argument as a share to hold out, or given slides, labels and groups.

    Raises InputError for anything else.
    """
    nothing: tuple[Any, Any, Any] = ((), (), None)
    if validation is None:
        return None, nothing
    number = isinstance(validation, int | float) and not isinstance(validation, bool)
    if number and 0 < validation < 1:
        return float(validation), nothing
    if isinstance(validation, tuple) and len(validation) in (2, 3) and len(validation[0]):
        return None, (*validation, None)[:3]
    raise InputError(
        f"validation is {validation!r}; expected a share between 0 and 1, None, (slides, labels) or"
        " (slides, labels, groups)"
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
