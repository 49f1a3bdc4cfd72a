"""MILSurvival: the risk of a patient, and the time to an event, from the embeddings of tiles."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn import functional

from xmag import records
from xmag.errors import BagError, InputError
from xmag.metrics.labels import Floats, Ints, require_length
from xmag.metrics.survival import Survival, as_survival, concordances, harrell_c
from xmag.mil.bags import BagLike
from xmag.mil.confidence import Known
from xmag.mil.estimator import MILEstimator
from xmag.mil.heads import Head, Objective, case_weights
from xmag.mil.params import is_whole
from xmag.mil.pooling import full
from xmag.mil.trainer import BagTrainer

Loss = Literal["cox", "nll"]

_LEAST_EVENTS = 2


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class SurvivalFunction:
    """A predicted share without an event, as a step function of time, like scikit-survival's.

    Attributes:
        x: float64 (k,), the times of the steps, rising.
        y: float64 (k,), the probability of no event up to and at each of them.
    """

    x: Floats
    y: Floats

    def __repr__(self) -> str:
        return f"<SurvivalFunction: {self.y[-1]:.3g} at {self.x[-1]:g}, {len(self.x):,} steps>"

    @property
    def domain(self) -> tuple[float, float]:
        """The times from 0 to the last of the training, beyond which nothing is known."""
        return 0.0, float(self.x[-1])

    def __call__(self, time: ArrayLike) -> Floats:
        """The probability at any times; InputError for one outside of the domain."""
        times = np.asarray(time, np.float64)
        low, high = self.domain
        if times.size and not (low <= times.min() and times.max() <= high):
            raise InputError(
                f"times go from {times.min():g} to {times.max():g}; expected {low:g} to {high:g},"
                " which the training knows of"
            )
        shares: Floats = np.append(1.0, self.y)[np.searchsorted(self.x, times, side="right")]
        return shares


def cox_loss(risk: Tensor, event: Tensor, time: Tensor) -> Tensor:
    """Cox's negative log partial likelihood (Breslow's for ties), a mean over the events.

    `risk` is the log hazard (n,), `event` bool (n,), `time` (n,). Cox 1972, "Regression models and
    life-tables"; Breslow 1974.
    """
    order = torch.argsort(time, descending=True, stable=True)
    sums = torch.logcumsumexp(risk[order], dim=0)
    # Cases of one time are at risk together: each has the sum of the last of them.
    last = torch.searchsorted(-time[order], -time, side="right") - 1
    return -(risk - sums[last])[event].mean()


class CoxObjective:
    """Cox's loss of a whole training set, in steps of a few bags.

    A bag's risk set is the training set, not its batch, which may have no event at all: `risk` (n,)
    are those of the last steps, 0 before the first. The loss of a bag has the exact gradient of
    `cox_loss` by its risk: of its own event, and of all events at whose time it was at risk.
    """

    def __init__(self, event: Tensor, time: Tensor) -> None:
        # On the CPU in double precision: the same on every device, and faster for a cohort.
        self._event, self._time = event, time
        self.risk = torch.zeros(len(event), dtype=torch.float64)

    def __call__(self, logits: Tensor, rows: Sequence[int]) -> Tensor:
        """Losses (B,) of the risks (B, 1) of the bags at `rows`."""
        here, risk = list(rows), full(logits)[:, 0]
        self.risk[here] = risk.detach().cpu().double()
        every = self.risk.clone().requires_grad_()
        with torch.enable_grad():
            loss = cox_loss(every, self._event, self._time)
        (slope,) = torch.autograd.grad(loss, every)
        # n times: the loss of the set is a mean, and that of a batch one over fewer bags.
        scaled = (slope[here] * len(every)).to(risk)
        return loss.detach().to(risk) + scaled * (risk - risk.detach())


def discrete_losses(logits: Tensor, interval: Tensor, event: Tensor) -> Tensor:
    """Negative log likelihood of discrete times, (B,): hazards of K intervals from logits (B, K).

    A case with the event in `interval` (B,) survived those before it; a censored one survived
    `interval` as well. Zadeh and Schmid 2020, "Bias in Cross-Entropy-Based Training of Deep
    Survival Networks".
    """
    logits = full(logits)
    log_survived, log_hazard = functional.logsigmoid(-logits), functional.logsigmoid(logits)
    place = torch.arange(logits.shape[1], device=logits.device)
    before = (log_survived * (place < interval[:, None])).sum(1)
    own = torch.where(event[:, None], log_hazard, log_survived)
    return -(before + own.gather(1, interval[:, None])[:, 0])


class SurvivalHead(Head):
    """Base of survival heads: labels, and their checks."""

    metric_names: ClassVar[tuple[str, ...]] = ("validation_concordance",)

    @staticmethod
    def read(values: Any, count: int, what: str) -> Survival:
        """Checked (event, time) of each bag; InputError as `as_survival`."""
        survival = as_survival(values, what)
        require_length(survival, count, what)
        return survival

    @staticmethod
    def from_json(values: dict[str, Any]) -> "CoxHead | DiscreteHead":
        """The head in `values`, from which its numbers are taken."""
        kind = DiscreteHead if "edges" in values else CoxHead
        return kind.of_json(values)

    def encode(self, labels: Survival, what: str) -> Floats:  # noqa: ARG002
        """Event (0 or 1) and time, float64 (n, 2)."""
        return np.stack([labels.event.astype(np.float64), labels.time], axis=1)

    def require_trainable(self, targets: Floats) -> None:
        """Raise InputError for fewer than two events among the bags that have tiles."""
        _require_events(targets[:, 0], " with tiles")

    def strata(self, targets: Floats) -> Ints:
        """Whether there was an event."""
        return targets[:, 0].astype(np.int64)

    def validation_weights(self, targets: Floats) -> Floats:
        """All 1; InputError where there is no event."""
        if not targets[:, 0].any():
            raise InputError(
                f"none of the {len(targets)} bags to validate with has an event; give others, more"
                " patients, or validation=None"
            )
        return np.ones(len(targets))

    def metrics(self, logits: Floats, targets: Floats) -> dict[str, float | None]:
        """Validation concordance, Harrell's C; None where no two cases can be compared."""
        seen = Survival(event=targets[:, 0] > 0, time=targets[:, 1])
        found = float(concordances(seen, self.predictions(logits))[0])
        return {"validation_concordance": None if math.isnan(found) else found}

    def predictions(self, logits: Floats) -> Floats:
        """Risk (n,): larger for an earlier event."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CoxHead(SurvivalHead):
    """Survival head of one logit: the log hazard, above a baseline hazard that is the same for all.

    Once training has ended, `center` is the mean of its logits, whose level Cox's loss leaves open,
    and `times` (k,) and `cumulative` (k,) are those of the cumulative hazard there (Breslow).
    """

    center: float = 0.0
    times: Floats = field(default_factory=lambda: np.zeros(0))
    cumulative: Floats = field(default_factory=lambda: np.zeros(0))

    @property
    def outputs(self) -> int:
        """1."""
        return 1

    def objective(self, targets: Floats, device: torch.device) -> Objective:  # noqa: ARG002
        """Cox's loss over the training set."""
        return CoxObjective(torch.from_numpy(targets[:, 0] > 0), torch.from_numpy(targets[:, 1]))

    def predictions(self, logits: Floats) -> Floats:
        """Risk (n,): the log hazard, 0 for the mean of the training."""
        risk: Floats = logits[:, 0] - self.center
        return risk

    def survived(self, logits: Floats) -> Floats:
        """Share without an event at each of `times`, (n, k)."""
        hazard = np.exp(self.predictions(logits))[:, None]
        return np.asarray(np.exp(-hazard * self.cumulative))

    def with_baseline(self, logits: Floats, targets: Floats) -> Self:
        """The head with the center and the baseline of the training's logits (n, 1)."""
        center = float(logits.mean())
        times, place = np.unique(targets[:, 1], return_inverse=True)
        events = np.bincount(place, targets[:, 0], len(times))
        own = np.bincount(place, np.exp(logits[:, 0] - center), len(times))
        at_risk = np.cumsum(own[::-1])[::-1]
        return replace(self, center=center, times=times, cumulative=np.cumsum(events / at_risk))

    @classmethod
    def of_json(cls, values: dict[str, Any]) -> Self:
        """The head in `values`, from which its numbers are taken."""
        center = float(values.pop("center"))
        times, hazards = (_rising(values.pop(key)) for key in ("times", "cumulative"))
        if len(times) != len(hazards) or not math.isfinite(center):
            raise ValueError("the baseline does not fit")
        return cls(center=center, times=times, cumulative=hazards)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DiscreteHead(SurvivalHead):
    """Survival head of a logit for each interval of time: the log odds of the event in it.

    `edges` (K + 1,) are the ends of the intervals. `base` (K,) are the log odds in all cases
    together, which logits are added to, so that the network learns what a bag has beyond that.
    """

    edges: Floats
    base: Floats

    center: ClassVar[float] = 0.0

    @classmethod
    def of(cls, labels: Survival, intervals: int) -> Self:
        """The head for training labels, with intervals that have as many events each."""
        _require_events(labels.event)
        shares = np.linspace(0, 1, intervals + 1)[1:-1]
        inner = np.quantile(labels.time[labels.event], shares)
        edges = np.unique([0.0, *inner, math.nextafter(labels.time.max(), math.inf)])
        place = interval_of(labels.time, edges)
        events = np.bincount(place[labels.event], minlength=len(edges) - 1)
        ended = np.bincount(place, minlength=len(edges) - 1)
        survived = np.cumsum(ended[::-1])[::-1] - events
        # Half a case more on either side: the log of none is infinite.
        return cls(edges=edges, base=np.log((events + 0.5) / (survived + 0.5)))

    @property
    def outputs(self) -> int:
        """The number K of intervals."""
        return len(self.base)

    @property
    def times(self) -> Floats:
        """The ends of the intervals, (K,)."""
        return self.edges[1:]

    def objective(self, targets: Floats, device: torch.device) -> Objective:
        """The discrete likelihood of each bag."""
        event = torch.from_numpy(targets[:, 0] > 0).to(device)
        intervals = torch.from_numpy(interval_of(targets[:, 1], self.edges)).to(device)
        base = torch.from_numpy(self.base.astype(np.float32)).to(device)
        return lambda logits, rows: discrete_losses(
            full(logits) + base, intervals[list(rows)], event[list(rows)]
        )

    def predictions(self, logits: Floats) -> Floats:
        """Risk (n,): minus the expected number of intervals survived."""
        return np.asarray(-self.survived(logits).sum(axis=1))

    def survived(self, logits: Floats) -> Floats:
        """Share without an event at each of `times`, (n, K)."""
        return np.asarray(np.exp(self._log_survived(logits)))

    def _log_survived(self, logits: Floats) -> Floats:
        return np.asarray(np.cumsum(-np.logaddexp(0, logits + self.base), axis=1))

    def fuse(self, logits: Floats) -> Floats:
        """Logits (K,) of the mean survival over logits (k, K)."""
        mean = np.logaddexp.reduce(self._log_survived(logits), axis=0) - math.log(len(logits))
        # log(1 - hazard), which is below 0 but for rounding
        step = np.minimum(np.diff(mean, prepend=0), -np.finfo(np.float64).tiny)
        return np.asarray(np.log(-np.expm1(step)) - step - self.base)

    @classmethod
    def of_json(cls, values: dict[str, Any]) -> Self:
        """The head in `values`, from which its numbers are taken."""
        edges, base = _rising(values.pop("edges")), np.array(values.pop("base"), np.float64)
        if base.shape != (len(edges) - 1,) or not np.isfinite(base).all():
            raise ValueError("base does not fit edges")
        return cls(edges=edges, base=base)


def _require_events(event: NDArray[Any], which: str = "") -> None:
    if (events := int(event.sum())) < _LEAST_EVENTS:
        raise InputError(
            f"y has {events} event{'' if events == 1 else 's'} among {len(event)} bags{which};"
            f" expected {_LEAST_EVENTS} or more to learn from"
        )


def interval_of(time: Floats, edges: Floats) -> Ints:
    """The interval between `edges` that each time lies in; the last one for times beyond it."""
    place = np.searchsorted(edges, time, side="right") - 1
    return np.clip(place, 0, len(edges) - 2).astype(np.int64)


def _rising(values: Any) -> Floats:
    array = np.array(values, np.float64)
    fits = array.ndim == 1 and len(array) and np.isfinite(array).all()
    if not (fits and (np.diff(array) >= 0).all()):
        raise ValueError("times or hazards make no sense")
    return array


@dataclass(kw_only=True, eq=False, repr=False)
class MILSurvival(MILEstimator[CoxHead | DiscreteHead]):
    """Multiple-instance survival model of bags of embeddings, with scikit-survival's conventions.

    `y` is a structured array (event, time), as ``sksurv.util.Surv`` makes it, or an array (n, 2) of
    event (0 or 1) and time. Other parameters are those of `MILClassifier`, but for its classes';
    `history_` has validation_loss and validation_concordance (Harrell's C).

    Args:
        loss: "cox" learns one log hazard by the partial likelihood, in which the risk set of each
            event is the whole training set: the risks of bags outside of a batch are those of
            their last step. "nll" learns a hazard for each interval of time.
        intervals: The number of intervals of "nll", with as many events of the training each.
    """

    loss: Loss = "cox"
    intervals: int = 4

    _noun: ClassVar[str] = "survival"
    _head_type: ClassVar[type[Any]] = SurvivalHead

    def _new_head(self, labels: Survival) -> CoxHead | DiscreteHead:
        return CoxHead() if self.loss == "cox" else DiscreteHead.of(labels, self.intervals)

    def _require_params(self) -> None:
        super()._require_params()
        records.require(self, "loss", self.loss in ("cox", "nll"), '"cox" or "nll"')
        records.require(self, "intervals", is_whole(self.intervals, 2), "an int from 2 on")

    def _adopt(self, trainer: BagTrainer, known: Known) -> None:
        super()._adopt(trainer, known)
        data, model = trainer.train, self._batched()
        if isinstance(self._head, CoxHead):
            try:
                logits = np.stack([model.logits([data[i]]) for i in range(len(data))])
            except BagError:  # a file is gone, and training ended by it: as each was seen last
                logits = cast(CoxObjective, trainer.objective).risk[:, None].numpy()
            self._head = self._head.with_baseline(logits, data.targets)

    def predict(self, X: Sequence[BagLike]) -> Floats:
        """The risk of each bag, float64 (n,): larger for an earlier event.

        With "cox" it is the log hazard above the mean of the training, with "nll" minus the
        expected number of intervals survived. A bag without tiles says nothing: its risk is that of
        the mean, with a warning. The sign is that of the hazard, and never fitted to the data.
        """
        logits = self._logits(X)
        return self._head.predictions(logits)

    def predict_survival_function(self, X: Sequence[BagLike]) -> list[SurvivalFunction]:
        """The share without an event over time, a step function for each bag; see `predict`."""
        logits, head = self._logits(X), self._head
        return [SurvivalFunction(head.times, row) for row in head.survived(logits)]

    def _logits(self, X: Sequence[BagLike]) -> Floats:
        logits, empty = self._predict_logits(X, "their prediction is that of the mean of training")
        return np.where(empty[:, None], self._head.center, logits)

    def score(
        self, X: Sequence[BagLike], y: Any, sample_weight: Sequence[float] | None = None
    ) -> float:
        """Harrell's C of the predicted risks; `sample_weight` (n,) weighs the cases."""
        risk = self.predict(X)
        survival = SurvivalHead.read(y, len(risk), "y")
        if sample_weight is None:
            return harrell_c(survival, risk)
        weights = case_weights(sample_weight, len(risk))
        found = float(concordances(survival, risk, weights[None])[0])
        if math.isnan(found):
            raise InputError("no two cases with a weight can be compared; give more cases")
        return found
