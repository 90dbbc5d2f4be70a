"""A folded map is the norm and the map, over random statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import weights
from ffnlab.layers import BatchNorm, Conv, FixedAffine, Linear, fold
from tests.contracts import input_of

# Float32 sums in another order, relative to outputs of about ten.
ATOL = 3e-5

CONVS = {
    "same": {"bias": True},
    "strided": {"stride": 2, "padding": "VALID"},
    "grouped": {"groups": 2, "padding": "VALID", "bias": True},
    "depthwise": {"groups": 4, "padding": "VALID", "size": (3,)},
    "pointwise": {"size": 1, "stride": 2},
}


def random_norm(d, key, **options):
    """A norm with random parameters and statistics, variances from .01 to 10."""
    a, b, c, e = (jax.random.normal(k, (d,)) for k in jax.random.split(key, 4))
    norm = BatchNorm(d, eps=1e-3, **options).with_statistics(a, 10 ** jnp.clip(b, -2, 1))
    if norm.scale is not None:
        norm.scale.set_value(c)
    if norm.bias is not None:
        norm.bias.set_value(e)
    return norm


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("plain", [True, False])
def test_linear(seed, plain):
    key = jax.random.key(seed)
    layer = Linear(6, 5, key=key, axes=("embed", "mlp"), bias=not plain)
    if layer.b is not None:
        layer = layer.replace(layer.weight, input_of((5,)))
    options = {"scale": False, "bias": False} if plain else {}
    before, after = random_norm(6, key, **options), random_norm(5, key, **options)
    x = input_of((7, 6))
    np.testing.assert_allclose(fold(layer, after)(x), after(layer(x)), atol=ATOL)
    np.testing.assert_allclose(fold(before, layer)(x), layer(before(x)), atol=ATOL)
    whole = fold(fold(before, layer), after)
    np.testing.assert_allclose(whole(x), after(layer(before(x))), atol=ATOL)
    assert whole.w.axes == layer.w.axes and whole.b.axes == ("mlp",)


@pytest.mark.parametrize("name", CONVS)
def test_conv(name):
    key = jax.random.key(3)
    layer = Conv(4, 8, key=key, **CONVS[name])
    if layer.b is not None:
        layer = layer.replace(layer.weight, input_of((8,)))
    x = input_of((2, *(6,) * len(layer.window.size), 4))
    before, after = random_norm(4, key), random_norm(8, key)
    np.testing.assert_allclose(fold(layer, after)(x), after(layer(x)), atol=ATOL)
    if name != "same":
        np.testing.assert_allclose(fold(before, layer)(x), layer(before(x)), atol=ATOL)


def test_a_fixed_map_folds_too(key):
    layer = Linear(6, 5, key=key, axes=("embed", "mlp"))
    fixed = FixedAffine(input_of((5,)), input_of((5,)) + 1)
    x = input_of((3, 6))
    np.testing.assert_allclose(fold(layer, fixed)(x), fixed(layer(x)), atol=ATOL)


def test_the_dtype_of_the_weight_stays(key):
    layer = Linear(6, 5, key=key, axes=("embed", "mlp"), dtype=jnp.bfloat16)
    folded = fold(layer, random_norm(5, key))
    assert folded.weight.dtype == jnp.bfloat16 and folded.bias.dtype == jnp.bfloat16


def test_rounding_of_the_input_stays_where_the_norm_comes_after(key):
    layer = Linear(6, 5, key=key, axes=("embed", "mlp"))
    rounding = layer.replace(weights.Dense(layer.weight.dense(), act="e4m3"))
    norm, x = random_norm(5, key), input_of((3, 6))
    np.testing.assert_allclose(fold(rounding, norm)(x), norm(rounding(x)), atol=ATOL)
    with pytest.raises(ValueError, match="act='e4m3' rounds the norm's output"):
        fold(random_norm(6, key), rounding)


def test_refusals(key):
    layer = Linear(6, 6, key=key, axes=("embed", "mlp"))
    norm = random_norm(6, key)
    with pytest.raises(ValueError, match="a Int8 cannot take in a norm exactly"):
        fold(layer.replace(weights.Int8.quantize(layer.weight.dense())), norm)
    for padding in ("SAME", "causal", ((0, 0), (0, 1))):
        with pytest.raises(ValueError, match="adds zeros that the norm before it never saw"):
            fold(norm, Conv(6, 6, key=key, padding=padding))
    with pytest.raises(ValueError, match="the norm has 5 channels, the Linear 6"):
        fold(random_norm(5, key), layer)
    with pytest.raises(ValueError, match="the norm has 5 channels, the Conv 6"):
        fold(Conv(4, 6, key=key), random_norm(5, key))
    for pair in ((norm, norm), (layer, layer)):
        with pytest.raises(TypeError, match="one must be a BatchNorm or FixedAffine"):
            fold(*pair)
