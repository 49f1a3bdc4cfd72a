"""linear_probe, knn and simpleshot: fit a probe on embeddings, and report on a test set."""

from typing import Any

from numpy.typing import ArrayLike

from xmag.errors import InputError
from xmag.evaluate.fitting import held_out
from xmag.evaluate.probes import Distance, LinearProbe, NearestNeighbours, SimpleShot
from xmag.evaluate.report import Report
from xmag.evaluate.results import Sampling, with_estimates
from xmag.evaluate.samples import OnIdentical, agreed_classes, samples, warn_without_groups
from xmag.evaluate.validation import protocol
from xmag.metrics.labels import Labels


def linear_probe(
    train_x: ArrayLike,
    train_y: Labels,
    test_x: ArrayLike,
    test_y: Labels,
    *,
    max_iter: int = 1000,
    groups: Labels | None = None,
    train_groups: Labels | None = None,
    classes: Labels | None = None,
    ordered: bool = False,
    level: float = 0.95,
    resamples: int = 1000,
    random_state: int = 0,
    on_identical: OnIdentical = "raise",
) -> Report:
    """Linear-probe evaluation: a Report of `LinearProbe` fitted on (n, D) and tested on (m, D).

    `train_x` and `test_x` are embeddings. `groups` are the patients of the test cases, for the
    intervals, and `train_groups` those of the training cases: with both, a patient on both sides is
    an error. ``report.settings`` has C and the iterations it took. The other options, and errors,
    are those of `cross_validate`.
    """
    return _probed(
        LinearProbe(max_iter=max_iter),
        (train_x, train_y, train_groups),
        (test_x, test_y, groups),
        title="Linear probe",
        classes=classes,
        ordered=ordered,
        sampling=Sampling(level=level, resamples=resamples, random_state=random_state),
        on_identical=on_identical,
    )


def knn(
    train_x: ArrayLike,
    train_y: Labels,
    test_x: ArrayLike,
    test_y: Labels,
    *,
    k: int = 20,
    metric: Distance = "cosine",
    center: bool = True,
    groups: Labels | None = None,
    train_groups: Labels | None = None,
    classes: Labels | None = None,
    ordered: bool = False,
    level: float = 0.95,
    resamples: int = 1000,
    random_state: int = 0,
    on_identical: OnIdentical = "raise",
) -> Report:
    """k-NN evaluation: a Report of `NearestNeighbours` fitted on (n, D), tested on (m, D).

    Options and errors are those of `linear_probe`; `k`, `metric` and `center` those of
    `NearestNeighbours`.
    """
    return _probed(
        NearestNeighbours(k=k, metric=metric, center=center),
        (train_x, train_y, train_groups),
        (test_x, test_y, groups),
        title=f"k-NN, k = {k}, {metric}",
        classes=classes,
        ordered=ordered,
        sampling=Sampling(level=level, resamples=resamples, random_state=random_state),
        on_identical=on_identical,
    )


def simpleshot(
    train_x: ArrayLike,
    train_y: Labels,
    test_x: ArrayLike,
    test_y: Labels,
    *,
    groups: Labels | None = None,
    train_groups: Labels | None = None,
    classes: Labels | None = None,
    ordered: bool = False,
    level: float = 0.95,
    resamples: int = 1000,
    random_state: int = 0,
    on_identical: OnIdentical = "raise",
) -> Report:
    """SimpleShot evaluation: a Report of `SimpleShot` fitted on (n, D) and tested on (m, D).

    Options and errors are those of `linear_probe`.
    """
    return _probed(
        SimpleShot(),
        (train_x, train_y, train_groups),
        (test_x, test_y, groups),
        title="SimpleShot",
        classes=classes,
        ordered=ordered,
        sampling=Sampling(level=level, resamples=resamples, random_state=random_state),
        on_identical=on_identical,
    )


def _probed(
    probe: LinearProbe | NearestNeighbours | SimpleShot,
    train_set: tuple[ArrayLike, Labels, Labels | None],
    test_set: tuple[ArrayLike, Labels, Labels | None],
    *,
    title: str,
    classes: Labels | None,
    ordered: bool,
    sampling: Sampling,
    on_identical: OnIdentical,
) -> Report:
    if ordered and classes is None:
        raise InputError("ordered=True needs the order of the classes; give classes=[...]")
    train = samples(*train_set, name="the training set")
    test = samples(*test_set, name="the test set")
    if test.groups is None:
        warn_without_groups(stacklevel=3)
    unknown = [label for label in dict.fromkeys(test.y) if label not in set(train.y)]
    if unknown:
        raise InputError(
            f"the test set has the label {unknown[0]!r}, which the training set does not; leave"
            " such cases out, or train on that class too"
        )
    order = agreed_classes([train, test], classes)
    fitted, result = held_out(probe, train, test, order, on_identical=on_identical)
    more: dict[str, Any] = {}
    if isinstance(fitted, LinearProbe):
        more = {"C": fitted.C_, "iterations": fitted.n_iter_}
    both = train.groups is not None and test.groups is not None
    return Report(
        title=f"{title}: {len(train):,} training cases",
        classes=order,
        results=(with_estimates(result, ordered=ordered, sampling=sampling),),
        sampling=sampling,
        settings=protocol("held out", probe, grouped=both, training_cases=len(train), **more),
    )
