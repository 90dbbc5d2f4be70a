"""The public gated product: silu(x @ gate) * (x @ up) over one joined matrix."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.w4a8 import api, backends, gradient
from pallas_kernels.w4a8.arguments import Arguments
from pallas_kernels.w4a8.packed import PAIR, Fragments, split


def plain(x, sx, codes, scales, divisors, *, run=api.XLA, **options):
    """silu(x @ gate) * (x @ up) by two products.

    Args:
      x, sx: see `reference.matmul`.
      codes, scales: what `packed.join` gives.
      divisors: [2] float32.
      run: the product, see `epilogue.after`.
      **options: see `reference.matmul`.
    Returns:
      [m, n] float32.
    """
    gate, up, gate_scales, up_scales = split(codes, scales)
    options = tuple((options | {"out_dtype": jnp.dtype(jnp.float32)}).items())
    one = functools.partial(api.product, x, sx, residual=None, options=options, run=run)
    activation = jax.nn.silu(one(gate, gate_scales, divisors[0])[0])
    return activation * one(up, up_scales, divisors[1])[0]


BACKENDS = backends.table("glu", plain, functools.partial(plain, run=api.REFERENCE))


def glu(
    x,
    codes,
    scales,
    *,
    divisors=(1.0, 1.0),
    group=128,
    act="e4m3",
    treatment="promote",
    x_scale=None,
    out_dtype=None,
    backend=None,
):
    """y = silu(x @ gate) * (x @ up), both INT4, in one pass over x (SwiGLU).

    Args:
      x: see `matmul`.
      codes, scales: what `join` makes of gate and up, each [k, n].
      divisors: (gate's, up's), scalars.
      group, act, treatment, x_scale, out_dtype, backend: see `matmul`.
    Returns:
      [..., n] in `out_dtype`, n rounded up to a multiple of 128. The new columns are zeros, as are
      the rows that the down product's packing adds: it takes y as it is.
    Raises:
      ValueError: see `matmul`; codes that are not joined.

    >>> from pallas_kernels.w4a8 import join, pack
    >>> w, scale = pack(jnp.full((64, 128), 0x11, jnp.uint8)), jnp.ones((1, 128))
    >>> codes, scales = join(w, w, scale, scale)
    >>> glu(jnp.ones((1, 128)), codes, scales)[0, 0]  # silu(128) * 128
    Array(16384., dtype=float32)
    """
    if not isinstance(codes, Fragments) or codes.words.ndim < 4 or codes.words.shape[0] % 4:
        raise ValueError("codes of `glu` must be gate and up joined by `w4a8.join`")
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
    if scales.shape[1] % (2 * PAIR):
        raise ValueError(f"scales have {scales.shape[1]} columns; `w4a8.join` gives 256 by 256")
    shape = *x.shape[:-1], scales.shape[1] // 2
    if len(given.rows) == 0:
        return jnp.zeros(shape, given.out_dtype)
    divisors = jnp.stack([jnp.asarray(d, jnp.float32) for d in divisors])
    operands = given.rows, given.sx, codes, scales, divisors
    y = gradient.call(given.run, plain, given.options, operands)
    return y.reshape(shape).astype(given.out_dtype)
