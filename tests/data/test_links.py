"""Hidden edges: parts that do not overlap, pairs without an edge, what is seen when."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ffnlab.data import block_model, link_split
from ffnlab.errors import ConfigError


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
