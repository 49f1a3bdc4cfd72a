"""Whole-slide image files: a reader for each format, opened as a `Slide`."""

from xmag.slide.omezarr import is_omezarr
from xmag.slide.slide import Slide, SlideFacts, is_slide_path

__all__ = ["Slide", "SlideFacts", "is_omezarr", "is_slide_path"]
