"""The demo: writes a slide of real tissue, and runs the main job on it."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xmag.demo.run import DemoResult, run_demo
    from xmag.demo.slide import write_demo_slide

__all__ = ["DemoResult", "run_demo", "write_demo_slide"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Whoever only makes slides does not wait for torch.
    home = "slide" if name == "write_demo_slide" else "run"
    return getattr(importlib.import_module(f"xmag.demo.{home}"), name)
