"""Dropout: what is kept, how it is scaled, and that a key is all that it remembers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.errors import ConfigError
from ffnlab.layers import dropout

X = jnp.full((200, 100), 3.0)


def test_without_a_key_it_is_the_input():
    assert dropout(X, 0.9, None) is X
    np.testing.assert_array_equal(dropout(X, 0.0, jax.random.key(1)), X)


@pytest.mark.parametrize("rate", [0.2, 0.75])
def test_kept_entries_are_scaled_and_the_share_is_right(rate, key):
    y = np.asarray(dropout(X, rate, key))
    dropped = (y == 0).mean()
    # Five standard errors of 20,000 draws.
    assert abs(dropped - rate) < 5 * np.sqrt(rate * (1 - rate) / y.size)
    np.testing.assert_allclose(y[y != 0], 3 / (1 - rate), rtol=1e-6)


def test_a_key_is_a_draw(key):
    first, other = (dropout(X, 0.5, k) for k in jax.random.split(key))
    np.testing.assert_array_equal(dropout(X, 0.5, jax.random.split(key)[0]), first)
    assert 0.4 < (first == other).mean() < 0.6


def test_a_rate_of_one_drops_all_and_has_a_gradient(key):
    run = jax.jit(lambda x, rate: dropout(x, rate, key))
    for rate in (1.0, jnp.float32(1.0)):
        np.testing.assert_array_equal(dropout(X, rate, key), 0)
        np.testing.assert_array_equal(jax.grad(lambda x: run(x, rate).sum())(X), 0)  # noqa: B023
    np.testing.assert_array_equal(run(X, 0.5), dropout(X, 0.5, key))


def test_dtype_follows_the_input(key):
    assert dropout(X.astype(jnp.bfloat16), 0.5, key).dtype == jnp.bfloat16
    assert dropout(X.astype(jnp.bfloat16), jnp.float32(0.5), key).dtype == jnp.bfloat16


def test_refusals(key):
    for rate in (-0.1, 1.5):
        with pytest.raises(ConfigError, match=r"must lie in 0\.\.1"):
            dropout(X, rate, key)
        with pytest.raises(ConfigError, match=r"must lie in 0\.\.1"):
            dropout(X, rate, None)
