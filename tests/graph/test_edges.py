"""Making a graph: its arrays against their definitions, and every bad index refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffnlab.errors import FFNLabError
from ffnlab.graph import Bipartite, Edges, Graph, edge_order
from ffnlab.graph.edges import checked_count
from ffnlab.weights.base import AxisNames
from tests.graph_cases import CASES, matrix, pairs


@st.composite
def edge_lists(draw):
    """(senders, receivers, m, n) with up to 30 edges among up to 6 of each."""
    m, n = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    edges = draw(st.lists(st.tuples(st.integers(0, m - 1), st.integers(0, n - 1)), max_size=30))
    return [a for a, _ in edges], [b for _, b in edges], m, n


@given(edge_lists())
def test_arrays_are_as_defined(case):
    senders, receivers, m, n = case
    edges = Bipartite.make(senders, receivers, m, n)
    ends = list(zip(receivers, senders, strict=True))
    assert [(b, a) for a, b in pairs(edges)] == sorted(ends)
    assert (edges.num_edges, edges.num_senders, edges.num_receivers) == (len(ends), m, n)
    starts, by = np.asarray(edges.starts), np.asarray(edges.by_sender)
    for i in range(n):
        own = np.asarray(edges.receivers)[starts[i] : starts[i + 1]]
        assert np.all(own == i) and len(own) == receivers.count(i)
    assert edges.degrees.tolist() == [receivers.count(i) for i in range(n)]
    assert sorted(by.tolist()) == list(range(len(ends)))
    for j in range(m):
        own = by[edges.sender_starts[j] : edges.sender_starts[j + 1]]
        assert np.all(np.asarray(edges.senders)[own] == j) and np.all(np.diff(own) > 0)
    assert all(leaf.dtype == jnp.int32 for leaf in jax.tree.leaves(edges))


@given(edge_lists())
def test_values_follow_their_edges(case):
    senders, receivers, m, n = case
    values = np.arange(1.0, len(senders) + 1)
    edges = Bipartite.make(senders, receivers, m, n)
    dense = np.zeros((n, m))
    np.add.at(dense, (np.array(receivers, int), np.array(senders, int)), values)
    np.testing.assert_array_equal(matrix(edges, values[edge_order(senders, receivers)]), dense)


@pytest.mark.parametrize("name", CASES)
def test_the_transpose_is_that_and_its_own_inverse(name):
    edges = CASES[name]
    there = edges.transpose()
    assert type(there) is type(edges)
    values = np.arange(1.0, edges.num_edges + 1)
    turned = values[np.asarray(edges.by_sender)]
    np.testing.assert_array_equal(matrix(there, turned), matrix(edges, values).T)
    dataclasses.replace(there)  # checks every invariant
    jax.tree.map(np.testing.assert_array_equal, there.transpose(), edges)


@pytest.mark.parametrize(
    ("senders", "said"),
    [
        ([0, 3], r"senders\[1\]=3 must lie in 0\.\.2"),
        ([-1, 0], r"senders\[0\]=-1 must lie"),
        (np.array([0, 2**63], np.uint64), r"senders\[1\]=9223372036854775808 must lie"),
        (np.array([0, 2**32]), r"senders\[1\]=4294967296 must lie"),
        (np.array([0.0, 1.0]), "dtype float64; integers"),
        (np.array([True, False]), "dtype bool; integers"),
        (np.array([[0], [1]]), r"shape \(2, 1\)"),
        ([0], "1 senders and 2 receivers"),
    ],
)
def test_bad_indices_are_refused(senders, said):
    with pytest.raises(FFNLabError, match=said):
        Graph.make(senders, [1, 2], nodes=3)
    other = said.replace("senders", "receivers").replace("1 receivers and 2", "2 senders and 1")
    with pytest.raises(FFNLabError, match=other):
        Graph.make([1, 2], senders, nodes=3)


def test_the_two_sides_of_a_bipartite_graph_have_ranges_of_their_own():
    Bipartite.make([4], [1], 5, 2)
    with pytest.raises(FFNLabError, match=r"senders\[0\]=5 must lie in 0\.\.4"):
        Bipartite.make([5], [1], 5, 2)
    with pytest.raises(FFNLabError, match=r"receivers\[0\]=2 must lie in 0\.\.1"):
        Bipartite.make([4], [2], 5, 2)


@pytest.mark.parametrize("nodes", [-1, True, 2**31, 2.0, None])
def test_bad_counts_are_refused(nodes):
    with pytest.raises(FFNLabError, match="nodes="):
        checked_count("nodes", nodes)
    assert Graph.make([], [], np.int64(2)).num_nodes == 2


def test_a_graph_is_not_made_inside_of_jit():
    with pytest.raises(FFNLabError, match="senders is traced: .* outside of jit"):
        jax.jit(lambda s: Graph.make(s, s, 3).starts)(jnp.arange(3))
    with pytest.raises(FFNLabError, match="is traced"):
        jax.jit(lambda s: Graph(s, s, s, s, s).starts)(jnp.arange(3))


def test_arrays_that_make_did_not_build_are_refused():
    graph = CASES["some"]
    e, n = graph.num_edges, graph.num_nodes
    flip = {name: getattr(graph, name)[::-1] for name in ("senders", "receivers", "by_sender")}
    wrong = [
        *({name: array} for name, array in flip.items()),
        {"senders": graph.senders.at[-1].set(n)},
        {"senders": graph.senders.at[0].set(-1)},
        {"senders": graph.senders[:-1]},
        {"starts": graph.starts.at[1].add(1)},
        {"starts": graph.starts.at[-1].set(e + 5)},
        {"starts": graph.starts[:0]},
        {"sender_starts": graph.sender_starts.at[1].add(1)},
        {"sender_starts": jnp.append(graph.sender_starts, e)},
        {"by_sender": jnp.zeros(e, jnp.int32)},
        {"by_sender": graph.by_sender.at[0].set(e)},
        {"by_sender": graph.by_sender.astype(jnp.float32)},
    ]
    for fields in wrong:
        with pytest.raises(FFNLabError, match="Graph.make|is accepted"):
            dataclasses.replace(graph, **fields)


def test_a_graph_is_a_tree_of_arrays_that_a_mesh_keeps_whole():
    graph = CASES["some"]
    back = jax.jit(lambda graph: graph)(graph)
    assert type(back) is Graph and pairs(back) == pairs(graph)
    names = jax.tree.leaves(graph.leaf_axes())
    assert names == [AxisNames((None,))] * len(jax.tree.leaves(graph))
    assert isinstance(graph, Edges) and graph.num_nodes == 9
