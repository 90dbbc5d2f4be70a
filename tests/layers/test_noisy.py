"""A chain with noise: without a key the chain, with one noise of the size that is asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.errors import ConfigError
from ffnlab.layers import MLP, Linear, Noisy
from ffnlab.models import ConvNetConfig


def test_without_a_key_it_is_the_network():
    net = MLP((3, 5, 2), key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (7, 3))
    assert np.array_equal(Noisy(net, 0.5)(x), net(x))
    assert np.array_equal(Noisy(net, 0.0)(x, jax.random.key(2)), net(x))
    assert len(Noisy(net).stages) == 2


@pytest.mark.parametrize("relative", [True, False])
def test_noise_has_the_size_that_is_asked_for(relative):
    net = MLP((2, 2), key=jax.random.key(0))
    net = jax.tree.map(lambda leaf: jnp.eye(2) if leaf.ndim == 2 else jnp.zeros(2), net)
    x = jnp.tile(jnp.array([[0.0, -4.0]]), (20_000, 1))
    y = Noisy(net, 0.1, relative=relative)(x, jax.random.key(3))
    assert y.mean(0) == pytest.approx([0, -4], abs=0.02)
    assert y.std(0) == pytest.approx([0, 0.4] if relative else [0.1, 0.1], rel=0.03)


def test_every_stage_has_noise_of_its_own():
    net = MLP((4, 4, 4), key=jax.random.key(0))
    net = jax.tree.map(lambda leaf: jnp.eye(4) if leaf.ndim == 2 else jnp.zeros(4), net)
    x = jnp.full((5000, 4), 10.0)
    y = Noisy(net, 0.1, relative=False)(x, jax.random.key(1))
    assert y.std() == pytest.approx(0.1 * 2**0.5, rel=0.03)  # of two stages
    assert not np.array_equal(y, Noisy(net, 0.1, relative=False)(x, jax.random.key(2)))


def test_a_convolutional_network_takes_noise():
    net = ConvNetConfig((1, 3, 4), 5).make(key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (6, 4, 4, 1))
    y = Noisy(net, 1e-3)(x, jax.random.key(2))
    assert y.shape == (6, 5) and 0 < jnp.abs(y - net(x)).max() < 0.1


def test_bad_input_is_named():
    with pytest.raises(ConfigError, match="a Linear has no stages; an MLP or a ConvNet has"):
        Noisy(Linear(2, 2, key=jax.random.key(0), axes=("embed", "mlp")))
    with pytest.raises(ConfigError, match="sigma=-0.1 must be >= 0"):
        Noisy(MLP((2, 2), key=jax.random.key(0)), -0.1)
