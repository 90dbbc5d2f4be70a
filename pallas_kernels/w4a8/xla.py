"""INT4 weights times activations on any platform XLA knows.

Up to four tokens each group's partial sum is taken on the integer codes and then scaled: on a GPU
XLA fuses the unpacking into that product, so the dequantized matrix is never written. With more
tokens the partial sums (groups x m x n) would cost more than the matrix, which is dequantized.

A CPU fuses nothing into a product: writing the dequantized matrix is what takes the time, and most
of that goes into fresh memory. There up to CPU_TOKENS tokens it is made and used a chunk of rows at
a time. Measured on one core for [m, 2048] @ [2048, 5632]: 2.4 ms instead of 32 for one token (a
dense float32 matrix: 2.2), 23 instead of 52 for 64, 81 instead of 100 for 256.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.numerics import to_e4m3
from pallas_kernels.w4a8.nibbles import unpack_nibbles
from pallas_kernels.w4a8.packed import canonical
from pallas_kernels.w4a8.reference import activations, dequantize

FEW_TOKENS = 4
CPU_TOKENS, CPU_ROWS = 256, 128


def matmul(x, sx, codes, scales, divisor, *, group, act, treatment, out_dtype=jnp.float32):
    """Same contract as `reference.matmul`; float32 accumulation in another order.

    Args:
      x: [m, k], float32, bfloat16 or float16; float8_e4m3fn with `sx`.
      sx: [m, 1] float32 or None.
      codes: [k / 2, n] uint8, or `Fragments`, which are unpacked first.
      scales: [k / group, n], float32, bfloat16 or float8_e4m3fn.
      divisor: [] float32.
      group, act, treatment, out_dtype: see `reference.matmul`.
    Returns:
      [m, n] float32.
    """
    x, sx = activations(x, sx, act)
    codes = canonical(codes, scales.shape[1])
    x = x.astype(operand_dtype(x.dtype))
    if jax.default_backend() == "cpu" and x.shape[0] <= CPU_TOKENS and fits_chunks(codes, group):
        product = in_chunks(x, codes, scales, group, treatment)
    elif treatment == "promote" and x.shape[0] <= FEW_TOKENS:
        product = grouped(x, codes, scales, group)
    else:
        w = dequantize(codes, scales, group=group, treatment=treatment).astype(x.dtype)
        product = jnp.matmul(x, w, preferred_element_type=jnp.float32)
    product = product if sx is None else sx * product
    return product / divisor


def grouped(x, codes, scales, group):
    """x [m, k] times the codes, group by group, then the scales: [m, n] float32."""
    groups, n = scales.shape
    q = unpack_nibbles(codes).astype(x.dtype).reshape(groups, group, n)
    x = x.reshape(x.shape[0], groups, group)
    parts = jnp.einsum("mgk,gkn->gmn", x, q, preferred_element_type=jnp.float32)
    return jnp.sum(parts * scales.astype(jnp.float32)[:, None], axis=0)


def fits_chunks(codes, group):
    """Whether chunks of CPU_ROWS rows fall on the groups, and both nibbles of a byte in one."""
    aligned = group % CPU_ROWS == 0 or (group % 2 == 0 and CPU_ROWS % group == 0)
    return aligned and 2 * codes.shape[0] % CPU_ROWS == 0


def in_chunks(x, codes, scales, group, treatment):
    """x [m, k] times the dequantized matrix, CPU_ROWS of its rows at a time: [m, n] float32.

    Even and odd rows stay apart: to interleave them takes longer than the rest.
    """
    m, n, count = x.shape[0], codes.shape[1], 2 * codes.shape[0] // CPU_ROWS
    repeats = max(group // CPU_ROWS, 1)
    scales = jnp.repeat(scales.astype(jnp.float32), repeats, axis=0)
    chunks = (
        x.reshape(m, count, CPU_ROWS // 2, 2).transpose(1, 3, 0, 2),
        codes.reshape(count, CPU_ROWS // 2, n),
        scales.reshape(count, -1, 1, n),
    )

    def add(total, chunk):
        (even, odd), codes, scales = chunk
        low = jax.lax.bitcast_convert_type(codes << jnp.uint8(4), jnp.int8) >> jnp.int8(4)
        high = jax.lax.bitcast_convert_type(codes, jnp.int8) >> jnp.int8(4)
        for rows, q in ((even, low), (odd, high)):
            w = q.astype(jnp.float32).reshape(scales.shape[0], -1, n) * scales
            w = to_e4m3(w).astype(jnp.float32) if treatment == "table" else w
            total += rows @ w.reshape(-1, n)
        return total, None

    return jax.lax.scan(add, jnp.zeros((m, n), jnp.float32), chunks)[0]


def operand_dtype(dtype):
    """Dtype of the product's operands; bfloat16 holds e4m3 and int4 exactly (slow on a CPU)."""
    if jax.default_backend() == "cpu":
        return jnp.float32
    return jnp.bfloat16 if dtype == jnp.float8_e4m3fn else dtype
