"""Cohorts of slides whose classes can be told apart to some degree, and estimators for them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from xmag.bag import FeatureBag


@dataclass(frozen=True, slots=True, kw_only=True)
class Cohort:
    """`x` (n, D), a label and a patient for each; slides of a patient are alike."""

    x: np.ndarray
    y: list[str]
    groups: list[str]

    def __iter__(self) -> Any:
        return iter((self.x, self.y, self.groups))


def cohort(
    seed: int,
    *,
    patients: int = 60,
    names: Sequence[str] = ("LUAD", "LUSC"),
    separation: float = 1.0,
    shift: float = 0.0,
    most_slides: int = 3,
) -> Cohort:
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(patients) % len(names))
    of_slide = np.repeat(np.arange(patients), rng.integers(1, most_slides + 1, patients))
    x = rng.normal(size=(len(of_slide), 6)) + 0.7 * rng.normal(size=(patients, 6))[of_slide]
    x[np.arange(len(of_slide)), labels[of_slide]] += separation
    return Cohort(
        x=x + shift,
        y=[names[label] for label in labels[of_slide]],
        groups=[f"{seed}-{patient}" for patient in of_slide],
    )


def as_bags(x: np.ndarray) -> list[FeatureBag]:
    """A bag of three tiles for each row, whose mean is the row."""
    steps = np.array([[-1.0], [0.0], [1.0]])
    return [FeatureBag((row + steps).astype(np.float32), np.zeros((3, 2))) for row in x]


class NearestMeanOfBags:
    """Serves as a MIL classifier: the nearest mean of a class, by the mean of a bag.

    Bags may be given as paths. It takes `groups`, and has no `predict`.
    """

    fitted: list["NearestMeanOfBags"] = []  # noqa: RUF012 (shared by all, to look at what was fit)

    def __init__(self, *, scale: float = 1.0) -> None:
        self.scale = scale

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        return {"scale": self.scale}

    def set_params(self, *, scale: float) -> "NearestMeanOfBags":
        self.scale = scale
        return self

    def fit(self, X: Sequence[Any], y: Any, groups: Any = None) -> "NearestMeanOfBags":  # noqa: N803
        means = _means(X)
        self.classes_ = list(dict.fromkeys(np.asarray(y).tolist()))  # in no particular order
        labels = np.asarray(y).tolist()
        self.means_ = np.array(
            [means[[label == c for label in labels]].mean(0) for c in self.classes_]
        )
        self.groups_ = groups
        self.fitted.append(self)
        return self

    def predict_proba(self, X: Sequence[Any]) -> np.ndarray:  # noqa: N803
        far = ((_means(X)[:, None] - self.means_) ** 2).sum(2) * self.scale
        odds = np.exp(far.min(1, keepdims=True) - far)
        return np.asarray(odds / odds.sum(1, keepdims=True))


def _means(bags: Sequence[Any]) -> np.ndarray:
    loaded = [FeatureBag.load(b) if isinstance(b, str) else b for b in bags]
    return np.array([np.asarray(bag).mean(0) for bag in loaded])
