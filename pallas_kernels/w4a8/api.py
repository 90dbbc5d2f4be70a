"""The public INT4 x FP8 product: checks, padding, choice of backend, gradient."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import backend as registry
from pallas_kernels.numerics import E4M3, quantize_tokens
from pallas_kernels.w4a8 import reference, xla

# A GPU or TPU kernel is one more entry in front.
BACKENDS = (
    registry.Backend("xla", xla.matmul),
    registry.Backend("reference", reference.matmul, automatic=False),
)
X_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16, E4M3)
SCALE_DTYPES = (jnp.float32, jnp.bfloat16, E4M3)
TREATMENTS = ("promote", "table")


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
    out_dtype=None,
    backend=None,
):
    """y = x @ w for w[k, n] = q[k, n] * scales[k // group, n] / divisor, with x rounded to e4m3.

    y[m, n] = sx[m] * sum_k e4m3(x[m, k] / sx[m]) * q[k, n] * scales[k // group, n] / divisor

    The gradient takes rounding as the identity: dx = dy @ w.T, scales and divisor get theirs in
    their own dtype, integer codes get float0.

    Args:
      x: [..., k0], float32, bfloat16 or float16; or float8_e4m3fn with `x_scale`. k0 may be up to
        one group smaller than k; the missing columns count as zeros.
      codes: [k / 2, n] uint8, row 2i of q in the low nibble of row i, two's complement -8..7.
      scales: [k / group, n], float32, bfloat16 or float8_e4m3fn.
      divisor: scalar or [] float32, FireQ's per-tensor scale c.
      group: rows of q that share a scale; divides k.
      act: "e4m3" rounds x per token, None multiplies x as it is.
      treatment: "promote" scales partial sums in float32; "table" rounds q * s to e4m3 first.
      x_scale: [..., 1] float32, for x that is already e4m3.
      out_dtype: x's dtype when None (float32 for e4m3).
      backend: None (chosen by platform), "xla" or "reference".
    Returns:
      [..., n] in `out_dtype`; accumulation is float32.
    Raises:
      ValueError: shapes, dtypes or options that do not fit.
    Source:
      FireQ (arXiv 2505.20839), INT4 x FP8 GEMM.

    >>> codes = jnp.array([[0x21]], jnp.uint8)  # q = [[1], [2]]
    >>> matmul(jnp.array([[448.0, 1.0]]), codes, jnp.ones((1, 1)), group=2)
    Array([[450.]], dtype=float32)
    """
    check(x, codes, scales, group=group, act=act, treatment=treatment, x_scale=x_scale)
    chosen = registry.choose(
        BACKENDS,
        backend,
        x=x,
        codes=codes,
        scales=scales,
        group=group,
        act=act,
        treatment=treatment,
    )
    narrow = x.dtype == E4M3
    out_dtype = out_dtype or (jnp.float32 if narrow else x.dtype)
    columns = 2 * codes.shape[0]
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    rows = jnp.pad(rows, ((0, 0), (0, columns - x.shape[-1])))
    rows, act = (rows.astype(jnp.float32), None) if narrow else (rows, act)
    options = (("group", group), ("act", act), ("treatment", treatment))
    divisor = jnp.asarray(divisor, jnp.float32)
    y = product(rows, codes, scales, divisor, options, chosen.run)
    y = y.reshape(*x.shape[:-1], codes.shape[1])
    return (y * x_scale if narrow else y).astype(out_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def product(x, codes, scales, divisor, options, run):
    """run(...) on padded operands, x [m, k] -> [m, n] float32, with the gradient of `matmul`."""
    return run(x, codes, scales, divisor, **dict(options))


def product_forward(x, codes, scales, divisor, options, run):
    """The product, and its operands for the gradient."""
    return product(x, codes, scales, divisor, options, run), (x, codes, scales, divisor)


def product_backward(options, run, residuals, dy):
    """Cotangents of x, codes (float0), scales and divisor; dy is [m, n] float32."""
    x, codes, scales, divisor = residuals
    group, act = dict(options)["group"], dict(options)["act"]
    w = reference.dequantize(codes, scales, group=group, treatment=dict(options)["treatment"])
    dx = jnp.matmul(dy, w.T) / divisor
    seen = x.astype(jnp.float32)
    if act == "e4m3":
        rounded, sx = quantize_tokens(x)
        seen = rounded.astype(jnp.float32) * sx
    dw = jnp.matmul(seen.T, dy) / divisor
    q = reference.unpack_nibbles(codes).astype(jnp.float32)
    dscales = jnp.sum((dw * q).reshape(-1, group, codes.shape[1]), axis=1)
    ddivisor = -jnp.sum(dw * w) / divisor
    return (
        dx.astype(x.dtype),
        np.zeros(codes.shape, jax.dtypes.float0),
        dscales.astype(scales.dtype),
        ddivisor,
    )


product.defvjp(product_forward, product_backward)


def check(x, codes, scales, *, group, act, treatment, x_scale):
    """Raises ValueError unless the operands of `matmul` fit each other."""
    if codes.ndim != 2 or codes.dtype != jnp.uint8:
        raise ValueError(f"codes must be [k / 2, n] uint8, got {codes.shape} {codes.dtype}")
    k, n = 2 * codes.shape[0], codes.shape[1]
    if not isinstance(group, int) or group < 1 or k == 0 or k % group:
        raise ValueError(f"group={group!r} does not divide k={k}, twice the {k // 2} rows of codes")
    if scales.shape != (k // group, n):
        raise ValueError(
            f"scales must be [k / group, n] = {(k // group, n)}, got {tuple(scales.shape)}"
        )
    if scales.dtype not in SCALE_DTYPES:
        raise ValueError(f"scales have dtype {scales.dtype}; accepted: {names(SCALE_DTYPES)}")
    if x.dtype not in X_DTYPES:
        raise ValueError(f"x has dtype {x.dtype}; accepted: {names(X_DTYPES)}")
    if x.ndim < 1 or not k - group < x.shape[-1] <= k:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; its last axis must be k={k}, "
            f"or at most group={group} - 1 shorter"
        )
    if act not in (None, "e4m3"):
        raise ValueError(f"act={act!r}; accepted: None, 'e4m3'")
    if treatment not in TREATMENTS:
        raise ValueError(f"treatment={treatment!r}; accepted: {', '.join(map(repr, TREATMENTS))}")
    if (x_scale is None) == (x.dtype == E4M3):
        raise ValueError(
            "x_scale belongs to an x of dtype float8_e4m3fn and only to it; "
            f"got x of dtype {x.dtype} and x_scale={'None' if x_scale is None else 'an array'}"
        )
    if x_scale is not None and x_scale.shape != (*x.shape[:-1], 1):
        raise ValueError(f"x_scale must be {(*x.shape[:-1], 1)}, got {tuple(x_scale.shape)}")


def names(dtypes):
    """Dtype names for a message."""
    return ", ".join(jnp.dtype(d).name for d in dtypes)
