"""Methods in which a token chooses what processes it."""

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
from ffnlab.routing.oracle import OracleReport, oracle, pattern_losses

__all__ = [
    "BIG",
    "EXPERTS",
    "ROUTERS",
    "MIXERS",
    "OracleReport",
    "budgeted",
    "by_task",
    "duo",
    "lora_experts",
    "mixed",
    "oracle",
    "pattern_losses",
    "preserved",
    "random_choices",
    "sharpened",
    "softened",
    "specialized",
    "with_routers",
]
