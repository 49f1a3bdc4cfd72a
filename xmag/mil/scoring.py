"""Inference of logits and attention, and metrics of logits."""

import numpy as np
import torch
from numpy.typing import NDArray

from xmag.errors import ModelError
from xmag.mil.batches import Runner
from xmag.mil.cohort import Cohort


def logits_of(runner: Runner, cohort: Cohort) -> NDArray[np.float64]:
    """The logits of every bag of a cohort, (n, C); the module has to be in eval mode."""
    return np.concatenate(
        [predict_logits(runner, [cohort.features(i)]) for i in range(len(cohort))]
    )


def predict_logits(runner: Runner, bags: list[NDArray[np.float32]]) -> NDArray[np.float64]:
    """The logits of a few bags that have tiles, (n, C); ModelError where they are not finite."""

    def forward() -> NDArray[np.float64]:
        logits = np.empty((len(bags), runner.classes))
        for part in runner.parts(bags):
            logits[part.rows] = runner.forward(part).logits.double().cpu().numpy()
        return logits

    with torch.inference_mode():
        logits = runner.with_less(forward)
    if not np.isfinite(logits).all():
        raise ModelError(
            "the aggregator gave logits that are not finite; check its weights and the scale of the"
            " features"
        )
    return logits


def attention_of(runner: Runner, bag: NDArray[np.float32]) -> NDArray[np.float32] | None:
    """The attention of one bag, (N,), in full precision; None where the aggregator has none."""

    def forward() -> NDArray[np.float32] | None:
        (part,) = runner.parts([bag])
        attention = runner.forward(part).attention
        return None if attention is None else attention[0].float().cpu().numpy()

    with torch.inference_mode():
        return runner.with_less(forward)


def auroc(labels: NDArray[np.int64], scores: NDArray[np.float64]) -> float | None:
    """Macro one-vs-rest AUROC of logits, over the classes that are present.

    From the logits turned into probabilities. None where only one class is there.
    """
    probabilities = np.exp(scores - log_sum_exp(scores)[:, None])
    areas = []
    for label in np.unique(labels):
        positive = labels == label
        if positive.all():
            return None
        own = probabilities[positive, label][:, None]
        others = probabilities[~positive, label][None]
        areas.append(float(((own > others) + 0.5 * (own == others)).mean()))
    return sum(areas) / len(areas)


def balanced_accuracy(labels: NDArray[np.int64], scores: NDArray[np.float64]) -> float:
    """Balanced accuracy of the largest logit: mean recall over the classes present."""
    right = scores.argmax(axis=1) == labels
    return float(np.mean([right[labels == label].mean() for label in np.unique(labels)]))


def log_sum_exp(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Log-sum-exp of each row, (n,)."""
    largest = logits.max(axis=1)
    return np.asarray(largest + np.log(np.exp(logits - largest[:, None]).sum(axis=1)))
