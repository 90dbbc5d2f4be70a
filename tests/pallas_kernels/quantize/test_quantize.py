"""Rounding to FP8 and INT4: the same bits from every backend, and the kernel in lowered modules."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ffnlab.quantization import fireq_core
from pallas_kernels import quantize, w4a8
from pallas_kernels.aot import lower_for
from pallas_kernels.backend import INTERPRETER, JAX_VERSION
from pallas_kernels.numerics import E4M3
from pallas_kernels.quantize import mosaic, reference
from pallas_kernels.quantize.api import OLDEST

interpreted = pytest.mark.skipif(
    JAX_VERSION < INTERPRETER, reason="Pallas interprets GPU kernels from jax 0.11"
)
bits = lambda tree: [np.asarray(leaf).tobytes() for leaf in tree]  # noqa: E731


def matrix(rows, columns, dtype=jnp.float32, seed=0):
    """Rows of very different size, one of zeros, one with the largest float of e4m3's range."""
    x = np.random.default_rng(seed).normal(size=(rows, columns))
    x = x * np.logspace(-6, 3, rows)[:, None]
    x[rows // 2] = 0
    return jnp.asarray(x, dtype)


@interpreted
@settings(max_examples=4, deadline=None)
@given(st.integers(1, 3), st.sampled_from([256, 512, 1024]), st.integers(0, 9))
def test_the_kernel_rounds_tokens_to_the_references_bits(m, k, seed):
    x = matrix(m, k, jnp.bfloat16, seed)
    assert bits(quantize.tokens(x, backend="mosaic_interpret")) == bits(quantize.tokens(x))
    rows = functools.partial(quantize.tokens, x.at[-1].set(jnp.nan), rows=m + 2)
    codes, scale = rows(backend="mosaic_interpret")
    finite = [both[: m - 1] for both in (codes, scale)]
    assert bits(finite) == bits(both[: m - 1] for both in rows())
    assert np.isnan(np.asarray(codes[m - 1], np.float32)).all()  # and not of the rows behind
    assert (np.asarray(codes[m:], np.float32) == 0).all() and (scale[m:] == 1).all()


@interpreted
def test_the_kernel_divides_scales_to_the_references_bits():
    x, divisors = matrix(3, 256), jnp.array([3.0, 0.7])
    codes, scales = mosaic.tokens(x, rows=4, divisors=divisors, interpret=True)
    assert bits([codes, scales]) == bits(reference.tokens(x, rows=4, divisors=divisors))
    plain_codes, scale = quantize.tokens(x, rows=4)
    assert bits([codes]) == bits([plain_codes]) and scales.shape == (2, 4)
    np.testing.assert_array_equal(scales, np.asarray(scale).T / np.asarray(divisors)[:, None])


def test_rows_behind_are_zeros_with_scale_1():
    x = matrix(3, 5)
    codes, scale = quantize.tokens(x, rows=8)
    assert bits([codes[:3], scale[:3]]) == bits(quantize.tokens(x))
    assert (codes[3:].astype(jnp.float32) == 0).all() and (scale[3:] == 1).all()
    for wrong in (x, x[None]):
        with pytest.raises(ValueError, match="rows=2 must be at least m of x"):
            quantize.tokens(wrong, rows=2)


@interpreted
@pytest.mark.parametrize("scales", [jnp.float32, jnp.bfloat16, E4M3])
def test_the_kernel_rounds_groups_to_the_references_bits(scales):
    w = matrix(12, 256)
    call = functools.partial(quantize.groups, w, group=4, dtype=scales)
    assert bits(call(backend="mosaic_interpret")) == bits(call())


@pytest.mark.parametrize("scales", ["float32", "bfloat16", "e4m3"])
def test_groups_are_fireqs(scales):
    w = matrix(64, 40)
    dtype = fireq_core.SCALE_DTYPES[scales]
    codes, found = jax.jit(functools.partial(quantize.groups, group=16, dtype=dtype))(w)
    expected = fireq_core.quantize(w, group=16, scales=scales)
    np.testing.assert_array_equal(w4a8.unpack_nibbles(codes), expected.codes)
    assert bits([found]) == bits([expected.scales])


def test_quotients_are_correctly_rounded():
    """bfloat16 lies on ties, which a product with the reciprocal takes to either side."""
    x = np.asarray(jax.random.normal(jax.random.key(0), (64, 512), jnp.bfloat16), np.float32)
    codes, scale = jax.jit(quantize.tokens)(x)
    exact = np.abs(x).max(axis=1, keepdims=True) / np.float32(448)
    np.testing.assert_array_equal(scale, exact)
    expected = (x / exact).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(np.asarray(codes).view(np.uint8), expected.view(np.uint8))
    codes, scales = jax.jit(functools.partial(quantize.groups, group=2))(x)
    exact = np.abs(x.reshape(32, 2, 512)).max(axis=1) / np.float32(7)
    np.testing.assert_array_equal(scales, exact)
    q = np.round(x.reshape(32, 2, 512) / exact[:, None]).reshape(64, 512)
    np.testing.assert_array_equal(w4a8.unpack_nibbles(codes), q)


def test_tokens_of_any_leading_axes_feed_the_product():
    x = matrix(6, 256).reshape(2, 3, 256)
    codes, scale = quantize.tokens(x)
    assert codes.shape == x.shape and codes.dtype == E4M3 and scale.shape == (2, 3, 1)
    packed, scales = quantize.groups(matrix(256, 24, seed=1))
    np.testing.assert_array_equal(
        w4a8.matmul(codes, packed, scales, group=128, x_scale=scale),
        w4a8.matmul(x, packed, scales, group=128),
    )
    empty = quantize.tokens(jnp.zeros((0, 4)))
    assert empty[0].shape == (0, 4) and empty[1].shape == (0, 1)


@pytest.mark.parametrize(("chip", "has"), [("h200", True), ("l4", True), ("a100", False)])
def test_calls_lower_to_the_kernel_where_the_chip_converts(chip, has):
    has = has and (chip == "h200" or JAX_VERSION >= OLDEST)
    tokens = jax.ShapeDtypeStruct((2, 512), jnp.bfloat16)
    assert ("mosaic_gpu" in lower_for(quantize.tokens, (tokens,), chip)) == has
    weights = jax.ShapeDtypeStruct((128, 256), jnp.bfloat16)
    assert ("mosaic_gpu" in lower_for(quantize.groups, (weights,), chip)) == has


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize.tokens(jnp.ones((2, 3), jnp.int32)), "x has dtype int32"),
        (lambda: quantize.tokens(jnp.float32(1)), r"x must be \[..., k\]"),
        (lambda: quantize.tokens(jnp.ones((2, 0))), "not empty"),
        (lambda: quantize.groups(jnp.ones((4,)), group=2), r"w must be \[k, n\]"),
        (lambda: quantize.groups(jnp.ones((4, 2)), group=3), "group=3 must be even"),
        (lambda: quantize.groups(jnp.ones((4, 2)), group=8), "divide k=4"),
        (lambda: quantize.groups(jnp.ones((4, 2)), group=2.0), "group=2.0 must be even"),
        (lambda: quantize.groups(jnp.ones((4, 2), jnp.int8), group=2), "w has dtype int8"),
        (lambda: quantize.groups(jnp.ones((0, 2)), group=2), "not empty"),
        (lambda: quantize.groups(jnp.ones((4, 2)), group=2, dtype=jnp.int8), "dtype=int8"),
        (lambda: quantize.tokens(jnp.ones((2, 3)), backend="cuda"), "'mosaic', 'mosaic_interpret'"),
    ],
)
def test_bad_operands_name_themselves(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@interpreted
def test_the_kernel_says_what_it_takes():
    with pytest.raises(ValueError, match="takes rows of a multiple of 256 up to 16384, k=100"):
        quantize.tokens(jnp.ones((1, 100)), backend="mosaic_interpret")
    with pytest.raises(ValueError, match="takes a multiple of 256 columns, n=3"):
        quantize.groups(jnp.ones((4, 3)), group=2, backend="mosaic_interpret")
