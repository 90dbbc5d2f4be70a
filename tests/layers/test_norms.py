"""Normalization against formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.errors import ConfigError
from ffnlab.layers import GroupNorm, InstanceNorm, LayerNorm, RMSNorm, ScaleNorm
from tests.contracts import input_of
from tests.fixtures.layers import record

ATOL = 1e-5  # float32 against float64, of values of about one


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


@pytest.fixture(scope="module")
def expected(fixtures):
    return np.load(fixtures / "layers" / "expected.npz")


@pytest.mark.parametrize("name", record.GROUP_NORMS)
def test_group_norm_is_torch_s(name, expected):
    shape, groups = record.GROUP_NORMS[name]
    x, gain, shift = (
        jnp.asarray(record.normal(*s, seed=i), jnp.float32)
        for i, s in enumerate([shape, shape[-1:], shape[-1:]])
    )
    norms = [GroupNorm(shape[-1], groups, eps=record.EPS)]
    norms += [InstanceNorm(shape[-1], eps=record.EPS)] if name == "instance" else []
    for norm in norms:
        norm.scale.set_value(gain)
        norm.bias.set_value(shift)
        np.testing.assert_allclose(norm(x), expected[f"group_norm/{name}"], atol=ATOL)


def test_groups_are_neighbours_and_examples_are_apart():
    x = np.array(input_of((2, 3, 4)))
    y = GroupNorm(4, 2)(jnp.asarray(x))
    np.testing.assert_allclose(y.reshape(2, 3, 2, 2).mean((1, 3)), 0, atol=ATOL)
    x[0, :, :2] += 5.0
    moved = GroupNorm(4, 2)(jnp.asarray(x))
    np.testing.assert_allclose(moved, y, atol=ATOL)  # a shift of a group is nothing to it


def test_one_group_without_a_grid_is_layer_norm():
    x = input_of((5, 16))
    np.testing.assert_allclose(GroupNorm(16, 1)(x), LayerNorm(16)(x), atol=ATOL)
    with pytest.raises(ConfigError, match="groups=3 must divide the 16 channels"):
        GroupNorm(16, 3)


def test_a_channel_of_one_position_becomes_its_bias():
    norm = InstanceNorm(3, bias=True)
    norm.bias.set_value(jnp.array([1.0, 2.0, 3.0]))
    np.testing.assert_array_equal(norm(input_of((2, 1, 3))), [[[1, 2, 3]], [[1, 2, 3]]])


def test_scale_norm_is_its_formula_and_finite_at_zero():
    x = input_of((3, 16))
    norm = ScaleNorm(16)
    x64 = np.asarray(x, np.float64)
    length = np.linalg.norm(x64, axis=-1, keepdims=True)
    np.testing.assert_allclose(norm(x), 4 * x64 / length, atol=ATOL)
    norm.scale.set_value(jnp.float32(0.5))
    np.testing.assert_allclose(norm(x * 1e-7), x64 * 1e-7 / 1e-5 / 2, rtol=1e-5)
    gradient = jax.grad(lambda x: norm(x).sum())(jnp.zeros((1, 16)))
    np.testing.assert_allclose(gradient, 0.5 / 1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "norm", [GroupNorm(64, 4), InstanceNorm(64), ScaleNorm(64), LayerNorm(64)], ids=type
)
def test_norms_are_computed_in_float32(norm):
    x = (input_of((2, 6, 64)) + 8).astype(jnp.bfloat16)
    assert norm(x).dtype == jnp.bfloat16
    np.testing.assert_array_equal(norm(x), norm(x.astype(jnp.float32)).astype(jnp.bfloat16))
