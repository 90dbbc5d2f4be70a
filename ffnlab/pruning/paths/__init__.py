"""A residual network as an ensemble of paths: unrolled, pruned, weighed and distilled.

Revisiting Vision Transformer from the View of Path Ensemble (2023, arXiv 2308.06548). What is
pruned here is what a model's head reads; `ffnlab.pruning.finercut` takes sublayers out of the
stream that the layers read.
"""

from ffnlab.pruning.paths.distill import self_distilled
from ffnlab.pruning.paths.path_ensemble import path_ensemble
from ffnlab.pruning.paths.path_map import PathMap, path_map
from ffnlab.pruning.paths.path_search import PathSearch
from ffnlab.pruning.paths.scaled import ensemble_scale
from ffnlab.pruning.paths.unroll import combine, exits, unroll

__all__ = [
    "PathMap",
    "PathSearch",
    "combine",
    "ensemble_scale",
    "exits",
    "path_ensemble",
    "path_map",
    "self_distilled",
    "unroll",
]
