"""Whole-slide images at 5x: tiles, XMAG embeddings, and what is built on them."""
