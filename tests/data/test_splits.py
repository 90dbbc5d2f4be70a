"""Parts of nodes and edges: none in two, pairs without an edge, what is seen when."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ffnlab.data import block_model, link_split, node_split, non_edges
from ffnlab.errors import ConfigError
from ffnlab.graph import Graph, undirected


def pairs_of(graph):
    """The pairs of a graph without directions, the smaller node first."""
    ends = np.stack([np.asarray(graph.senders), np.asarray(graph.receivers)], 1)
    return {tuple(pair) for pair in np.sort(ends, 1).tolist()}


@settings(max_examples=15)
@given(st.integers(0, 9999))
def test_every_edge_is_in_one_part_and_no_pair_in_two(seed):
    nodes = block_model(seed, nodes=40, classes=2, inside=0.2, across=0.05, train=1, valid=1)
    found, edges = link_split(nodes, seed), pairs_of(nodes.graph)
    parts = [found.train, found.valid, found.test]
    joined = [{tuple(p) for p in part.ends[part.joined].tolist()} for part in parts]
    apart = [{tuple(p) for p in part.ends[~part.joined].tolist()} for part in parts]
    assert set.union(*joined) == edges and sum(map(len, joined)) == len(edges)
    assert [len(p) for p in joined] == [len(p) for p in apart]
    assert not set.union(*apart) & edges
    assert len(set.union(*apart)) == len(edges), "none is there twice"
    assert all(a < b for a, b in set.union(*apart))
    assert [len(p) for p in joined[1:]] == [round(0.16 * len(edges)), round(0.2 * len(edges))]
    assert pairs_of(found.graph) == joined[0] and pairs_of(found.seen) == joined[0] | joined[1]
    for graph in (found.graph, found.seen):
        assert graph.num_nodes == 40 and graph.num_edges == 2 * len(pairs_of(graph))
    assert found.x is nodes.x


def test_a_seed_draws_the_same_and_another_another():
    nodes = block_model(0, nodes=40, classes=2, inside=0.2, train=1, valid=1)
    first, again, other = (link_split(nodes, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.test.ends, again.test.ends)
    assert not np.array_equal(first.test.ends, other.test.ends)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"inside": 1.0, "across": 1.0}, "as many pairs have none"),
        ({"inside": 0.0, "across": 0.0}, "leave a part without any"),
    ],
)
def test_graphs_with_too_many_or_too_few_edges_are_refused(given, said):
    with pytest.raises(ConfigError, match=said):
        link_split(block_model(0, nodes=9, classes=2, train=1, valid=1, **given))


def test_shares_that_leave_nothing_are_refused():
    nodes = block_model(0, nodes=40, classes=2, inside=0.2, train=1, valid=1)
    for shares in ({"valid": 0.0}, {"test": 0.9, "valid": 0.1}, {"seed": -1}):
        with pytest.raises(ConfigError, match="leave a part without any|seed=-1"):
            link_split(nodes, **shares)


def relabelled(nodes, order):
    """The same graph with node order[i] as node i."""
    where = np.argsort(order)
    ends = (where[np.asarray(e)] for e in (nodes.graph.senders, nodes.graph.receivers))
    graph = Graph.make(*ends, nodes=len(order))
    return nodes._replace(graph=graph, x=nodes.x[order], y=nodes.y[order])


def test_the_order_in_which_edges_come_does_not_count():
    nodes = block_model(0, nodes=40, classes=2, inside=0.2, train=1, valid=1)
    turned = np.random.default_rng(1).permutation(nodes.graph.num_edges)
    ends = (np.asarray(e)[turned] for e in (nodes.graph.receivers, nodes.graph.senders))
    found, again = link_split(nodes), link_split(nodes._replace(graph=Graph.make(*ends, nodes=40)))
    for part, other in zip((found.train, found.valid, found.test), again[3:], strict=True):
        np.testing.assert_array_equal(part.ends, other.ends)


@settings(max_examples=10)
@given(st.integers(0, 9999))
def test_nodes_of_every_class_are_in_one_part_each(seed):
    nodes = block_model(seed, nodes=60, classes=3, train=1, valid=1)
    order = np.random.default_rng(seed).permutation(60)
    for given_nodes in (nodes, relabelled(nodes, order)):
        found = node_split(given_nodes, seed, train=4, valid=3)
        parts = np.stack([found.train, found.valid, found.test])
        assert np.all(parts.sum(0) == 1)
        for c in range(3):
            own = parts[:, given_nodes.y == c].sum(1)
            assert own[0] == 4 and own[1] == 3
        assert found.graph is given_nodes.graph and found.x is given_nodes.x
    again, other = (node_split(nodes, s, train=4, valid=3) for s in (seed, seed + 1))
    np.testing.assert_array_equal(again.train, node_split(nodes, seed, train=4, valid=3).train)
    assert not np.array_equal(again.train, other.train)


def test_nodes_that_are_not_there_are_not_split():
    nodes = block_model(0, nodes=30, classes=2, train=1, valid=1)._replace(y=np.arange(30) % 2)
    with pytest.raises(ConfigError, match="class 0 has 15 nodes; train=10 and valid=6 of each"):
        node_split(nodes, train=10, valid=6)
    with pytest.raises(ConfigError, match="leave no node to test on"):
        node_split(nodes, train=10, valid=5)
    with pytest.raises(ConfigError, match="train=0"):
        node_split(nodes, train=0)


def test_pairs_without_an_edge_are_all_of_them_where_so_many_are_asked_for():
    graph = undirected(Graph.make([0, 1, 3, 3], [1, 2, 0, 3], nodes=5))
    found = non_edges(graph, 7)
    free = {(a, b) for b in range(5) for a in range(b)} - {(0, 1), (1, 2), (0, 3)}
    assert {tuple(pair) for pair in found.tolist()} == free and len(found) == 7
    with pytest.raises(ConfigError, match="count=8: 7 pairs of 5 nodes have no edge"):
        non_edges(graph, 8)
    assert non_edges(graph, 3, 1).tolist() == non_edges(graph, 3, 1).tolist()
    with pytest.raises(ConfigError, match="0 pairs of 1 nodes"):
        non_edges(Graph.make([], [], nodes=1), 1)
