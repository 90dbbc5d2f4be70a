"""Pruning: which parts of a model can go, decided by what the model puts out without them.

Methods that remove whole sublayers, channels or layers belong here, and searches for what to remove
(`ffnlab.pruning.search`). Zeroing activations at run time is `ffnlab.sparsity`; a mask on a weight
is a weight (`ffnlab.weights.Masked`).
"""

from ffnlab.pruning.elastic import Net, cut, elastic, formed
from ffnlab.pruning.finercut import Search, finercut, removal_order
from ffnlab.pruning.removal_map import RemovalMap, removal_map

__all__ = [
    "Net",
    "RemovalMap",
    "Search",
    "cut",
    "elastic",
    "finercut",
    "formed",
    "removal_map",
    "removal_order",
]
