"""Several kinds of nodes: relations and their reverses, means beside dense matrices, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ffnlab.errors import ConfigError, FFNLabError
from ffnlab.graph import Graph, Hetero, mean_over
from ffnlab.graph.hetero import reverse_of

NODES = {"b": 4, "a": 3}
RELATIONS = {
    ("b", "x", "a"): ([0, 1, 1, 3], [0, 0, 0, 2]),
    ("a", "y", "a"): ([0, 1], [1, 2]),
}


def dense(relation, nodes=NODES, relations=RELATIONS):
    """The row-normalized matrix of a relation or a reverse, in float64."""
    is_given = relation in relations
    senders, receivers = relations[relation if is_given else reverse_of(relation)]
    first, _, last = relation if is_given else reverse_of(relation)
    matrix = np.zeros((nodes[last], nodes[first]))
    np.add.at(matrix, (receivers, senders), 1)
    matrix = matrix if is_given else matrix.T
    return matrix / np.maximum(matrix.sum(1, keepdims=True), 1)


def test_relations_are_heard_both_ways_and_within_a_kind_one_way():
    graph = Hetero.make(NODES, RELATIONS)
    assert dict(graph.counts) == NODES and graph.names == tuple(sorted(RELATIONS))
    assert graph.relations == (("a", "y", "a"), ("b", "x", "a"), ("a", "r.x", "b"))
    assert graph.touching("a") == graph.names and graph.touching("b") == (("b", "x", "a"),)
    for relation in graph.relations:
        x = np.random.default_rng(0).normal(size=(NODES[relation[0]], 2)).astype(np.float32)
        found = graph.mean(relation, jnp.asarray(x))
        np.testing.assert_allclose(found, dense(relation) @ x, atol=1e-6)  # means of floats
        assert found.dtype == jnp.float32
    assert graph.mean(("b", "x", "a"), jnp.ones((4, 1))).ravel().tolist() == [1, 0, 1]


@settings(max_examples=10)
@given(st.data())
def test_means_of_any_edges(data):
    nodes = {"s": data.draw(st.integers(1, 4)), "t": data.draw(st.integers(1, 4))}
    pair = st.tuples(st.integers(0, nodes["s"] - 1), st.integers(0, nodes["t"] - 1))
    senders, receivers = zip(*data.draw(st.lists(pair, min_size=1, max_size=8)), strict=True)
    relations = {("s", "x", "t"): (np.array(senders), np.array(receivers))}
    graph = Hetero.make(nodes, relations)
    for relation in graph.relations:
        found = graph.mean(relation, jnp.eye(nodes[relation[0]]))
        np.testing.assert_allclose(found, dense(relation, nodes, relations), atol=1e-6)


def test_a_graph_is_data_of_a_program():
    graph, traced = Hetero.make(NODES, RELATIONS), []

    @jax.jit
    def mean(graph, x):
        traced.append(1)
        return graph.mean(("a", "r.x", "b"), x)

    other = Hetero.make(NODES, RELATIONS | {("b", "x", "a"): ([0, 1, 2, 3], [0, 1, 2, 2])})
    for one in (graph, other):
        expected = one.mean(("a", "r.x", "b"), jnp.eye(3))
        np.testing.assert_allclose(mean(one, jnp.eye(3)), expected, atol=1e-7)
    assert len(traced) == 1
    axes = [edges.leaf_axes().senders for edges in graph.edges]
    assert axes == [(None,), (None,)]


def test_means_of_a_plain_graph_in_half_precision():
    graph = Graph.make([0, 1, 1], [2, 2, 0], nodes=3)
    found = mean_over(graph, jnp.array([[1.0], [2.0], [4.0]], jnp.bfloat16))
    assert found.dtype == jnp.bfloat16 and found.ravel().tolist() == [2, 0, 1.5]


@pytest.mark.parametrize(
    ("nodes", "relations", "message"),
    [
        (NODES, {}, "one relation or more"),
        ({"a": 0}, {("a", "y", "a"): ([], [])}, "one node or more of every kind"),
        ({"a": True}, RELATIONS, r"nodes\['a'\]=True must be an integer"),
        (NODES, {("a", "y", "a"): ([], [])}, "has no edges; leave it out"),
        (NODES, {("a", "y", "a"): ([0], [3])}, r"relation=.*receivers\[0\]=3 must lie in 0..2"),
        (NODES, {("a", "y", "a"): ([0], [1, 2])}, "1 senders and 2 receivers"),
        (NODES, {("a", "y", "c"): ([0], [0])}, "has 'c', nodes are"),
        (NODES, {("a", "r.y", "a"): ([0], [0])}, "does not begin with 'r.'"),
    ],
)
def test_what_is_no_graph_of_kinds(nodes, relations, message):
    with pytest.raises(FFNLabError, match=message):
        Hetero.make(nodes, relations)


def test_a_kind_or_relation_that_there_is_not():
    graph = Hetero.make(NODES, RELATIONS)
    with pytest.raises(ConfigError, match="kind='c' is not one of"):
        graph.touching("c")
    with pytest.raises(ConfigError, match=r"relation=\('a', 'x', 'b'\) is not one of"):
        graph.mean(("a", "x", "b"), jnp.ones((3, 1)))
