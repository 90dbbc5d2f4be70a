"""Pruning: which parts of a model can go, decided by what the model puts out without them.

Methods that remove whole sublayers, channels or layers belong here, by a transform, by a rule that
searches while it trains, or by a search (`ffnlab.pruning.search`). Zeroing activations at run time
is `ffnlab.sparsity`; a mask on a weight is a weight (`ffnlab.weights.Masked`).
"""

from ffnlab.pruning.elastic import Net, cut, elastic, formed
from ffnlab.pruning.finercut import Search, finercut, removal_order
from ffnlab.pruning.group_importance import group_penalty, importance
from ffnlab.pruning.group_norm import group_norm, kept_of, removal_steps, to_budget
from ffnlab.pruning.meta import corrected, lesson, meta_loss, meta_prune
from ffnlab.pruning.paths import (
    PathMap,
    PathSearch,
    combine,
    ensemble_scale,
    exits,
    path_ensemble,
    path_map,
    self_distilled,
    unroll,
)
from ffnlab.pruning.removal_map import RemovalMap, removal_map
from ffnlab.pruning.tas.rule import TASOptions, TASState, tas

__all__ = [
    "Net",
    "PathMap",
    "PathSearch",
    "RemovalMap",
    "Search",
    "TASOptions",
    "TASState",
    "combine",
    "corrected",
    "cut",
    "elastic",
    "ensemble_scale",
    "exits",
    "finercut",
    "formed",
    "group_norm",
    "group_penalty",
    "importance",
    "kept_of",
    "lesson",
    "meta_loss",
    "meta_prune",
    "path_ensemble",
    "path_map",
    "removal_map",
    "removal_order",
    "removal_steps",
    "self_distilled",
    "tas",
    "to_budget",
    "unroll",
]
