"""Normalization against formulas in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.layers import LayerNorm, RMSNorm
from tests.contracts import input_of


def test_rms_norm_formula_and_offset():
    x = input_of((3, 16)) * 5
    gain = jnp.linspace(-1, 1, 16)
    for offset in (0.0, 1.0):
        norm = RMSNorm(16, eps=1e-3, offset=offset)
        norm.scale.set_value(gain)
        x64 = np.asarray(x, np.float64)
        expected = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-3) * (offset + gain)
        np.testing.assert_allclose(norm(x), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(RMSNorm(16, offset=1.0)(x), RMSNorm(16)(x), rtol=1e-6)


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm_is_its_formula(scale, bias):
    # A mean of 100 deviations: the formula with squares less the squared mean is off by 1e-3.
    x = input_of((3, 5, 16)) * 0.1 + 10
    norm = LayerNorm(16, eps=1e-3, scale=scale, bias=bias)
    assert (norm.scale is not None, norm.bias is not None) == (scale, bias)
    x64 = np.asarray(x, np.float64)
    expected = (x64 - x64.mean(-1, keepdims=True)) / np.sqrt(x64.var(-1, keepdims=True) + 1e-3)
    # Float32 has 1e-6 of ten, a hundred thousandth of a deviation.
    np.testing.assert_allclose(norm(x), expected, atol=2e-5)
    gain, shift = np.linspace(-1, 1, 16), np.linspace(2, 3, 16)
    if scale:
        norm.scale.set_value(jnp.asarray(gain, jnp.float32))
        expected = expected * gain
    if bias:
        norm.bias.set_value(jnp.asarray(shift, jnp.float32))
        expected = expected + shift
    np.testing.assert_allclose(norm(x), expected, atol=2e-5)


def test_layer_norm_is_computed_in_float32():
    norm = LayerNorm(64, dtype=jnp.bfloat16)
    x = (input_of((4, 64)) + 8).astype(jnp.bfloat16)
    assert norm(x).dtype == jnp.bfloat16
    exact = LayerNorm(64)(x.astype(jnp.float32)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(norm(x), exact)
