"""Metanetworks: parity with the authors' code, relabelled neurons, nodes without edges."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ffnlab import tree
from ffnlab.errors import ConfigError
from ffnlab.graph import Graph, edge_order
from ffnlab.layers.stacking import stack_modules
from ffnlab.models import MetaNetwork, MetaNetworkConfig, MetaRound
from ffnlab.models.meta_network import spread
from ffnlab.weights import Dense
from tests.fixtures.meta_pruning import record_official as record
from tests.hashed import parameter

TOLERANCE = 1e-5  # of the card, float32
CONFIG = MetaNetworkConfig(
    nodes=record.SIZES["in_node_dim"],
    edges=record.SIZES["in_edge_dim"],
    layers=record.SIZES["num_layer"],
    width=record.SIZES["hiddim"],
    ratio=record.RATIO,
)
run = jax.jit(lambda net, nodes, edges, graph: net(nodes, edges, graph))


def mapped(linear, *names):
    """A map with torch's parameters of one or more maps, side by side."""
    d_in, d_out = linear.weight.shape
    parts = [(parameter(f"{n}.weight", (d_out // len(names), d_in)).T,
              parameter(f"{n}.bias", (d_out // len(names),))) for n in names]  # fmt: skip
    w, b = (np.concatenate(side, axis=-1) for side in zip(*parts, strict=True))
    return linear.replace(Dense(jnp.asarray(w)), jnp.asarray(b))


@functools.cache
def official():
    """Our metanetwork with the parameters of the fixture."""
    net, rounds = CONFIG.make(key=jax.random.key(0)), []
    for i in range(CONFIG.layers):
        one = MetaRound(CONFIG.width, key=jax.random.key(0))
        one.sides = mapped(one.sides, *(f"convs.{i}.lin{k}.0" for k in (1, 2, 3, 4)))
        one.down = mapped(one.down, f"convs.{i}.downlin")
        rounds.append(one)
    net.rounds = stack_modules(rounds)
    for ours, theirs in (("of_node", "nodeEnc"), ("of_edge", "edgeEnc")):
        setattr(net, ours, mapped(getattr(net, ours), theirs))
    for ours, theirs in (("to_node", "nodeDec"), ("to_edge", "edgeDec")):
        maps = getattr(net, ours).maps
        maps[0], maps[1] = mapped(maps[0], f"{theirs}.1"), mapped(maps[1], f"{theirs}.3")
    return net


def example():
    """The graph of the fixture and its numbers, edges in the graph's order."""
    graph = Graph.make(*record.ENDS, nodes=record.NODES)
    nodes, edges = record.numbers()
    return jnp.asarray(nodes), jnp.asarray(edges), graph, edge_order(*record.ENDS)


def test_it_gives_what_the_authors_does(fixtures):
    nodes, edges, graph, order = example()
    found = run(official(), nodes, edges[order], graph)
    with np.load(fixtures / "meta_pruning" / "official.npz", allow_pickle=False) as file:
        assert np.abs(found[0] - file["nodes"]).max() < TOLERANCE
        assert np.abs(found[1] - file["edges"][order]).max() < TOLERANCE
        assert np.abs(file["nodes"] - nodes).max() > 0.05  # it is no identity


@settings(max_examples=10, deadline=None)
@given(st.randoms(use_true_random=False))
def test_relabelled_neurons_get_relabelled_corrections(random):
    nodes, edges, graph, _ = example()
    place = np.array(random.sample(range(record.NODES), record.NODES))
    ends = place[np.asarray(graph.senders)], place[np.asarray(graph.receivers)]
    order = edge_order(*ends)
    moved = Graph.make(*ends, nodes=record.NODES)
    found = run(official(), nodes[np.argsort(place)], edges[order], moved)
    known = run(official(), nodes, edges, graph)
    np.testing.assert_allclose(found[0][place], known[0], atol=TOLERANCE)
    np.testing.assert_allclose(found[1], known[1][order], atol=TOLERANCE)


def test_with_decoders_of_zero_nothing_changes():
    net = tree.map_at(official(), tree.at("to_*"), lambda part: jax.tree.map(jnp.zeros_like, part))
    nodes, edges, graph, order = example()
    found = run(net, nodes, edges[order], graph)
    assert all(map(np.array_equal, found, (nodes, edges[order])))


def test_spread_by_hand():
    """A node without edges, one with a single edge, one of little and one of much variance."""
    graph = Graph.make([0, 0, 1, 0, 1, 2], [1, 2, 2, 3, 3, 3], nodes=4)
    m = np.array([[2.0, -1.0], [1.0, 1.0], [1.001, 3.0], [0.0, 0.0], [-3.0, 5.0], [1.0, -2.0]])
    found = np.asarray(spread(graph, jnp.asarray(m, jnp.float32))).reshape(4, 4, 2)
    assert not found[0].any()
    np.testing.assert_allclose(found[1], [m[0], [0, 0], m[0], m[0]])
    np.testing.assert_allclose(found[2][1], [0, 1], atol=1e-6)  # 2.5e-7 is no variance
    values = m[3:]
    want = [values.mean(0), values.std(0), values.max(0), values.min(0)]
    np.testing.assert_allclose(found[3], want, rtol=1e-5)


def test_gradients_are_finite_and_reach_everything():
    """Also where deviations are 0 and where nodes have no edges."""
    nodes, edges, graph, _ = example()

    def loss(net, edges):
        out = net(nodes, edges, graph)
        return jnp.sum(out[0] ** 2) + jnp.sum(out[1] ** 2)

    of_both = jax.jit(jax.grad(loss, (0, 1)))
    gradient, of_edges = of_both(official(), edges)
    assert all(np.isfinite(leaf).all() and leaf.any() for leaf in jax.tree.leaves(gradient))
    assert of_edges.any()
    flat = of_both(official(), jnp.zeros_like(edges))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(flat))


def test_the_directions_are_told_apart():
    """Edges the other way round are another network."""
    nodes, edges, graph, _ = example()
    back = Graph.make(graph.receivers, graph.senders, nodes=record.NODES)
    order = edge_order(np.asarray(graph.receivers), np.asarray(graph.senders))
    found, known = (
        run(official(), nodes, edges[order], back),
        run(official(), nodes, edges, graph),
    )
    assert np.abs(found[0] - known[0]).max() > 1e-2


def test_what_does_not_fit():
    nodes, edges, graph, _ = example()
    net = official()
    with pytest.raises(ConfigError, match=r"nodes \[9, 2\]: the graph and this metanetwork take"):
        net(nodes[:, :2], edges, graph)
    with pytest.raises(ConfigError, match=r"edges \[9, 2\]: the graph .* take \[10, 2\]"):
        net(nodes, edges[:9], graph)
    for options, said in (
        ({"width": 0}, "width=0 must be at least 1"),
        ({"layers": 0}, "layers=0 must be"),
        ({"ratio": 1.5}, r"ratio=1.5 must lie in 0..1"),
    ):
        with pytest.raises(ConfigError, match=said):
            MetaNetworkConfig(1, 1, **options)
    assert isinstance(net, MetaNetwork)
