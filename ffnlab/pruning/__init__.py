"""Pruning: which parts of a model can go, decided by what the model puts out without them.

Methods that remove whole sublayers, channels or layers belong here. Zeroing activations at run time
is `ffnlab.sparsity`; a mask on a weight is a weight (`ffnlab.weights.Masked`).
"""

from ffnlab.pruning.finercut import Search, finercut, removal_order
from ffnlab.pruning.removal_map import RemovalMap, removal_map

__all__ = ["RemovalMap", "Search", "finercut", "removal_map", "removal_order"]
