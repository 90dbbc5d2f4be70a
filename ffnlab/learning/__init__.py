"""Learning rules (`ffnlab.rule.Rule`): ways to change a model from batches.

Optimizers are optax pieces and belong inside a rule; the loop that runs any rule is
`ffnlab.parallel.train`.
"""

from ffnlab.learning.backprop import (
    BackpropState,
    backprop,
    computed_in,
)
from ffnlab.learning.counter_current.rule import (
    CounterCurrentState,
    MapLoss,
    PairLoss,
    counter_current,
)
from ffnlab.learning.forward_gnn.batches import (
    link_batch,
    link_question,
    node_batch,
    node_question,
)
from ffnlab.learning.forward_gnn.inputs import GraphBatch, GraphInputs
from ffnlab.learning.forward_gnn.options import ForwardGNNOptions
from ffnlab.learning.forward_gnn.rule import ForwardGNNState, forward_gnn, forward_gnn_answers
from ffnlab.learning.members import members
from ffnlab.learning.noprop.rule import NoPropOptions, NoPropState, noprop
from ffnlab.learning.optimizers.masters import MastersState, in_float32
from ffnlab.learning.optimizers.named import (
    OPTIMIZERS,
    Extension,
    OptimizerConfig,
    make_optimizer,
    rate_at,
)
from ffnlab.learning.optimizers.noise import gradient_noise, noise_scale
from ffnlab.learning.optimizers.trust import (
    lamb,
    lars,
    scale_by_trust_ratio,
    sqrt_batch_schedule,
)
from ffnlab.learning.rewriting import from_state, rewritten
from ffnlab.learning.stopping import StoppingState, early_stopping
from ffnlab.losses import labelled, next_token, packed_next_token
from ffnlab.models.noise import LearnedSchedule
from ffnlab.models.noprop_net import NoPropNet

__all__ = [
    "OPTIMIZERS",
    "BackpropState",
    "CounterCurrentState",
    "Extension",
    "ForwardGNNOptions",
    "ForwardGNNState",
    "GraphBatch",
    "GraphInputs",
    "LearnedSchedule",
    "MapLoss",
    "MastersState",
    "NoPropNet",
    "NoPropOptions",
    "NoPropState",
    "OptimizerConfig",
    "PairLoss",
    "StoppingState",
    "backprop",
    "computed_in",
    "counter_current",
    "early_stopping",
    "forward_gnn",
    "forward_gnn_answers",
    "from_state",
    "gradient_noise",
    "in_float32",
    "labelled",
    "lamb",
    "lars",
    "link_batch",
    "link_question",
    "make_optimizer",
    "members",
    "next_token",
    "node_batch",
    "node_question",
    "noise_scale",
    "noprop",
    "packed_next_token",
    "rate_at",
    "rewritten",
    "scale_by_trust_ratio",
    "sqrt_batch_schedule",
]
