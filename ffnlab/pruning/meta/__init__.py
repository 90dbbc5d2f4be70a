"""Meta pruning: a network of the kind "meta" corrects another network so that it can be pruned.

    network = train(backprop(meta_loss(reg=0.003)), fresh, Lessons([lesson(net, rows), …]), …)
    small, _ = transform.apply(meta_prune(metanetwork=network, speed_up=4), net_never_seen)

The metanetwork itself is `ffnlab.models.MetaNetwork`; groups, narrowing and the plain criterion are
in `ffnlab.models` and `ffnlab.pruning`.
"""

from ffnlab.pruning.meta.correcting import corrected
from ffnlab.pruning.meta.graphs import Layout
from ffnlab.pruning.meta.layouts import layout_of
from ffnlab.pruning.meta.pruning import meta_prune
from ffnlab.pruning.meta.training import Lesson, Lessons, lesson, meta_loss

__all__ = [
    "Layout",
    "Lesson",
    "Lessons",
    "corrected",
    "layout_of",
    "lesson",
    "meta_loss",
    "meta_prune",
]
