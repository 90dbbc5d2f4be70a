"""Activations rounded to e4m3: the same value with and without a gradient, which passes through."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.weights import fake_e4m3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_differentiated_it_rounds_as_it_does_alone(dtype, key):
    x, weight = jax.random.normal(key, (2, 3, 8)).astype(dtype)
    x = x.at[1].set(0)
    wanted = fake_e4m3(x)
    assert wanted.dtype == dtype and (np.asarray(wanted) != x).any()
    value, pull = jax.vjp(fake_e4m3, x)
    np.testing.assert_array_equal(value, wanted)
    np.testing.assert_array_equal(pull(weight)[0], weight)


def test_rounds_each_row_by_its_largest():
    """17 lies between 16 and 18, 100 between 96 and 104; a small row has steps as small."""
    x = jnp.array([[448.0, 17.0, -100.0], [0.875, 17 / 512, -0.1953125]])
    np.testing.assert_array_equal(fake_e4m3(x)[0], [448, 16, -96])
    np.testing.assert_array_equal(fake_e4m3(x)[1] * 512, fake_e4m3(x)[0])
