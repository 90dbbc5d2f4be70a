"""Compatibility and score beside the authors' code, recorded, and beside dense least squares."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ffnlab.errors import ConfigError
from ffnlab.graph import Graph, undirected
from ffnlab.graphs import (
    FittingPairs,
    View,
    compatibility,
    fitting_pairs,
    similarities,
    usable_information,
    view_of,
)
from ffnlab.graphs.netinfof_core import bin_edges, first_estimate, kept_entries, table_of
from ffnlab.models.account import compiled_cost
from tests.fixtures.netinfof.record import NODES, case

EXACT = 2e-3  # float32 normal equations beside float32 products and LSQR to the end
LOOSE = 0.05  # of scores, theirs as it is, of a tolerance of 1e-2


@pytest.fixture(scope="module")
def official(fixtures):
    with np.load(fixtures / "netinfof" / "expected.npz", allow_pickle=False) as saved:
        return {name: saved[name] for name in saved.files}


@functools.cache
def pairs_of_case(name):
    """The pairs that the authors' code fits to."""
    found = case(name)
    graph = undirected(Graph.make(*found["edges"].T, nodes=NODES[name]))
    drawn = fitting_pairs(graph)
    own = drawn.ends[drawn.joined]
    assert len(found["fitted"]) == 2 * len(own) == (~drawn.joined).sum()
    return drawn._replace(ends=np.concatenate([own, found["fitted"]]).astype(np.int32))


@pytest.mark.parametrize("name", NODES)
def test_a_compatibility_is_that_of_the_authors(name, official):
    z, pairs = jnp.asarray(case(name)["z"]), pairs_of_case(name)
    first = first_estimate(z, jnp.asarray(pairs.edges), 64)
    np.testing.assert_allclose(first, np.triu(official[f"{name}.ridge"]), atol=1e-4)
    exact = official[f"{name}.exact"]
    found = np.asarray(compatibility(z, pairs))
    np.testing.assert_allclose(found, exact, atol=EXACT)
    fixed = ~np.asarray(kept_entries(first))[np.triu_indices(len(first))]
    assert np.all(np.abs(exact[np.triu_indices(len(first))][fixed]) < 1e-5)
    assert fixed.any(), "and some are"


@pytest.mark.parametrize("name", NODES)
def test_a_score_is_that_of_the_authors(name, official):
    given_case, z = case(name), jnp.asarray(case(name)["z"])
    known = jnp.asarray(np.concatenate([given_case["edges"], given_case["binned"]]))
    valid, joined = jnp.asarray(given_case["valid"]), given_case["joined"]
    views = {"plain": View(z, z), "adjusted": view_of(z, pairs_of_case(name))}
    for side, view in views.items():
        edges = bin_edges(np.asarray(similarities(view, known)))
        score = usable_information(table_of(np.asarray(similarities(view, valid)), joined, edges))
        # a pair at the edge of a bin may be in the next one
        assert score == pytest.approx(float(official[f"{name}.exact.{side}"]), abs=0.01)
        assert score == pytest.approx(float(official[f"{name}.lsqr.{side}"]), abs=LOOSE)


def test_unlike_neighbours_are_alike_by_their_compatibility():
    """The card's: off the diagonal above a half, on it near 0, and more information."""
    z = jnp.asarray(case("across")["z"])
    h = np.asarray(compatibility(z, pairs_of_case("across")))
    assert h[0, 1] > 0.5 and max(abs(h[0, 0]), abs(h[1, 1])) < 0.3


def drawn(seed, n=30, d=5):
    """Rows of length 1, and pairs of a graph in which every node has four edges."""
    random = np.random.default_rng(seed)
    z = random.normal(size=(n, d))
    z = jnp.asarray(z / np.linalg.norm(z, axis=1, keepdims=True), jnp.float32)
    circle = np.arange(2 * n) % n
    ends = random.permutation(n)[[circle, (circle + np.repeat([1, 2], n)) % n]]
    return z, fitting_pairs(undirected(Graph.make(*ends, nodes=n)), seed)


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 999))
def test_normal_equations_are_those_of_the_design_matrix(seed):
    z, pairs = drawn(seed)
    first = np.asarray(first_estimate(z, jnp.asarray(pairs.edges), 64), np.float64)
    kept = np.asarray(kept_entries(jnp.asarray(first, jnp.float32)))
    rows, columns = np.nonzero(kept)
    zi, zj = (np.asarray(z, np.float64)[pairs.ends[:, i]] for i in (0, 1))
    design = zi[:, rows] * zj[:, columns] + zi[:, columns] * zj[:, rows]
    design[:, rows == columns] /= 2
    left = pairs.joined - design @ first[rows, columns]
    square = design.T @ design + np.eye(len(rows))
    upper = np.zeros_like(first)
    upper[rows, columns] = first[rows, columns] + np.linalg.solve(square, design.T @ left)
    want = upper + np.triu(upper, 1).T
    found = np.asarray(compatibility(z, pairs))
    np.testing.assert_allclose(found, want, atol=2e-4)
    np.testing.assert_allclose(found, found.T, atol=1e-6)


def test_neither_order_nor_pieces_nor_the_ends_of_a_pair_count():
    z, pairs = drawn(3)
    found = compatibility(z, pairs)
    turned = pairs._replace(edges=pairs.edges[:, ::-1], ends=pairs.ends[:, ::-1])
    order = np.random.default_rng(0).permutation(len(pairs.ends))
    mixed = FittingPairs(pairs.edges[::-1], pairs.ends[order], pairs.joined[order])
    for other in (turned, mixed):
        np.testing.assert_allclose(compatibility(z, other), found, atol=1e-4)
    np.testing.assert_allclose(compatibility(z, pairs, piece=7), found, atol=1e-4)
    relabelled = np.random.default_rng(1).permutation(30)
    where = np.argsort(relabelled)
    moved = pairs._replace(edges=where[pairs.edges], ends=where[pairs.ends])
    np.testing.assert_allclose(compatibility(z[relabelled], moved), found, atol=1e-4)
    view = View(z, z @ found)
    ends = jnp.asarray(pairs.ends)
    np.testing.assert_allclose(
        similarities(view, ends), similarities(view, ends[:, ::-1]), atol=1e-5
    )


def test_columns_of_zeros_change_nothing():
    z, pairs = drawn(4)
    more = jnp.pad(z, ((0, 0), (0, 2)))
    found = compatibility(more, pairs)
    np.testing.assert_allclose(found[:5, :5], compatibility(z, pairs), atol=1e-4)
    assert not np.any(found[5:]), "what is missing of a rank"


def test_memory_does_not_grow_with_a_design_matrix():
    """Of 40,000 pairs and 64 columns it would have 2,080 columns: 330 MB."""
    pairs = FittingPairs(
        *(
            jax.ShapeDtypeStruct(s, t)
            for s, t in (((20_000, 2), jnp.int32), ((40_000, 2), jnp.int32), ((40_000,), bool))
        )
    )
    z = jax.ShapeDtypeStruct((1000, 64), jnp.float32)
    cost = compiled_cost(functools.partial(compatibility, piece=1024), z, pairs)
    assert cost.temporary < 5e6


def test_pairs_are_of_the_core_and_of_all_nodes():
    """Nodes 0 to 3 are a square; 4 hangs on it."""
    square = [(0, 1), (1, 2), (2, 3), (3, 0), (0, 4)]
    graph = undirected(Graph.make(*np.array(square).T, nodes=6))
    found = fitting_pairs(graph, 1)
    own = {tuple(p) for p in found.ends[found.joined].tolist()}
    assert own == {(0, 1), (1, 2), (2, 3), (0, 3)} and (~found.joined).sum() == 8
    assert sorted(map(tuple, found.edges.tolist())) == sorted(
        pair for a, b in square for pair in ((a, b), (b, a))
    )
    few = fitting_pairs(graph, 1, most=2)
    assert few.joined.sum() == 2 and {tuple(p) for p in few.ends[:2].tolist()} < own
    with pytest.raises(ConfigError, match="none of 1 edges joins two nodes of two edges or more"):
        fitting_pairs(undirected(Graph.make([0], [1], nodes=3)))
    with pytest.raises(ConfigError, match="most=0"):
        fitting_pairs(graph, most=0)


@given(
    st.lists(st.lists(st.integers(0, 50), min_size=2, max_size=2), min_size=1, max_size=8).filter(
        lambda table: sum(map(sum, table)) > 0
    )
)
def test_a_guess_by_the_bin_is_right_as_often_as_the_score_says(table):
    table = np.array(table)
    score = usable_information(table)
    assert table.max(1).sum() / table.sum() >= score - 1e-12
    assert 0.5 - 1e-12 <= score <= 1 + 1e-12
    p = table / table.sum()
    bits = -sum(x * np.log2(x / row.sum()) for row in p for x in row if x)
    assert score == pytest.approx(2**-bits)


def test_scores_of_bins_that_tell_all_and_nothing():
    assert usable_information(np.array([[7, 0], [0, 2], [4, 0]])) == 1
    assert usable_information(np.array([[3, 3], [5, 5], [0, 0]])) == pytest.approx(0.5)
    for bad in (np.zeros((2, 2)), np.array([[1, -1]]), np.ones(3)):
        with pytest.raises(ConfigError, match="counts"):
            usable_information(bad)


def test_bins_hold_as_many_and_equal_values_make_fewer():
    values = np.random.default_rng(0).normal(size=801)
    edges = bin_edges(values)
    counts = table_of(values, values > 0, edges).sum(1)
    assert len(counts) == 8 and counts.min() >= 100 and counts.max() <= 101
    np.testing.assert_allclose(edges, np.quantile(values, np.arange(1, 8) / 8))
    few = np.repeat([0.0, 1.0, 2.0], [50, 40, 10])
    table = table_of(few, few > 0, bin_edges(few))
    assert len(table) < 8 and usable_information(table) == 1
    same = np.ones(9)
    assert len(bin_edges(same)) == 0
    assert table_of(same, np.arange(9) < 5, bin_edges(same)).tolist() == [[4, 5]]
    with pytest.raises(ConfigError, match="bins=1"):
        bin_edges(values, 1)
