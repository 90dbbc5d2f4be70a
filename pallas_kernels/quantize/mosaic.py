"""Rounding on an NVIDIA GPU (Pallas Mosaic GPU): every element is read from memory once.

    tokens   a block of 128 threads holds a row in registers, finds its absmax, writes its codes
    groups   a block holds the sums of some columns; it walks the rows of a group twice, and the
             second walk finds them in the cache

Division is the correctly rounded one, so codes and scales are the reference's to the bit.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _compat
from pallas_kernels.numerics import E4M3, E4M3_MAX, E4M3_TINY, divide
from pallas_kernels.quantize.limits import group_width, row_width
from pallas_kernels.quantize.reference import ABSMAX_FLOOR

MAGIC = 12582912.0  # 1.5 * 2**23: adding it rounds to an integer, half to even, in the low bits


def tokens(x, *, rows=None, divisors=None, interpret=False):
    """Same contract as `reference.tokens`; k is a multiple of 256."""
    rows, k = rows or x.shape[0], x.shape[1]
    layout = plgpu.Layout.WG_STRIDED((k,), row_width(k))
    by = () if divisors is None else (divisors,)
    scales = jax.ShapeDtypeStruct((1 if divisors is None else len(divisors), rows), jnp.float32)
    run = _compat.kernel(
        functools.partial(one_row, layout),
        out_type=[jax.ShapeDtypeStruct((rows, k), E4M3), scales],
        grid=(rows,),
        grid_names=("row",),
        interpret=interpret,
    )
    codes, scale = run(x, *by)
    return codes, scale.T if divisors is None else scale


def one_row(layout, x, *refs):
    """Rounds one row; of zeros, where x has no more."""
    *divisors, codes, scales = refs
    row, m, rows = lax.axis_index("row"), x.shape[0], scales.shape[1]
    load = lambda: _compat.load(x.at[row], layout=layout, optimized=False)  # noqa: E731
    if rows > m:
        zeros = plgpu.layout_cast(jnp.zeros(x.shape[1:], x.dtype), layout)
        values = lax.cond(row < m, load, lambda: zeros)
    else:
        values = load()
    values = values.astype(jnp.float32)
    absmax = jnp.max(jnp.abs(values))
    scale = divide(absmax, E4M3_MAX)
    scale = jnp.where(scale == 0, jnp.float32(1), scale)
    rounded = jnp.clip(values / scale, -jnp.float32(E4M3_MAX), jnp.float32(E4M3_MAX))
    _compat.store(codes.at[row], rounded.astype(E4M3))
    for i in range(scales.shape[0]):
        scales[i, row] = scale / divisors[0][i] if divisors else scale


def groups(w, *, group, dtype, interpret=False):
    """Same contract as `reference.groups`; n is a multiple of 256."""
    k, n = w.shape
    width = group_width(n)
    wide = 128 * width
    layout = plgpu.Layout.WG_STRIDED((wide,), width)
    run = _compat.kernel(
        functools.partial(one_group, layout, group, wide, dtype),
        out_type=(
            jax.ShapeDtypeStruct((k // 2, n), jnp.uint8),
            jax.ShapeDtypeStruct((k // group, n), dtype),
        ),
        grid=(k // group, n // wide),
        grid_names=("group", "columns"),
        interpret=interpret,
    )
    return run(w)


def one_group(layout, group, wide, dtype, w, codes, scales):
    """Rounds one group of rows of some columns."""
    first, columns = lax.axis_index("group"), pl.ds(lax.axis_index("columns") * wide, wide)

    def row(i):
        source = w.at[first * group + i, columns]
        return _compat.load(source, layout=layout, optimized=False).astype(jnp.float32)

    zeros = plgpu.layout_cast(jnp.zeros((wide,), jnp.float32), layout)
    absmax = lax.fori_loop(0, group, lambda i, m: jnp.maximum(m, jnp.abs(row(i))), zeros)
    scale = divide(jnp.maximum(absmax, jnp.float32(ABSMAX_FLOOR)), 7)
    if dtype == E4M3:
        scale = jnp.clip(scale, jnp.float32(E4M3_TINY), jnp.float32(E4M3_MAX))
    stored = scale.astype(dtype)
    _compat.store(scales.at[first, columns], stored)
    scale = stored.astype(jnp.float32)

    def nibble(i):
        rounded = jnp.clip(row(i) / scale, jnp.float32(-8), jnp.float32(7)) + jnp.float32(MAGIC)
        return lax.bitcast_convert_type(rounded, jnp.int32) & jnp.int32(15)

    def pair(i, carry):
        byte = nibble(2 * i) | (nibble(2 * i + 1) << jnp.int32(4))
        target = codes.at[first * (group // 2) + i, columns]
        _compat.store(target, byte.astype(jnp.uint8))
        return carry

    lax.fori_loop(0, group // 2, pair, 0)
