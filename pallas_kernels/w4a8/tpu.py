"""INT4 weights times FP8 activations on a TPU (plain Pallas, which any device can interpret).

A TPU has no order of lanes to serve: codes stay canonical, two rows of w per byte. Even and odd
rows are multiplied apart, by the even and odd columns of x, so that nothing is interleaved. Codes
and e4m3 activations are exact in bfloat16; the partial sum of each group of rows is scaled in
float32.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.w4a8.reference import activations
from pallas_kernels.w4a8.refusals import TPU_ROWS

TOKENS, COLUMNS = 128, 256  # of a block of the output; 16 tokens at least


def matmul(x, sx, codes, scales, divisor, *, group, act, interpret=False, **_):
    """Same contract as `reference.matmul` for canonical codes, n a multiple of 128."""
    x, sx = activations(x, sx, act)
    (m, k), n = x.shape, scales.shape[1]
    tokens = min(TOKENS, m + -m % 16)
    columns = COLUMNS if n % COLUMNS == 0 else 128
    rows = TPU_ROWS if k % TPU_ROWS == 0 else k
    x = jnp.pad(x.astype(jnp.bfloat16), ((0, -m % tokens), (0, 0)))
    half = pl.BlockSpec((tokens, rows // 2), lambda i, j, s: (i, s))
    run = pl.pallas_call(
        functools.partial(block, group),
        grid=(x.shape[0] // tokens, n // columns, k // rows),
        in_specs=[
            half,
            half,
            pl.BlockSpec((rows // 2, columns), lambda i, j, s: (s, j)),
            pl.BlockSpec((rows // group, columns), lambda i, j, s: (s, j)),
        ],
        out_specs=pl.BlockSpec((tokens, columns), lambda i, j, s: (i, j)),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], n), jnp.float32),
        scratch_shapes=[pltpu.VMEM((tokens, columns), jnp.float32)],
        interpret=interpret,
    )
    signed = jax.lax.bitcast_convert_type(codes, jnp.int8)
    y = run(x[:, 0::2], x[:, 1::2], signed, scales.astype(jnp.float32))[:m]
    return (y if sx is None else y * sx) / divisor


def block(group, even, odd, codes, scales, out, total):
    """Adds the groups of one block of rows; writes the sum after the last."""
    last = pl.num_programs(2) - 1

    @pl.when(pl.program_id(2) == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    half = group // 2
    for i in range(scales.shape[0]):
        part = pl.ds(i * half, half)
        both = codes[part, :].astype(jnp.int32)
        low, high = (both << 28) >> 28, both >> 4
        product = jnp.zeros(total.shape, jnp.float32)
        for tokens, q in ((even, low), (odd, high)):
            q = q.astype(jnp.float32).astype(jnp.bfloat16)
            product += jnp.dot(tokens[:, part], q, preferred_element_type=jnp.float32)
        total[...] += product * scales[i : i + 1, :]

    @pl.when(pl.program_id(2) == last)
    def _():
        out[...] = total[...]
