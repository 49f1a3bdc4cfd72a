"""Confidence of predictions: a temperature for logits, and the novelty of cases."""

import math
import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from xmag.errors import InputError, WeightsError, XmagWarning
from xmag.metrics.labels import Floats, Ints
from xmag.mil.bags import BagDataset

_MOST_LOG = 10.0
"""Largest |log temperature|, as in scikit-learn: beyond it, every answer is right or a coin's."""
_HALVINGS = 80
_FOLDS = 20
"""Many: with few, held-out cases are measured by a covariance of fewer cases than new ones are."""
LEAST_PATIENTS = 10
"""Fewer have no spread that could be measured."""
_NOVELTY = ("mean", "factor", "floor", "reference")
_PREFIX = "xmag.confidence."
"""Of the names in a file, beside those of the aggregator's weights."""


def fit_temperature(logits: Floats, losses: Callable[[Tensor], Tensor]) -> float:
    """Temperature T that makes the mean of the convex ``losses(logits / T)``, (n,), lowest.

    Guo et al. 2017, "On Calibration of Modern Neural Networks". The only minimum, in 1 / T, is
    found by halving. Warns where the cases are all predicted right, or no better than by chance.
    """
    known = torch.from_numpy(logits)
    low, high = -_MOST_LOG, _MOST_LOG
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        scale = torch.tensor(math.exp(middle), dtype=torch.float64, requires_grad=True)
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(losses(known * scale).mean(), scale)
        low, high = (low, middle) if slope > 0 else (middle, high)
    if abs(low) > _MOST_LOG - 0.01:
        right = "all predicted right" if low > 0 else "predicted no better than by chance"
        warnings.warn(
            f"the {len(logits)} cases to calibrate with are {right}, so that no temperature fits"
            " them; give more, and do not trust the probabilities",
            XmagWarning,
            stacklevel=3,
        )
    return math.exp(-(low + high) / 2)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Novelty:
    """Novelty: distance of vectors from those of the training, as a percentile of held-out ones.

    Distances are Mahalanobis's, with the covariance shrunk towards a sphere (Ledoit and Wolf 2004),
    as vectors are longer than cohorts are large.

    Attributes:
        mean: float64 (D,), of the vectors of the training.
        factor: float64 (r, D); r is the smaller of D and the number of vectors.
        floor: float64 (). The shrunk covariance is ``factor.T @ factor + floor * identity``.
        reference: float64 (n,), rising: the distance of each case of the training from those in
            the other folds.
    """

    mean: Floats
    factor: Floats
    floor: Floats
    reference: Floats

    @classmethod
    def of(cls, vectors: Floats, *, groups: Ints, rng: np.random.Generator) -> Self:
        """The Novelty of `vectors` (n, D) by folds of patients; InputError for fewer than 10."""
        patients = np.unique(groups)
        if len(patients) < LEAST_PATIENTS:
            raise InputError(
                f"there are {len(patients)} patients for novelty; expected {LEAST_PATIENTS} or more"
            )
        fold_of = np.empty(len(patients), np.int64)
        fold_of[rng.permutation(len(patients))] = np.arange(len(patients)) % _FOLDS
        folds = fold_of[np.searchsorted(patients, groups)]
        reference = np.empty(len(vectors))
        for fold in np.unique(folds):
            held = folds == fold
            reference[held] = _distances(vectors[held], *_shrunk(vectors[~held]))
        mean, factor, floor = _shrunk(vectors)
        return cls(mean=mean, factor=factor, floor=floor, reference=np.sort(reference))

    def percentiles(self, vectors: Floats) -> Floats:
        """Share of the held-out cases that lie nearer than each vector, 0 to 100, float64 (n,)."""
        found = _distances(vectors, self.mean, self.factor, self.floor)
        nearer = np.searchsorted(self.reference, found, side="left")
        return 100 * nearer / len(self.reference)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Known:
    """Facts of the cases of a fit that an estimator keeps; None for what is not known.

    `digests` are of the features of each bag. `patients` are in memory only: neither a file nor a
    pickle ever has them.
    """

    digests: frozenset[bytes] | None = None
    patients: frozenset[Hashable] | None = None
    novelty: Novelty | None = None

    @classmethod
    def of(cls, data: BagDataset, check: BagDataset | None, *, rng: np.random.Generator) -> Self:
        """Facts of datasets to train on and to validate with, and the novelty of the former."""
        every = [data] if check is None else [data, check]
        groups = [group for part in every for group in part.groups or ()]
        known = cls(
            digests=frozenset(digest for part in every for *_, digest in part.slides),
            patients=frozenset(groups) if groups else None,
        )
        units = data.units()
        if len(set(units.tolist())) < LEAST_PATIENTS:
            return known
        # With late fusion a case has several rows.
        _, first, place = np.unique(data.cases[data.rows], return_index=True, return_inverse=True)
        tiles = np.array(data.tiles, dtype=np.float64)[data.rows]
        sums = np.zeros((len(first), data.origin[0]))
        np.add.at(sums, place, data.means[data.rows] * tiles[:, None])
        means = sums / np.bincount(place, weights=tiles)[:, None]
        return replace(known, novelty=Novelty.of(means, groups=units[first], rng=rng))

    def require_new(self, data: BagDataset) -> None:
        """Raise InputError for a bag or patient of the training; warn of what cannot be told."""
        if self.digests is None:
            warnings.warn(
                "nobody knows what this estimator was trained on, so nothing shows whether the"
                " cases to calibrate with are new; give none of the training",
                XmagWarning,
                stacklevel=3,
            )
        remedy = "a temperature is fitted to cases that are new to the estimator: leave it out"
        for row, slide, digest in data.slides:
            if digest in (self.digests or ()):
                name = data.bags.name(row, slide)
                raise InputError(f"{name} has the features of a bag of the training; {remedy}")
        if data.groups is None:
            return
        if self.patients is None and self.digests is not None:
            warnings.warn(
                "the patients of the training are not known (they are never saved), so groups"
                " cannot be compared with them: only identical features were looked for",
                XmagWarning,
                stacklevel=3,
            )
        for row, patient in enumerate(data.groups):
            if patient in (self.patients or ()):
                raise InputError(
                    f"{data.bags.name(row)} is of the patient {patient!r} of the training; {remedy}"
                )

    def to_tensors(self) -> dict[str, Tensor]:
        """All but the patients, by names that `from_tensors` takes."""
        found = {}
        if self.digests is not None:
            # Sorted: the order of the training is nobody's business.
            rows = [list(digest) for digest in sorted(self.digests)]
            found["digests"] = torch.tensor(rows, dtype=torch.uint8)
        for name in _NOVELTY if self.novelty else ():
            found[name] = torch.from_numpy(getattr(self.novelty, name))
        return {_PREFIX + name: value for name, value in found.items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Self:
        """The facts of `to_tensors`, taken out of `tensors`; WeightsError if shapes do not fit."""
        rows = tensors.pop(f"{_PREFIX}digests", None)
        digests = None if rows is None else frozenset(bytes(row.tolist()) for row in rows)
        parts = {name: tensors.pop(_PREFIX + name, None) for name in _NOVELTY}
        arrays = {k: part.double().numpy() for k, part in parts.items() if part is not None}
        if not arrays:
            return cls(digests=digests)
        shapes = [array.shape for array in arrays.values()]
        dimensions = [len(shape) for shape in shapes] == [1, 2, 0, 1]
        if not dimensions or shapes[0] != shapes[1][1:] or not arrays["floor"] > 0:
            raise WeightsError(
                f"the tensors of the novelty have the shapes {shapes}; save the estimator again"
            )
        return cls(digests=digests, novelty=Novelty(**arrays))


def _shrunk(vectors: Floats) -> tuple[Floats, Floats, Floats]:
    """Mean, factor and floor of vectors (n, D), shrunk by Ledoit and Wolf's estimate."""
    count, width = vectors.shape
    mean = vectors.mean(0)
    centred = vectors - mean
    norms = (centred**2).sum(1)
    sphere = norms.mean() / width
    # A dimension in which the training does not vary at all tells nothing.
    least = 1e-9 * max(sphere, 1e-30)
    if count > width:
        products = centred.T @ centred / count
        factor = np.linalg.cholesky(products + least * np.eye(width)).T
    else:
        products = centred @ centred.T / count
        factor = np.linalg.qr(centred, mode="r") / np.sqrt(count)
    squared = (products**2).sum()
    apart = squared - width * sphere**2
    noise = ((norms**2).mean() - squared) / count
    share = 1.0 if apart <= 0 else min(noise / apart, 1.0)
    return mean, np.sqrt(1 - share) * factor, np.array(share * sphere + least)


def _distances(vectors: Floats, mean: Floats, factor: Floats, floor: Floats) -> Floats:
    away = vectors - mean
    # By Woodbury's identity: the inverse is of the smaller side of the factor.
    seen = away @ factor.T
    inner = factor @ factor.T + floor * np.eye(len(factor))
    explained = (seen * np.linalg.solve(inner, seen.T).T).sum(1)
    return np.asarray(np.sqrt(np.maximum(((away**2).sum(1) - explained) / floor, 0)))
