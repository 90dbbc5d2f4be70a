"""The sparse product and both its gradients against dense matrices in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ffnlab.compat import make_mesh
from ffnlab.errors import FFNLabError
from ffnlab.graph import Graph, aggregate
from ffnlab.graph.product import PIECE, by_rows, by_values, sampled
from ffnlab.testing import counted
from tests.graph_cases import CASES, drawn, matrix

# Sums of a few dozen float32 products; what the issue asks of gradients.
TOLERANCE = 1e-5
WIDTH = 5


def operands(edges, seed=0, members=()):
    """Weights [*members, e], x [*members, m, d] and a gradient [*members, n, d]."""
    random = np.random.default_rng(seed)
    rows = (edges.num_edges,), (edges.num_senders, WIDTH), (edges.num_receivers, WIDTH)
    return [jnp.asarray(random.normal(size=(*members, *r)), jnp.float32) for r in rows]


def expected(edges, weights, x, gradient):
    """(y, gradient for the weights, gradient for x), in float64."""
    dense = matrix(edges, weights)
    x, gradient = np.asarray(x, np.float64), np.asarray(gradient, np.float64)
    of_weights = (gradient @ x.T)[np.asarray(edges.receivers), np.asarray(edges.senders)]
    return dense @ x, of_weights, dense.T @ gradient


def near(ours, theirs):
    assert jnp.shape(ours) == np.shape(theirs)
    np.testing.assert_allclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)


def with_gradients(edges, weights, x, gradient):
    """What `expected` gives, by ours."""
    y, pull = jax.vjp(functools.partial(aggregate, edges), weights, x)
    return (y, *pull(gradient))


@pytest.mark.parametrize("name", CASES)
def test_product_and_gradients(name):
    edges = CASES[name]
    given = operands(edges)
    for ours, theirs in zip(
        jax.jit(with_gradients)(edges, *given), expected(edges, *given), strict=True
    ):
        near(ours, theirs)


@pytest.mark.parametrize("name", ["some", "duplicates"])
def test_without_jit_and_without_weights(name):
    edges = CASES[name]
    weights, x, gradient = operands(edges)
    for ours, theirs in zip(
        with_gradients(edges, weights, x, gradient),
        expected(edges, weights, x, gradient),
        strict=True,
    ):
        near(ours, theirs)
    near(aggregate(edges, None, x), expected(edges, np.ones(len(weights)), x, gradient)[0])


@pytest.mark.parametrize("name", ["duplicates", "more senders", "no edges"])
def test_both_forms_of_the_product_are_one(name):
    edges = CASES[name]
    weights, x, _ = operands(edges)
    parts = (edges.starts, edges.receivers, edges.senders, weights, x)
    near(by_rows(*parts), by_values(*parts))


def test_a_cpu_runs_the_native_product_both_ways():
    edges = CASES["some"]
    given = operands(edges)
    program = jax.jit(with_gradients).lower(edges, *given).compile().as_text()
    assert program.count("cpu_csr_sparse_dense") >= 2 and "scatter" not in program


def test_nothing_of_the_size_of_a_graph_becomes_a_constant():
    edges = CASES["some"]
    constants = jax.make_jaxpr(with_gradients)(edges, *operands(edges)).consts
    assert not any(np.size(constant) >= edges.num_nodes for constant in constants)


def test_a_second_graph_of_the_same_sizes_compiles_nothing():
    first = CASES["some"]
    second = Graph.make(*drawn(7, 20, 9, 9), nodes=9)
    run = jax.jit(with_gradients)
    run(first, *operands(first))
    with counted() as count:
        found = run(second, *operands(second))
    assert count.programs == 0
    near(found[0], expected(second, *operands(second))[0])


@pytest.mark.parametrize("axes", [(None, None, 0), (None, 0, None), (None, 0, 0), (0, 0, 0)])
def test_members(axes):
    graphs = [CASES["some"], Graph.make(*drawn(7, 20, 9, 9), nodes=9)]
    given = operands(graphs[0], members=(2,))
    is_one = [axis is None for axis in axes]
    edges = graphs[0] if is_one[0] else jax.tree.map(lambda *a: jnp.stack(a), *graphs)
    chosen = [a[0] if one else a for a, one in zip(given[:2], is_one[1:], strict=True)]
    found = jax.vmap(with_gradients, (*axes, 0))(edges, *chosen, given[2])
    for i in range(2):
        own = [a[0] if one else a[i] for a, one in zip(given[:2], is_one[1:], strict=True)]
        graph = graphs[0] if is_one[0] else graphs[i]
        for ours, theirs in zip(found, expected(graph, *own, given[2][i]), strict=True):
            near(ours[i], theirs)


def test_members_of_x_are_columns_of_one_native_product():
    edges = CASES["some"]
    weights, x, _ = operands(edges, members=(3,))
    run = jax.jit(jax.vmap(aggregate, (None, None, 0)))
    text = run.lower(edges, weights[0], x).as_text()
    assert text.count("custom_call") == 1 and "while" not in text


def test_gradients_of_gradients():
    edges = CASES["some"]
    weights, x, _ = operands(edges)

    def by_matrix(weights, x):
        shape = (edges.num_receivers, edges.num_senders)
        return jnp.zeros(shape).at[edges.receivers, edges.senders].add(weights) @ x

    def curved(product):
        first = jax.grad(lambda w, x: jnp.sin(product(w, x)).sum(), (0, 1))
        return jax.grad(lambda w, x: sum(jnp.sum(g**3) for g in first(w, x)), (0, 1))

    ours = curved(functools.partial(aggregate, edges))(weights, x)
    for a, b in zip(ours, curved(by_matrix)(weights, x), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())  # cubes of sums


@pytest.mark.parametrize("spec", [("dp",), (None, "dp")])
def test_on_a_mesh_a_graph_is_whole_and_x_may_be_cut(spec):
    edges = Graph.make(*drawn(6, 30, 8, 8), nodes=8)
    random = np.random.default_rng(0)
    x, gradient = jnp.asarray(random.normal(size=(2, 8, 4)), jnp.float32)
    weights = jnp.asarray(random.normal(size=30), jnp.float32)
    mesh = make_mesh((4,), ("dp",), devices=jax.devices()[:4])
    cut, whole = (NamedSharding(mesh, PartitionSpec(*s)) for s in (spec, ()))
    placed = jax.device_put((edges, weights), whole), jax.device_put(x, cut)
    found = jax.jit(with_gradients)(*placed[0], placed[1], gradient)
    for ours, theirs in zip(found, expected(edges, weights, x, gradient), strict=True):
        near(ours, theirs)


@pytest.mark.parametrize("edges", [PIECE - 1, PIECE, PIECE + 1, 2 * PIECE + 7])
def test_the_sampled_product_in_pieces(edges):
    graph = Graph.make(*drawn(5, edges, 30, 30), nodes=30)
    a, b = (jax.random.normal(jax.random.key(i), (30, 4)) for i in range(2))
    near(sampled(graph, a, b), np.asarray(a @ b.T)[graph.receivers, graph.senders])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_lower_dtypes_are_summed_in_float32_and_rounded_once(dtype):
    # 1 + 300 * 2^-8: added up in bfloat16 it would stay 1.
    graph = Graph.make(np.arange(301), np.zeros(301, int), nodes=301)
    x = jnp.full((301, 1), 2.0**-8, dtype).at[0].set(1)
    y = aggregate(graph, None, x)
    assert y.dtype == dtype and float(y[0, 0]) == float(dtype(1 + 300 / 256))
    weights = jnp.ones(301)
    of_weights, of_x = jax.grad(lambda w, x: aggregate(graph, w, x).sum(), (0, 1))(weights, x)
    assert of_weights.dtype == jnp.float32 and of_x.dtype == dtype


@pytest.mark.parametrize(
    ("weights", "x", "said"),
    [
        (None, jnp.ones((8, 2)), r"x is float32\[8, 2\]; floats are accepted, \[9, …\] for 9"),
        (None, jnp.ones((10, 2)), "x is"),
        (None, jnp.ones((9, 2), jnp.int32), "x is int32"),
        (None, jnp.ones((9, 2, 2)), "vmap"),
        (jnp.ones(19), jnp.ones((9, 2)), r"weights is float32\[19\].*20 edges"),
        (jnp.ones((20, 2)), jnp.ones((9, 2)), "vmap"),
        (jnp.ones(20, jnp.int32), jnp.ones((9, 2)), "weights is int32"),
    ],
)
def test_operands_that_do_not_fit_are_refused(weights, x, said):
    plain = getattr(aggregate, "__wrapped__", aggregate)  # without the shape checks of the tests
    with pytest.raises(FFNLabError, match=said):
        plain(CASES["some"], weights, x)
