"""How the miniature is scored: probes on unseen patients, intervals, and what a model costs."""

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from xmag.evaluate.probes import LinearProbe, NearestNeighbours
from xmag.metrics.bootstrap import drawn_weights, percentile_interval

PROBES = ("probe", "probe, standardised", "1-NN", "5-NN")
RESAMPLES = 2000
Hits = Mapping[str, NDArray[np.bool_]]


def hits(
    embeddings: NDArray[np.float32], classes: NDArray[np.str_], held_out: NDArray[np.bool_]
) -> dict[str, NDArray[np.bool_]]:
    """For each probe, which images of the left-out patient are given their class.

    `embeddings` are (N, D); the probes learn from the other patients' images alone.
    """
    train, test = embeddings[~held_out], embeddings[held_out]
    mean, std = train.mean(0), train.std(0) + 1e-6
    sides = {"probe, standardised": ((train - mean) / std, (test - mean) / std)}
    kinds = (
        LinearProbe(),
        LinearProbe(),
        NearestNeighbours(k=1),
        NearestNeighbours(k=min(5, len(train))),
    )
    found = {}
    for name, probe in zip(PROBES, kinds, strict=True):
        x, queries = sides.get(name, (train, test))
        with warnings.catch_warnings():  # an embedding that says nothing may not converge
            warnings.filterwarnings("ignore", "lbfgs failed to converge")
            probe.fit(x, classes[~held_out])
        found[name] = probe.predict(queries) == classes[held_out]
    return found


def balanced(
    hit: NDArray[Any], classes: NDArray[np.str_], weights: NDArray[Any] | None = None
) -> NDArray[np.float64]:
    """The mean over classes of the share of hits, for each row of `weights` (R, N)."""
    weights = np.ones((1, len(hit))) if weights is None else weights
    shares = [
        (weights[:, of] * hit[of]).sum(1) / weights[:, of].sum(1)
        for of in (classes == name for name in np.unique(classes))
    ]
    return np.asarray(np.mean(shares, axis=0))


def summary(
    seeds: Sequence[NDArray[Any]],
    classes: NDArray[np.str_],
    *,
    minus: Sequence[NDArray[Any]] = (),
    groups: NDArray[Any] | None = None,
) -> dict[str, Any]:
    """Balanced accuracy: the mean over seeds, each seed's, and a 95% bootstrap interval.

    `seeds` hold the hits (N,) of all images, pooled over the folds. The mean over seeds is linear
    in hits, so that the interval is of that mean; resampled are images, or `groups` of them.
    `minus` are the seeds of what is taken off, under the same draws.
    """
    values = np.mean(seeds, axis=0) - (np.mean(minus, axis=0) if len(minus) else 0)
    codes = np.unique(classes, return_inverse=True)[1]
    units = np.arange(len(codes))
    if groups is not None:
        units = np.unique(groups, return_inverse=True)[1]
    blocks = drawn_weights(codes, units, resamples=RESAMPLES, random_state=0)
    drawn: list[NDArray[np.float64]] = []
    while sum(map(len, drawn)) < RESAMPLES:
        drawn.append(balanced(values, classes, next(blocks)))
    interval = percentile_interval(np.concatenate(drawn)[:RESAMPLES], level=0.95)
    return {
        "value": float(balanced(values, classes)[0]),
        "low": interval.low,
        "high": interval.high,
        "seeds": [float(balanced(np.asarray(hit), classes)[0]) for hit in seeds],
    }


def gflop(run: Callable[[Tensor], Any], tiles: Tensor) -> float:
    """GFLOP (two for each multiply-add) for one of the tiles."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        run(tiles)
    return float(counter.get_total_flops() / len(tiles) / 1e9)


def seconds_a_tile(run: Callable[[Tensor], Any], tiles: Tensor, *, repeats: int = 5) -> float:
    """The median time of a batch after one untimed turn, divided by its tiles."""
    times = []
    for turn in range(repeats + 1):
        _wait(tiles.device)
        start = time.perf_counter()
        with torch.no_grad():
            run(tiles)
        _wait(tiles.device)
        if turn:
            times.append(time.perf_counter() - start)
    return float(np.median(times)) / len(tiles)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
