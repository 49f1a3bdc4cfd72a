"""scikit-learn's interface of estimators: parameters and their JSON, tags, routing, random_state.

scikit-learn is imported only where it calls itself, and is loaded by then: see
https://scikit-learn.org/stable/developers/develop.html.
"""

import copy
import inspect
import reprlib
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from xmag.errors import InputError
from xmag.notebook import Rows, Shown

if TYPE_CHECKING:
    from sklearn.utils import Tags
    from sklearn.utils.metadata_routing import MetadataRequest

_NOT_SAVED = ("aggregator", "aggregator_options", "device")
_UNCHANGED = "$UNCHANGED$"  # scikit-learn's own word for it, sklearn.utils.metadata_routing


class Estimator(Shown):
    """scikit-learn's interface: get_params and set_params by the constructor, and routing."""

    @classmethod
    def _defaults(cls) -> dict[str, Any]:
        parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
        return {parameter.name: parameter.default for parameter in parameters}

    def get_params(self, deep: bool = True) -> dict[str, Any]:  # noqa: ARG002
        """The constructor's parameters by name; `deep` changes nothing."""
        return {name: getattr(self, name) for name in sorted(self._defaults())}

    def set_params(self, **params: Any) -> Self:
        """Set constructor parameters and return self; InputError for an unknown name."""
        known = self._defaults()
        if unknown := sorted(set(params) - set(known)):
            raise InputError(
                f"{type(self).__name__} has no parameter {unknown[0]!r}; expected one of"
                f" {sorted(known)}"
            )
        for name, value in params.items():
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        shown = [
            f"{name}={getattr(self, name)!r}"
            for name, default in self._defaults().items()
            if type(getattr(self, name)) is not type(default) or getattr(self, name) != default
        ]
        return f"{type(self).__name__}({', '.join(shown)})"

    def _rows(self) -> Rows:
        params = [[name, _shown(value)] for name, value in self.get_params().items()]
        names = [n for n in dir(self) if n.endswith("_") and not n.startswith("_")]
        learned = [[n, _shown(getattr(self, n))] for n in names if hasattr(self, n)]
        title = "fitted" if learned else "not fitted yet"
        return [["parameter", "value"], *params, [title, ""], *learned]

    def _params_to_json(self) -> dict[str, Any]:
        """The parameters as JSON has them, but for those that are saved otherwise or not at all."""
        params = {k: _plain(v) for k, v in self.get_params().items() if k not in _NOT_SAVED}
        if callable(params["progress"]):  # a function of the program's own
            params["progress"] = None
        if not isinstance(params["random_state"], int):
            params["random_state"] = None  # a generator: where it stood is not known any more
        return params

    @classmethod
    def _params_from_json(cls, params: dict[str, Any]) -> dict[str, Any]:
        return params

    def set_fit_request(
        self, *, groups: bool | str | None = _UNCHANGED, validation: bool | str | None = _UNCHANGED
    ) -> Self:
        """Request that scikit-learn's metadata routing passes these to `fit`; returns self.

        Needs ``sklearn.set_config(enable_metadata_routing=True)``, as with every estimator.
        """
        return self._ask("fit", groups=groups, validation=validation)

    def set_score_request(self, *, sample_weight: bool | str | None = _UNCHANGED) -> Self:
        """Request that metadata routing passes `sample_weight` to `score`; returns self."""
        return self._ask("score", sample_weight=sample_weight)

    def _ask(self, method: str, **aliases: bool | str | None) -> Self:
        from sklearn import get_config

        if not get_config()["enable_metadata_routing"]:
            raise RuntimeError(
                "metadata routing is off; switch it on first:"
                " sklearn.set_config(enable_metadata_routing=True)"
            )
        request = self.get_metadata_routing()
        for name, alias in aliases.items():
            if alias != _UNCHANGED:
                getattr(request, method).add_request(param=name, alias=alias)
        self._metadata_request = request
        return self

    def get_metadata_routing(self) -> "MetadataRequest":
        """scikit-learn's MetadataRequest: the arguments of `fit` and `score` that it may route."""
        from sklearn.utils.metadata_routing import MetadataRequest

        if hasattr(self, "_metadata_request"):
            return copy.deepcopy(self._metadata_request)
        request = MetadataRequest(owner=type(self).__name__)
        for name in ("groups", "validation"):
            request.fit.add_request(param=name, alias=None)
        # A pipeline's own score hands it on whether it was given or not.
        request.score.add_request(param="sample_weight", alias=None)
        return request

    def __sklearn_tags__(self) -> "Tags":
        from sklearn.utils import InputTags, Tags, TargetTags

        return Tags(
            estimator_type=getattr(self, "_estimator_type", None),
            target_tags=TargetTags(required=True),
            input_tags=InputTags(two_d_array=False),
        )


def seed_of(random_state: Any) -> int:
    """The seed for a `random_state=`: the int itself, or a draw from a generator or the system."""
    if random_state is None:
        return int(np.random.SeedSequence().generate_state(1, np.uint64)[0] >> 1)
    if isinstance(random_state, np.random.RandomState):
        return int(random_state.randint(2**31 - 1))
    if isinstance(random_state, np.random.Generator):
        return int(random_state.integers(2**63 - 1))
    if is_whole(random_state, 0) and random_state < 2**63:
        return int(random_state)
    raise InputError(
        f"random_state is {random_state!r}; expected None, an int from 0 on, or NumPy's generator"
    )


def is_whole(value: Any, least: int) -> bool:
    """Whether a value is an int from `least` on, of Python or NumPy."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return whole and bool(value >= least)


def _plain(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return value.item() if isinstance(value, np.generic) else value


def _shown(value: Any) -> str:
    """A parameter, or what was learned, in a few words."""
    if isinstance(value, torch.nn.Module):
        return type(value).__name__
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return f"{len(value)} epochs"
    return reprlib.repr(value.tolist() if isinstance(value, np.ndarray) else value)
