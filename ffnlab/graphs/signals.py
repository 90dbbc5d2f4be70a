"""How large signals are in a network on graphs: what a start is to keep of one size.

Of every layer the mean square of what it gives before the nonlinearity, and of the gradient of a
loss there (arXiv 2312.02622, its forward and backward variance).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PyTree

from ffnlab import tree
from ffnlab.models import GraphNetwork

__all__ = ["Signals", "layer_signals"]


class Signals(NamedTuple):
    """Mean squares by layer.

    Attributes:
      forward: of what each layer gives, before the nonlinearity.
      backward: of the gradient of the loss there.
    """

    forward: Float[Array, "layers"]
    backward: Float[Array, "layers"]


class Shifted(nnx.Module):
    """A layer with something added to what it gives."""

    def __init__(self, layer: nnx.Module, shift: Float[Array, "n out"]):
        self.layer = layer
        self.shift = nnx.Variable(shift)

    def __call__(self, *given: PyTree) -> Float[Array, "n out"]:
        return self.layer(*given) + self.shift[...]


def layer_signals(
    model: GraphNetwork,
    batch: PyTree,
    loss: Callable[[GraphNetwork, PyTree], tuple[Array, PyTree]],
) -> Signals:
    """Mean squares of signals and of their gradients in every layer.

    Args:
      model: of scores, stacked or not; under `jax.jit` and `jax.vmap` too.
      batch: of the loss; ({"x", "graph"}, …), what the network is called with first.
      loss: (model, batch) -> (loss, metrics).
    Returns:
      the mean squares, from input to output.
    """
    flat = model.unstacked()
    at = [f"layers[{i}]" for i in range(len(flat.layers))]
    calls: Any = tree.capture(flat, lambda path, node: path in at, **batch[0])[1]
    given = [calls[path].output.astype(jnp.float32) for path in at]

    def shifted(shifts: list[Array]) -> Array:
        pairs = zip(at, flat.layers, shifts, strict=True)
        moved = tree.replace(flat, {path: Shifted(layer, s) for path, layer, s in pairs})
        return loss(moved, batch)[0]

    pulls = jax.grad(shifted)([jnp.zeros_like(y) for y in given])
    return Signals(*(jnp.stack([jnp.mean(y**2) for y in each]) for each in (given, pulls)))
