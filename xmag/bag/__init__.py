"""FeatureBag: the embeddings of a slide, its files, and those of other software."""

from xmag.bag.bag import FeatureBag, save_bag
from xmag.bag.exports import Canvas, Pictured, placed, placed_tiles
from xmag.bag.formats import SUFFIXES, NewerBagError

__all__ = [
    "SUFFIXES", "Canvas", "FeatureBag", "NewerBagError", "Pictured", "placed", "placed_tiles",
    "save_bag",
]  # fmt: skip
