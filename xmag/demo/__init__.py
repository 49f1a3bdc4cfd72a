"""The demo: writes a slide of real tissue, and runs the main job on it."""

from xmag.demo.run import DemoResult, run_demo
from xmag.demo.slide import write_demo_slide

__all__ = ["DemoResult", "run_demo", "write_demo_slide"]
