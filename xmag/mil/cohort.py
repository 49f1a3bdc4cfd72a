"""Labelled datasets of bags, checked before any training."""

import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xmag.errors import BagError, InputError, XmagWarning
from xmag.mil.bags import Bags, Facts, require_same_origin, require_width
from xmag.mil.labels import hashables
from xmag.provenance import Provenance


@dataclass(frozen=True, slots=True, kw_only=True)
class Cohort:
    """Training or validation set: rows of `bags`, with class indices and loss weights."""

    bags: Bags
    facts: list[Facts]
    rows: NDArray[np.int64]
    labels: NDArray[np.int64]
    weights: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.rows)

    def features(self, index: int) -> NDArray[np.float32]:
        """The features of a bag, float32 (N, D); BagError where its file is no longer the same."""
        row = int(self.rows[index])
        features: NDArray[np.float32] = self.bags[row].features
        expected = (self.facts[row].tiles, self.facts[row].width)
        if features.shape != expected:
            raise BagError(
                f"{self.bags.name(row)} has changed while training: features {features.shape},"
                f" at first {expected}. Leave the files alone, and fit again"
            )
        return features


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """The arguments X, y and groups of `fit`, read once and checked against each other.

    `kept` are the rows of the bags that have tiles, int64.
    """

    bags: Bags
    facts: list[Facts]
    labels: list[Hashable]
    groups: list[Hashable] | None
    kept: NDArray[np.int64]

    @property
    def provenance(self) -> Provenance | None:
        """The provenance of the first bag that has one; None without any."""
        return next((f.provenance for f in self.facts if f.provenance is not None), None)

    def cohort(
        self, rows: NDArray[np.int64], labels: NDArray[np.int64], weights: NDArray[np.float64]
    ) -> Cohort:
        """A subset of the bags, with class indices, and loss weights by class."""
        return Cohort(
            bags=self.bags, facts=self.facts, rows=rows, labels=labels, weights=weights[labels]
        )


def read_labelled(X: Any, y: Any, groups: Any, *, of: str = "") -> Labelled:  # noqa: N803
    """Read and check bags, labels and groups; `of` is put before their names in messages.

    Reads every bag once, so that what is wrong with one is known before hours of training. Warns
    of bags without tiles. Raises InputError for counts that differ or labels that are missing,
    BagError for a bag that cannot be read, is not finite or is of another width, and MismatchError
    for one that was made otherwise.
    """
    bags = Bags(X, what=f"{of}X")
    if len(bags) == 0:
        raise InputError(f"{of}X is empty; expected one bag or more")
    labels = hashables(y, count=len(bags), what=f"{of}y")
    members = None if groups is None else hashables(groups, count=len(bags), what=f"{of}groups")
    facts: list[Facts] = []
    made: int | None = None
    for row, fact in enumerate(bags.facts()):
        facts.append(fact)
        require_width(fact.width, facts[0].width, bags.name(row), bags.name(0))
        if made is None:
            made = row if fact.provenance is not None else None
        else:
            origin = facts[made].provenance
            require_same_origin(fact.provenance, origin, bags.name(row), bags.name(made))
    empty = [row for row, fact in enumerate(facts) if fact.tiles == 0]
    if empty:
        warn_of_empty([bags.name(row) for row in empty], "they are left out of the training")
    kept = np.array([row for row, fact in enumerate(facts) if fact.tiles], dtype=np.int64)
    return Labelled(bags=bags, facts=facts, labels=labels, groups=members, kept=kept)


def warn_of_empty(names: Sequence[str], what: str) -> None:
    """Warn of bags without tiles; `what` says what is done about them."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    warnings.warn(f"{', '.join(names[:3])}{more} have no tiles; {what}", XmagWarning, stacklevel=3)
