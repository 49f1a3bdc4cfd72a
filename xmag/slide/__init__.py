"""All that touches slide files: open one as a `Slide`."""

from xmag.slide.slide import Slide

__all__ = ["Slide"]
