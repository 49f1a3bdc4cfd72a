"""Encoder and aggregator fine-tuned together, as an estimator that validation fits and tests."""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xmag import files
from xmag.cohort.jobs import Job
from xmag.encoder import Encoder, TileEncoder
from xmag.encoder.timm import TimmEncoder
from xmag.errors import InputError
from xmag.extract import extract_features
from xmag.finetune import FinetuneResult, Settings, TileOptions, finetune_slides
from xmag.mil import MILClassifier
from xmag.slide import Slide

_OF_TILES = ("tissue", "min_tissue", "border", "transform")
_ALIKE = {"overlap": 0, "damaged": "error", "roi": None}
"""Options of `extract_cohort` that fine-tuning has no other value of."""


def can_be_finetuned(encoder: TileEncoder) -> bool:
    """Whether an encoder is a ViT of xmag's, which alone can be fine-tuned."""
    return isinstance(encoder, Encoder) and not isinstance(encoder, TimmEncoder)


def check_end_to_end(like: Any, extraction: Mapping[str, Any]) -> None:
    """Raise InputError for an estimator or options of extraction that fine-tuning does not have."""
    if not isinstance(like, MILClassifier) or like.ordinal is not False:
        raise InputError(
            f"end to end, no {type(like).__name__} of this kind is trained; expected a"
            " MILClassifier of classes without an order, whose aggregator is taken"
        )
    for name, value in _ALIKE.items():
        if extraction.get(name, value) != value:
            raise InputError(
                f"{name} is {extraction[name]!r}; end to end it is always {value!r}: leave it"
                " out, or fine-tuning"
            )
    if extraction.get("tissue") not in ("auto", None):
        raise InputError(
            "tissue is a place of masks; end to end it is found, or None for every tile: leave it"
            " out, or fine-tuning"
        )


@dataclass(kw_only=True, eq=False, repr=False)
class EndToEnd:
    """Classifier of slides, fine-tuned end to end, with scikit-learn's fit and predict_proba.

    A case is the path of its bag of features, by which `slides` has the slide. Fitting goes on
    from its checkpoint in `folder` where an earlier one of the same cases was stopped.
    `like` is the MILClassifier whose aggregator is taken.
    """

    model: Any
    slides: Mapping[str, Job]
    like: Any
    settings: Settings
    extraction: Mapping[str, Any]
    folder: Path
    random_state: int
    device: str = "auto"
    _result: FinetuneResult | None = field(default=None, init=False)

    def __sklearn_clone__(self) -> "EndToEnd":
        return replace(self)

    def get_params(self, deep: bool = False) -> dict[str, Any]:  # noqa: ARG002
        """The parameters that decide what is learnt, by which earlier reports are known again."""
        return {
            "settings": self.settings.to_dict(),
            "aggregator": repr(self.like.aggregator),
            "tiles": sorted((name, repr(value)) for name, value in self._tiles.items()),
            "random_state": self.random_state,
        }

    @property
    def _tiles(self) -> dict[str, Any]:
        return {name: self.extraction[name] for name in _OF_TILES if name in self.extraction}

    @property
    def classes_(self) -> NDArray[Any]:
        """The labels, in the order of the columns of `predict_proba`; after `fit`."""
        return np.asarray(self._fitted.classifier.classes_)

    def fit(self, X: Sequence[str], y: Any, groups: Any = None) -> "EndToEnd":  # noqa: N803
        """Fine-tune on the slides of these bags; raises what `finetune_slides` does."""
        cases = [*zip(X, np.asarray(y).tolist(), strict=True)]
        digest = hashlib.sha256(repr([self.get_params(), cases]).encode()).hexdigest()[:16]
        files.make_folder(self.folder)
        with ExitStack() as stack:
            self._result = finetune_slides(
                [stack.enter_context(self._slide(bag)) for bag in X],
                y,
                model=self.model,
                aggregator=self.like.aggregator,
                groups=groups,
                settings=self.settings,
                tiles=TileOptions(**self._tiles),
                checkpoint=self.folder / f"{digest}.checkpoint",
                random_state=self.random_state,
                device=self.device,
            )
        return self

    def predict_proba(self, X: Sequence[str]) -> NDArray[np.float64]:  # noqa: N803
        """The probabilities of the classes, float64 (n, C), from the slides of these bags."""
        bags = []
        for bag in X:
            with self._slide(bag) as slide:
                bags.append(extract_features(slide, model=self._fitted.encoder, **self._tiles))
        return np.asarray(self._fitted.classifier.predict_proba(bags), np.float64)

    @property
    def _fitted(self) -> FinetuneResult:
        if self._result is None:
            raise InputError("this EndToEnd is not fitted yet; call fit(X, y)")
        return self._result

    def _slide(self, bag: str) -> Slide:
        job = self.slides[bag]
        return Slide(job.path, mpp=job.mpp, region=job.region)
