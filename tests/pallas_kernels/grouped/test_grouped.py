"""Grouped products: every backend against the formula, gradients, and bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import grouped, quantize
from pallas_kernels.aot import lower_for
from pallas_kernels.backend import INTERPRETER, JAX_VERSION
from pallas_kernels.grouped import blocks, reference
from pallas_kernels.numerics import E4M3
from tests.w4a8_operands import error

interpreted = pytest.mark.skipif(
    JAX_VERSION < INTERPRETER, reason="Pallas interprets GPU kernels from jax 0.11"
)
FP8 = {
    "x": jnp.ones((3, 5), E4M3),
    "w": jnp.ones((2, 5, 3), E4M3),
    "x_scale": jnp.ones((3, 1)),
    "w_scale": jnp.ones((2,)),
}
NARROW = 4e-3  # relative norm of rounding to bfloat16, as in w4a8
WIDE = 1e-6  # the same of float32 sums in another order


def operands(m, k, n, experts, dtype=jnp.float32, transposed=False):
    """x [m, k] and w of `experts` matrices."""
    random = np.random.default_rng(0)
    w = jnp.asarray(random.normal(size=(experts, k, n)), dtype)
    x = jnp.asarray(random.normal(size=(m, k)), dtype)
    return x, w.swapaxes(1, 2) if transposed else w


def formula(x, w, sizes):
    """Expert by expert in float64; zeros in rows beyond the groups."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    y, start = np.zeros((len(x), w.shape[2])), 0
    for expert, size in enumerate(np.asarray(sizes)):
        y[start : start + size] = x[start : start + size] @ w[expert]
        start += size
    return y


@pytest.mark.parametrize("backend", ["blocks", "xla", "reference"])
@settings(max_examples=8, deadline=None)
@given(sizes=st.lists(st.integers(0, 4), min_size=3, max_size=3), transposed=st.booleans())
def test_equals_the_formula(backend, sizes, transposed):
    x, w = operands(13, 5, 6, 3, transposed=transposed)
    sizes = jnp.array(sizes, jnp.int32)
    call = functools.partial(grouped.matmul, transposed=transposed, backend=backend)
    y = jax.jit(call)(x, w, sizes)
    np.testing.assert_allclose(
        y, formula(x, w.swapaxes(1, 2) if transposed else w, sizes), rtol=1e-5, atol=1e-5
    )


@interpreted
@pytest.mark.parametrize("transposed", [False, True])
def test_the_kernel_and_its_gradients_equal_the_reference(transposed):
    x, w = operands(140, 128, 256, 3, jnp.bfloat16, transposed)
    sizes = jnp.array([0, 130, 7], jnp.int32)  # one expert empty, three rows without

    def loss(x, w, backend):
        y = grouped.matmul(x, w, sizes, transposed=transposed, backend=backend)
        return (y.astype(jnp.float32) ** 2).sum(), y

    def both(backend):
        run = jax.value_and_grad(functools.partial(loss, backend=backend), (0, 1), has_aux=True)
        (_, y), grads = run(x, w)
        return y, *grads

    for found, expected in zip(both("sm90_interpret"), both("reference"), strict=True):
        assert found.dtype == expected.dtype and error(found, expected) < 2 * NARROW
    dw = both("sm90_interpret")[2]
    assert (dw[0] == 0).all()


@interpreted
def test_fp8_in_the_kernel():
    x, w = operands(9, 256, 128, 2)
    x8, sx = quantize.tokens(x)
    w8 = w.swapaxes(1, 2).astype(E4M3)
    sizes, unit = jnp.array([4, 5], jnp.int32), jnp.array([0.5, 2.0])
    call = functools.partial(
        grouped.matmul, x8, w8, sizes, transposed=True, x_scale=sx, w_scale=unit
    )
    expected = call(backend="reference", out_dtype=jnp.float32)
    assert error(call(backend="sm90_interpret"), expected) < NARROW
    assert error(call(backend="xla", out_dtype=jnp.float32), expected) < WIDE
    plain = functools.partial(grouped.matmul, x8, w8.swapaxes(1, 2), sizes)
    other = plain(x_scale=sx, w_scale=unit, backend="sm90_interpret")
    assert error(other, expected) < NARROW  # turned around on the way in
    exact = formula(
        x8.astype(jnp.float32) * sx,
        w8.swapaxes(1, 2).astype(jnp.float32) * unit[:, None, None],
        sizes,
    )
    assert error(expected, exact) < WIDE


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_are_those_of_the_formula(transposed):
    x, w = operands(7, 5, 4, 3, transposed=transposed)
    sizes = jnp.array([2, 0, 4], jnp.int32)

    def loss(x, w):
        return (grouped.matmul(x, w, sizes, transposed=transposed) ** 2).sum()

    def plain(x, w):
        y = reference.multiply(x, w, None, sizes, transposed=transposed, out_dtype=jnp.float32)
        return (y**2).sum()

    grads, expected = (jax.jit(jax.grad(f, (0, 1)))(x, w) for f in (loss, plain))
    for a, b in zip(grads, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    assert (grads[1][1] == 0).all() and (grads[0][6] == 0).all()


def test_scales_of_fp8_get_their_gradient():
    x, w = operands(4, 8, 4, 2)
    x8, sx = quantize.tokens(x)
    sizes = jnp.array([1, 3], jnp.int32)

    def loss(sx, unit):
        y = grouped.matmul(
            x8, w.astype(E4M3), sizes, x_scale=sx, w_scale=unit, out_dtype=jnp.float32
        )
        return y.sum(), y

    unit = jnp.array([2.0, 3.0])
    (dsx, dunit), y = jax.grad(loss, (0, 1), has_aux=True)(sx, unit)
    np.testing.assert_allclose(dsx[:, 0] * sx[:, 0], y.sum(1), rtol=1e-4)
    np.testing.assert_allclose(dunit[0] * 2, y[0].sum(), rtol=1e-4)


def test_no_tokens():
    x, w = operands(0, 5, 4, 2)
    assert grouped.matmul(x, w, jnp.zeros((2,), jnp.int32)).shape == (0, 4)


@pytest.mark.parametrize(("chip", "has"), [("h200", True), ("a100", False)])
def test_training_lowers_to_the_kernel(chip, has):
    x, w = operands(3, 128, 256, 2, jnp.bfloat16)
    sizes = jnp.array([1, 2], jnp.int32)

    def loss(x, w, sizes):
        return grouped.matmul(x, w, sizes).astype(jnp.float32).sum()

    text = lower_for(jax.grad(loss, (0, 1)), (x, w, sizes), chip)
    # The value is not used; the gradients in x and in w are a kernel each.
    assert text.count("@mosaic_gpu") == (2 if has else 0)
    assert ("@mosaic_gpu" in lower_for(grouped.matmul, (x, w, sizes), chip)) == has


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": jnp.ones((2, 4, 3))}, r"x must be \[m, k\] and w \[e, k, n\]"),
        ({"w": jnp.ones((2, 5, 3)), "transposed": True}, r"w \[e, n, k\]"),
        ({"w": jnp.ones((2, 5, 3), jnp.bfloat16)}, "x is float32, w bfloat16"),
        ({"x": jnp.ones((3, 5), jnp.int8)}, "x is int8"),
        ({"group_sizes": jnp.ones((3,), jnp.int32)}, r"group_sizes must be \[e\] = \(2,\)"),
        ({"group_sizes": jnp.ones((2,))}, "integers"),
        ({"x_scale": jnp.ones((3, 1))}, "x_scale belongs to operands of float8_e4m3fn"),
        ({"group_sizes": jnp.array([2, 2])}, r"group_sizes=\[2, 2\] are not parts of m=3 rows"),
        ({"group_sizes": jnp.array([-1, 2])}, r"group_sizes=\[-1, 2\] are not parts"),
        (FP8 | {"x_scale": jnp.ones((3,))}, r"x_scale must be \(3, 1\) float32"),
        (FP8 | {"w_scale": jnp.ones((2,), jnp.bfloat16)}, r"w_scale must be \(2,\) float32"),
        (FP8 | {"w_scale": None}, "w_scale belongs to operands of float8_e4m3fn"),
        (FP8 | {"w_scale": jnp.array([1.0, jnp.inf])}, "w_scale holds a NaN or an infinity"),
        ({"backend": "cuda"}, "'sm90', 'sm90_interpret', 'blocks', 'xla', 'reference'"),
    ],
)
def test_bad_operands_name_themselves(change, message):
    operands = {
        "x": jnp.ones((3, 5)),
        "w": jnp.ones((2, 5, 3)),
        "group_sizes": jnp.ones((2,), jnp.int32),
    }
    with pytest.raises(ValueError, match=message):
        grouped.matmul(**(operands | change))


def test_the_kernel_says_what_it_takes():
    x, w = operands(3, 128, 100, 2, jnp.bfloat16)
    sizes = jnp.array([1, 2], jnp.int32)
    wanted = "jax 0.11" if JAX_VERSION < INTERPRETER else r"multiples of 128, .* \(128, 100\)"
    with pytest.raises(ValueError, match=wanted):
        grouped.matmul(x, w, sizes, backend="sm90_interpret")


@settings(max_examples=10, deadline=None)
@given(sizes=st.lists(st.integers(0, 45), min_size=3, max_size=3))
def test_blocks_reach_into_no_other_group(sizes):
    x, w = operands(140, 5, 6, 3)  # blocks of 8 rows
    dy = operands(140, 6, 1, 3)[0]
    sizes = jnp.array(sizes, jnp.int32)
    y = jax.jit(blocks.by_block)(x, w, sizes)
    np.testing.assert_allclose(y, formula(x, w, sizes), rtol=1e-5, atol=1e-5)
    dw = jax.jit(blocks.outer_by_block)(x, dy, sizes)
    np.testing.assert_allclose(dw, reference.outer(x, dy, sizes), rtol=1e-4, atol=1e-4)


def test_blocks_under_vmap_are_one_after_the_other():
    x, w = operands(40, 5, 6, 3)
    sizes = jnp.array([[20, 0, 20], [1, 2, 3]], jnp.int32)
    xs = jnp.stack([x, x + 1])
    call = functools.partial(grouped.matmul, backend="blocks")
    y = jax.jit(jax.vmap(call, (0, None, 0)))(xs, w, sizes)
    for i in (0, 1):
        np.testing.assert_allclose(y[i], formula(xs[i], w, sizes[i]), rtol=1e-5, atol=1e-5)


def test_a_block_is_large_where_groups_are():
    assert blocks.block_size(8192, 8) == 128
    assert blocks.block_size(8 * 4 * 16, 8) == 16
    assert blocks.block_size(30, 8) == 8 and blocks.block_size(5, 8) == 5
