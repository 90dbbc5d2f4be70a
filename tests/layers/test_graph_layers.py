"""The contract of layers on graphs, held by all of them, and by networks of them."""

import inspect

import jax
import jax.numpy as jnp
import pytest

from ffnlab import layers
from ffnlab.graph import Graph
from ffnlab.graph.ends import at_senders
from ffnlab.models import GraphNetworkConfig
from ffnlab.testing import check_graph_layer

GRAPH_LAYERS = {
    "GCN": lambda key: layers.GCN(3, 5, key=key),
    "GCN-narrow": lambda key: layers.GCN(3, 2, key=key),
    "GraphSAGE": lambda key: layers.GraphSAGE(3, 5, key=key),
    "GAT": lambda key: layers.GAT(3, 4, key=key, heads=2),
    "GAT-mean": lambda key: layers.GAT(3, 4, key=key, heads=2, is_joined=False),
    "GraphNetwork": lambda key: GraphNetworkConfig((3, 4, 4, 4, 2)).make(key=key).stacked(),
    "GraphNetwork-layerwise": lambda key: GraphNetworkConfig((3, 4), form="layerwise").make(
        key=key
    ),
}
MESH_BLOCKS = {
    "MeshBlock": lambda key: layers.MeshBlock(4, key=key, heads=2),
    "MeshBlock-plain": lambda key: layers.MeshBlock(4, key=key, gated=False),
}


@pytest.mark.parametrize("name", GRAPH_LAYERS)
def test_layer_on_graphs(name):
    check_graph_layer(GRAPH_LAYERS[name], 3)


@pytest.mark.parametrize("name", MESH_BLOCKS)
def test_block_on_meshes(name):
    check_graph_layer(MESH_BLOCKS[name], 4, call=nodes_after)


def nodes_after(block, x, graph):
    """Nodes after a round of messages of edges that begin as what sends along them."""
    return block(graph, at_senders(graph, x), x)[1]


def test_every_layer_that_takes_a_graph_is_under_contract():
    kinds = {
        name
        for name in layers.__all__
        if inspect.isclass(member := getattr(layers, name))
        and "graph" in inspect.signature(member.__call__).parameters
    }
    assert kinds and kinds <= {name.split("-")[0] for name in GRAPH_LAYERS | MESH_BLOCKS}


def test_sixteen_blocks_are_one_program_of_the_size_of_three():
    """Their text grows with what differs, not with depth."""
    sizes = {}
    for depth in (4, 17):
        for form in ("stacked", "unstacked"):
            model = GraphNetworkConfig((3, *[4] * depth, 2)).make(key=jax.random.key(0))
            sizes[form, depth] = program(getattr(model, form)())
    assert sizes["stacked", 17] < 1.02 * sizes["stacked", 4]
    assert sizes["unstacked", 17] > 2 * sizes["unstacked", 4]


def program(model):
    """Characters of the program of a gradient."""
    graph = Graph.make([0, 1, 1], [0, 1, 0], nodes=2)
    total = lambda model, x, graph: model(x, graph).sum()  # noqa: E731
    return len(jax.jit(jax.grad(total)).lower(model, jnp.ones((2, 3)), graph).as_text())
