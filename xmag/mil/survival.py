"""MILSurvival: the risk of a patient, and the time to an event, from the embeddings of tiles."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn import functional

from xmag import records
from xmag.errors import InputError
from xmag.metrics.survival import Survival, as_survival, concordances, harrell_c
from xmag.mil.bags import BagLike
from xmag.mil.estimator import MILEstimator
from xmag.mil.heads import Objective
from xmag.mil.pooling import full
from xmag.mil.trainer import BagTrainer, Settings

if TYPE_CHECKING:
    from sklearn.utils import Tags

Loss = Literal["cox", "nll"]
Floats = NDArray[np.float64]

_LEAST_EVENTS = 2


@dataclass(frozen=True, slots=True, eq=False)
class SurvivalFunction:
    """A predicted share without an event, as a step function of time, like scikit-survival's.

    Attributes:
        x: float64 (k,), the times of the steps, rising.
        y: float64 (k,), the probability of no event up to and at each of them.
    """

    x: Floats
    y: Floats

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
    return -(risk - _log_risk_sums(risk, time))[event].mean()


def _log_risk_sums(risk: Tensor, time: Tensor) -> Tensor:
    """Log of the sum of hazards of the cases still at risk at the time of each, (n,)."""
    order = torch.argsort(time, descending=True, stable=True)
    sums = torch.logcumsumexp(risk[order], dim=0)
    # Cases of one time are at risk together: each has the sum of the last of them.
    last = torch.searchsorted(-time[order], -time, side="right") - 1
    return sums[last]


class CoxObjective:
    """Cox's loss of a whole training set, in steps of a few bags.

    A bag's risk set is the training set, and not its batch, which may have no event at all. The
    risks of bags outside of the batch are those of their last step (0 before the first). The loss
    of a bag has the exact gradient of `cox_loss` by its risk: of its own event, and of all events
    at whose time it was still at risk.
    """

    def __init__(self, event: Tensor, time: Tensor) -> None:
        self._event, self._time = event, time
        self._risk = torch.zeros(len(event), device=event.device)

    def __call__(self, logits: Tensor, rows: Sequence[int]) -> Tensor:
        """Losses (B,) of the risks (B, 1) of the bags at `rows`."""
        here = list(rows)
        risk = full(logits)[:, 0]
        self._risk[here] = risk.detach().to(self._risk.dtype)
        every = self._risk.clone().requires_grad_()
        with torch.enable_grad():
            loss = cox_loss(every, self._event, self._time)
        (slope,) = torch.autograd.grad(loss, every)
        # n times: the loss of the set is a mean, and that of a batch one over fewer bags.
        scaled = slope[here] * len(self._risk)
        return loss.detach() + scaled * (risk - risk.detach())


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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SurvivalHead:
    """Survival head: one log hazard (Cox), or a hazard for each interval of time (NLL).

    `edges` (K + 1,) are the ends of the intervals, None for Cox. For Cox, `times` (k,) and
    `cumulative` (k,) are the baseline's cumulative hazard (Breslow), once training has ended.
    """

    edges: Floats | None = None
    times: Floats | None = None
    cumulative: Floats | None = None

    has_labels: ClassVar[bool] = False
    metric_names: ClassVar[tuple[str, ...]] = ("validation_loss", "validation_concordance")

    @property
    def outputs(self) -> int:
        """1, or the number of intervals."""
        return 1 if self.edges is None else len(self.edges) - 1

    @staticmethod
    def read(values: Any, count: int, what: str) -> Survival:
        """Checked (event, time) of each bag; InputError as `as_survival`."""
        survival = as_survival(values, what)
        if len(survival) != count:
            raise InputError(f"{what} has {len(survival)} values for {count} bags")
        return survival

    @classmethod
    def of(cls, labels: Survival, *, loss: Loss, intervals: int) -> Self:
        """The head for training labels: with "nll" intervals that have as many events each."""
        if loss == "cox":
            return cls()
        shares = np.linspace(0, 1, intervals + 1)[1:-1]
        inner = np.quantile(labels.time[labels.event], shares)
        edges = np.unique([0.0, *inner, math.nextafter(labels.time.max(), math.inf)])
        return cls(edges=edges)

    def encode(self, labels: Survival, what: str) -> NDArray[np.float64]:  # noqa: ARG002
        """Event (0 or 1) and time, float64 (n, 2)."""
        return np.stack([labels.event.astype(np.float64), labels.time], axis=1)

    def require_trainable(self, targets: NDArray[np.float64]) -> None:
        """Raise InputError for fewer than two events among the bags that have tiles."""
        if (events := int(targets[:, 0].sum())) < _LEAST_EVENTS:
            raise InputError(
                f"y has {events} events among {len(targets)} bags with tiles; expected"
                f" {_LEAST_EVENTS} or more to learn from"
            )

    def strata(self, targets: NDArray[np.float64]) -> NDArray[np.int64]:
        """Whether there was an event."""
        return targets[:, 0].astype(np.int64)

    def objective(self, targets: NDArray[np.float64], device: torch.device) -> Objective:
        """The loss: Cox's over the training set, or the discrete likelihood of each bag."""
        event = torch.from_numpy(targets[:, 0] > 0).to(device)
        if self.edges is None:
            # Only the order of times counts, and not every device has double precision.
            order = np.unique(targets[:, 1], return_inverse=True)[1]
            return CoxObjective(event, torch.from_numpy(order).to(device))
        intervals = torch.from_numpy(self.interval_of(targets[:, 1])).to(device)
        return lambda logits, rows: discrete_losses(
            logits, intervals[list(rows)], event[list(rows)]
        )

    def interval_of(self, time: Floats) -> NDArray[np.int64]:
        """The interval that each time lies in; the last one for times beyond it."""
        assert self.edges is not None
        place = np.searchsorted(self.edges, time, side="right") - 1
        return np.clip(place, 0, self.outputs - 1).astype(np.int64)

    def predictions(self, logits: Floats) -> Floats:
        """Risk (n,): the log hazard, or minus the expected number of intervals survived."""
        risk: Floats = logits[:, 0] if self.edges is None else -self.survived(logits).sum(axis=1)
        return risk

    def survived(self, logits: Floats) -> Floats:
        """Share without an event at each of `steps`, (n, k)."""
        if self.edges is not None:
            return np.asarray(np.exp(np.cumsum(-np.logaddexp(0, logits), axis=1)))
        assert self.cumulative is not None
        return np.asarray(np.exp(-np.exp(logits[:, :1]) * self.cumulative))

    @property
    def steps(self) -> Floats:
        """The times at which survival functions fall, (k,)."""
        steps = self.times if self.edges is None else self.edges[1:]
        assert steps is not None
        return steps

    def with_baseline(self, risk: Floats, targets: NDArray[np.float64]) -> Self:
        """The head with the baseline's cumulative hazard, of the training's risks (Breslow)."""
        if self.edges is not None:
            return self
        times, place = np.unique(targets[:, 1], return_inverse=True)
        events = np.bincount(place, targets[:, 0], len(times))
        own = np.bincount(place, np.exp(risk), len(times))
        at_risk = np.cumsum(own[::-1])[::-1]
        return replace(self, times=times, cumulative=np.cumsum(events / at_risk))

    def metrics(
        self,
        logits: Floats,
        targets: NDArray[np.float64],
        weights: NDArray[np.float64],
    ) -> dict[str, float | None]:
        """Validation loss, and Harrell's C; None where no two cases can be compared."""
        seen = Survival(event=targets[:, 0] > 0, time=targets[:, 1])
        if not seen.event.any():
            raise InputError(
                f"none of the {len(seen)} bags to validate with has an event; give others, more"
                " patients, or validation=None"
            )
        scores, known = torch.from_numpy(logits), torch.from_numpy(targets)
        if self.edges is None:
            loss = float(cox_loss(scores[:, 0], known[:, 0] > 0, known[:, 1]))
        else:
            intervals = torch.from_numpy(self.interval_of(seen.time))
            losses = discrete_losses(scores, intervals, known[:, 0] > 0).numpy()
            loss = float((weights * losses).sum() / weights.sum())
        found = float(concordances(seen, self.predictions(logits))[0])
        return {
            "validation_loss": loss,
            "validation_concordance": None if math.isnan(found) else found,
        }

    def to_json(self) -> dict[str, Any]:
        """The head as JSON values."""
        parts = {"edges": self.edges, "times": self.times, "cumulative": self.cumulative}
        return {key: None if part is None else part.tolist() for key, part in parts.items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """The head in `values`, from which its arrays are taken."""
        found = [values.pop(key) for key in ("edges", "times", "cumulative")]
        edges, times, cumulative = (None if v is None else np.array(v, np.float64) for v in found)
        for part in (edges, times, cumulative):
            if part is not None and not (
                part.ndim == 1 and np.isfinite(part).all() and (np.diff(part) >= 0).all()
            ):
                raise ValueError("times or hazards make no sense")
        if edges is None and (times is None or cumulative is None or len(times) != len(cumulative)):
            raise ValueError("the baseline does not fit")
        if edges is not None and len(edges) < 2:
            raise ValueError("edges do not fit")
        return cls(edges=edges, times=times, cumulative=cumulative)


@dataclass(kw_only=True, eq=False, repr=False)
class MILSurvival(MILEstimator[SurvivalHead]):
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

    def _new_head(self, labels: Survival) -> SurvivalHead:
        return SurvivalHead.of(labels, loss=self.loss, intervals=self.intervals)

    def _settings(self) -> Settings:
        records.require(self, "loss", self.loss in ("cox", "nll"), '"cox" or "nll"')
        whole = isinstance(self.intervals, int) and not isinstance(self.intervals, bool)
        records.require(self, "intervals", whole and self.intervals >= 2, "an int from 2 on")
        return super()._settings()

    def _adopt(self, trainer: BagTrainer) -> int:
        best = super()._adopt(trainer)
        data, model = trainer.train, self._batched()
        if self._head.edges is None:
            risk = np.array([model.logits(data[i])[0] for i in range(len(data))])
            self._head = self._head.with_baseline(risk, data.targets)
        return best

    def predict(self, X: Sequence[BagLike]) -> Floats:  # noqa: N803
        """The risk of each bag, float64 (n,): larger for an earlier event; the scale is arbitrary.

        A bag without tiles gets the risk of a network that sees nothing (0), with a warning. The
        sign is that of the hazard, and never fitted to the data.
        """
        self._require_fitted()
        return self._head.predictions(self._predict_logits(X, "their risk is that of logits 0")[0])

    def predict_survival_function(
        self,
        X: Sequence[BagLike],  # noqa: N803
    ) -> list[SurvivalFunction]:
        """The share without an event over time, a step function for each bag."""
        self._require_fitted()
        logits = self._predict_logits(X, "their survival is that of logits 0")[0]
        head = self._head
        return [SurvivalFunction(head.steps, row) for row in head.survived(logits)]

    def score(
        self,
        X: Sequence[BagLike],  # noqa: N803
        y: Any,
        sample_weight: Sequence[float] | None = None,
    ) -> float:
        """Harrell's C of the predicted risks; `sample_weight` (n,) weighs the cases."""
        risk = self.predict(X)
        survival = SurvivalHead.read(y, len(risk), "y")
        if sample_weight is None:
            return harrell_c(survival, risk)
        found = float(concordances(survival, risk, np.asarray(sample_weight, np.float64)[None])[0])
        if math.isnan(found):
            raise InputError("no two cases with a weight can be compared; give more cases")
        return found

    def __sklearn_tags__(self) -> "Tags":
        from sklearn.utils import InputTags, Tags, TargetTags

        return Tags(
            estimator_type=None,
            target_tags=TargetTags(required=True),
            input_tags=InputTags(two_d_array=False),
        )
