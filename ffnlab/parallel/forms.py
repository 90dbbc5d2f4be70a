"""A state goes on in another form of its model: what an optimizer remembers goes along."""

from collections.abc import Callable
from typing import TypeVar

import jax
from jaxtyping import PyTree

__all__ = ["reformed"]

T = TypeVar("T")


def reformed(state: T, kind: type, change: Callable[[PyTree], PyTree]) -> T:
    """A state with its model, and whatever has the structure of it, in another form.

    Args:
      state: a rule's state, a model, or what a checkpoint gave, of arrays or abstract.
      kind: class of the model, `ffnlab.models.Decoder` for instance.
      change: one that moves arrays and makes none, as `ffnlab.models.stack`, `unstack`,
        `pipeline` and `unpipeline` do.
    Raises:
      ConfigError: as `change`.

    >>> from ffnlab import models
    >>> from ffnlab.learning import backprop
    >>> from ffnlab.testing import tiny
    >>> state = backprop().init(models.stack(tiny()), jax.random.key(0))
    >>> type(reformed(state, models.Decoder, models.unstack).model.layers).__name__
    'List'
    """
    is_model = lambda node: isinstance(node, kind)  # noqa: E731
    of_node = lambda node: change(node) if is_model(node) else node  # noqa: E731
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(state)):
        return jax.eval_shape(lambda s: jax.tree.map(of_node, s, is_leaf=is_model), state)
    return jax.tree.map(of_node, state, is_leaf=is_model)
