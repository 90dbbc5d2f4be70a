"""The plain feed-forward network against NumPy."""

import jax
import numpy as np
import pytest

from ffnlab.errors import ConfigError
from ffnlab.layers import MLP


@pytest.mark.parametrize("bias", [True, False])
def test_it_is_numpy_s(key, bias):
    net = MLP([5, 7, 6, 3], key=key, activation="tanh", bias=bias)
    x = np.asarray(jax.random.normal(key, (4, 5)))
    h = x
    for i, linear in enumerate(net.maps):
        h = h @ np.asarray(linear.weight.dense()) + (linear.bias if bias else 0)
        h = np.tanh(h) if i < 2 else h
    np.testing.assert_allclose(net(jax.numpy.asarray(x)), h, rtol=1e-5, atol=1e-6)
    assert len(jax.tree.leaves(net)) == (6 if bias else 3)


@pytest.mark.parametrize("name", ["prelu", "srelu"])
def test_units_that_learn_stand_behind_hidden_maps(key, name):
    net = MLP([5, 7, 6, 3], key=key, activation=name)
    x = np.asarray(3 * jax.random.normal(key, (4, 5)))
    assert len(net.units) == 2
    for i, unit in enumerate(net.units):
        if name == "prelu":
            unit.slope[...] = jax.numpy.array([0.1 * (i + 1)])
        else:
            unit.end[...], unit.slope[...] = jax.numpy.array([0.5]), jax.numpy.array([2.0 + i])
    h = x
    for i, linear in enumerate(net.maps):
        h = h @ np.asarray(linear.weight.dense()) + linear.bias
        if i < 2 and name == "prelu":
            h = np.where(h >= 0, h, 0.1 * (i + 1) * h)
        elif i < 2:
            h = np.where(h < 0, 0, np.where(h < 0.5, h, 0.5 + (2.0 + i) * (h - 0.5)))
    np.testing.assert_allclose(net(jax.numpy.asarray(x)), h, rtol=1e-5, atol=1e-5)
    grads = jax.grad(lambda net: net(jax.numpy.asarray(x)).sum())(net)
    assert all(np.abs(unit.slope[...]).max() > 0 for unit in grads.units)
    assert MLP([5, 3], key=key, activation=name).stages and MLP([5, 3], key=key).units is None


def test_entries_have_the_deviation_asked_for(key):
    for std, found in ((None, np.sqrt(2 / 200)), (0.1, 0.1), (0.0, 0.0)):
        net = MLP([200, 300], key=key, std=std)
        assert float(np.std(net.maps[0].weight.dense())) == pytest.approx(found, rel=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": [3]}, r"sizes=\[3\]"),
        ({"sizes": [3, 0]}, "positive"),
        ({"sizes": [3, 2], "activation": "step"}, "'step' is not one of"),
    ],
)
def test_refusals(key, options, message):
    with pytest.raises(ConfigError, match=message):
        MLP(**options, key=key)


def test_an_initializer_draws_every_map(key):
    init = jax.nn.initializers.orthogonal()
    net = MLP([6, 6, 6], key=key, init=init)
    for linear, k in zip(net.maps, jax.random.split(key, 2), strict=True):
        np.testing.assert_array_equal(linear.weight.dense(), init(k, (6, 6)))
    with pytest.raises(ConfigError, match="std=0.1 and init"):
        MLP([6, 6], key=key, init=init, std=0.1)
