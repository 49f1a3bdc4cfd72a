"""Whole-slide image files: a reader for each format, opened as a `Slide`."""

from xmag.slide.omezarr import is_omezarr
from xmag.slide.slide import Slide, SlideFacts, checked_region, is_slide_path, scan_stem

__all__ = ["Slide", "SlideFacts", "checked_region", "is_omezarr", "is_slide_path", "scan_stem"]
