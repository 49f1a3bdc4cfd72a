"""Confidence of predictions: a temperature for logits, and the novelty of pooled vectors."""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from xmag.errors import InputError

Floats = NDArray[np.float64]

_MOST_LOG = 10.0
"""Largest |log temperature|, as in scikit-learn: beyond it, every answer is right or a coin's."""
_HALVINGS = 80
_FOLDS = 5
_LEAST_CASES = 10


def fit_temperature(logits: Floats, targets: NDArray[np.int64]) -> float:
    """Temperature T that makes softmax(logits / T) likeliest for the targets (log loss).

    `logits` are (n, C), `targets` (n,) the places of the true classes. Guo et al. 2017, "On
    Calibration of Modern Neural Networks". The loss is convex in 1 / T; its only minimum is found
    by halving.
    """
    low, high = -_MOST_LOG, _MOST_LOG
    own = logits[np.arange(len(logits)), targets]
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        scaled = np.exp(middle) * logits
        shares = np.exp(scaled - scaled.max(1, keepdims=True))
        shares /= shares.sum(1, keepdims=True)
        slope = ((shares * logits).sum(1) - own).mean()
        low, high = (low, middle) if slope > 0 else (middle, high)
    return float(np.exp(-(low + high) / 2))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Novelty:
    """How far vectors lie from those of the training, as a percentile of held-out ones.

    Distances are Mahalanobis's, with the covariance shrunk towards a sphere (Ledoit and Wolf 2004),
    as vectors are longer than cohorts are large.

    Attributes:
        mean: float64 (D,), of the vectors of the training.
        covariance: float64 (D, D), shrunk.
        reference: float64 (n,), rising: the distance of each case of the training from those in
            the other folds.
    """

    mean: Floats
    covariance: Floats
    reference: Floats

    @classmethod
    def of(cls, vectors: Floats, *, groups: NDArray[np.int64], rng: np.random.Generator) -> Self:
        """The Novelty that is measured from `vectors` (n, D); patients (`groups`) stay together.

        Raises InputError for fewer than 10 patients, whose spread nobody knows.
        """
        patients = np.unique(groups)
        if len(patients) < _LEAST_CASES:
            raise InputError(
                f"there are {len(patients)} patients to measure novelty from; expected"
                f" {_LEAST_CASES} or more"
            )
        fold_of = dict(
            zip(rng.permutation(patients), np.arange(len(patients)) % _FOLDS, strict=True)
        )
        folds = np.array([fold_of[group] for group in groups])
        reference = np.empty(len(vectors))
        for fold in range(_FOLDS):
            held = folds == fold
            mean, covariance = _shrunk(vectors[~held])
            reference[held] = _distances(vectors[held], mean, covariance)
        mean, covariance = _shrunk(vectors)
        return cls(mean=mean, covariance=covariance, reference=np.sort(reference))

    def percentiles(self, vectors: Floats) -> Floats:
        """Share of the held-out cases that lie nearer than each vector, 0 to 100, float64 (n,)."""
        found = _distances(vectors, self.mean, self.covariance)
        nearer = np.searchsorted(self.reference, found, side="left")
        return 100 * nearer / len(self.reference)


def _shrunk(vectors: Floats) -> tuple[Floats, Floats]:
    """Mean and covariance of vectors (n, D), the latter shrunk by Ledoit and Wolf's estimate."""
    count, width = vectors.shape
    mean = vectors.mean(0)
    centred = vectors - mean
    covariance = centred.T @ centred / count
    sphere = np.trace(covariance) / width
    apart = (covariance**2).sum() - width * sphere**2
    squared = centred**2
    noise = ((squared.T @ squared).sum() / count - (covariance**2).sum()) / count
    share = 1.0 if apart <= 0 else min(noise / apart, 1.0)
    return mean, (1 - share) * covariance + share * sphere * np.eye(width)


def _distances(vectors: Floats, mean: Floats, covariance: Floats) -> Floats:
    away = vectors - mean
    # A dimension in which the training does not vary at all tells nothing.
    scale = np.trace(covariance) / len(mean)
    solved = np.linalg.solve(covariance + 1e-9 * max(scale, 1e-30) * np.eye(len(mean)), away.T)
    return np.asarray(np.sqrt(np.maximum((away * solved.T).sum(1), 0)))
