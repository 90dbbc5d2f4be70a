"""Variances of starts beside the recursion of dense matrices in float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ffnlab.errors import ConfigError
from ffnlab.graph import Graph, disjoint, symmetric_norm, undirected, with_self_loops
from ffnlab.graphs import STARTS, hop_norms, variances
from ffnlab.graphs.virgo_core import joined, nothing_seen
from tests.graph_cases import matrix

HOPS = 5
WIDTHS = [(7, 16), (16, 16), (16, 16), (16, 16), (16, 4)]
UNEQUAL = [(7, 16), (16, 8), (8, 20), (20, 6), (6, 3)]
TOLERANCE = 1e-6  # the card's


def random_graph(seed=0, nodes=60, edges=120):
    random = np.random.default_rng(seed)
    ends = random.integers(nodes, size=(2, edges))
    return with_self_loops(undirected(Graph.make(*ends, nodes=nodes)))


def features(seed=1, nodes=60, width=7):
    return jnp.asarray(np.random.default_rng(seed).random((nodes, width)), jnp.float32)


def dense_recursion(graph, x, widths, classes=None):
    """(v, u) by the card's formulas, layers from input to output."""
    a = matrix(graph)
    root = a.sum(1) ** -0.5
    a = root[:, None] * a * root
    x = np.asarray(x, np.float64)

    def squares(signal):
        found = []
        for _ in widths:
            signal = a @ signal
            found.append(float(signal @ signal))
        return found

    c, back = squares(x.mean(1)), squares(np.ones(len(x)))
    v = [2 / widths[0][0]]
    v += [2 / widths[i][0] * c[i - 1] / c[i] for i in range(1, len(widths))]
    u = [len(x) / (((classes or widths[-1][1]) - 1) * back[0])]
    u += [2 / widths[-1 - j][1] * back[j - 1] / back[j] for j in range(1, len(widths))]
    return np.array(v), np.array(u[::-1])


@pytest.mark.parametrize("widths", [WIDTHS, UNEQUAL])
@pytest.mark.parametrize("classes", [None, 9])
def test_variances_are_those_of_dense_matrices(widths, classes):
    graph, x = random_graph(), features()
    norms = hop_norms(x, graph, hops=HOPS)
    v, u = dense_recursion(graph, x, widths, classes)
    wanted = {"virgofor": v, "virgoback": u, "virgo": 2 / (1 / v + 1 / u)}
    for start, want in wanted.items():
        found = variances(start, widths, norms, classes=classes)
        np.testing.assert_allclose(found, want, atol=TOLERANCE, rtol=1e-5, err_msg=start)
    found = variances("virgo", widths, norms, mean="normal", classes=classes)
    np.testing.assert_allclose(found, (v + u) / 2, atol=TOLERANCE, rtol=1e-5)


def test_usual_starts_ask_for_widths_alone():
    into, out = np.array(UNEQUAL, float).T
    wanted = {"kaifor": 2 / into, "kaiback": 2 / out, "xavier": 2 / (into + out)}
    assert {start for start, asked in STARTS.items() if not asked} == set(wanted)
    for start, want in wanted.items():
        np.testing.assert_allclose(variances(start, UNEQUAL, nothing_seen(HOPS)), want, rtol=1e-6)


def test_on_a_regular_graph_hidden_layers_are_those_of_kaiming():
    n = 12
    circle = [(i, (i + k) % n) for i in range(n) for k in (1, 2)]
    graph = with_self_loops(undirected(Graph.make(*np.array(circle).T, nodes=n)))
    norms = hop_norms(jnp.full((n, 3), 0.7), graph, hops=HOPS)
    np.testing.assert_allclose(variances("virgofor", WIDTHS, norms)[1:], 2 / 16, rtol=1e-6)
    found = variances("virgoback", WIDTHS, norms)
    np.testing.assert_allclose(found[:-1], 2 / 16, rtol=1e-6)
    assert float(found[-1]) == pytest.approx(1 / (4 - 1), rel=1e-6)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 999), scale=st.sampled_from([1e-30, 1e-3, 7.0, 1e30]))
def test_neither_scale_nor_order_of_nodes_counts(seed, scale):
    graph, x = random_graph(seed), features(seed)
    order = np.random.default_rng(seed).permutation(60)
    where = np.argsort(order)
    moved = Graph.make(where[np.asarray(graph.senders)], where[np.asarray(graph.receivers)], 60)
    norms = hop_norms(x, graph, hops=HOPS)
    others = hop_norms(x * scale, graph, hops=HOPS), hop_norms(x[order], moved, hops=HOPS)
    for other in others:
        for start in ("virgofor", "virgoback", "virgo"):
            want = variances(start, WIDTHS, norms)
            # logarithms of norms of 1e60 are rounded to 1e-5
            np.testing.assert_allclose(variances(start, WIDTHS, other), want, rtol=5e-5)


def test_norms_of_graphs_add_up():
    graphs = [random_graph(i, 30 + 10 * i, 70) for i in range(3)]
    xs = [features(i, 30 + 10 * i) for i in range(3)]
    found = nothing_seen(HOPS)
    for graph, x in zip(graphs, xs, strict=True):
        found = joined(found, hop_norms(x, graph, hops=HOPS))
    whole = hop_norms(jnp.concatenate(xs), disjoint(graphs), hops=HOPS)
    for ours, theirs in zip(found, whole, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_loops_that_are_not_there_are_counted_and_weights_are_taken_as_they_are():
    looped = random_graph()
    kept = np.asarray(looped.senders) != np.asarray(looped.receivers)
    kept |= np.asarray(looped.senders) < 5  # some nodes have theirs
    ends = (np.asarray(e)[kept] for e in (looped.senders, looped.receivers))
    want = hop_norms(features(), looped, hops=HOPS)
    given_weights = hop_norms(features(), looped, symmetric_norm(looped), hops=HOPS)
    for found in (hop_norms(features(), Graph.make(*ends, nodes=60), hops=HOPS), given_weights):
        for ours, theirs in zip(found, want, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_mean_that_is_rounding_is_none():
    x = features(width=200)
    x = x - x.mean(1, keepdims=True)
    assert np.any(np.asarray(x.mean(1)) != 0)
    assert np.all(np.isneginf(hop_norms(x, random_graph(), hops=2).forward))
    small = x + 1e-4  # of a size of a quarter
    assert np.all(np.isfinite(hop_norms(small, random_graph(), hops=2).forward))


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        (("he", WIDTHS), {}, "start='he' is not one of"),
        (("virgo", WIDTHS), {"mean": "mean"}, "mean='mean' is not one of"),
        (("virgo", WIDTHS[:-1]), {}, "norms of 5 hops for 4 layers"),
        (("virgoback", [*WIDTHS[:-1], (16, 1)]), {}, "classes=1 must be at least 2"),
        (("virgo", WIDTHS), {"classes": 1}, "classes=1 must be at least 2"),
    ],
)
def test_what_means_nothing_is_refused(arguments, options, said):
    norms = hop_norms(features(), random_graph(), hops=HOPS)
    with pytest.raises(ConfigError, match=said):
        variances(*arguments, norms, **options)


def test_one_class_is_no_matter_forward():
    norms = hop_norms(features(), random_graph(), hops=HOPS)
    assert variances("virgofor", [*WIDTHS[:-1], (16, 1)], norms).shape == (5,)
