import ast
import importlib
import inspect
from importlib.metadata import version
from pathlib import Path

import pytest

import xmag

MODULES = {
    "bag": {"FeatureBag"},
    "cohort": {"CohortReport", "extract_cohort"},
    "distill": set(),
    "draw": set(),
    "encoder": {"Encoder", "known_models", "load_model"},
    "errors": {
        "BagError",
        "ClosedSlideError",
        "DamagedSlideError",
        "HubError",
        "InputError",
        "MismatchError",
        "MissingExtraError",
        "ModelError",
        "OutputError",
        "SlideError",
        "SlideScaleError",
        "UnsupportedSlideError",
        "WeightsError",
        "XmagError",
        "XmagWarning",
    },
    "evaluate": set(),
    "extract": {"extract_features"},
    "finetune": set(),
    "geometry": {"TileSpec"},
    "metrics": set(),
    "mil": {"Attention", "MILClassifier", "MILRegressor", "MILSurvival"},
    "plan": {"TilePlan", "plan_tiles"},
    "provenance": {"Provenance"},
    "slide": {"Slide"},
    "tiles": {"read_tiles"},
    "tissue": {"TissueMask", "find_tissue"},
}
OPERANDS = {
    "extract_cohort": ["slides", "out"],
    "extract_features": ["slide"],
    "find_tissue": ["slide"],
    "load_model": ["name_or_path"],
    "plan_tiles": ["slide", "spec"],
    "read_tiles": ["slide", "plan"],
    "Slide": ["path"],
}


def test_these_names_are_exported_and_no_others() -> None:
    parts = {"distill", "draw", "evaluate", "finetune", "metrics"}
    assert set(xmag.__all__) == set().union(*MODULES.values(), {"__version__"}, parts)
    assert set(dir(xmag)) == {*xmag.__all__, *MODULES}


@pytest.mark.parametrize("module", MODULES)
def test_each_name_is_that_of_its_module(module: str) -> None:
    for name in MODULES[module]:
        thing = getattr(xmag, name)
        assert thing.__name__ == name
        assert thing is getattr(importlib.import_module(f"xmag.{module}"), name)
    assert getattr(xmag, module) is importlib.import_module(f"xmag.{module}")


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(xmag.__file__).read_text())
    guard = next(node for node in tree.body if isinstance(node, ast.If))
    imported = {
        (node.module, alias.name)
        for node in guard.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    names = {(f"xmag.{module}", name) for module, names in MODULES.items() for name in names}
    assert imported == names | {("xmag", module) for module in MODULES}


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'xmag' has no attribute 'load_modle'"):
        _ = xmag.load_modle


def test_the_version_is_that_of_the_installed_package() -> None:
    assert xmag.__version__ == version("xmag")


@pytest.mark.parametrize("name", OPERANDS)
def test_operands_are_positional_and_options_keyword_only(name: str) -> None:
    parameters = inspect.signature(getattr(xmag, name)).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == OPERANDS[name]
    options = [p for p in parameters if p.name not in positional]
    assert all(p.kind is p.KEYWORD_ONLY for p in options)
