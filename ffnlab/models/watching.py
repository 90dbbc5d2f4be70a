"""A model's call that keeps what its layers report of their routing."""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Key

from ffnlab.layers.context import LayerInputs
from ffnlab.layers.routers import Routing
from ffnlab.models.stack import layers_of

__all__ = ["watched"]


def watched(model: Any, seen: list[Routing], key: Key[Array, ""] | None = None) -> Callable:
    """The model as a function of its inputs, which puts every routing of a call into a list.

    Args:
      model: with `run`, and `output` or `logits` of hidden states, as Encoder and Decoder have.
      seen: what the routings are put into, one for each slot that reports some.
      key: of what layers draw, each by a key of its own; nothing is drawn when None.
    """
    finish = model.output if hasattr(model, "output") else model.logits

    def call(*args: Any, **options: Any) -> Array:
        if key is not None:
            options["inputs"] = LayerInputs(key=jax.random.split(key, layers_of(model)))
        h, outputs = model.run(*args, **options)
        seen.extend(found for found in outputs.reports.values() if isinstance(found, Routing))
        return finish(h)

    return call
