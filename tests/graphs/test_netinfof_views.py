"""Five embeddings beside their formulas with dense matrices, and walks beside what they may do."""

import numpy as np
import pytest

from ffnlab.errors import ConfigError
from ffnlab.graph import Graph, undirected
from ffnlab.graphs import VIEWS, embeddings, netinfof_views, normalised_features
from ffnlab.graphs.netinfof_views import adjacency, components, spectral, walk_counts


def graph_of(seed=0, nodes=40, edges=90):
    random = np.random.default_rng(seed)
    return undirected(Graph.make(*random.integers(nodes, size=(2, edges)), nodes=nodes))


def features(seed=1, nodes=40, width=12):
    return np.random.default_rng(seed).normal(size=(nodes, width)).astype(np.float32)


def standard(z):
    z = z / z.std(0)
    return z / np.linalg.norm(z, axis=1, keepdims=True)


def principal(x, d):
    x = x - x.mean(0)
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    z = (u * s)[:, :d]
    return z * np.sign(z[np.abs(z).argmax(0), np.arange(d)])


def test_embeddings_of_features_are_those_of_dense_matrices():
    graph, x, d = graph_of(), features(), 5
    found = embeddings(x, graph, dimension=d)
    assert list(found) == list(VIEWS) == list("URFPS")
    assert all(z.shape == (40, d) and z.dtype == np.float32 for z in found.values())
    a = adjacency(graph).toarray()
    np.testing.assert_array_equal(a, a.T)
    assert not a.diagonal().any() and set(np.unique(a)) == {0, 1}
    near = a / np.maximum(a.sum(1, keepdims=True), 1)
    own = (a + np.eye(40)) / (a.sum(1, keepdims=True) + 1)
    wanted = {"F": x, "P": near @ near @ x, "S": own @ own @ x}
    for name, want in wanted.items():
        np.testing.assert_allclose(found[name], standard(principal(want, d)), atol=1e-4)
    u, s, _ = np.linalg.svd(a)
    z = (u * np.sqrt(s))[:, :d]
    z *= np.sign(z[np.abs(z).argmax(0), np.arange(d)])
    want = standard(z)
    want[a.sum(1) == 0] = 0  # rounding has no direction
    assert not want.any(1).all()
    np.testing.assert_allclose(found["U"], want, atol=1e-4)
    lengths = np.linalg.norm(found["R"], axis=1)
    assert np.all(np.isclose(lengths, 1, atol=1e-5) | (lengths == 0))


def test_large_matrices_are_of_the_same_vectors(monkeypatch):
    a, random = adjacency(graph_of()), np.random.default_rng(0)
    want = spectral(a, 6, random)
    monkeypatch.setattr(netinfof_views, "SMALL", 0)
    np.testing.assert_allclose(spectral(a, 6, random), want, atol=1e-8)
    x = features()
    np.testing.assert_allclose(components(x.astype(float), 4), principal(x, 4), atol=1e-5)
    wide = features(width=60).astype(float)
    np.testing.assert_allclose(components(wide, 4), principal(wide, 4), atol=1e-5)


def test_what_a_rank_lacks_are_zeros():
    x = features()
    x[:, 3:] = 0
    found = embeddings(x, graph_of(), dimension=6)
    for name in "FPS":
        assert np.all(found[name][:, 3:] == 0) and np.all(found[name].std(0)[:3] > 0)
    two = undirected(Graph.make([0], [1], nodes=9))  # of rank 2
    assert np.all(embeddings(features(nodes=9), two, dimension=5)["U"][:, 2:] == 0)


def test_other_names_of_nodes_give_the_same_rows():
    graph, x = graph_of(), features()
    order = np.random.default_rng(2).permutation(40)
    where = np.argsort(order)
    ends = (where[np.asarray(side)] for side in (graph.senders, graph.receivers))
    found = embeddings(x, graph, dimension=4)
    moved = embeddings(x[order], Graph.make(*ends, nodes=40), dimension=4)
    for name in "UFPS":  # walks are drawn
        np.testing.assert_allclose(moved[name], found[name][order], atol=1e-4, err_msg=name)


def test_walks_do_not_turn_round():
    """On the path 0-1-2-3 with a node of its own."""
    path = undirected(Graph.make([0, 1, 2], [1, 2, 3], nodes=5))
    counts = walk_counts(adjacency(path), 50, 3, np.random.default_rng(0)).toarray()
    assert counts[0].tolist() == [0, 50, 50, 0, 0], "to 1, and from there to 2 alone"
    assert counts[1, 0] + counts[1, 2] == 50 and counts[1, 2] == counts[1, 3]
    assert not counts[4].any() and not counts[:, 4].any()
    longer = walk_counts(adjacency(path), 50, 5, np.random.default_rng(0)).toarray()
    assert longer[0].tolist() == [0, 50, 50, 50, 0], "and ends at 3"


def test_ways_are_equally_likely_and_once_is_not_at_all(monkeypatch):
    star = undirected(Graph.make([0] * 5, range(1, 6), nodes=6))
    counts = walk_counts(adjacency(star), 4000, 3, np.random.default_rng(0)).toarray()
    expected = np.full(5, 800)
    # five standard deviations of a binomial
    assert np.all(np.abs(counts[0, 1:] - expected) < 5 * np.sqrt(4000 * 0.2 * 0.8))
    leaves = counts[1:, 1:][~np.eye(5, dtype=bool)]
    assert np.all(np.abs(leaves - 1000) < 5 * np.sqrt(4000 * 0.25 * 0.75))
    assert np.all(counts[1:, 0] == 4000)
    one = walk_counts(adjacency(star), 1, 2, np.random.default_rng(0))
    assert one.nnz == 0
    monkeypatch.setattr(netinfof_views, "AT_ONCE", 12)  # two walks of each node at a time
    parts = walk_counts(adjacency(star), 7, 2, np.random.default_rng(0)).toarray()
    assert np.all(parts[1:, 0] == 7)


def test_features_are_normalised_as_the_authors_do():
    x = np.array([[0.5, -0.5, 0.0], [-0.5, -0.4, -0.5]])
    np.testing.assert_allclose(
        normalised_features(x), [[1 / 1.5, 0, 0.5 / 1.5], [0, 0.1, 0]], atol=1e-7
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x": features(nodes=39)}, r"finite features \[40, f\] are accepted"),
        ({"x": np.full((40, 3), np.nan)}, "finite features"),
        ({"graph": Graph.make([3], [3], nodes=40)}, "the graph has no edges"),
        ({"dimension": 0}, "dimension=0"),
        ({"walks": 0}, "walks=0"),
        ({"length": 1}, "length=1"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_what_has_no_embedding_is_refused(change, said):
    with pytest.raises(ConfigError, match=said):
        embeddings(**{"x": features(), "graph": graph_of()} | change)
