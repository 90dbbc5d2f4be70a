"""Rows of nodes at edges and values of edges at nodes, beside NumPy, with their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.errors import FFNLabError
from ffnlab.graph import at_receivers, at_senders, collected
from tests.graph_cases import CASES

TOLERANCE = 1e-5  # float32 sums of a few dozen terms in another order


def rows(seed, *shape):
    """Numbers in float32."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def dense(edges, side):
    """[e, nodes] with a 1 where an edge begins, or ends."""
    count = edges.num_senders if side == "senders" else edges.num_receivers
    found = np.zeros((edges.num_edges, count))
    found[np.arange(edges.num_edges), np.asarray(getattr(edges, side))] = 1
    return found


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("side", ["senders", "receivers"])
def test_rows_come_to_edges_and_their_gradients_back(name, side):
    edges, take = CASES[name], {"senders": at_senders, "receivers": at_receivers}[side]
    matrix = dense(edges, side)
    x, g = rows(0, matrix.shape[1], 3), rows(1, edges.num_edges, 3)
    found, pull = jax.vjp(lambda x: take(edges, x), x)
    np.testing.assert_allclose(found, matrix @ np.asarray(x), atol=TOLERANCE)
    np.testing.assert_allclose(pull(g)[0], matrix.T @ np.asarray(g), atol=TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_values_are_collected_and_their_gradients_come_back(name):
    edges = CASES[name]
    matrix = dense(edges, "receivers").T
    w, v = rows(0, edges.num_edges), rows(1, edges.num_edges, 3)
    g = rows(2, edges.num_receivers, 3)
    np.testing.assert_allclose(collected(edges, v), matrix @ np.asarray(v), atol=TOLERANCE)
    found, pull = jax.vjp(lambda w, v: collected(edges, v, w), w, v)
    weighed = np.asarray(w)[:, None] * np.asarray(v)
    np.testing.assert_allclose(found, matrix @ weighed, atol=TOLERANCE)
    there = matrix.T @ np.asarray(g)
    of_w, of_v = pull(g)
    np.testing.assert_allclose(of_w, (there * np.asarray(v)).sum(1), atol=TOLERANCE)
    np.testing.assert_allclose(of_v, there * np.asarray(w)[:, None], atol=TOLERANCE)


def test_members_are_as_one_by_one():
    edges = CASES["more senders"]
    v, w = rows(0, 4, edges.num_edges, 3), rows(1, 4, edges.num_edges)
    for axes in ((0, 0), (0, None), (None, 0)):
        given = [a if axis == 0 else a[0] for a, axis in zip((v, w), axes, strict=True)]
        together = jax.vmap(lambda v, w: collected(edges, v, w), axes)(*given)
        for i in range(4):
            one = [a[i] if axis == 0 else a for a, axis in zip(given, axes, strict=True)]
            np.testing.assert_allclose(together[i], collected(edges, *one), atol=TOLERANCE)


def test_narrow_values_are_summed_wide():
    edges, v = CASES["duplicates"], rows(0, CASES["duplicates"].num_edges, 2)
    narrow = v.astype(jnp.bfloat16)
    found = collected(edges, narrow)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        found, collected(edges, narrow.astype(jnp.float32)).astype(jnp.bfloat16)
    )
    assert at_senders(edges, rows(1, 3, 2).astype(jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("take", "given", "message"),
    [
        (at_senders, (jnp.ones((4, 2)),), r"x is float32\[4, 2\].*11 senders"),
        (collected, (jnp.ones((3, 2)),), "25 edges"),
    ],
)
def test_bad_input(take, given, message):
    with pytest.raises(FFNLabError, match=message):
        take(CASES["more senders"], *given)
