"""The demo: writes a slide of real tissue, and runs the main job on it."""

import importlib
from typing import TYPE_CHECKING, Any

from xmag.demo.slide import write_demo_slide

if TYPE_CHECKING:
    from xmag.demo.run import DemoResult, run_demo

__all__ = ["DemoResult", "run_demo", "write_demo_slide"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Whoever only makes slides does not wait for torch.
    return getattr(importlib.import_module("xmag.demo.run"), name)
