"""Slides: pixels and their scale."""
