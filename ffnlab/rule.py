"""The shape of every learning rule: `Rule(init, step, predict, model, check)`.

The trainer holds a Rule and never asks which: it never says loss or gradient, only `step`.
"""

import dataclasses
from collections.abc import Callable, Mapping

from jaxtyping import Array, PyTree

from ffnlab.errors import ConfigError

__all__ = ["Metrics", "Rule", "accept", "held_model"]

Metrics = Mapping[str, Array]


def accept(state: PyTree, batch: PyTree) -> None:
    """The check of a rule that takes any batch."""
    del state, batch


def held_model(state: PyTree) -> PyTree:
    """What was learned, of a state that has it as `.model`.

    Raises:
      ConfigError: the state has no such part.
    """
    if not hasattr(state, "model"):
        raise ConfigError(
            f"a state of type {type(state).__name__} has no part `model`; give the rule a function "
            "of its state: Rule(…, model=lambda state: …)"
        )
    return state.model


@dataclasses.dataclass(frozen=True)
class Rule:
    """A way of learning, as pure functions over one state pytree.

    Attributes:
      name: for logs and errors.
      init: (model, key) -> state. Everything that changes while learning is in the state.
      step: (state, batch) -> (state, metrics). Jitted by the rule; may donate its state; metrics
        are scalars by name.
      predict: (state, inputs) -> outputs of the model as learned so far.
      model: state -> the model as learned so far; `state.model` unless the rule says otherwise.
      check: (state, batch) -> None; raises ValueError for a batch that `step` must not be given,
        which computes with any. The loop calls it with every batch on the host, before it is
        placed; of the state, which may be abstract, only shapes are to be looked at. It accepts
        all unless the rule says otherwise.
      result: state -> what a run is for, on the host; None where that is `model`. A search gives
        the network that it found, whose sizes are others. `finished` asks for it.
    """

    name: str
    init: Callable[[PyTree, Array], PyTree]
    step: Callable[[PyTree, PyTree], tuple[PyTree, Metrics]]
    predict: Callable[[PyTree, PyTree], PyTree]
    model: Callable[[PyTree], PyTree] = held_model
    check: Callable[[PyTree, PyTree], None] = accept
    result: Callable[[PyTree], PyTree] | None = None

    def finished(self, state: PyTree) -> PyTree:
        """What is kept of a run: what it found, or the model as learned."""
        return self.model(state) if self.result is None else self.result(state)
