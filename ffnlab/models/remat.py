"""Rematerialization: layers that are computed again in the backward pass instead of stored."""

from typing import TypeVar

import jax

from ffnlab.layers.stacking import check_policy
from ffnlab.models.stack import layers_of

__all__ = ["remat"]


M = TypeVar("M")


def remat(model: M, policy: str | None) -> M:
    """The same model, whose layers keep less for the backward pass.

    Args:
      model: any with layers, in a list or stacked; or pipelined: then a stage keeps less of a tick.
      policy: "nothing" keeps only each layer's input; "products" also the results of its matrix
        products with parameters; None everything.
    Raises:
      ConfigError: another policy, or a model without layers.
    """
    check_policy(policy)
    layers_of(model)
    new = jax.tree.map(lambda leaf: leaf, model)
    new.remat = policy
    return new
