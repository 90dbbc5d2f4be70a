"""Physical removal of sublayers from a decoder."""

from collections.abc import Iterable

import jax

from ffnlab.models.decoder import Decoder
from ffnlab.models.stack import unstack


def remove(model: Decoder, units: Iterable[int]) -> Decoder:
    """The decoder without some of its sublayers; unit 2i is attention of block i, 2i + 1 its FFN.

    Blocks keep their numbers: one that has lost both sublayers stays in the list and does nothing.
    A stacked model is unstacked.

    Raises:
      ValueError: a unit out of range, named twice, or removed before.
    """
    units = [int(u) for u in units]
    new = unstack(model) if units else jax.tree.map(lambda leaf: leaf, model)
    n = 2 * model.config.layers
    for unit in units:
        if not 0 <= unit < n:
            raise ValueError(f"units holds {unit}, outside 0..{n - 1}")
        new.layers[unit // 2] = new.layers[unit // 2].without("ffn" if unit % 2 else "attn")
    return new


def removed(model: Decoder) -> list[int]:
    """Units (see `remove`) whose sublayer is missing, in order."""
    blocks = unstack(model).layers
    parts = [part for block in blocks for part in (block.attn, block.ffn)]
    return [unit for unit, part in enumerate(parts) if part is None]
