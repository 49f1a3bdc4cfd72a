"""Lazy import of the optional packages of `xmag[evaluate]`."""

import importlib
from typing import Any

from xmag.errors import MissingExtraError


def optional(module: str, purpose: str) -> Any:
    """Import a module of scikit-learn or matplotlib; MissingExtraError if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = "scikit-learn" if module.startswith("sklearn") else "matplotlib"
        raise MissingExtraError(
            f'{purpose} needs {package}, which is not installed; run pip install "xmag[evaluate]"'
        ) from error
