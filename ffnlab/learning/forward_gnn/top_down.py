"""Layers that learn all at once, a step after the other, and are told of what is above them.

    "input":  layer j reads [h_{j-1}, h_{j+1}], rows of length 1; above the last one are labels
    "loss":   layer j reads h_{j-1}; its loss is of the mean of its output and all rows above

h are outputs of the step before, detached: no error goes from layer to layer. The first ones come
from a pass from below. As in the authors' code, that of "loss" scales rows only where they are
kept, and not on the way from layer to layer.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PyTree

from ffnlab.layers.activations import ACTIVATIONS
from ffnlab.layers.norms import unit_rows
from ffnlab.learning.forward_gnn.inputs import GraphBatch, GraphInputs
from ffnlab.learning.forward_gnn.layerwise import Method, updated
from ffnlab.models import GraphNetwork

__all__ = ["answers", "bottom_up", "learned"]

TIMES, FIRST = 10, 2  # steps of an answer, and the first that counts

Rows = Sequence[Float[Array, "N _"]]


def output(
    model: GraphNetwork, layer: nnx.Module, read: Float[Array, "N d"], inputs: GraphInputs
) -> Float[Array, "N w"]:
    """What a layer makes of rows."""
    return ACTIVATIONS[model.config.activation](layer(read, inputs.graph))


def bottom_up(method: Method, model: GraphNetwork, inputs: GraphInputs) -> tuple[Array, ...]:
    """The first rows of all layers, from below."""
    is_input, rows, found = method.options.top_down == "input", jnp.asarray(inputs.x), []
    for layer in model.layers:
        rows = output(model, layer, model.read(layer, rows) if is_input else rows, inputs)
        found.append(rows if is_input else unit_rows(rows))
    return tuple(found)


def fed(
    method: Method,
    model: GraphNetwork,
    held: Rows,
    inputs: GraphInputs,
    visit: Callable[[int, Float[Array, "N d"]], Float[Array, "N w"]],
) -> tuple[Array, ...]:
    """New rows of all layers, each of which reads the ones beside it.

    Args:
      held: rows of the step before.
      visit: (layer's number, what it reads) -> its new rows.
    """
    count, new = len(model.layers), {}
    top = None if inputs.labels is None else jnp.asarray(inputs.labels[0])
    is_alternating = method.options.alternating
    order = [*range(0, count, 2), *range(1, count, 2)] if is_alternating else range(count)
    for j in order:
        latest = dict(enumerate(held)) | (dict(new) if is_alternating else {})
        latest |= {-1: jnp.asarray(inputs.x), count: top}
        new[j] = visit(j, model.read(model.layers[j], latest[j - 1], latest[j + 1]))
    return tuple(new[j] for j in range(count))


def mixed(own: Float[Array, "N w"], above: Rows) -> Float[Array, "N w"]:
    """The mean of a layer's output and the rows above it."""
    return jnp.mean(jnp.stack([own, *above]), axis=0)


def below_of(held: Rows, inputs: GraphInputs, j: int) -> Float[Array, "N d"]:
    """What a layer reads whose loss, and not input, is told of what is above."""
    return held[j - 1] if j else unit_rows(jnp.asarray(inputs.x))


def learned(
    method: Method,
    model: GraphNetwork,
    optimizers: tuple[PyTree, ...],
    held: Rows,
    batch: GraphBatch,
) -> tuple[GraphNetwork, tuple[PyTree, ...], tuple[Array, ...], list[Float[Array, ""]]]:
    """A step of every layer: (model, optimizers, new rows, losses before it)."""
    inputs, losses = batch.inputs, {}
    held = [jax.lax.stop_gradient(rows) for rows in held]

    def step(j: int, read: Float[Array, "N d"], above: Rows = ()) -> Float[Array, "N w"]:
        nonlocal model, optimizers

        def loss(model: GraphNetwork) -> tuple[Array, Array]:
            h = output(model, model.layers[j], jax.lax.stop_gradient(read), inputs)
            shown = mixed(h, above)[None] if above else h[None]
            return method.objective.loss(shown, inputs, batch.targets), h

        model, optimizers, losses[j], h = updated(method, j, model, optimizers, loss)
        return jax.lax.stop_gradient(h)

    if method.options.top_down == "input":
        new = fed(method, model, held, inputs, step)
    else:
        new = tuple(
            unit_rows(step(j, below_of(held, inputs, j), held[j + 1 :])) for j in range(len(held))
        )
    return model, optimizers, new, [losses[j] for j in range(len(new))]


def answers(method: Method, model: GraphNetwork, inputs: GraphInputs) -> Float[Array, "..."]:
    """What all layers say together of what is asked, from a pass from below."""
    objective, held, count = method.objective, bottom_up(method, model, inputs), len(model.layers)
    if method.options.top_down == "loss":
        said = [
            objective.scores(mixed(own, held[j + 1 :])[None], inputs)
            for j, own in enumerate(
                output(model, layer, below_of(held, inputs, j), inputs)
                for j, layer in enumerate(model.layers)
            )
        ]
        return objective.total(sum(said), count)

    def visit(j: int, read: Float[Array, "N d"]) -> Float[Array, "N w"]:
        return output(model, model.layers[j], read, inputs)

    def at_time(held: tuple[Array, ...], time: Array) -> tuple[tuple[Array, ...], Array]:
        new = fed(method, model, held, inputs, visit)
        said = sum(objective.scores(rows[None], inputs) for rows in new)
        return new, jnp.where(time >= FIRST, said, 0)

    _, said = jax.lax.scan(at_time, held, jnp.arange(TIMES))
    return objective.total(said.sum(0), count * (TIMES - FIRST))
