"""Graphs from graphs, against sets of pairs."""

import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.errors import FFNLabError
from ffnlab.graph import Graph, aggregate, disjoint, pad, undirected, with_self_loops
from tests.graph_cases import CASES, matrix, pairs

GRAPHS = [name for name, edges in CASES.items() if isinstance(edges, Graph)]


@pytest.mark.parametrize("name", GRAPHS)
def test_each_node_has_a_loop_and_no_second_one(name):
    graph = CASES[name]
    looped = with_self_loops(graph)
    own = {(i, i) for i in range(graph.num_nodes)}
    assert sorted(pairs(looped)) == sorted([*pairs(graph), *own - set(pairs(graph))])
    assert looped.num_nodes == graph.num_nodes
    assert pairs(with_self_loops(looped)) == pairs(looped)


@pytest.mark.parametrize("name", GRAPHS)
def test_every_edge_goes_both_ways_once(name):
    graph = CASES[name]
    both = undirected(graph)
    expected = {*pairs(graph), *((b, a) for a, b in pairs(graph))}
    assert set(pairs(both)) == expected and both.num_edges == len(expected)
    assert both.num_nodes == graph.num_nodes


def test_disjoint_graphs_are_blocks():
    graphs = [CASES[name] for name in GRAPHS]
    whole = matrix(disjoint(graphs), np.concatenate([np.arange(g.num_edges) for g in graphs]))
    row = 0
    for graph in graphs:
        end = row + graph.num_nodes
        block = matrix(graph, np.arange(graph.num_edges))
        np.testing.assert_array_equal(whole[row:end, row:end], block)
        whole[row:end, row:end] = 0
        row = end
    assert row == len(whole) and not whole.any()
    assert disjoint([]).num_nodes == disjoint([]).num_edges == 0


def test_padding_changes_nothing_that_was_there():
    graph = CASES["some"]
    padded = pad(graph, nodes=12, edges=31)
    assert (padded.num_nodes, padded.num_edges) == (12, 31)
    assert pairs(padded)[:20] == pairs(graph) and set(pairs(padded)[20:]) == {(11, 11)}
    x = jnp.arange(12.0 * 2).reshape(12, 2)
    weights = jnp.arange(31.0)
    np.testing.assert_array_equal(
        aggregate(padded, weights, x)[:9], aggregate(graph, weights[:20], x[:9])
    )
    assert pairs(pad(graph, graph.num_nodes, graph.num_edges)) == pairs(graph)
    assert pad(graph, 10, 20).degrees.tolist() == [*graph.degrees.tolist(), 0]


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ((8, 20), "fewer than the graph's 9 and 20"),
        ((12, 19), "fewer than the graph's 9 and 20"),
        ((9, 21), "adds 1 edges and nodes=9 no node for them; use at least nodes=10"),
    ],
)
def test_padding_that_does_not_fit_is_refused(sizes, said):
    with pytest.raises(FFNLabError, match=said):
        pad(CASES["some"], *sizes)
