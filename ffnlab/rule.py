"""The shape of every learning rule: `Rule(init, step, predict)`.

The trainer holds a Rule and never asks which: it never says loss or gradient, only `step`.
"""

import dataclasses
from collections.abc import Callable, Mapping

from jaxtyping import Array, PyTree

Metrics = Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class Rule:
    """A way of learning, as three pure functions over one state pytree.

    Attributes:
      name: for logs and errors.
      init: (model, key) -> state. Everything that changes while learning is in the state.
      step: (state, batch) -> (state, metrics). Jitted by the rule; may donate its state; metrics
        are scalars by name.
      predict: (state, inputs) -> outputs of the model as learned so far.
    """

    name: str
    init: Callable[[PyTree, Array], PyTree]
    step: Callable[[PyTree, PyTree], tuple[PyTree, Metrics]]
    predict: Callable[[PyTree, PyTree], PyTree]
