"""Stacks of alike blocks, scanned: compile time and program size do not grow with depth.

`stack` puts the blocks of a decoder on a leading axis and `unstack` takes them apart again, both
without changing a bit. Where layers alternate (Gemma's windows), the shortest repeating period is
stacked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
from flax import nnx
from jaxtyping import Array, Float

from ffnlab.errors import ConfigError
from ffnlab.layers import Block, Context
from ffnlab.layers.stacking import stack_modules, with_axes
from ffnlab.models.remat import run_block

if TYPE_CHECKING:
    from ffnlab.models.decoder import Decoder


class Stacked(nnx.Module):
    """`repeats` times a period of blocks, each leaf with a leading axis of that length.

    Attributes:
      period: nnx.List of Block; every parameter's logical axes begin with "layers".
      repeats: how often the period repeats (static).
    """

    def __init__(self, period: list[Block], repeats: int):
        self.period = nnx.List(period)
        self.repeats = repeats

    def __call__(
        self,
        h: Float[Array, "b t d"],
        context: Context,
        *,
        gates: Float[Array, "n 2"] | None = None,
        caches: tuple | None = None,
        remat: str | None = None,
    ) -> tuple[Float[Array, "b t d"], tuple | None]:
        """Runs all blocks by `lax.scan`; arguments as `Block` with a leading axis.

        Args:
          remat: see `ffnlab.models.remat`.
        """
        width = len(self.period)
        if gates is not None:
            gates = gates.reshape(self.repeats, width, 2)

        def body(h: Array, xs: tuple) -> tuple[Array, tuple | None]:
            blocks, gate, cache = xs
            new = []
            for i, block in enumerate(blocks):
                h, kv = run_block(
                    block,
                    remat,
                    h,
                    context,
                    gates=None if gate is None else gate[i],
                    cache=None if cache is None else cache[i],
                )
                new.append(kv)
            return h, None if cache is None else tuple(new)

        return jax.lax.scan(body, h, (self.period, gates, caches), length=self.repeats)


def stack(model: Decoder) -> Decoder:
    """The same decoder with its blocks stacked, to be scanned.

    Raises:
      ValueError: the model is stacked already.
    """
    if isinstance(model.layers, Stacked):
        raise ValueError("model is stacked already; models.unstack(model) gives the list form")
    blocks = list(model.layers)
    n = len(blocks)
    kinds = [_kind(block) for block in blocks]
    width = next(p for p in range(1, n + 1) if n % p == 0 and kinds[p:] == kinds[: n - p])
    period = [stack_modules(blocks[i::width]) for i in range(width)]
    return _with_layers(model, Stacked(period, n // width))


def unstack(model: Decoder) -> Decoder:
    """The same decoder with its blocks in a list; one that is not stacked is copied.

    Raises:
      ConfigError: it is no decoder.
    """
    if not hasattr(model, "layers"):
        raise ConfigError(f"model is a {type(model).__name__}; a Decoder is accepted")
    if not isinstance(model.layers, Stacked):
        return jax.tree.map(lambda leaf: leaf, model)
    layers = model.layers
    blocks = []
    for repeat in range(layers.repeats):
        for block in layers.period:
            one = jax.tree.map(lambda leaf, i=repeat: leaf[i], block)
            blocks.append(with_axes(one, lambda axes: axes[1:]))
    return _with_layers(model, nnx.List(blocks))


def _kind(block: Block) -> tuple:
    leaves, treedef = jax.tree.flatten(block)
    return treedef, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


def _with_layers(model: Decoder, layers: nnx.Module) -> Decoder:
    new = jax.tree.map(lambda leaf: leaf, model)
    new.layers = layers
    return new
