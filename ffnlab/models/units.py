"""The removable sublayers of a model: the one list that pruning and ensembles of paths read.

Units are numbered layer by layer, within a layer in the order of the block's slots, whether a
sublayer is still there or not: with attention and FFN in every block, unit 2i is the attention of
block i and unit 2i + 1 its FFN.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool

from ffnlab.errors import ConfigError
from ffnlab.layers import Block
from ffnlab.models.stack import Stacked, check_layered, period_of

__all__ = ["Unit", "is_attention", "present", "removable", "slots", "units"]


class Unit(NamedTuple):
    """One sublayer.

    Attributes:
      number: its place in the list.
      layer: index of its block.
      slot: its name in the block, "attn" or "ffn" in most.
      present: whether it is still there.
    """

    number: int
    layer: int
    slot: str
    present: bool

    def __str__(self) -> str:
        return f"{self.slot} of layer {self.layer}"


def units(model: Any) -> list[Unit]:
    """All units of a model, those that were removed too.

    Args:
      model: with layers that are `Block`s, stacked or not; leaves may be abstract.
    Raises:
      ConfigError: it has no layers, or some are no blocks.
    """
    check_layered(model)
    blocks = period_of(model.layers)
    strange = [type(block).__name__ for block in blocks if not isinstance(block, Block)]
    if strange:
        raise ConfigError(f"layers of type {sorted(set(strange))}; only a Block has units")
    if isinstance(model.layers, Stacked):
        blocks = blocks * model.layers.repeats
    parts = [(i, slot, block) for i, block in enumerate(blocks) for slot in block.slots]
    return [
        Unit(number, layer, slot, getattr(block, slot) is not None)
        for number, (layer, slot, block) in enumerate(parts)
    ]


def is_attention(slot: str) -> bool:
    """Whether a sublayer of this name mixes tokens: "attn", "attn_in", …; others do not.

    >>> is_attention("attn"), is_attention("ffn_in")
    (True, False)
    """
    return slot.startswith("attn")


def slots(model: Any) -> tuple[str, ...]:
    """Names of the sublayers of every block, in order.

    Raises:
      ConfigError: see `units`; or blocks have different sublayers.
    """
    units(model)  # whose checks say what the model is
    found = list(dict.fromkeys(block.slots for block in period_of(model.layers)))
    if len(found) != 1:
        raise ConfigError(f"the blocks of this model have different sublayers: {found}")
    return found[0]


def present(model: Any) -> Bool[np.ndarray, "n s"]:
    """Which sublayers are there, by layer and slot.

    Raises:
      ConfigError: see `units`; or blocks have different numbers of slots.
    """
    found = units(model)
    rows: dict[int, list[bool]] = {}
    for unit in found:
        rows.setdefault(unit.layer, []).append(unit.present)
    if len({len(row) for row in rows.values()}) > 1:
        raise ConfigError("the blocks of this model have different numbers of sublayers")
    return np.array(list(rows.values()), bool)


def removable(model: Any) -> Bool[np.ndarray, "n s"]:
    """Which sublayers are there and have a residual: without another one nothing would be left.

    Raises:
      ConfigError: see `present`.
    """
    blocks = period_of(model.layers)
    rows = [[join.residual for join in block.joins] for block in blocks]
    repeats = model.layers.repeats if isinstance(model.layers, Stacked) else 1
    return present(model) & np.array(rows * repeats, bool)
