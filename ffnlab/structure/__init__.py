"""Structure: methods that change what a block is.

Transforms that rewrite sublayers into others, merge them, share them or grow them belong here; the
layers that they put there are in `ffnlab.layers`.
"""

from ffnlab.structure.learngene_sws import even_source, expand, share
from ffnlab.structure.macaron import macaron
from ffnlab.structure.pflayer import pflayer
from ffnlab.structure.repavit import idle_ratios, repa, repa_fold
from ffnlab.structure.revcol import gradient_error, supervised
from ffnlab.structure.scalelong import block_gradients, noise_response, scalelong
from ffnlab.structure.snnk import bundle, bundled, snnk, snnk_adapter
from ffnlab.structure.structured_ffn import (
    guided,
    paper_options,
    premerged,
    self_guided,
    share_of_guide,
    structured,
    unguided,
)

__all__ = [
    "block_gradients",
    "bundle",
    "bundled",
    "even_source",
    "expand",
    "gradient_error",
    "guided",
    "idle_ratios",
    "macaron",
    "noise_response",
    "paper_options",
    "pflayer",
    "premerged",
    "repa",
    "repa_fold",
    "scalelong",
    "self_guided",
    "share",
    "share_of_guide",
    "snnk",
    "snnk_adapter",
    "structured",
    "supervised",
    "unguided",
]
