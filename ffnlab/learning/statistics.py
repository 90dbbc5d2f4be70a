"""What a loss measured of its model, put back into it: new values of `Statistic`s, by path."""

import difflib
from collections.abc import Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ffnlab import tree
from ffnlab.errors import SelectionError
from ffnlab.layers.stacking import Statistic
from ffnlab.losses import Unsettled

__all__ = ["settled", "written"]

M = TypeVar("M")


def written(model: M, new: Mapping[str, Array]) -> M:
    """A model with new statistics, the rest the same.

    Args:
      model: any; left intact.
      new: values by the path of their `Statistic`, as `ffnlab.tree` names it ("norm.mean").
    Raises:
      SelectionError: a path is not that of a Statistic.
      ValueError: a value of another shape or dtype than the one that it replaces.
    """
    if not new:
        return model
    held = {path: node for path, node in tree.walk(model) if isinstance(node, Statistic)}
    for path, value in new.items():
        if path not in held:
            near = difflib.get_close_matches(path, held, n=3, cutoff=0.0)
            raise SelectionError(f"statistic {path!r} is not in the model; it has {near}")
        old, value = held[path].get_value(), jnp.asarray(value)
        if (old.shape, old.dtype) != (value.shape, value.dtype):
            raise ValueError(
                f"statistic {path!r} is {value.dtype}{list(value.shape)}; the model holds "
                f"{old.dtype}{list(old.shape)}"
            )
    nodes = {path: jax.tree.unflatten(jax.tree.structure(held[path]), [new[path]]) for path in new}
    return tree.replace(model, nodes)


def settled(found: Mapping[str, PyTree], parts: int) -> dict[str, Array]:
    """Statistics of a batch, from means over its parts; see `ffnlab.losses.Unsettled`."""
    return {
        path: value.settle(parts) if isinstance(value, Unsettled) else value
        for path, value in found.items()
    }
