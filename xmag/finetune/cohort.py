"""Labelled slides of a run: classes, the validation split, and sharding over ranks."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from xmag.finetune.gradients import seed_of
from xmag.finetune.tilestore import Source
from xmag.metrics.labels import as_labels
from xmag.mil.heads import ClassHead, ClassWeight, class_weights
from xmag.training.splits import held_out, require_disjoint, units, warn_without_groups


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """Labels and patients of the slides; those from `count` on are for validation only."""

    head: ClassHead
    targets: tuple[int, ...]
    groups: list[Hashable] | None
    other_groups: list[Hashable] | None
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Cohort:
    """Slides of a run, and which to train and validate on; `weights` in the loss are by class."""

    sources: tuple[Source, ...]
    targets: tuple[int, ...]
    head: ClassHead
    weights: tuple[float, ...]
    train: tuple[int, ...]
    validation: tuple[int, ...]

    def shard(self, rank: int, world: int) -> list[int]:
        """Indices of the slides that a rank trains and validates on."""
        return [*shards(self.train, self.targets, world=world)[rank], *self.validation[rank::world]]


def read_labels(
    labels: Any, groups: Any, other_labels: Any, other_groups: Any, *, slides: int, others: int
) -> Labels:
    """Check labels and groups of `slides` slides, and of `others` given for validation."""
    found = as_labels(labels, "labels", n=slides)
    head = ClassHead.of(found)
    targets = head.encode(found, "labels").tolist()
    if others:
        what = "the labels of validation"
        targets += head.encode(head.read(other_labels, others, what), what).tolist()
    if groups is not None:
        groups = as_labels(groups, "groups", n=slides)
    if other_groups is not None:
        other_groups = as_labels(other_groups, "the groups of validation", n=others)
    return Labels(
        head=head, targets=tuple(targets), groups=groups, other_groups=other_groups, count=slides
    )


def make_cohort(
    sources: Sequence[Source],
    labels: Labels,
    *,
    share: float | None,
    class_weight: ClassWeight,
    seed: int,
) -> Cohort:
    """Cohort of opened slides, about `share` of each class held out by patient and content."""
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
    counts = np.bincount(targets[~held], minlength=len(labels.head.classes)).astype(np.float64)
    return Cohort(
        sources=tuple(sources),
        targets=labels.targets,
        head=labels.head,
        weights=tuple(class_weights(class_weight, labels.head.classes, counts).tolist()),
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
