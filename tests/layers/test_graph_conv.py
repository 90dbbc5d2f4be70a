"""Layers on graphs against PyTorch Geometric's, recorded, and what they promise beside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ffnlab import tree
from ffnlab.errors import ConfigError
from ffnlab.graph import Graph, edge_order, symmetric_norm, with_self_loops
from ffnlab.layers import GAT, GCN, GraphSAGE
from ffnlab.weights import Dense, Float8, LowRank, Weight
from tests.fixtures.graph_conv.record import (
    NODES,
    RECEIVERS,
    SENDERS,
    SIZES,
    operands,
    parameters,
)
from tests.graph_cases import matrix

TOLERANCE = 1e-5  # what the issue asks; sums of a few dozen float32 products
GRAPH = Graph.make(SENDERS, RECEIVERS, NODES)
KINDS = {
    "gcn": GCN,
    "gcn_weighted": GCN,
    "sage": GraphSAGE,
    "gat": lambda a, b, key: GAT(a, b, key=key, heads=2),
    "gat_mean": lambda a, b, key: GAT(a, b, key=key, heads=2, is_joined=False),
}
PLACES = {
    "w": "linear.w.value.w",
    "near": "near.w.value.w",
    "own": "own.w.value.w",
    "b": "b.value",
    "sending": "sending.value",
    "receiving": "receiving.value",
}


def place(layer, name):
    """The path of a recorded parameter."""
    return "own.b.value" if name == "b" and isinstance(layer, GraphSAGE) else PLACES[name]


def filled(kind, size):
    """The layer with the recorded parameters."""
    layer = KINDS[kind](*SIZES[size], key=jax.random.key(0))
    values = parameters(kind, *SIZES[size]).items()
    new = {place(layer, name): jnp.asarray(value, jnp.float32) for name, value in values}
    assert len(new) == len(jax.tree.leaves(layer))
    return tree.replace(layer, new)


def prepared(kind):
    """The graph as each kind takes it, and further arguments."""
    if kind == "sage":
        return GRAPH, ()
    graph = with_self_loops(GRAPH)
    if kind != "gcn_weighted":
        return graph, ()
    own = {a for a, b in zip(SENDERS, RECEIVERS, strict=True) if a == b}
    more = [i for i in range(NODES) if i not in own]
    given = np.append(operands(1, 1)[2], np.ones(len(more)))
    order = edge_order([*SENDERS, *more], [*RECEIVERS, *more])
    return graph, (symmetric_norm(graph, jnp.asarray(given[order], jnp.float32)),)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_pytorch_geometric(kind, size, fixtures):
    with np.load(fixtures / "graph_conv" / "expected.npz", allow_pickle=False) as saved:
        want = {n.split(".")[2]: saved[n] for n in saved.files if n.startswith(f"{kind}.{size}.")}
    layer, (graph, more) = filled(kind, size), prepared(kind)
    x, pull, _ = (jnp.asarray(a, jnp.float32) for a in operands(*SIZES[size]))
    trained, fixed = tree.trained(layer)

    @jax.jit
    def both(trained, x, graph, more):
        run = lambda trained, x: tree.combine(trained, fixed)(x, graph, *more)  # noqa: E731
        y, back = jax.vjp(run, trained, x)
        return y, *back(pull)

    y, of_layer, of_x = both(trained, x, graph, more)
    found = {"y": y, "x": of_x}
    for name in parameters(kind, *SIZES[size]):
        (leaf,) = jax.tree.leaves(tree.select(of_layer, tree.at(place(layer, name))))
        found[name] = leaf
    assert set(found) == set(want)
    for name, ours in found.items():
        scale = max(1.0, np.abs(want[name]).max())
        np.testing.assert_allclose(ours, want[name], atol=TOLERANCE * scale, err_msg=name)


def test_the_graph_is_taken_on_the_narrower_side(key):
    graph = with_self_loops(GRAPH)
    for make in (GCN, GraphSAGE):
        for d_in, d_out in SIZES.values():
            x = jnp.ones((NODES, d_in))
            steps = jax.make_jaxpr(make(d_in, d_out, key=key))(x, graph).eqns
            (product,) = (e for e in steps if e.primitive.name == "custom_vjp_call")
            assert product.outvars[0].aval.shape == (NODES, min(d_in, d_out))


@pytest.mark.parametrize("make", [GCN, GraphSAGE, GAT])
@pytest.mark.parametrize(
    "convert", [lambda w: LowRank.truncate(w, 2), Float8.quantize], ids=["LowRank", "Float8"]
)
def test_any_weight_stands_in_a_layer(make, convert, key):
    graph = with_self_loops(GRAPH)
    x = jax.random.normal(key, (NODES, 6))
    layer = make(6, 4, key=key)
    is_dense = tree.of_type(Dense)
    changed = tree.map_at(layer, is_dense, lambda w: convert(w.dense()))
    flat = tree.map_at(changed, tree.of_type(Weight), lambda w: Dense(w.dense()))
    assert not any(
        type(node.get_value()) is Dense
        for _, node in tree.walk(changed)
        if isinstance(node, nnx.Param)
    )
    np.testing.assert_allclose(changed(x, graph), flat(x, graph), atol=TOLERANCE)
    assert np.abs(changed(x, graph) - layer(x, graph)).max() > 1e-3


def test_attention_is_a_convex_mixture(key):
    graph = with_self_loops(GRAPH)
    layer = GAT(3, 4, key=key, heads=4)
    x = jnp.ones((NODES, 3))  # then all senders say the same
    np.testing.assert_allclose(layer(x, graph), layer.linear(x), rtol=TOLERANCE)


def test_a_node_alone_keeps_what_is_its_own(key):
    x = jax.random.normal(key, (NODES, 3))
    alone = int(np.argwhere(matrix(GRAPH).sum(1) == 0)[0, 0])
    layer = GraphSAGE(3, 5, key=key)
    np.testing.assert_allclose(layer(x, GRAPH)[alone], layer.own(x)[alone], rtol=TOLERANCE)


@pytest.mark.parametrize("heads", [0, 3])
def test_heads_that_do_not_divide_are_refused(heads, key):
    with pytest.raises(ConfigError, match=f"heads={heads} must be at least 1 and divide d_out=4"):
        GAT(3, 4, key=key, heads=heads)
    if heads:
        assert GAT(3, 4, key=key, heads=heads, is_joined=False).linear.weight.shape == (3, 12)


@pytest.mark.parametrize("make", [GCN, GraphSAGE, lambda *d, key: GAT(*d, key=key, heads=2)])
@pytest.mark.parametrize("sizes", [(6, 4), (4, 6)])
def test_a_layer_is_its_two_halves(make, sizes, key):
    """And what is learned is in the second: the first gives the same whatever the weights."""
    layer, graph = make(*sizes, key=key), with_self_loops(GRAPH)
    other = make(*sizes, key=jax.random.key(9))
    x = jax.random.normal(jax.random.key(1), (NODES, sizes[0]))
    read = layer.propagated(x, graph)
    np.testing.assert_array_equal(read, other.propagated(x, graph))
    np.testing.assert_allclose(
        layer.transformed(read, graph), layer(x, graph), rtol=TOLERANCE, atol=TOLERANCE
    )
    assert layer.d_in == sizes[0]
