"""The table of nonlinearities against their formulas in NumPy, and parametric ReLU."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.errors import ConfigError
from ffnlab.layers import ACTIVATIONS, MLP, GatedFFN, PReLU
from ffnlab.layers.activations import check_activation

FORMULAS = {
    "abs": np.abs,
    "elu": lambda x: np.where(x > 0, x, np.exp(np.minimum(x, 0)) - 1),
    "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "identity": lambda x: x,
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
    "relu": lambda x: np.maximum(x, 0),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "softplus": lambda x: np.log1p(np.exp(x)),
    "tanh": np.tanh,
}
# Float32 rounding of values of about one; the two forms of gelu are 5e-4 apart.
ATOL = 2e-6
X = np.linspace(-6, 6, 97)


def test_every_name_has_a_formula():
    assert ACTIVATIONS.keys() == FORMULAS.keys()


@pytest.mark.parametrize("name", FORMULAS)
def test_a_name_is_its_formula(name):
    for dtype in (jnp.float32, jnp.bfloat16):
        assert ACTIVATIONS[name](jnp.ones(3, dtype)).dtype == dtype
    y = ACTIVATIONS[name](jnp.asarray(X, jnp.float32))
    np.testing.assert_allclose(y, FORMULAS[name](X), rtol=1e-6, atol=ATOL)


@pytest.mark.parametrize("name", FORMULAS)
def test_an_mlp_and_a_gated_network_mean_the_same_by_a_name(name, key):
    x = jax.random.normal(key, (6, 4))
    mlp = MLP((4, 5, 3), key=key, activation=name)
    hidden, out = mlp.maps
    np.testing.assert_array_equal(mlp(x), out(ACTIVATIONS[name](hidden(x))))
    ffn = GatedFFN(4, 5, key=key, activation=name)
    np.testing.assert_array_equal(ffn(x), ffn.down(ACTIVATIONS[name](ffn.gate(x)) * ffn.up(x)))


def test_an_unknown_name_is_refused():
    with pytest.raises(ConfigError, match=r"activation='swish' is not one of \['abs', 'elu', "):
        check_activation("swish")


@pytest.mark.parametrize("channels", [1, 3])
def test_a_parametric_relu_has_a_slope_below_zero(channels):
    layer = PReLU(channels)
    x = jnp.array([[-2.0, 0.0, 4.0], [3.0, -8.0, -1.0]])
    np.testing.assert_array_equal(layer(x), [[-0.5, 0, 4], [3, -2, -0.25]])
    if channels == 3:
        layer.slope.set_value(jnp.array([1.0, -1.0, 0.0]))
        np.testing.assert_array_equal(layer(x), [[-2, 0, 4], [3, 8, 0]])


def test_the_slope_s_gradient_is_the_sum_of_what_is_below_zero():
    layer = PReLU(2)
    x = jnp.array([[-2.0, 5.0], [-3.0, -7.0]])
    gradient = jax.grad(lambda layer: layer(x).sum())(layer)
    np.testing.assert_array_equal(gradient.slope.get_value(), [-5, -7])
