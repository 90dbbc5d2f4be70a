"""Structure: methods that change what a block is.

Transforms that rewrite sublayers into others, merge them, share them or grow them belong here; the
layers that they put there are in `ffnlab.layers`.
"""

from ffnlab.structure.pflayer import pflayer
from ffnlab.structure.repavit import idle_ratios, repa, repa_fold

__all__ = ["idle_ratios", "pflayer", "repa", "repa_fold"]
