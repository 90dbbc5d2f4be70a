"""Sums, means, maxima and softmax over the edges of each receiver, one receiver at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.errors import FFNLabError
from ffnlab.graph import segment_max, segment_mean, segment_softmax, segment_sum
from tests.graph_cases import CASES

TOLERANCE = 1e-6  # sums of a dozen float32 numbers


def values_of(edges, shape=(3,)):
    return jax.random.normal(jax.random.key(0), (edges.num_edges, *shape)) * 5


def rows(edges, values):
    """The values of each receiver's edges, in float64."""
    values, receivers = np.asarray(values, np.float64), np.asarray(edges.receivers)
    return [values[receivers == i] for i in range(edges.num_receivers)]


DEFINITIONS = {
    segment_sum: lambda own: own.sum(0),
    segment_mean: lambda own: own.mean(0) if len(own) else np.zeros(own.shape[1:]),
    segment_max: lambda own: own.max(0) if len(own) else np.zeros(own.shape[1:]),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("segment", DEFINITIONS)
def test_against_the_definition(segment, name):
    edges = CASES[name]
    for shape in ((), (3,)):
        values = values_of(edges, shape)
        found = segment(edges, values)
        assert found.shape == (edges.num_receivers, *shape)
        for ours, own in zip(found, rows(edges, values), strict=True):
            np.testing.assert_allclose(
                ours, DEFINITIONS[segment](own), rtol=TOLERANCE, atol=10 * TOLERANCE
            )


@pytest.mark.parametrize("name", CASES)
def test_softmax(name):
    edges = CASES[name]
    scores = values_of(edges) + 200  # exp of it overflows
    parts = [np.exp(own - own.max(0)) for own in rows(edges, scores) if len(own)]
    expected = np.concatenate([np.zeros((0, 3)), *(p / p.sum(0) for p in parts)])
    found = segment_softmax(edges, scores)
    np.testing.assert_allclose(found, expected, rtol=1e-4)  # float32 scores of 200: 2e-5 apart


def test_softmax_of_scores_that_are_masked():
    edges = CASES["some"]
    receiver = int(edges.receivers[0])
    scores = jnp.where((edges.receivers == receiver) | (edges.senders == 3), -jnp.inf, 1.0)
    found = segment_softmax(edges, scores)
    assert not found[edges.receivers == receiver].any() and not found[edges.senders == 3].any()
    totals = segment_sum(edges, found)
    left = segment_max(edges, jnp.isfinite(scores).astype(jnp.float32))
    np.testing.assert_allclose(totals, left, rtol=TOLERANCE)
    gradient = jax.grad(lambda s: (segment_softmax(edges, s) ** 2).sum())(scores)
    assert np.isfinite(gradient).all()


def test_the_gradient_of_softmax_is_that_of_its_definition():
    edges = CASES["some"]
    scores, pull = values_of(edges, ()), values_of(edges, ())[::-1]
    found = jax.grad(lambda s: segment_softmax(edges, s) @ pull)(scores)
    p = np.asarray(segment_softmax(edges, scores), np.float64)
    drift = np.asarray(segment_sum(edges, jnp.asarray(p * pull, jnp.float32)))
    expected = p * (pull - drift[edges.receivers])  # (diag(p) - p p') pull, receiver by receiver
    np.testing.assert_allclose(found, expected, atol=10 * TOLERANCE)


@pytest.mark.parametrize("segment", [*DEFINITIONS, segment_softmax])
def test_dtypes_are_kept_and_misfits_refused(segment):
    edges = CASES["some"]
    values = values_of(edges).astype(jnp.bfloat16)
    found = segment(edges, values)
    assert found.dtype == jnp.bfloat16
    exact = segment(edges, values.astype(jnp.float32)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(found.astype(jnp.float32), exact.astype(jnp.float32))
    plain = getattr(segment, "__wrapped__", segment)  # without the shape checks of the tests
    for wrong in (values[1:], jnp.ones(20, jnp.int32), jnp.float32(1)):
        with pytest.raises(FFNLabError, match="20 edges"):
            plain(edges, wrong)
