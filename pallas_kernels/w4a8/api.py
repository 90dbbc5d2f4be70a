"""The public INT4 x FP8 product: checks, padding, choice of backend, gradient."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.w4a8 import backends, epilogue, reference, xla
from pallas_kernels.w4a8.arguments import Arguments
from pallas_kernels.w4a8.checks import check_residual
from pallas_kernels.w4a8.nibbles import unpack_nibbles
from pallas_kernels.w4a8.packed import canonical

XLA, REFERENCE = epilogue.after(xla.matmul), epilogue.after(reference.matmul)
BACKENDS = backends.table("matmul", XLA, REFERENCE)


def matmul(
    x,
    codes,
    scales,
    *,
    divisor=1.0,
    group,
    act="e4m3",
    treatment="promote",
    x_scale=None,
    residual=None,
    with_sumsq=False,
    out_dtype=None,
    backend=None,
) -> Any:
    """y = x @ w for w[k, n] = q[k, n] * scales[k // group, n] / divisor, with x rounded to e4m3.

    y[m, n] = sx[m] * sum_k e4m3(x[m, k] / sx[m]) * q[k, n] * scales[k // group, n] / divisor
              + residual[m, n]

    The gradient takes rounding as the identity: dx = dy @ w.T, scales and divisor get theirs in
    their own dtype, integer codes get float0.

    Args:
      x: [..., k0], float32, bfloat16 or float16; or float8_e4m3fn with `x_scale`. k0 may be up to
        one group smaller than k; the missing columns count as zeros.
      codes: [k / 2, n] uint8, row 2i of q in the low nibble of row i, two's complement -8..7; or
        `Fragments` of them (`pack`), which the GPU kernels need.
      scales: [k / group, n], float32, bfloat16 or float8_e4m3fn.
      divisor: scalar or [] float32, FireQ's per-tensor scale c.
      group: rows of q that share a scale; divides k.
      act: "e4m3" rounds x per token, None multiplies x as it is.
      treatment: "promote" scales partial sums in float32; "table" rounds q * s to e4m3 first.
      x_scale: [..., 1] float32, for x that is already e4m3.
      residual: [..., n] in the result's dtype, added before y is rounded to it.
      with_sumsq: whether to return the sum of squares of each row of y too, as the RMSNorm that
        follows needs it.
      out_dtype: x's dtype when None (float32 for e4m3).
      backend: None (chosen by device), "sm90", "sm80", "triton" (Ampere and Ada by jax-triton,
        groups of 32, 64 or 128), "tpu", "xla", "reference"; "sm90_interpret", "sm80_interpret" and
        "tpu_interpret" run a kernel's body in Pallas' interpreter, on any device.
    Returns:
      [..., n] in `out_dtype`; accumulation is float32. With `with_sumsq` a pair of that and [...]
      float32, the sums over n of y * y, before y is rounded or after it.
    Raises:
      ValueError: shapes, dtypes or options that do not fit; scales that are not finite (seen only
        outside jit); a backend that cannot run the call.
    Source:
      FireQ (arXiv 2505.20839), INT4 x FP8 GEMM.

    >>> codes = jnp.array([[0x21]], jnp.uint8)  # q = [[1], [2]]
    >>> matmul(jnp.array([[448.0, 1.0]]), codes, jnp.ones((1, 1)), group=2)
    Array([[450.]], dtype=float32)
    """
    given = Arguments.of(
        BACKENDS,
        *(x, codes, scales),
        group=group,
        act=act,
        treatment=treatment,
        x_scale=x_scale,
        out_dtype=out_dtype,
        backend=backend,
    )
    shape = *x.shape[:-1], scales.shape[1]
    if residual is not None:
        check_residual(residual, shape, given.out_dtype)
        residual = residual.reshape(len(given.rows), shape[-1])
    divisor = jnp.asarray(divisor, jnp.float32)
    operands = given.rows, given.sx, codes, scales, divisor, residual
    options = (*given.options, ("with_sumsq", with_sumsq))
    y, squares = product(*operands, options, given.run)
    y = y.reshape(shape).astype(given.out_dtype)
    return (y, squares.reshape(shape[:-1])) if with_sumsq else y


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def product(x, sx, codes, scales, divisor, residual, options, run):
    """run(...) on padded operands, x [m, k] -> [m, n] float32 and, if among the options, the sums
    of squares [m] (else None), with the gradient of `matmul`."""
    if x.shape[0] == 0:
        y = jnp.zeros((0, scales.shape[1]), jnp.float32)
        return epilogue.finish(y, None, dict(options).get("with_sumsq"))
    y, squares = run(x, sx, codes, scales, divisor, residual=residual, **dict(options))
    return y.astype(jnp.float32), squares


def product_forward(x, sx, codes, scales, divisor, residual, options, run):
    """The product, and its operands for the gradient; itself only where squares need it."""
    y, squares = product(x, sx, codes, scales, divisor, residual, options, run)
    kept = None if squares is None else y
    return (y, squares), (x, sx, codes, scales, divisor, residual, kept)


def product_backward(options, run, residuals, cotangents):
    """Cotangents of x, sx, codes (float0), scales, divisor and residual."""
    x, sx, codes, scales, divisor, residual, y = residuals
    dy = epilogue.backward(y, *cotangents)
    facts = dict(options)
    group, n = facts["group"], scales.shape[1]
    w = reference.dequantize(codes, scales, group=group, treatment=facts["treatment"])
    dx = jnp.matmul(dy, w.T) / divisor
    dsx = None
    if sx is not None:
        dsx = jnp.sum(dx * x.astype(jnp.float32), axis=-1, keepdims=True)
        dx = dx * sx
    rounded, unit = reference.activations(x, sx, facts["act"])
    seen = rounded.astype(jnp.float32) * (1 if unit is None else unit)
    dw = jnp.matmul(seen.T, dy) / divisor
    q = unpack_nibbles(canonical(codes, n)).astype(jnp.float32)
    dscales = jnp.sum((dw * q).reshape(-1, group, n), axis=1)
    return (
        dx.astype(x.dtype),
        dsx,
        jax.tree.map(lambda leaf: np.zeros(leaf.shape, jax.dtypes.float0), codes),
        dscales.astype(scales.dtype),
        -jnp.sum(dw * w) / divisor,
        None if residual is None else dy.astype(residual.dtype),
    )


product.defvjp(product_forward, product_backward)
