"""Every system on graphs that are hardly any: what it finds is finite, or it says why it is not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import transform, tree
from ffnlab.errors import ConfigError, FFNLabError, NumericalError
from ffnlab.graph import Bipartite, Graph, Hetero, aggregate, mean_over, pad, symmetric_norm
from ffnlab.graphs import (
    RpHGNNOptions,
    embeddings,
    label_groups,
    normalised_features,
    precomputed,
    virgo,
)
from ffnlab.models import GraphNetworkConfig

ODD = {
    "isolated nodes": Graph.make([0, 1, 1], [1, 0, 2], nodes=6),
    "duplicate edges": Graph.make([0, 1, 1, 1, 2], [1, 0, 0, 0, 0], nodes=3),
    "a loop alone": Graph.make([0], [0], nodes=1),
    "a single node": Graph.make([], [], nodes=1),
    "no edges": Graph.make([], [], nodes=4),
}
# Kinds of one node, of nodes that hear nothing, and edges that are there several times.
OF_KINDS = {
    "isolated nodes": ({"p": 5, "a": 4}, {("a", "x", "p"): ([0], [3])}),
    "duplicate edges": ({"p": 2, "a": 2}, {("a", "x", "p"): ([0, 0, 0, 1], [0, 0, 1, 1])}),
    "single nodes": ({"p": 1, "a": 1}, {("a", "x", "p"): ([0], [0])}),
    "a loop alone": ({"p": 1}, {("p", "x", "p"): ([0], [0])}),
}


def rows(nodes, width=3):
    return np.random.default_rng(nodes).normal(size=(nodes, width)).astype(np.float32)


def is_finite(found):
    return all(np.isfinite(np.asarray(leaf, np.float64)).all() for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize("layer", ["gcn", "sage", "gat"])
def test_networks_and_their_gradients(layer):
    model = GraphNetworkConfig((3, 4, 2), layer).make(key=jax.random.key(0))
    trained, fixed = tree.trained(model)

    @jax.jit
    def found(graph, x):
        weights = symmetric_norm(graph) if layer == "gcn" else None
        call = lambda t: tree.combine(t, fixed)(x, graph, weights)  # noqa: E731
        return call(trained), jax.grad(lambda t: (call(t) ** 2).sum())(trained)

    for graph in ODD.values():
        for x in (rows(graph.num_nodes), np.zeros((graph.num_nodes, 3), np.float32)):
            assert is_finite(found(graph, jnp.asarray(x)))


@pytest.mark.parametrize("name", ODD)
def test_virgo_draws_by_a_finite_variance_or_says_what_is_gone(name):
    graph = ODD[name]  # every node has a loop, there or not
    model = GraphNetworkConfig((3, 4, 2), "gcn").make(key=jax.random.key(0))
    batch = {"x": jnp.asarray(np.abs(rows(graph.num_nodes)) + 1), "graph": graph}
    drawn, stats = transform.apply(virgo(), model, [batch], progress=False)
    assert min(map(float, stats.variance.values())) > 0 and is_finite(stats.variance)
    assert is_finite(tree.trained(drawn)[0])
    with pytest.raises(NumericalError, match="has norm 0, or none that is finite"):
        nothing = batch | {"x": 0 * batch["x"]}
        transform.apply(virgo(), model, [nothing], progress=False)


@pytest.mark.parametrize("name", ODD)
def test_views_of_netinfof_are_rows_of_length_1_or_0(name):
    graph = ODD[name]
    x = normalised_features(rows(graph.num_nodes))
    if name not in ("isolated nodes", "duplicate edges"):  # loops are not looked at
        with pytest.raises(ConfigError, match="the graph has no edges"):
            embeddings(x, graph)
        return
    for z in embeddings(x, graph, dimension=3, walks=5).values():
        assert z.shape[0] == graph.num_nodes and is_finite(z)
        length = np.linalg.norm(z, axis=1)
        np.testing.assert_allclose(length, np.round(length), atol=1e-5)


@pytest.mark.parametrize("name", OF_KINDS)
def test_summaries_and_classes_around(name):
    nodes, relations = OF_KINDS[name]
    graph = Hetero.make(nodes, relations)
    x = {kind: jnp.asarray(rows(n)) for kind, n in nodes.items()}
    options = RpHGNNOptions(3, dtype="float32", with_input=True, with_own=True)
    found = precomputed(graph, x, "p", options, key=jax.random.key(0))
    assert is_finite(found.rows)
    y, known = np.arange(nodes["p"]) % 2, np.ones(nodes["p"], bool)
    assert is_finite(label_groups(graph, "p", y, known, 2).rows)
    if name == "isolated nodes":
        odd = found.groups[0]
        assert odd[3, 0].any() and not np.delete(odd, 3, axis=0).any(), "one paper has an author"


def test_edges_that_are_there_several_times_are_added():
    x = jnp.asarray(rows(3))
    for make in (
        lambda s, r: Graph.make(s, r, nodes=3),
        lambda s, r: Bipartite.make(s, r, num_senders=3, num_receivers=3),
    ):
        once, thrice = make([0, 1, 2], [1, 1, 0]), make([0, 0, 0, 1, 2], [1, 1, 1, 1, 0])
        assert thrice.num_edges == 5 and thrice.degrees.tolist() == [1, 4, 0]
        added = aggregate(thrice, None, x) - aggregate(once, None, x)
        np.testing.assert_allclose(added[1], 2 * x[0], atol=1e-6)
        np.testing.assert_allclose(mean_over(thrice, x)[1], (3 * x[0] + x[1]) / 4, atol=1e-6)


@pytest.mark.parametrize("ends", [([0, 3], [0, 0]), ([-1], [0])])
def test_ends_beyond_the_nodes(ends):
    for senders, receivers, name in ((*ends, "senders"), (*ends[::-1], "receivers")):
        for make in (
            lambda s, r: Graph.make(s, r, nodes=3),
            lambda s, r: Bipartite.make(s, r, num_senders=3, num_receivers=3),
            lambda s, r: Hetero.make({"a": 3, "b": 3}, {("a", "x", "b"): (s, r)}),
        ):
            with pytest.raises(FFNLabError, match=rf"{name}\[\d\]=(3|-1) must lie in 0\.\.2"):
                make(senders, receivers)


def test_a_graph_larger_than_its_padding():
    graph = ODD["isolated nodes"]
    for sizes in ((5, 3), (8, 2)):
        with pytest.raises(FFNLabError, match="are fewer than the graph's 6 and 3"):
            pad(graph, *sizes)
    padded = pad(ODD["a single node"], 3, 4)
    assert padded.num_nodes == 3 and is_finite(mean_over(padded, jnp.asarray(rows(3))))
