"""Physical removal of sublayers from a model."""

from collections.abc import Iterable
from typing import TypeVar, cast

import jax
from flax import nnx

from ffnlab.models.stack import unstack
from ffnlab.models.units import units

M = TypeVar("M")


def remove(model: M, numbers: Iterable[int]) -> M:
    """The model without some of its sublayers, by their numbers (`ffnlab.models.units`).

    Blocks keep their numbers: one that has lost all its sublayers stays in the list and does
    nothing. A stacked model is unstacked.

    Args:
      model: with layers that are blocks.
      numbers: of units; where every block has attention and an FFN, 2i is the attention of block i
        and 2i + 1 its FFN.
    Raises:
      ValueError: a number out of range, named twice, or removed before.
    """
    numbers = [int(number) for number in numbers]
    known = units(model)
    new = unstack(model) if numbers else jax.tree.map(lambda leaf: leaf, model)
    layers = cast(nnx.List, new.layers)
    for number in numbers:
        if not 0 <= number < len(known):
            raise ValueError(f"units holds {number}, outside 0..{len(known) - 1}")
        layer = known[number].layer
        layers[layer] = layers[layer].without(known[number].slot)
    return new


def removed(model: object) -> list[int]:
    """Units (see `remove`) whose sublayer is missing, in order."""
    return [unit.number for unit in units(model) if not unit.present]
