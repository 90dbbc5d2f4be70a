"""Channels and sublayers switched off by numbers, inside a compiled step.

A model is of all its widths and depths at once: `masked` is what `narrow` will do, `gated` what
`remove` will.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Shaped

from ffnlab import tree
from ffnlab.errors import ConfigError
from ffnlab.layers import FixedAffine, LayerInputs, Residual
from ffnlab.layers.stacking import Statistic
from ffnlab.models.groups import COLUMNS, Part, check_names, groups, owner_of
from ffnlab.models.stack import Stacked, unstack
from ffnlab.models.units import present, removable
from ffnlab.weights import Dense, Weight

__all__ = ["gated", "masked"]

M = TypeVar("M")


def masked(model: M, masks: Mapping[str, Shaped[Array | np.ndarray, "_"]]) -> M:
    """The model, as wide as it was, in which units count as often as masks say.

    Every parameter's entries of a unit are multiplied by its number: a unit of 0 gives nothing, and
    the model computes what `narrow` without it does. It may be called inside a compiled step, with
    traced masks.

    Args:
      masks: name of a group -> a number for each unit, 0 and 1 for most uses.
    Returns:
      a new model; a stacked one in its list form.
    Raises:
      ConfigError: no such group, another number of units, or a parameter in another format than
        `Dense`.
    """
    known = {group.name: group for group in groups(model)}
    check_names(masks, known)
    is_stacked = isinstance(getattr(model, "layers", None), Stacked)
    new = unstack(model) if is_stacked else tree.copy(model)
    nodes = dict(tree.walk(new))
    for name, mask in masks.items():
        if jnp.shape(mask) != (known[name].size,):
            raise ConfigError(
                f"masks[{name!r}] has shape {jnp.shape(mask)}, not one number for each of the "
                f"{known[name].size} units"
            )
        for part in known[name].parts:
            if isinstance(nodes[part.path], Residual):
                continue
            owner, attribute = owner_of(nodes, part.path)
            variable = getattr(owner, attribute)
            if isinstance(variable, nnx.Param) or isinstance(owner, FixedAffine):
                value = _multiplied(variable.get_value(), part, jnp.asarray(mask))
                setattr(owner, attribute, variable.replace(value))
    return new


def _multiplied(value: Weight | Array, part: Part, mask: Array) -> Weight | Array:
    """A parameter whose entries are multiplied by the number of their unit."""
    if isinstance(value, Weight) and not isinstance(value, Dense):
        raise ConfigError(f"{part.path} is a {type(value).__name__}; only a Dense can be masked")
    array = value.w if isinstance(value, Dense) else value
    unit_of = np.full(array.shape[part.axis], len(mask))  # whose number is 1
    unit_of[part.index] = np.arange(len(mask))[:, None]
    factor = jnp.concatenate([mask, jnp.ones(1, mask.dtype)])[unit_of].astype(array.dtype)
    array = array * (factor if part.axis == COLUMNS else factor[:, None])
    return dataclasses.replace(value, w=array) if isinstance(value, Dense) else array


def gated(model: M, gates: Float[Array | np.ndarray, "n s"]) -> M:
    """The model in which each sublayer adds its branch times a number.

    A sublayer of 0 adds nothing, and the model computes what `remove` makes of it. It may be called
    inside a compiled step, with traced gates.

    Args:
      model: with layers that are blocks, stacked or not, whose `run` takes inputs of layers.
      gates: a number for each sublayer of each layer, in the order of the block's slots.
    Returns:
      a new model, for calls alone: its class is none that can be saved.
    Raises:
      ConfigError: no such model, other sublayers than gates, or a sublayer without a residual,
        after which nothing would be left.
    """
    there = present(model)
    if jnp.shape(gates) != there.shape:
        raise ConfigError(
            f"gates {jnp.shape(gates)}: the model has {there.shape[0]} layers of {there.shape[1]} "
            "sublayers"
        )
    bare = np.argwhere(there & ~removable(model))
    if len(bare):
        layer, slot = bare[0].tolist()
        raise ConfigError(f"sublayer {slot} of layer {layer} has no residual; it cannot be gated")
    new = tree.copy(model)
    new.__class__ = _with_gates(type(model))
    new.gates = Statistic(jnp.asarray(gates), axes=(None, None))
    return new


@functools.cache
def _with_gates(kind: type) -> type:
    """The class of models whose `run` gives its own gates to the layers."""

    def run(self: Any, *args: Any, inputs: LayerInputs | None = None, **options: Any) -> Any:
        inputs = LayerInputs() if inputs is None else inputs
        return kind.run(self, *args, inputs=inputs._replace(gates=self.gates[...]), **options)

    return type(f"Gated{kind.__name__}", (kind,), {"run": run})
