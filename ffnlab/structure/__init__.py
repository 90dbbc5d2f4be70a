"""Structure: methods that change what a block is.

Transforms that rewrite sublayers into others, merge them, share them or grow them belong here; the
layers that they put there are in `ffnlab.layers`.
"""

from ffnlab.structure.learngene_sws import even_source, expand, share
from ffnlab.structure.pflayer import pflayer
from ffnlab.structure.repavit import idle_ratios, repa, repa_fold
from ffnlab.structure.revcol import gradient_error, supervised

__all__ = [
    "even_source",
    "expand",
    "gradient_error",
    "idle_ratios",
    "pflayer",
    "repa",
    "repa_fold",
    "share",
    "supervised",
]
