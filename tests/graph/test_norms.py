"""Normalizations against their matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.graph import Graph, row_norm, symmetric_norm
from tests.graph_cases import CASES, matrix

TOLERANCE = 1e-6


def weights_of(edges):
    """None, and drawn weights with all edges of one receiver at 0."""
    drawn = jax.random.uniform(jax.random.key(1), (edges.num_edges,))
    return [None, drawn * (edges.receivers != 0)]


@pytest.mark.parametrize("name", [name for name, e in CASES.items() if isinstance(e, Graph)])
def test_symmetric(name):
    graph = CASES[name]
    for weights in weights_of(graph):
        dense = matrix(graph, weights)
        degree = dense.sum(1)
        root = np.where(degree > 0, np.where(degree > 0, degree, 1) ** -0.5, 0)
        found = matrix(graph, jax.jit(symmetric_norm)(graph, weights))
        np.testing.assert_allclose(found, root[:, None] * dense * root, rtol=TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_rows_sum_to_one(name):
    edges = CASES[name]
    for weights in weights_of(edges):
        dense = matrix(edges, weights)
        degree = dense.sum(1, keepdims=True)
        found = matrix(edges, jax.jit(row_norm)(edges, weights))
        np.testing.assert_allclose(found, dense / np.where(degree > 0, degree, 1), rtol=TOLERANCE)


@pytest.mark.parametrize("norm", [symmetric_norm, row_norm])
def test_gradients_of_weights_are_finite_where_a_receiver_has_none(norm):
    graph = CASES["some"]
    weights = weights_of(graph)[1]
    gradient = jax.grad(lambda w: (norm(graph, w) ** 2).sum())(weights)
    assert np.isfinite(gradient).all() and gradient.any()
    assert norm(graph, jnp.ones(20, jnp.bfloat16)).dtype == jnp.bfloat16
