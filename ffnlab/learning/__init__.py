"""Learning rules (`ffnlab.rule.Rule`): ways to change a model from batches.

Optimizers are optax pieces and belong inside a rule; the loop that runs any rule is
`ffnlab.parallel.train`.
"""

from ffnlab.layers.physical import BlackBox
from ffnlab.learning.backprop import (
    BackpropState,
    backprop,
    computed_in,
)
from ffnlab.learning.continual.growth import grow
from ffnlab.learning.continual.rule import (
    ContinualOptions,
    ContinualState,
    TaskRows,
    continual,
)
from ffnlab.learning.counter_current.rule import (
    CounterCurrentState,
    MapLoss,
    PairLoss,
    counter_current,
)
from ffnlab.learning.dann.rule import adversarial, dann, domain_classifier, features_of
from ffnlab.learning.dann.shallow import ShallowState, shallow_dann
from ffnlab.learning.exact_permutations.ensemble import exact_permutations
from ffnlab.learning.fitted import fitted_by
from ffnlab.learning.forward_gnn.batches import (
    link_batch,
    link_question,
    node_batch,
    node_question,
)
from ffnlab.learning.forward_gnn.inputs import GraphBatch, GraphInputs
from ffnlab.learning.forward_gnn.options import ForwardGNNOptions
from ffnlab.learning.forward_gnn.rule import ForwardGNNState, forward_gnn, forward_gnn_answers
from ffnlab.learning.generated import generated
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
from ffnlab.learning.physical.boxes import external, opaque
from ffnlab.learning.physical.rule import PhysicalState, contrast, physical_ff
from ffnlab.learning.physical.twin import TwinState, digital_twin
from ffnlab.learning.rewriting import from_state, rewritten
from ffnlab.learning.squares import squares
from ffnlab.learning.stopping import StoppingState, early_stopping
from ffnlab.losses import labelled, next_token, packed_next_token
from ffnlab.models.noise import LearnedSchedule
from ffnlab.models.noprop_net import NoPropNet

__all__ = [
    "OPTIMIZERS",
    "BackpropState",
    "BlackBox",
    "ContinualOptions",
    "ContinualState",
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
    "PhysicalState",
    "ShallowState",
    "StoppingState",
    "TaskRows",
    "TwinState",
    "adversarial",
    "backprop",
    "computed_in",
    "continual",
    "contrast",
    "counter_current",
    "dann",
    "digital_twin",
    "domain_classifier",
    "early_stopping",
    "exact_permutations",
    "external",
    "features_of",
    "fitted_by",
    "forward_gnn",
    "forward_gnn_answers",
    "from_state",
    "generated",
    "gradient_noise",
    "grow",
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
    "opaque",
    "packed_next_token",
    "physical_ff",
    "rate_at",
    "rewritten",
    "scale_by_trust_ratio",
    "shallow_dann",
    "sqrt_batch_schedule",
    "squares",
]
