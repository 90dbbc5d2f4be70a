"""The public product of tokens with their experts' INT4 matrices."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.grouped.api import plainest, product
from pallas_kernels.w4a8 import backends, gradient, reference, xla
from pallas_kernels.w4a8.arguments import Arguments


def plain(x, sx, codes, scales, divisors, group_sizes, *, group, act, treatment, out_dtype):
    """Each token times its expert's dequantized matrix, by the grouped product of any platform.

    Args:
      x, sx: see `reference.matmul`; rows sorted by expert.
      codes: [e, k / 2, n] uint8 or `Fragments`; scales: [e, k / group, n].
      divisors: [e] float32.
      group_sizes: [e] int32, rows of x per expert.
      group, act, treatment, out_dtype: see `reference.matmul`.
    Returns:
      [m, n] float32; zeros in rows beyond the last group.
    """
    seen, unit = rounded(x, sx, act)
    w = dequantized(codes, scales, divisors, group=group, treatment=treatment)
    dtype = xla.operand_dtype(seen.dtype)
    operands = seen.astype(dtype), w.astype(dtype), None, group_sizes
    y = product(*operands, False, jnp.dtype(jnp.float32), plainest())
    return y if unit is None else y * unit


def by_expert(x, sx, codes, scales, divisors, group_sizes, *, group, act, treatment, out_dtype):
    """`plain` without `ragged_dot`: every expert's product of all tokens, of which one is kept."""
    seen, unit = rounded(x, sx, act)
    w = dequantized(codes, scales, divisors, group=group, treatment=treatment)
    ends = jnp.cumsum(group_sizes)
    expert = jnp.searchsorted(ends, jnp.arange(x.shape[0]), side="right")

    def add(total, numbered):
        number, matrix = numbered
        y = jnp.matmul(seen.astype(jnp.float32), matrix, precision="highest")
        return total + jnp.where((expert == number)[:, None], y, 0), None

    zeros = jnp.zeros((x.shape[0], w.shape[2]), jnp.float32)
    y = jax.lax.scan(add, zeros, (jnp.arange(len(w)), w))[0]
    return y if unit is None else y * unit


def rounded(x, sx, act):
    """x as it enters the product and its scale, with rounding's gradient the identity."""
    x8, unit = reference.activations(x, sx, act)
    if sx is not None or unit is None:
        return x8.astype(jnp.float32) if sx is not None else x8, unit
    exact = x.astype(jnp.float32) / unit
    return exact + jax.lax.stop_gradient(x8.astype(jnp.float32) - exact), jax.lax.stop_gradient(
        unit
    )


def dequantized(codes, scales, divisors, *, group, treatment):
    """[e, k, n] float32."""
    one = functools.partial(reference.dequantize, group=group, treatment=treatment)
    return jax.vmap(one)(codes, scales) / divisors[:, None, None]


BACKENDS = backends.table("grouped", plain, by_expert)


def grouped(
    x,
    codes,
    scales,
    group_sizes,
    *,
    divisors=None,
    group=128,
    act="e4m3",
    treatment="promote",
    x_scale=None,
    out_dtype=None,
    backend=None,
):
    """y[i] = x[i] @ w[expert of i] for INT4 experts, tokens sorted by expert (dropless MoE).

    Args:
      x: [m, k0]; see `matmul`. The first group_sizes[0] rows are expert 0's, and so on.
      codes: [e, k / 2, n] uint8, or `Fragments` of them.
      scales: [e, k / group, n]; see `matmul`.
      group_sizes: [e] int32, with a sum of at most m.
      divisors: [e] float32, ones when None.
      group, act, treatment, x_scale, out_dtype, backend: see `matmul`.
    Returns:
      [m, n] in `out_dtype`; zeros in rows beyond the last group.
    Raises:
      ValueError: see `matmul`; group_sizes of another shape or dtype.

    >>> codes, scales = jnp.full((2, 1, 1), 0x11, jnp.uint8), jnp.array([[[1.0]], [[3.0]]])
    >>> grouped(jnp.ones((3, 2)), codes, scales, jnp.array([1, 2]), group=2, act=None)[:, 0]
    Array([2., 6., 6.], dtype=float32)
    """
    given = Arguments.of(
        BACKENDS,
        *(x, codes, scales),
        stack=1,
        group=group,
        act=act,
        treatment=treatment,
        x_scale=x_scale,
        out_dtype=out_dtype,
        backend=backend,
    )
    if x.ndim != 2:
        raise ValueError(f"x must be [m, k], got {tuple(x.shape)}")
    experts = scales.shape[0]
    if group_sizes.shape != (experts,) or not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(
            f"group_sizes must be [e] = ({experts},) integers, "
            f"got {tuple(group_sizes.shape)} {group_sizes.dtype}"
        )
    divisors = jnp.ones((experts,), jnp.float32) if divisors is None else divisors
    if divisors.shape != (experts,):
        raise ValueError(f"divisors must be [e] = ({experts},), got {tuple(divisors.shape)}")
    if len(given.rows) == 0:
        return jnp.zeros((0, scales.shape[2]), given.out_dtype)
    operands = given.rows, given.sx, codes, scales, divisors, group_sizes
    return gradient.call(given.run, plain, given.options, operands).astype(given.out_dtype)
