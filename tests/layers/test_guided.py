"""A guided map is the mixture of its two, and does not compute what does not run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ffnlab.errors import ConfigError
from ffnlab.layers import Guided, Linear
from ffnlab.models import account
from ffnlab.weights import Dense, LowRank


def linear(key, bias=True):
    """A map of rank 2."""
    weight = LowRank.truncate(jax.random.normal(key, (6, 4)), 2)
    return Linear.of(weight, jnp.arange(4.0) if bias else None, axes=("embed", "mlp"))


def other(key):
    """A guide that is another matrix."""
    return Dense(jax.random.normal(jax.random.fold_in(key, 1), (6, 4)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_shares_add_up_and_the_bias_is_whole(alpha, bias, key):
    x = jax.random.normal(key, (3, 6))
    layer = Guided(linear(key, bias), other(key), alpha=alpha)
    dense, thin = (np.float64(w.dense()) for w in (layer.guide.weight, layer.linear.weight))
    want = np.float64(x) @ (alpha * dense + (1 - alpha) * thin) + bias * np.arange(4)
    np.testing.assert_allclose(layer(x), want, atol=1e-5)


def test_without_a_share_or_told_so_it_is_the_map_alone(key):
    x, alone = jax.random.normal(key, (3, 6)), linear(key)
    wild = Dense(jnp.full((6, 4), jnp.nan))  # were it computed, it would be seen
    half = Guided(alone, wild, alpha=0.5)
    for layer in (Guided(alone, wild, alpha=0.0), half.told(jnp.float32(0.5), jnp.array(False))):
        np.testing.assert_array_equal(layer(x), alone(x))
    assert np.isnan(half(x)).all()
    assert np.isnan(half.told(jnp.float32(0), jnp.array(True))(x)).all()
    assert half.told(jnp.float32(0.2), None).running is None


def test_it_begins_as_what_it_guides(key):
    x = jax.random.normal(key, (3, 6))
    np.testing.assert_allclose(Guided(linear(key))(x), linear(key)(x), atol=1e-6)


def test_its_work_is_that_of_both_by_the_share_of_runs(key):
    layers = nnx.List([Guided(linear(key))])
    thin, dense = 2 * 2 * 10, 2 * 24
    assert account.flops_per_token(layers, 1) == thin + dense
    assert account.flops_per_token(layers, 1, zeros={"[0]": 0.5}) == thin + dense / 2


def test_bad_parts(key):
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match=f"alpha={alpha} must lie in 0..1"):
            Guided(linear(key), alpha=alpha)
    with pytest.raises(ConfigError, match=r"guide is \(4, 6\), the map \(6, 4\)"):
        Guided(linear(key), other(key).transpose())
