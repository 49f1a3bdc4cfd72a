"""Probes of frozen embeddings: linear probe, k-NN and SimpleShot, as scikit-learn estimators."""

from abc import ABC, abstractmethod
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from xmag.errors import InputError, not_fitted
from xmag.evaluate.extra import optional
from xmag.evaluate.report import Report
from xmag.evaluate.results import Sampling, with_estimates
from xmag.evaluate.samples import OnIdentical, Samples, Trial, agreed_classes, warn_without_groups
from xmag.evaluate.validation import fit, result_of, settings_of
from xmag.metrics import labels
from xmag.metrics.decisions import accuracies
from xmag.metrics.labels import Labels

Distance = Literal["cosine", "euclidean"]
Method = Literal["linear", "knn", "simpleshot"]


def probe(
    train_x: ArrayLike,
    train_y: Labels,
    test_x: ArrayLike,
    test_y: Labels,
    *,
    method: Method = "linear",
    groups: Labels | None = None,
    train_groups: Labels | None = None,
    classes: Labels | None = None,
    ordered: bool = False,
    level: float = 0.95,
    resamples: int = 1000,
    random_state: int = 0,
    on_identical: OnIdentical = "raise",
    **options: Any,
) -> Report:
    """Probe of embeddings: a Report of one that is fitted on (n, D) and tested on (m, D).

    `method` is "linear" for `LinearProbe`, and ``report.settings`` then has its C and the
    iterations it took; "knn" for `NearestNeighbours`; "simpleshot" for `SimpleShot`. `options` are
    those of that estimator: ``max_iter=``; ``k=``, ``metric=`` and ``center=``. `train_x` and
    `test_x` are embeddings. `groups` are the patients of the test cases, for the intervals, and
    `train_groups` those of the training cases: with both, a patient on both sides is an error. The
    other arguments, and errors, are those of `cross_validate`.
    """
    if method not in _METHODS:
        raise InputError(f"method is {method!r}; expected one of {tuple(_METHODS)}")
    kind, title = _METHODS[method]
    estimator = kind().set_params(**options)
    sampling = Sampling(level=level, resamples=resamples, random_state=random_state)
    train = Samples.of(train_x, train_y, train_groups, name="the training set")
    test = Samples.of(test_x, test_y, groups, name="the test set")
    if groups is None:
        warn_without_groups(stacklevel=2)
    if unknown := [label for label in test.y if label not in set(train.y)]:
        raise InputError(
            f"the test set has the label {unknown[0]!r}, which the training set does not; leave"
            " such cases out, or train on that class too"
        )
    order = agreed_classes([train, test], classes, ordered=ordered)
    Trial.across(train, test).check(order, on_identical=on_identical, stacklevel=3)
    fitted = fit(estimator, train, order)
    result = result_of(order, [test], [test.task.predict(fitted, test)], trained_on=train.name)
    own = fitted.estimator
    found = {"C": own.C_, "iterations": own.n_iter_} if isinstance(own, LinearProbe) else {}
    both = train_groups is not None and groups is not None
    return Report(
        title=f"{title.format(**estimator.get_params())}: {len(train):,} training cases",
        classes=order,
        results=(with_estimates(result, ordered=ordered, sampling=sampling),),
        sampling=sampling,
        settings=settings_of(
            "held out", estimator, train.task, grouped=both, training_cases=len(train), **found
        ),
    )


class _Probe(ABC):
    """Base class of the probes: scikit-learn's estimator interface, label encoding, checks."""

    _parameters: tuple[str, ...] = ()
    classes_: NDArray[Any]
    n_features_in_: int

    def __repr__(self) -> str:
        params = ", ".join(f"{name}={value!r}" for name, value in self.get_params().items())
        return f"{type(self).__name__}({params})"

    @abstractmethod
    def _fit(self, embeddings: NDArray[Any], places: NDArray[np.int64]) -> None:
        """Fit to embeddings (n, D) and the indices of their classes (n,)."""

    @abstractmethod
    def _probabilities(self, embeddings: NDArray[Any]) -> NDArray[Any]:
        """Class probabilities (n, C) of embeddings (n, D)."""

    def fit(self, X: ArrayLike, y: Labels) -> Self:  # noqa: N803
        """Fit to embeddings (n, D) and their labels; InputError for values that are not finite."""
        embeddings = _embeddings(X)
        given = labels.as_labels(y, "y", n=len(embeddings))
        order = labels.class_order(given, None)
        if len(order) < 2:
            raise InputError(f"y has one class only, {order}; expected at least two classes")
        self.classes_ = labels.class_array(order)
        self.n_features_in_ = embeddings.shape[1]
        self._fit(embeddings, labels.encode(given, order))
        return self

    def predict_proba(self, X: ArrayLike) -> NDArray[np.float64]:  # noqa: N803
        """Class probabilities, float64 (n, C), of embeddings (n, D), in the order of `classes_`."""
        if not hasattr(self, "n_features_in_"):
            raise not_fitted(f"{type(self).__name__} is not fitted; call fit(X, y) first")
        embeddings = _embeddings(X)
        if embeddings.shape[1] != self.n_features_in_:
            raise InputError(
                f"X has {embeddings.shape[1]} features, and {type(self).__name__} was fitted on"
                f" {self.n_features_in_}; give embeddings of the same model"
            )
        return np.asarray(self._probabilities(embeddings), dtype=np.float64)

    def predict_log_proba(self, X: ArrayLike) -> NDArray[np.float64]:  # noqa: N803
        """Log of `predict_proba`, float64 (n, C), -inf where that is 0."""
        with np.errstate(divide="ignore"):
            return np.log(self.predict_proba(X))

    def predict(self, X: ArrayLike) -> NDArray[Any]:  # noqa: N803
        """The class with the largest probability, (n,); of equal ones, the first."""
        places = self.predict_proba(X).argmax(1)  # first: it says so where there is no fit yet
        return np.asarray(self.classes_[places])

    def score(self, X: ArrayLike, y: Labels, sample_weight: Any = None) -> float:  # noqa: N803
        """Accuracy of `predict`, weighted by `sample_weight` (n,)."""
        truth, found = labels.as_labels(y, "y"), labels.as_labels(self.predict(X), "predict")
        cases = labels.decided_cases(truth, found, list(dict.fromkeys([*truth, *found])))
        weights = None if sample_weight is None else np.asarray(sample_weight, np.float64)[None]
        return float(accuracies(cases, weights)[0])

    def get_params(self, deep: bool = True) -> dict[str, Any]:  # noqa: ARG002
        """The parameters of the constructor."""
        return {name: getattr(self, name) for name in self._parameters}

    def set_params(self, **parameters: Any) -> Self:
        """Set parameters of the constructor; InputError for others."""
        for name, value in parameters.items():
            if name not in self._parameters:
                kind, known = type(self).__name__, self._parameters
                raise InputError(f"{kind} has no parameter {name!r}; expected one of {known}")
            setattr(self, name, value)
        return self

    def __sklearn_tags__(self) -> Any:
        utils = optional("sklearn.utils", "a probe among scikit-learn's estimators")
        return utils.Tags(
            estimator_type="classifier",
            target_tags=utils.TargetTags(required=True),
            classifier_tags=utils.ClassifierTags(),
        )

    def get_metadata_routing(self) -> Any:
        """scikit-learn's MetadataRequest: `sample_weight` may be routed to `score`."""
        routing = optional("sklearn.utils.metadata_routing", "a probe in a pipeline")
        request = routing.MetadataRequest(owner=type(self).__name__)
        request.score.add_request(param="sample_weight", alias=None)
        return request


class LinearProbe(_Probe):
    """Linear probe: logistic regression on embeddings, with a penalty scaled by their width.

    scikit-learn's LogisticRegression (L-BFGS, L2) with ``C = dim * classes / 100``, the inverse of
    the penalty: it minimises C times the sum of the cross-entropies plus half the squared norm of
    the weights. That is what Patho-Bench does with ``cost="adaptive"``. UNI passes the same C
    (its paper writes the penalty as 100 / (dim * classes)), but its own solver takes the mean of
    the cross-entropies and the norm unsquared, which is a weaker or stronger penalty by the number
    of cases; its option ``use_sklearn`` is what is done here. Embeddings are taken as they are.

    Args:
        max_iter: Most iterations; where they do not suffice, scikit-learn warns. UNI has 1,000.
    """

    _parameters = ("max_iter",)

    def __init__(self, *, max_iter: int = 1000) -> None:
        self.max_iter = max_iter

    def _fit(self, embeddings: NDArray[Any], places: NDArray[np.int64]) -> None:
        self.C_ = embeddings.shape[1] * len(self.classes_) / 100
        linear_model = optional("sklearn.linear_model", "the linear probe")
        self._model = linear_model.LogisticRegression(C=self.C_, max_iter=self.max_iter)
        self._model.fit(embeddings, places)
        self.n_iter_ = int(self._model.n_iter_.max())

    def _probabilities(self, embeddings: NDArray[Any]) -> Any:
        return self._model.predict_proba(embeddings)


class NearestNeighbours(_Probe):
    """k-nearest-neighbours (k-NN) probe: votes of the k nearest training embeddings.

    UNI's: embeddings are centred by the training mean, brought to length 1, and compared by
    Euclidean distance, which ranks as the cosine does; all k votes are equal. scikit-learn's
    KNeighborsClassifier. Probabilities are shares of the votes.

    Args:
        k: Number of neighbours, at most that of the training embeddings.
        metric: "cosine", or "euclidean" of embeddings whose length is left as it is.
        center: Whether the training mean is taken off first.
    """

    _parameters = ("k", "metric", "center")

    def __init__(self, *, k: int = 20, metric: Distance = "cosine", center: bool = True) -> None:
        self.k = k
        self.metric = metric
        self.center = center

    def _fit(self, embeddings: NDArray[Any], places: NDArray[np.int64]) -> None:
        if not 1 <= self.k <= len(embeddings):
            cases = len(embeddings)
            raise InputError(f"k is {self.k} for {cases} training cases; expected 1 to {cases}")
        if self.metric not in ("cosine", "euclidean"):
            raise InputError(f"metric is {self.metric!r}; expected 'cosine' or 'euclidean'")
        self._mean = embeddings.mean(0) if self.center else np.zeros_like(embeddings[0])
        neighbors = optional("sklearn.neighbors", "k-NN")
        self._model = neighbors.KNeighborsClassifier(n_neighbors=self.k)
        self._model.fit(self._compared(embeddings), places)

    def _probabilities(self, embeddings: NDArray[Any]) -> Any:
        return self._model.predict_proba(self._compared(embeddings))

    def _compared(self, embeddings: NDArray[Any]) -> NDArray[Any]:
        centred = embeddings - self._mean
        return _unit(centred) if self.metric == "cosine" else centred


class SimpleShot(_Probe):
    """SimpleShot probe: nearest class mean of embeddings that are centred and L2-normalised.

    Wang et al. 2019, "SimpleShot", as UNI has it: the mean is that of the training set, and class
    means are not brought to length 1 again. Probabilities are the softmax of minus the squared
    distances (Snell et al. 2017, "Prototypical networks").
    """

    def _fit(self, embeddings: NDArray[Any], places: NDArray[np.int64]) -> None:
        self._mean = embeddings.mean(0)
        compared = _unit(embeddings - self._mean)
        number = len(self.classes_)
        self._means = np.array([compared[places == place].mean(0) for place in range(number)])

    def _probabilities(self, embeddings: NDArray[Any]) -> NDArray[Any]:
        compared = _unit(embeddings - self._mean).astype(np.float64)
        # |a - b|² without the term of the query alone, which the softmax does not see.
        logits = 2 * compared @ self._means.T - (self._means**2).sum(1)
        odds = np.exp(logits - logits.max(1, keepdims=True))
        return np.asarray(odds / odds.sum(1, keepdims=True))


_METHODS: dict[str, tuple[type[_Probe], str]] = {
    "linear": (LinearProbe, "Linear probe"),
    "knn": (NearestNeighbours, "k-NN, k = {k}, {metric}"),
    "simpleshot": (SimpleShot, "SimpleShot"),
}


def _embeddings(x: Any) -> NDArray[Any]:
    """Checked embeddings, finite floats (n, D), from an array, a tensor, or a list of vectors."""
    if hasattr(x, "detach"):  # a tensor, which may be on a GPU
        x = x.detach().cpu()
    try:
        array = np.asarray(x)
    except ValueError as error:
        raise InputError(f"X is no table of numbers: {error}; expected (n, D)") from error
    if array.dtype.kind not in "biuf" or array.ndim != 2:
        raise InputError(
            f"X is an array of {array.dtype} with shape {array.shape}; expected embeddings, numbers"
            " of shape (n, D)"
        )
    if len(bad := np.flatnonzero(~np.isfinite(array).all(1))):
        raise InputError(
            f"X has values that are not finite in {len(bad)} rows, first in row {bad[0]}; make"
            " those embeddings again, or leave them out"
        )
    return array if array.dtype.kind == "f" else array.astype(np.float64)


def _unit(vectors: NDArray[Any]) -> NDArray[Any]:
    """L2-normalised vectors; a zero vector stays zero."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.where(lengths > 0, lengths, 1))
