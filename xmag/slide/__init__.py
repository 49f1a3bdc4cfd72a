"""Whole-slide image files: a reader for each format, opened as a `Slide`."""

from xmag.slide.opening import is_slide_path
from xmag.slide.slide import Slide, SlideFacts

__all__ = ["Slide", "SlideFacts", "is_slide_path"]
