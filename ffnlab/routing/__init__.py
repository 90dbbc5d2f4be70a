"""Routing: tokens that choose their feed-forward network, and how they are made to.

Methods that give the FFNs of a model to a router belong here, and pictures of who chose what. The
routers themselves are layers (`ffnlab.layers.routers`), as are the losses that read what they chose
(`ffnlab.layers.balance`); both are to be had here too.
"""

from ffnlab.layers.balance import (
    budget_loss,
    counts,
    entropy,
    load_balance,
    specialization,
    unrouted,
    z_loss,
)
from ffnlab.layers.routers import (
    Routing,
    by_hash,
    by_modality,
    capacity_of,
    expert_choice,
    fixed,
    limited,
    random,
    sigmoid_top_k,
    softmax_top_k,
    thinned,
)
from ffnlab.routing.maps import RoutingMap, maps
from ffnlab.routing.upcycle import upcycle

__all__ = [
    "Routing",
    "RoutingMap",
    "budget_loss",
    "by_hash",
    "by_modality",
    "capacity_of",
    "counts",
    "entropy",
    "expert_choice",
    "fixed",
    "limited",
    "load_balance",
    "maps",
    "random",
    "sigmoid_top_k",
    "softmax_top_k",
    "specialization",
    "thinned",
    "unrouted",
    "upcycle",
    "z_loss",
]
