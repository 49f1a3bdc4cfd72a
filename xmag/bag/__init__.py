"""FeatureBag: the embeddings of a slide, its files, and those of other software."""

from xmag.bag.bag import FeatureBag, placed, save_bag
from xmag.bag.exports import Canvas, Pictured
from xmag.bag.formats import SUFFIXES, NewerBagError

__all__ = ["SUFFIXES", "Canvas", "FeatureBag", "NewerBagError", "Pictured", "placed", "save_bag"]
