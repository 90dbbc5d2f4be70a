"""Layers that learn one after the other, each from rows that the finished ones below give it.

What the learning layer reads stays the same until it ends, so it is propagated through the graph
once and kept in the state; a step is a step of one layer, whatever stands below or above it.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from ffnlab import tree
from ffnlab.graph import Graph
from ffnlab.layers.activations import ACTIVATIONS
from ffnlab.learning.forward_gnn.inputs import GraphBatch, GraphInputs, parts_of
from ffnlab.learning.forward_gnn.objectives import Objective
from ffnlab.learning.forward_gnn.options import ForwardGNNOptions
from ffnlab.models import GraphNetwork
from ffnlab.models.graph_network import with_layers

__all__ = ["Held", "Method", "answers", "held_before", "layer_losses", "learned", "updated"]


class Method(NamedTuple):
    """What a step is told.

    Attributes:
      options, objective, optimizer: of every layer.
    """

    options: ForwardGNNOptions
    objective: Objective
    optimizer: optax.GradientTransformation


class Held(NamedTuple):
    """What is kept while a layer learns.

    Attributes:
      read: of what is learned from, and of what is asked where that is another, what the layer
        reads, propagated: [r, parts, N, widest], of which it reads the first columns.
      below: what the finished layers say together of what is asked (`Objective.scores`).
    """

    read: tuple[Float[Array, "r p N w"], ...]
    below: Float[Array, "..."]


def of_copies(
    fn: Callable[[Array, Graph], Array], rows: Float[Array, "q *d"], graph: Graph
) -> Float[Array, "r *e"]:
    """fn(rows, graph) of every copy; rows or the graph may be the same for all."""
    has_graphs = graph.starts.ndim == 2
    if has_graphs and len(rows) == 1:
        return jax.vmap(fn, (None, 0))(rows[0], graph)
    return jax.vmap(fn, (0, 0 if has_graphs else None))(rows, graph)


def first_rows(objective: Objective, inputs: GraphInputs) -> Float[Array, "q N d"]:
    """Features as the first layer is given them, with the labels of each copy appended."""
    x = jnp.asarray(inputs.x)[None]
    if not objective.appends:
        return x
    labels = jnp.asarray(inputs.labels, x.dtype)
    return jnp.concatenate([jnp.broadcast_to(x, (len(labels), *x.shape[1:])), labels], axis=-1)


def propagated(
    model: GraphNetwork, index: int, rows: Float[Array, "q N d"], graph: Graph
) -> Float[Array, "r p N d"]:
    """What a layer reads of rows: their directions, through the graph."""
    layer = model.layers[index]
    return of_copies(lambda x, g: layer.propagated(model.read(layer, x), g), rows, graph)


def output(
    model: GraphNetwork, layer: nnx.Module, read: Float[Array, "r p N w"], graph: Graph
) -> Float[Array, "r N d"]:
    """What a layer of a model makes of what it reads."""
    phi, width = ACTIVATIONS[model.config.activation], layer.d_in
    return of_copies(lambda x, g: phi(layer.transformed(x, g)), read[..., :width], graph)


def held_before(method: Method, model: GraphNetwork, like: GraphBatch) -> Held:
    """Room for what is kept, of the shapes that a batch has; zeros."""
    widest = max(layer.d_in for layer in model.layers)

    def read(inputs: GraphInputs) -> Float[Array, "r p N d"]:
        return propagated(model, 0, first_rows(method.objective, inputs), inputs.graph)

    def below(inputs: GraphInputs) -> Float[Array, "..."]:
        h = output(model, model.layers[0], read(inputs), inputs.graph)
        return method.objective.scores(h, inputs)

    parts = parts_of(like)
    shapes = [jax.eval_shape(read, part).shape for part in parts]
    rooms = [jnp.zeros((*shape[:-1], widest)) for shape in shapes]
    return Held(tuple(rooms), jnp.zeros(jax.eval_shape(below, parts[-1]).shape))


def begun(method: Method, index: int, model: GraphNetwork, held: Held, batch: GraphBatch) -> Held:
    """What is kept while a layer learns, made of what was kept for the one below."""
    parts, objective = parts_of(batch), method.objective
    below = jnp.zeros_like(held.below)
    if index == 0:
        rows = [first_rows(objective, part) for part in parts]
    else:
        layer = model.layers[index - 1]
        pairs = zip(held.read, parts, strict=True)
        rows = [output(model, layer, read, part.graph) for read, part in pairs]
        below = held.below + objective.scores(rows[-1], parts[-1])
        rows[0] = objective.onward(rows[0])
    found = [propagated(model, index, r, part.graph) for r, part in zip(rows, parts, strict=True)]
    read = [room.at[..., : f.shape[-1]].set(f) for room, f in zip(held.read, found, strict=True)]
    return Held(tuple(read), below)


def layer_loss(
    method: Method, index: int, model: GraphNetwork, held: Held, batch: GraphBatch
) -> Float[Array, ""]:
    """The loss of one layer, which the others have no part in but by what is kept."""
    h = output(model, model.layers[index], held.read[0], batch.inputs.graph)
    return method.objective.loss(h, batch.inputs, batch.targets)


def layer_losses(method: Method, model: GraphNetwork, batch: GraphBatch) -> list[Float[Array, ""]]:
    """The losses of all layers as the network stands, each of detached rows: whose Jacobian by the
    layers is diagonal."""
    held, losses = held_before(method, model, batch), []
    for index in range(len(model.layers)):
        held = jax.lax.stop_gradient(begun(method, index, model, held, batch))
        losses.append(layer_loss(method, index, model, held, batch))
    return losses


def updated(
    method: Method,
    index: int,
    model: GraphNetwork,
    optimizers: tuple[PyTree, ...],
    loss: Callable[[GraphNetwork], tuple[Array, PyTree]],
) -> tuple[GraphNetwork, tuple[PyTree, ...], Float[Array, ""], PyTree]:
    """A step of one layer down its loss.

    Args:
      loss: model -> (value, more), of the model with that layer changed.
    Returns:
      (model, optimizers, value before the step, more).
    """
    layer = model.layers[index]
    trained, fixed = tree.trained(layer)

    def of_trained(trained: PyTree) -> tuple[Array, PyTree]:
        return loss(with_layer(model, index, tree.combine(trained, fixed)))

    (value, more), gradient = jax.value_and_grad(of_trained, has_aux=True)(trained)
    updates, memory = method.optimizer.update(gradient, optimizers[index], trained)
    layer = tree.combine(optax.apply_updates(trained, updates), fixed)
    optimizers = (*optimizers[:index], memory, *optimizers[index + 1 :])
    return with_layer(model, index, layer), optimizers, value, more


def learned(
    method: Method,
    index: int,
    model: GraphNetwork,
    optimizers: tuple[PyTree, ...],
    held: Held,
    batch: GraphBatch,
) -> tuple[GraphNetwork, tuple[PyTree, ...], Float[Array, ""]]:
    """A step of the learning layer: (model, optimizers, loss before it)."""

    def loss(model: GraphNetwork) -> tuple[Array, None]:
        return layer_loss(method, index, model, held, batch), None

    model, optimizers, value, _ = updated(method, index, model, optimizers, loss)
    return model, optimizers, jnp.float32(value)


def validated(
    method: Method, index: int, model: GraphNetwork, held: Held, batch: GraphBatch
) -> Float[Array, ""]:
    """How good the answers of a layer and those below it are."""
    asked, objective = parts_of(batch)[-1], method.objective
    h = output(model, model.layers[index], held.read[-1], asked.graph)
    total = objective.total(held.below + objective.scores(h, asked), index + 1)
    return jnp.float32(objective.figure(total, batch.held_out))


def answers(
    method: Method, model: GraphNetwork, inputs: GraphInputs, layers: int | Int[Array, ""]
) -> Float[Array, "..."]:
    """What the first so many layers say together of what is asked."""
    objective, total = method.objective, 0.0
    rows = first_rows(objective, inputs)
    for index, layer in enumerate(model.layers):
        rows = output(model, layer, propagated(model, index, rows, inputs.graph), inputs.graph)
        total = total + jnp.where(index < layers, objective.scores(rows, inputs), 0)
    return objective.total(total, layers)


def with_layer(model: GraphNetwork, index: int, layer: nnx.Module) -> GraphNetwork:
    """A copy of a network with another layer at one place."""
    layers = [*model.layers]
    layers[index] = layer
    return with_layers(model, layers[:-1], layers[-1])


def by_layer(fn: Callable[..., PyTree], count: int, method: Method) -> list[Callable[..., PyTree]]:
    """fn of each layer, as branches of a switch."""
    return [functools.partial(fn, method, index) for index in range(count)]
