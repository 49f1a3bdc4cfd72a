"""All that touches slide files: open one as a `Slide`."""

from xmag.slide.opening import is_slide_path
from xmag.slide.slide import Slide

__all__ = ["Slide", "is_slide_path"]
