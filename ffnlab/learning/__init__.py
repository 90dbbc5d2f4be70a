"""Learning rules (`ffnlab.rule.Rule`): ways to change a model from batches.

Optimizers are optax pieces and belong inside a rule; the loop that runs any rule is
`ffnlab.parallel.train`.
"""

from ffnlab.learning.backprop import BackpropState, backprop, next_token
from ffnlab.learning.optimizers import Extension, OptimizerConfig, make_optimizer, rate_at

__all__ = [
    "BackpropState",
    "Extension",
    "OptimizerConfig",
    "backprop",
    "make_optimizer",
    "next_token",
    "rate_at",
]
