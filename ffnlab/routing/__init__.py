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
    straight,
    thinned,
)
from ffnlab.routing import pal
from ffnlab.routing.duo import (
    BIG,
    ROUTERS,
    budgeted,
    duo,
    random_choices,
    softened,
    with_routers,
)
from ffnlab.routing.lora_mixer import (
    EXPERTS,
    MIXERS,
    by_task,
    lora_experts,
    mixed,
    preserved,
    sharpened,
    specialized,
)
from ffnlab.routing.maps import RoutingMap, maps
from ffnlab.routing.mixture_of_transformers import modality_of, untie
from ffnlab.routing.oracle import OracleReport, oracle, pattern_losses
from ffnlab.routing.pal import Sounds
from ffnlab.routing.robust_qa import evaluated, switch_head, top2_head
from ffnlab.routing.upcycle import upcycle

__all__ = [
    "BIG",
    "EXPERTS",
    "MIXERS",
    "ROUTERS",
    "OracleReport",
    "Routing",
    "RoutingMap",
    "Sounds",
    "budget_loss",
    "budgeted",
    "by_hash",
    "by_modality",
    "by_task",
    "capacity_of",
    "counts",
    "duo",
    "entropy",
    "evaluated",
    "expert_choice",
    "fixed",
    "limited",
    "load_balance",
    "lora_experts",
    "maps",
    "mixed",
    "modality_of",
    "oracle",
    "pal",
    "pattern_losses",
    "preserved",
    "random",
    "random_choices",
    "sharpened",
    "sigmoid_top_k",
    "softened",
    "softmax_top_k",
    "specialization",
    "specialized",
    "straight",
    "switch_head",
    "thinned",
    "top2_head",
    "unrouted",
    "untie",
    "upcycle",
    "with_routers",
    "z_loss",
]
