"""What follows a product in its kernel: a residual, and sums of squares for the next RMSNorm."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import w4a8
from pallas_kernels.aot import lower_for
from pallas_kernels.backend import INTERPRETER, JAX_VERSION
from pallas_kernels.numerics import quantize_tokens
from pallas_kernels.w4a8 import plan
from tests.w4a8_operands import error, tokens, weights

interpreted = pytest.mark.skipif(
    JAX_VERSION < INTERPRETER, reason="Pallas interprets GPU kernels from jax 0.11"
)
NARROW = 4e-3  # relative norm of the error of rounding to bfloat16, also of half of its square
WIDE = 1e-6  # the same for sums of float32 in another order


def operands(m, n=200, k=256, dtype=jnp.float32):
    """x, residual, canonical and packed codes, scales."""
    codes, fragments, scales = weights(n, k)
    return tokens(m, k, dtype), tokens(m, n, dtype, seed=5), codes, fragments, scales


@pytest.mark.parametrize("backend", ["reference", "xla", "tpu_interpret"])
def test_equals_the_plain_formula(backend):
    x, residual, codes, _, scales = operands(5, 128)
    call = functools.partial(w4a8.matmul, x, codes, scales, divisor=2.0, group=128, backend=backend)
    y, squares = call(residual=residual, with_sumsq=True)
    expected = call() + residual
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6)
    assert squares.shape == (5,) and error(squares, (expected**2).sum(-1)) < WIDE
    np.testing.assert_array_equal(call(residual=residual), y)
    alone, of_product = call(with_sumsq=True)
    np.testing.assert_array_equal(alone, call())
    assert error(of_product, (alone**2).sum(-1)) < WIDE


@pytest.mark.parametrize("shape", [(256,), (0, 256), (2, 3, 256)])
def test_leading_axes(shape):
    _, _, codes, _, scales = operands(1)
    x, residual = jnp.ones(shape), jnp.ones((*shape[:-1], 200))
    call = functools.partial(w4a8.matmul, x, codes, scales, group=128)
    y, squares = call(residual=residual, with_sumsq=True)
    assert y.shape == residual.shape and squares.shape == shape[:-1]
    np.testing.assert_allclose(y, call() + 1, rtol=1e-6, atol=1e-6)


@interpreted
@pytest.mark.parametrize(("kernel", "m"), [("sm90", 3), ("sm90", 70), ("sm80", 3)])
def test_the_kernels_equal_the_reference(kernel, m):
    x, residual, codes, fragments, scales = operands(m, dtype=jnp.bfloat16)
    call = functools.partial(w4a8.matmul, x, scales=scales, group=128, with_sumsq=True)
    y, squares = call(codes=fragments, residual=residual, backend=f"{kernel}_interpret")
    wide = functools.partial(call, codes=codes, backend="reference", out_dtype=jnp.float32)
    expected, sums = wide(residual=residual.astype(jnp.float32))
    assert y.dtype == jnp.bfloat16 and error(y, expected) < NARROW
    assert squares.dtype == jnp.float32 and error(squares, sums) < NARROW


@interpreted
def test_every_column_of_a_wide_block_counts_once():
    from pallas_kernels.w4a8 import calls

    x, residual, codes, fragments, scales = operands(66, 512, 128, jnp.bfloat16)
    run = functools.partial(
        calls.followed,
        *(*quantize_tokens(x), fragments, scales, jnp.float32(2)),
        kernel="sm90",
        treatment="promote",
        out_dtype=jnp.bfloat16,
        residual=residual,
        with_sumsq=True,
        config=plan.Config(tile_m=64, columns=128, cores=2),
        interpret=True,
    )
    y, squares = run()
    expected = w4a8.matmul(
        x, codes, scales, divisor=2.0, group=128, residual=residual, backend="reference"
    )
    assert error(y, expected) < NARROW
    assert error(squares, (y.astype(jnp.float32) ** 2).sum(-1)) < WIDE  # of the rounded values
    for a, b in zip((y, squares), run(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("with_sumsq", [True, False])
def test_on_a_hopper_the_kernel_finishes(with_sumsq):
    x, residual, _, fragments, scales = operands(70, dtype=jnp.bfloat16)
    call = functools.partial(w4a8.matmul, group=128, with_sumsq=with_sumsq)
    run = lambda x, r, codes, scales: call(x, codes, scales, residual=r)  # noqa: E731
    abstract = jax.eval_shape(lambda: (x, residual, fragments, scales))
    module = lower_for(run, abstract, "h200").splitlines()
    product = [line for line in module if "@mosaic_gpu" in line][-1]  # after that of rounding
    assert product.count("tensor<128x256xbf16>") == 2  # the residual and the result
    assert ("tensor<4x128xf32>" in product) == with_sumsq  # sums of 4 blocks of 64 columns


def test_gradients_by_finite_differences():
    x, residual, codes, _, scales = operands(3, 8, 128)
    x8, sx = quantize_tokens(x + 1)

    def loss(sx, scales, residual):
        y, squares = w4a8.matmul(
            x8, codes, scales, x_scale=sx, group=128, residual=residual, with_sumsq=True
        )
        return (y * jnp.arange(8.0)).sum() + (jnp.sqrt(squares) * jnp.arange(1.0, 4)).sum()

    at = (sx, scales, residual)
    grads = jax.jit(jax.grad(loss, (0, 1, 2)))(*at)
    for i, (value, grad) in enumerate(zip(at, grads, strict=True)):
        step = 1e-3 * jnp.abs(value).max() * jax.random.normal(jax.random.key(i), value.shape)
        ahead, behind = (loss(*at[:i], value + s * step, *at[i + 1 :]) for s in (1, -1))
        slope = float((grad * step).sum())
        assert abs(float(ahead - behind) / 2 - slope) < 0.02 * abs(slope)


def test_gradients_keep_their_dtypes_and_reach_x():
    x, residual, codes, _, scales = operands(3, 8, 128, jnp.bfloat16)

    def loss(x, residual):
        y, squares = w4a8.matmul(x, codes, scales, group=128, residual=residual, with_sumsq=True)
        return squares.sum() + y.astype(jnp.float32).sum()

    dx, dresidual = jax.grad(loss, (0, 1))(x, residual)
    y = w4a8.matmul(x, codes, scales, group=128, residual=residual, out_dtype=jnp.bfloat16)
    assert dx.dtype == dresidual.dtype == jnp.bfloat16 and (dx != 0).any()
    assert error(dresidual, 2 * y.astype(jnp.float32) + 1) < NARROW


def test_works_under_vmap():
    x, residual, codes, _, scales = operands(4)
    call = functools.partial(
        w4a8.matmul, codes=codes, scales=scales, group=128, with_sumsq=True, out_dtype=jnp.float32
    )
    pair = lambda a: a.reshape(2, 2, -1)  # noqa: E731
    many = jax.vmap(lambda x, r: call(x, residual=r))(pair(x), pair(residual))
    for a, b in zip(many, call(x, residual=residual), strict=True):
        np.testing.assert_allclose(a.reshape(b.shape), b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "residual", [jnp.ones((3, 199)), jnp.ones((200,)), jnp.ones((3, 200), jnp.bfloat16)]
)
def test_a_residual_that_does_not_fit_names_itself(residual):
    x, _, codes, _, scales = operands(3)
    with pytest.raises(ValueError, match=r"residual must be \(3, 200\) float32 like the result"):
        w4a8.matmul(x, codes, scales, group=128, residual=residual)
