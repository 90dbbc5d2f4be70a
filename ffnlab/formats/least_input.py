"""The least input that each kind of model takes, abstract, and how it is called with it alone.

Files are checked by it: a model that was read runs once, traced and not computed.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ffnlab.graph import Bipartite, Graph
from ffnlab.models import (
    ICGNN,
    AudioEncoder,
    ConvNet,
    Globe,
    GraphNetwork,
    GroupNetwork,
    Hypernet,
    MetaNetwork,
    NoPropNet,
    OneForecast,
    PhysicalNet,
    ResNet,
    RevCol,
    SequenceTransformer,
    SMamba,
    UViT,
    ViT,
)


def tokens(model: Any) -> jax.ShapeDtypeStruct:
    """One token."""
    return jax.ShapeDtypeStruct((1, 1), jnp.int32)


def row(model: Any) -> jax.ShapeDtypeStruct:
    """One row as wide as the first map."""
    if isinstance(model, PhysicalNet):
        width = model.inputs
    elif isinstance(model, GraphNetwork):
        width = model.config.sizes[0]
    elif isinstance(model, MetaNetwork):
        width = model.config.nodes
    elif isinstance(model, GroupNetwork):
        width = model.config.width
    else:
        first = model.blocks.of_input if isinstance(model, NoPropNet) else model.maps[0]
        width = first.weight.shape[0]
    return jax.ShapeDtypeStruct((1, width), jnp.float32)


def frame(model: AudioEncoder) -> jax.ShapeDtypeStruct:
    """One frame of a sound."""
    return jax.ShapeDtypeStruct((1, 1, model.config.bands), jnp.float32)


def sequence(model: SequenceTransformer) -> jax.ShapeDtypeStruct:
    """One sequence of the length that the configuration says."""
    return jax.ShapeDtypeStruct((1, model.config.length, model.config.inputs), jnp.float32)


def window(model: SMamba) -> jax.ShapeDtypeStruct:
    """One window of one series."""
    return jax.ShapeDtypeStruct((1, model.config.length, 1), jnp.float32)


def moment(model: OneForecast) -> jax.ShapeDtypeStruct:
    """The fields of one moment."""
    return jax.ShapeDtypeStruct((*model.config.grid, model.config.inputs), jnp.float32)


def image(model: Any) -> jax.ShapeDtypeStruct:
    """One image that is pooled to a pixel."""
    side = 2 ** len(model.convs if isinstance(model, ConvNet) else model.down)
    return jax.ShapeDtypeStruct((1, side, side, model.sizes[0]), jnp.float32)


def whole_image(model: ViT | ResNet | UViT | RevCol) -> jax.ShapeDtypeStruct:
    """One image of the size that the configuration says."""
    return jax.ShapeDtypeStruct((1, *model.config.image, model.config.channels), jnp.float32)


def on_one_node(model: GraphNetwork, x: Any) -> Any:
    """The network on a graph of one node that is its own neighbour."""
    with jax.ensure_compile_time_eval():  # a graph checks its indices, which may not be traced
        graph = Graph.make([0], [0], nodes=1)
    return model(x, graph)


def on_one_edge(model: MetaNetwork, x: Any) -> Any:
    """The metanetwork on a neuron that reads itself, with a weight of 0."""
    with jax.ensure_compile_time_eval():
        graph = Graph.make([0], [0], nodes=1)
    return model(x, jnp.zeros((1, model.config.edges), x.dtype), graph)


def one_node(model: ICGNN) -> jax.ShapeDtypeStruct:
    """A grid of one node."""
    config = model.config
    return jax.ShapeDtypeStruct((1, *(1,) * config.axes, config.nodes), jnp.float32)


def on_grid(model: ICGNN, x: Any) -> Any:
    """The network on nodes whose edges, where there are some, are zeros."""
    edges = model.config.edges
    return model(x, edges=jnp.zeros((*x.shape[:2], x.shape[1], edges), x.dtype) if edges else None)


def on_one_point(model: OneForecast, x: Any) -> Any:
    """The forecast on a mesh of one node that is joined to the first place of the grid."""
    places = x.shape[0] * x.shape[1]
    with jax.ensure_compile_time_eval():
        joined = Bipartite.make([0], [0], num_senders=places, num_receivers=1)
        back = Bipartite.make([0], [0], num_senders=1, num_receivers=places)
        features = (jnp.zeros((1, 3)), *[jnp.zeros((1, 4))] * 3)
        globe = Globe(joined, Graph.make([0], [0], nodes=1), back, *features)
    return model(x, globe)


def denoise(model: NoPropNet, x: Any) -> Any:
    """The first denoiser and the readout, each once."""
    z = model.of_class(jnp.zeros(len(x), jnp.int32))
    is_timed = model.block_of(0) is model.blocks
    return model.block_of(0)(x, z, *([jnp.zeros(len(x))] if is_timed else [])), model.out(z)


def find_noise(model: UViT, x: Any) -> Any:
    """The noise in images at time 0, of the first class where the model is told of one."""
    is_told = model.config.classes is not None
    return model(x, labels=jnp.zeros(len(x), jnp.int32) if is_told else None)


def of_first_task(model: Hypernet, x: Any) -> Any:
    """What the target gives of the first task, or without tasks."""
    return model(x, 0 if "task" in model.spec.inputs else None)
