"""Whole-slide images at 5x: tiles, XMAG embeddings, and what is built on them."""

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xmag import bag as bag
    from xmag import cohort as cohort
    from xmag import distill as distill
    from xmag import draw as draw
    from xmag import encoder as encoder
    from xmag import errors as errors
    from xmag import evaluate as evaluate
    from xmag import extract as extract
    from xmag import finetune as finetune
    from xmag import geometry as geometry
    from xmag import metrics as metrics
    from xmag import mil as mil
    from xmag import plan as plan
    from xmag import provenance as provenance
    from xmag import slide as slide
    from xmag import tiles as tiles
    from xmag import tissue as tissue
    from xmag.bag import FeatureBag
    from xmag.cohort import CohortReport, extract_cohort
    from xmag.encoder import Encoder, known_models, load_model
    from xmag.errors import (
        BagError,
        ClosedSlideError,
        DamagedSlideError,
        HubError,
        InputError,
        MismatchError,
        MissingExtraError,
        ModelError,
        OutputError,
        SlideError,
        SlideScaleError,
        UnsupportedSlideError,
        WeightsError,
        XmagError,
        XmagWarning,
    )
    from xmag.extract import extract_features
    from xmag.geometry import TileSpec
    from xmag.mil import Attention, MILClassifier, MILRegressor, MILSurvival
    from xmag.plan import TilePlan, plan_tiles
    from xmag.provenance import Provenance
    from xmag.slide import Slide
    from xmag.tiles import read_tiles
    from xmag.tissue import TissueMask, find_tissue

    __version__: str

__all__ = [
    "Attention",
    "BagError",
    "ClosedSlideError",
    "CohortReport",
    "DamagedSlideError",
    "Encoder",
    "FeatureBag",
    "HubError",
    "InputError",
    "MILClassifier",
    "MILRegressor",
    "MILSurvival",
    "MismatchError",
    "MissingExtraError",
    "ModelError",
    "OutputError",
    "Provenance",
    "Slide",
    "SlideError",
    "SlideScaleError",
    "TilePlan",
    "TileSpec",
    "TissueMask",
    "UnsupportedSlideError",
    "WeightsError",
    "XmagError",
    "XmagWarning",
    "__version__",
    "distill",
    "draw",
    "evaluate",
    "extract_cohort",
    "extract_features",
    "find_tissue",
    "finetune",
    "known_models",
    "load_model",
    "metrics",
    "plan_tiles",
    "read_tiles",
]

_NAMES_OF_MODULE = {
    "bag": ("FeatureBag",),
    "cohort": ("CohortReport", "extract_cohort"),
    "distill": (),
    "draw": (),
    "encoder": ("Encoder", "known_models", "load_model"),
    "errors": tuple(name for name in __all__ if name.endswith(("Error", "Warning"))),
    "evaluate": (),
    "extract": ("extract_features",),
    "finetune": (),
    "geometry": ("TileSpec",),
    "metrics": (),
    "mil": ("Attention", "MILClassifier", "MILRegressor", "MILSurvival"),
    "plan": ("TilePlan", "plan_tiles"),
    "provenance": ("Provenance",),
    "slide": ("Slide",),
    "tiles": ("read_tiles",),
    "tissue": ("TissueMask", "find_tissue"),
}
_MODULE_OF_NAME = {name: module for module, names in _NAMES_OF_MODULE.items() for name in names}

# A library stays silent until the program that uses it says where its log goes.
logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    if name in _NAMES_OF_MODULE:
        return importlib.import_module(f"{__name__}.{name}")
    if name == "__version__":
        value: Any = importlib.import_module("importlib.metadata").version(__name__)
    elif name in _MODULE_OF_NAME:
        module = importlib.import_module(f"{__name__}.{_MODULE_OF_NAME[name]}")
        value = getattr(module, name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value  # the next look-up no longer comes here
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_NAMES_OF_MODULE})
