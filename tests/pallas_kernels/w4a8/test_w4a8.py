"""The INT4 x FP8 product: its formula in float64, packing, gradients, padding and bad input."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ffnlab.testing import counted
from pallas_kernels import w4a8
from pallas_kernels.numerics import E4M3, quantize_tokens

BACKENDS = ("xla", "reference")
EXAMPLES = settings(max_examples=40, deadline=None)
# Relative to the largest output; sums of k = 256 float32 products in another order.
ROUNDING = 2e-6


@pytest.fixture
def operands(key):
    """x [m, 256], codes, scales [2, 24] and the same in numpy as x, q."""
    x_key, q_key, s_key = jax.random.split(key, 3)
    q = jax.random.randint(q_key, (256, 24), -8, 8, jnp.int8)
    scales = jax.random.uniform(s_key, (2, 24), jnp.float32, 0.004, 0.05)
    x = jax.random.normal(x_key, (9, 256)) * jnp.logspace(-3, 2, 9)[:, None]
    return x.at[3].set(0), w4a8.pack_nibbles(q), scales


def formula(x, codes, scales, divisor, group, treatment, act="e4m3"):
    """The card's formula in float64, rounding by ml_dtypes."""
    x, q = np.asarray(x, np.float32), np.asarray(w4a8.unpack_nibbles(codes), np.float32)
    absmax = np.abs(x).max(axis=-1, keepdims=True)
    sx = np.where(absmax == 0, np.float32(1), absmax / np.float32(448))
    x8 = (x / sx).astype(ml_dtypes.float8_e4m3fn) if act else x
    w = q * np.repeat(np.asarray(scales).astype(np.float32), group, axis=0)
    w = w.astype(ml_dtypes.float8_e4m3fn) if treatment == "table" else w
    y = x8.astype(np.float64) @ w.astype(np.float64) / divisor
    return y * sx if act else y


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("treatment", ["promote", "table"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, E4M3])
@pytest.mark.parametrize("tokens", [1, 4, 9])
def test_equals_the_formula(operands, backend, treatment, dtype, tokens):
    x, codes, scales = operands
    x, scales = x[:tokens], scales.astype(dtype)
    product = functools.partial(w4a8.matmul, group=128, treatment=treatment, backend=backend)
    y = jax.jit(product)(x, codes, scales, divisor=jnp.float32(4))
    expected = formula(x, codes, scales, 4.0, 128, treatment)
    limit = ROUNDING * np.abs(expected).max(axis=-1, keepdims=True) + 1e-30
    assert (np.abs(np.asarray(y) - expected) <= limit).all()


# One chunk of rows at a time and, where groups do not fit it or with many tokens, the whole matrix.
@pytest.mark.parametrize(("group", "tokens"), [(2, 1), (32, 3), (256, 9), (128, 300), (86, 2)])
def test_every_group_and_number_of_tokens(group, tokens, key):
    k = 3 * group if group == 86 else 256
    random = np.random.default_rng(group)
    codes = jnp.asarray(random.integers(0, 256, (k // 2, 5)), jnp.uint8)
    scales = jnp.asarray(random.uniform(0.5, 2, (k // group, 5)), jnp.float32)
    x = jax.random.normal(key, (tokens, k))

    @jax.jit
    def both(x):
        product = functools.partial(w4a8.matmul, x, codes, scales, group=group, act=None)
        return product(backend="xla"), product(backend="reference")

    np.testing.assert_allclose(*both(x), rtol=1e-5, atol=1e-4)  # sums in another order


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_activation_rounding_it_is_the_plain_product(operands, backend):
    x, codes, scales = operands
    y = w4a8.matmul(x, codes, scales, group=128, act=None, backend=backend)
    expected = formula(x, codes, scales, 1.0, 128, "promote", act=None)
    limit = 1e-5 * np.abs(expected).max(axis=-1, keepdims=True) + 1e-30
    assert (np.abs(np.asarray(y) - expected) <= limit).all()


def test_rows_of_zeros_give_zeros_and_nan_stays_in_its_row(operands):
    x, codes, scales = operands
    y = w4a8.matmul(x.at[5, 7].set(jnp.nan), codes, scales, group=128)
    assert (y[3] == 0).all()
    assert jnp.isnan(y[5]).all() and jnp.isfinite(jnp.delete(y, 5, axis=0)).all()


@pytest.mark.parametrize("shape", [(256,), (0, 256), (2, 0, 256), (2, 3, 256), (1, 1, 1, 256)])
def test_leading_axes(operands, shape):
    x, codes, scales = operands
    x = jnp.resize(x, shape)
    y = w4a8.matmul(x, codes, scales, group=128)
    assert y.shape == (*shape[:-1], 24)
    flat = w4a8.matmul(x.reshape(-1, 256), codes, scales, group=128)
    np.testing.assert_allclose(y.reshape(-1, 24), flat, rtol=1e-5, atol=1e-5)


def test_short_rows_count_as_padded(operands):
    x, codes, scales = operands
    padded = x.at[:, 200:].set(0)
    y = w4a8.matmul(padded[:, :200], codes, scales, group=128)
    np.testing.assert_array_equal(y, w4a8.matmul(padded, codes, scales, group=128))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_output_dtype(operands, dtype):
    x, codes, scales = operands
    assert w4a8.matmul(x.astype(dtype), codes, scales, group=128).dtype == dtype
    wide = w4a8.matmul(x.astype(dtype), codes, scales, group=128, out_dtype=jnp.float32)
    assert wide.dtype == jnp.float32


def test_quantized_activations_are_taken_as_they_are(operands):
    x, codes, scales = operands
    x8, sx = quantize_tokens(x)
    y = w4a8.matmul(x8, codes, scales, x_scale=sx, group=128, divisor=2.0)
    expected = w4a8.matmul(x, codes, scales, group=128, divisor=2.0)
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6)
    slope = jax.grad(lambda s: w4a8.matmul(x8, codes, scales, x_scale=s, group=128).sum())(sx)
    assert slope.shape == sx.shape and (slope[0] != 0).all()


@pytest.mark.parametrize("act", [None, "e4m3"])
def test_gradients_are_those_of_the_dequantized_product(operands, act):
    x, codes, scales = operands
    x = x[4:7]  # no tiny rows: their gradient is checked like any other's

    def ours(x, scales, divisor):
        return (w4a8.matmul(x, codes, scales, divisor=divisor, group=128, act=act) ** 2).sum()

    def plain(x, scales, divisor):
        seen = x
        if act:
            codes8, sx = quantize_tokens(x)
            seen = x + jax.lax.stop_gradient(codes8.astype(jnp.float32) * sx - x)
        return ((seen @ w4a8.dequantize(codes, scales, group=128) / divisor) ** 2).sum()

    args = (x, scales, jnp.float32(3))
    grads, expected = (jax.jit(jax.grad(f, (0, 1, 2)))(*args) for f in (ours, plain))
    for a, b in zip(grads, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(b).max()))


def test_codes_get_no_gradient_and_narrow_scales_keep_their_dtype(operands):
    x, codes, scales = operands
    grads = jax.grad(lambda c, s: w4a8.matmul(x, c, s, group=128).sum(), (0, 1), allow_int=True)(
        codes, scales.astype(jnp.bfloat16)
    )
    assert grads[0].dtype == jax.dtypes.float0 and grads[1].dtype == jnp.bfloat16


def test_works_under_vmap_and_compiles_once(operands):
    x, codes, scales = operands
    stack = jnp.stack([codes, codes[::-1]])
    y = jax.vmap(lambda c: w4a8.matmul(x, c, scales, group=128))(stack)
    expected = jnp.stack([w4a8.matmul(x, c, scales, group=128) for c in stack])
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-4)
    run = jax.jit(lambda x, c: w4a8.matmul(x, c, scales, group=128))
    run(x, codes)
    others = 2 * x, stack[1]
    with counted() as count:
        run(*others)
    assert count.programs == 0


@EXAMPLES
@given(hnp.arrays(np.int8, st.sampled_from([(2, 1), (6, 3), (0, 2)]), elements=st.integers(-8, 7)))
def test_packing_round_trips(q):
    packed = w4a8.pack_nibbles(jnp.asarray(q))
    assert packed.shape == (len(q) // 2, q.shape[1]) and packed.dtype == jnp.uint8
    np.testing.assert_array_equal(w4a8.unpack_nibbles(packed), q)
    np.testing.assert_array_equal(np.asarray(packed) & 15, q[0::2] & 15)


@EXAMPLES
@given(
    hnp.arrays(np.float32, (3, 8), elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False))
)
def test_tokens_round_to_e4m3(x):
    codes, scale = jax.jit(quantize_tokens)(x)
    codes, scale = np.asarray(codes).astype(np.float32), np.asarray(scale)
    assert (scale > 0).all() and np.abs(codes).max() <= 448
    error = np.abs(codes * scale - x)
    assert (error <= np.abs(x) / 16 + scale * 2.0**-10 * 1.001).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group": 96}, "group=96 does not divide k=256"),
        ({"group": 0}, "group=0"),
        ({"group": 64}, r"\(4, 24\)"),
        ({"codes": jnp.zeros((128, 24), jnp.int8)}, "uint8"),
        ({"codes": jnp.zeros((128,), jnp.uint8)}, "uint8"),
        ({"codes": jnp.zeros((0, 24), jnp.uint8)}, "k=0"),
        ({"scales": jnp.ones((2, 23))}, r"\(2, 24\), got \(2, 23\)"),
        ({"scales": jnp.ones((2, 24), jnp.int32)}, "scales have dtype int32"),
        ({"x": jnp.ones((3, 256), jnp.int32)}, "x has dtype int32"),
        ({"x": jnp.ones((3, 128))}, "k=256"),
        ({"x": jnp.ones((3, 257))}, "k=256"),
        ({"x": jnp.float32(1)}, "k=256"),
        ({"act": "int8"}, "act='int8'"),
        ({"treatment": "lookup"}, "'promote', 'table'"),
        ({"backend": "cuda"}, "'xla', 'reference'"),
        ({"x_scale": jnp.ones((3, 1))}, "x_scale belongs"),
        ({"x": jnp.ones((3, 256), E4M3)}, "x_scale belongs"),
        ({"x": jnp.ones((3, 256), E4M3), "x_scale": jnp.ones((3,))}, r"\(3, 1\), got \(3,\)"),
    ],
)
def test_bad_operands_name_themselves(change, message):
    operands = {
        "x": jnp.ones((3, 256)),
        "codes": jnp.zeros((128, 24), jnp.uint8),
        "scales": jnp.ones((2, 24)),
        "group": 128,
    }
    operands |= change
    with pytest.raises(ValueError, match=message):
        w4a8.matmul(**operands)
