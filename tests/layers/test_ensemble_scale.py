"""Weights of paths: sums, masks, and what is no weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.errors import ConfigError
from ffnlab.layers import EnsembleScale
from ffnlab.layers.ensemble_scale import weighted_sum

C = jax.random.normal(jax.random.key(0), (5, 2, 3, 4))
MASK = np.array([1, 0, 1, 1, 0])


def test_sums_are_those_of_every_path():
    vectors = jax.random.uniform(jax.random.key(1), (5, 4))
    scalars = vectors[:, 0]
    for scale in (None, scalars, vectors):
        layer = EnsembleScale(MASK, scale)
        weight = np.ones((5, 1)) if scale is None else np.reshape(scale, (5, -1))
        want = sum(MASK[j] * weight[j] * np.asarray(C[j], np.float64) for j in range(5))
        np.testing.assert_allclose(layer(C), want, atol=1e-5)
        first, rest = layer.weights(2, 2)
        shape = () if scale is None or scale.ndim == 1 else (4,)
        assert first.shape == shape and rest.shape == (2, 2, *shape)
        again = jnp.concatenate([first[None], rest.reshape(4, *shape)])
        np.testing.assert_array_equal(again, layer.values)
    assert layer.scale.axes == (None, "embed") and layer.kept.dtype == jnp.float32


def test_sums_of_bfloat16_are_added_up_in_float32():
    parts = jnp.full((300, 1), 1.0, jnp.bfloat16)  # which bfloat16 itself counts to 256
    found = weighted_sum(parts, jnp.ones(300))
    assert found.dtype == jnp.bfloat16 and float(found[0]) == 300.0


@pytest.mark.parametrize(
    ("kept", "scale", "message"),
    [
        (np.ones((2, 2)), None, "numbers 0 and 1"),
        (np.array([1.0, 0.5]), None, "numbers 0 and 1"),
        (np.array([1.0, np.nan]), None, "numbers 0 and 1"),
        (np.zeros(3), None, "0 for all 3 paths"),
        (np.ones(3), np.ones(4), "for 3 paths"),
        (np.ones(3), np.ones((3, 2, 2)), "for 3 paths"),
        (np.ones(3), np.array([1.0, -0.1, 1.0]), "allow_negative=True"),
        (np.ones(3), np.array([1.0, np.nan, 1.0]), "allow_negative=True"),
    ],
)
def test_what_is_no_weight_is_refused(kept, scale, message):
    with pytest.raises(ConfigError, match=message):
        EnsembleScale(kept, None if scale is None else jnp.asarray(scale))


def test_negative_weights_are_taken_where_they_are_allowed():
    layer = EnsembleScale(np.ones(2), jnp.array([1.0, -2.0]), allow_negative=True)
    np.testing.assert_array_equal(layer.values, [1.0, -2.0])
    with pytest.raises(ConfigError, match="2 paths; 3 layers of 2 sublayers are 7"):
        layer.weights(3, 2)
