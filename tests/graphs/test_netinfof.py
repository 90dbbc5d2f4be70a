"""Scores as probes: of pairs, of nodes, and on generated graphs of known information."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.data import link_split
from ffnlab.errors import ConfigError, NumericalError
from ffnlab.graphs import (
    VIEWS,
    NodeRows,
    PairRows,
    View,
    embeddings,
    fitting_pairs,
    informative_graph,
    netinfof,
    netinfof_nodes,
    pair_rows,
    scored_pairs,
    similarities,
    view_of,
)
from ffnlab.graphs.netinfof_nodes import clusters
from ffnlab.layers import MLP
from tests.data.test_splits import pairs_of

SMALL = {"nodes": 120, "width": 40, "density": 0.1, "walks": 50}


def signs(n=40):
    """Two groups that a coordinate tells apart, and a view that is a constant."""
    z = jnp.asarray(np.where(np.arange(n) % 2, 1.0, -1.0)[:, None], jnp.float32)
    return {"told": View(z, z), "constant": View(jnp.ones_like(z), jnp.ones_like(z))}


def all_pairs(n=40):
    ends = np.array([(a, b) for b in range(n) for a in range(b)], np.int32)
    return ends, (ends[:, 0] + ends[:, 1]) % 2 == 0


def test_bins_that_tell_all_and_nothing():
    ends, joined = all_pairs()
    scored = np.random.default_rng(0).random(len(ends)) < 0.5
    report = netinfof()(signs(), [PairRows(ends, joined, scored)], progress=False)
    share = joined[scored].mean()
    nothing = 2 ** (share * np.log2(share) + (1 - share) * np.log2(1 - share))
    assert report.scores["told"] == 1
    assert report.scores["constant"] == pytest.approx(nothing) == report.least
    assert report.bins == {"told": 2, "constant": 1}
    assert report.figures()["information/told"] == 1


def test_answers_of_what_only_makes_bins_do_not_count():
    ends, joined = all_pairs()
    scored = np.arange(len(ends)) % 2 == 0
    wrong = np.where(scored, joined, ~joined)
    reports = [
        netinfof(bins=4)(signs(), [PairRows(ends, each, scored)], progress=False)
        for each in (joined, wrong)
    ]
    assert reports[0] == reports[1]


def test_nodes_are_told_apart_by_clusters():
    y = (np.arange(40) % 2).astype(np.int32)
    rows = NodeRows(np.arange(40, dtype=np.int32), y, np.arange(40) >= 20)
    report = netinfof_nodes()(signs(), [rows], progress=False)
    assert report.scores["told"] == 1 and report.scores["constant"] == pytest.approx(0.5)
    assert report.bins == {"told": 2, "constant": 1}
    with pytest.raises(ConfigError, match="y has class -1"):
        netinfof_nodes()(signs(), [rows._replace(y=y - 1)], progress=False)


def test_clusters_are_means_of_their_points():
    random = np.random.default_rng(0)
    centres = np.array([[0.0, 0], [5, 0], [0, 5]])
    points = np.repeat(centres, 30, axis=0) + 0.2 * random.normal(size=(90, 2))
    found = clusters(points, 3)
    want = points.reshape(3, 30, 2).mean(1)
    np.testing.assert_allclose(sorted(found.tolist()), sorted(want.tolist()), atol=1e-9)


def test_pairs_of_a_split_leak_nothing():
    nodes = informative_graph("random", **SMALL)
    split = link_split(nodes, 3)
    found, again = scored_pairs(split, 1), scored_pairs(split, 1)
    assert all(np.array_equal(a, b) for a, b in zip(found, again, strict=True))
    asked = split.valid
    np.testing.assert_array_equal(found.ends[found.scored], asked.ends)
    np.testing.assert_array_equal(found.joined[found.scored], asked.joined)
    known = ~found.scored & found.joined
    assert {tuple(e) for e in found.ends[known].tolist()} == pairs_of(split.graph)
    assert (~found.scored & ~found.joined).sum() == 2 * known.sum()
    hidden = {tuple(e) for e in asked.ends[asked.joined].tolist()}
    assert not hidden & pairs_of(split.graph)
    test = scored_pairs(split, part="test")
    np.testing.assert_array_equal(test.ends[test.scored], split.test.ends)
    with pytest.raises(ConfigError, match="part='train'"):
        scored_pairs(split, part="train")


def test_rows_of_pairs_add_up_to_similarities():
    random = np.random.default_rng(0)
    views = {n: View(*jnp.asarray(random.normal(size=(2, 9, 4)))) for n in "UF"}
    ends = jnp.asarray(random.integers(9, size=(7, 2)))
    rows = pair_rows(views, ends)
    assert rows.shape == (7, 8)
    for i, view in enumerate(views.values()):
        part = rows[:, 4 * i : 4 * i + 4].sum(1)
        np.testing.assert_allclose(part, similarities(view, ends), rtol=1e-5)


def test_what_is_no_tree_of_embeddings_is_refused(key):
    ends, joined = all_pairs()
    scored = joined | True
    for model in (MLP((3, 2), key=key), {"U": jnp.ones((3, 2))}, {}):
        with pytest.raises(ConfigError, match="a mapping from names to Views is accepted"):
            netinfof()(model, [])
    for all_of in (scored, ~scored):
        with pytest.raises(ConfigError, match="rows are scored; some, and not all"):
            netinfof()(signs(), [PairRows(ends, joined, all_of)], progress=False)
    broken = {"U": View(*(jnp.full((40, 2), jnp.nan),) * 2)}
    with pytest.raises(NumericalError, match="netinfof"):
        netinfof()(broken, [PairRows(ends, joined, joined)], progress=False)
    with pytest.raises(ConfigError, match="bins=1"):
        netinfof_nodes(bins=1)


@pytest.mark.parametrize("edges", ["diag", "offdiag"])
def test_generated_graphs_join_what_they_say(edges):
    for features in ("random", "global", "local"):
        nodes = informative_graph(features, edges, 1, **SMALL)
        assert nodes.x.shape == (120, 40) and np.bincount(nodes.y).tolist() == [30] * 4
        assert not (nodes.train | nodes.valid | nodes.test).any()
    ends = np.array(sorted(pairs_of(nodes.graph)))
    a, b = nodes.y[ends].T
    fits = a == b if edges == "diag" else (a // 2 == b // 2) & (a != b)
    most = 4 * 30 * 29 / 2 if edges == "diag" else 2 * 30 * 30
    assert fits.mean() > 0.95 and fits.sum() > 0.1 * most
    assert np.bincount(ends[fits].ravel(), minlength=120).min() >= 3, "all are in a clique"
    own = nodes.x.reshape(120, 4, 10)[np.arange(120), nodes.y]
    others = nodes.x.sum() - own.sum()
    assert others < 0.02 * own.sum(), "local features are in the columns of their class"
    again = informative_graph("local", edges, 1, **SMALL)
    np.testing.assert_array_equal(again.x, nodes.x)
    coins = informative_graph("random", edges, **SMALL).x
    assert set(np.unique(coins)) == {0, 1} and 0.4 < coins.mean() < 0.6


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"features": "none"}, "features='none' is not one of"),
        ({"edges": "all"}, "edges='all' is not one of"),
        ({"edges": "offdiag", "classes": 3}, "classes=3 must be even"),
        ({"nodes": 30}, "36 nodes or more"),
        ({"nodes": 60, "width": 60}, "nodes=60, width=60"),
        ({"density": 1.0}, "density=1.0"),
    ],
)
def test_graphs_that_cannot_be_are_refused(given, said):
    with pytest.raises(ConfigError, match=said):
        informative_graph(**given)


@functools.cache
def information(features, edges):
    """Scores on a graph of 300 nodes."""
    nodes = informative_graph(features, edges, nodes=300, width=100, density=0.1, walks=200)
    split = link_split(nodes, 0, valid=0.15, test=0.1)
    pairs = fitting_pairs(split.graph)
    found = embeddings(split.x, split.graph, dimension=32)
    views = {name: view_of(z, pairs) for name, z in found.items()}
    return netinfof()(views, [scored_pairs(split)], progress=False).scores


@pytest.mark.slow
def test_scores_say_where_the_information_is():
    found = information("random", "diag")
    assert set(found) == set(VIEWS)
    assert min(found["U"], found["R"]) > found["F"] and found["F"] < 0.53
    for edges in ("diag", "offdiag"):
        told = information("local", edges)
        assert min(told[name] for name in "FPS") > 0.55, (edges, told)
