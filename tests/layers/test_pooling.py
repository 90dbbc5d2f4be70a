"""Pooling against torch (recorded)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.errors import ConfigError
from ffnlab.layers import (
    avg_pool,
    global_avg_pool,
    global_max_pool,
    max_pool,
    shifted_max_pool,
)
from tests.contracts import input_of
from tests.fixtures.layers import record


@pytest.fixture(scope="module")
def expected(fixtures):
    return np.load(fixtures / "layers" / "expected.npz")


@pytest.mark.parametrize("name", record.POOLS)
def test_it_is_torch_s(name, expected):
    shape, size, stride, padding = record.POOLS[name]
    x = jnp.asarray(record.normal(*shape), jnp.float32)
    options = {"stride": stride, "padding": padding}
    np.testing.assert_array_equal(max_pool(x, size, **options), expected[f"max_pool/{name}"])
    np.testing.assert_array_equal(
        shifted_max_pool(x, size, **options), expected[f"max_pool/{name}"]
    )
    found = avg_pool(x, size, **options)
    np.testing.assert_allclose(found, expected[f"avg_pool/{name}"], atol=1e-6)


def test_what_lies_beyond_the_edges_counts_as_nothing():
    x = jnp.full((1, 3, 1), -2.0)
    for pool in (max_pool, shifted_max_pool, avg_pool):
        for padding in ("SAME", "causal", 1):
            np.testing.assert_array_equal(pool(x, 2, stride=1, padding=padding), -2.0)


def test_windows_follow_each_other_where_no_stride_is_given():
    x = jnp.arange(12.0).reshape(1, 6, 2)
    np.testing.assert_array_equal(max_pool(x, 3)[0], [[4, 5], [10, 11]])
    np.testing.assert_array_equal(avg_pool(x, 3)[0], [[2, 3], [8, 9]])
    assert max_pool(x, 4).shape == (1, 1, 2)  # a window that does not fit whole is none


def test_the_whole_grid():
    x = input_of((2, 3, 4, 5))
    np.testing.assert_array_equal(global_max_pool(x), np.asarray(x).max((1, 2)))
    np.testing.assert_allclose(global_avg_pool(x), np.asarray(x).mean((1, 2)), atol=1e-6)


def test_means_are_summed_in_float32():
    x = (input_of((1, 512, 2)) + 8).astype(jnp.bfloat16)
    for found in (avg_pool(x, 512)[:, 0], global_avg_pool(x)):
        assert found.dtype == jnp.bfloat16
        exact = np.asarray(x, np.float64).mean(1)
        np.testing.assert_array_equal(found, jnp.asarray(exact, jnp.bfloat16))
    assert max_pool(x, 2).dtype == jnp.bfloat16


def test_gradients_go_to_the_largest_and_to_all_evenly():
    x = jnp.array([[[1.0], [4.0], [3.0], [2.0]]])
    largest = jax.grad(lambda x: (max_pool(x, 2) * jnp.array([[[2.0], [5.0]]])).sum())(x)
    np.testing.assert_array_equal(largest[0, :, 0], [0, 2, 5, 0])
    even = jax.grad(lambda x: avg_pool(x, 2, stride=1, padding="SAME").sum())(x)
    np.testing.assert_allclose(even[0, :, 0], [0.5, 1, 1, 1.5])


def test_refusals():
    x = input_of((1, 4, 4, 2))
    with pytest.raises(ConfigError, match=r"size=\(2,\) must be one positive integer, or 2"):
        max_pool(x, (2,))
    with pytest.raises(ConfigError, match="stride=0"):
        avg_pool(x, 2, stride=0)
    with pytest.raises(ConfigError, match="padding='full'"):
        max_pool(x, 2, padding="full")
    with pytest.raises(ValueError, match="do not fit a grid"):
        max_pool(x, 5)


@pytest.mark.parametrize("pool", [max_pool, shifted_max_pool, avg_pool])
@pytest.mark.parametrize("padding", [3, ((0, 3), (0, 0)), ((1, 1), (3, 0))])
def test_no_window_lies_beyond_the_edges(pool, padding):
    """It would have a maximum of -inf, and the mean of nothing is NaN."""
    x = input_of((1, 2, 4, 1))
    with pytest.raises(ConfigError, match="lies beyond the edges of a grid of .2, 4."):
        pool(x, 3, stride=1, padding=padding)
    for fits, stride in ((2, 1), (((0, 3), (0, 3)), 3), ("SAME", 2)):
        assert np.isfinite(pool(x, 3, stride=stride, padding=fits)).all()


@pytest.mark.parametrize(("size", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (2, 2, "SAME")])
def test_both_maxima_have_one_gradient_away_from_ties(size, stride, padding):
    """It goes to the largest of each window alone: distinct values, and finite differences."""
    x = jax.random.permutation(jax.random.key(0), jnp.arange(2.0 * 5 * 4 * 3) / 7).reshape(
        2, 5, 4, 3
    )
    options = {"stride": stride, "padding": padding}
    weights = jnp.cos(jnp.arange(max_pool(x, size, **options).size, dtype=jnp.float32))

    def total(pool, x):
        return (pool(x, size, **options).reshape(-1) * weights).sum()

    gradients = [jax.grad(lambda x, p=p: total(p, x))(x) for p in (max_pool, shifted_max_pool)]
    np.testing.assert_allclose(*gradients, atol=1e-6)
    step, moved = 0.01, []  # less than half of what separates two values
    for i in range(12):
        e = jnp.zeros(x.size).at[9 * i].set(step).reshape(x.shape)
        change = total(shifted_max_pool, x + e) - total(shifted_max_pool, x - e)
        moved.append(float(change) / (2 * step))
    np.testing.assert_allclose(gradients[1].reshape(-1)[::9][:12], moved, atol=1e-3)


def test_a_tie_is_shared_by_one_and_not_by_the_other():
    x = jnp.ones((1, 2, 1))
    first, shared = (
        jax.grad(lambda x, p=p: p(x, 2).sum())(x) for p in (max_pool, shifted_max_pool)
    )
    assert first.ravel().tolist() == [1, 0] and shared.ravel().tolist() == [0.5, 0.5]
