"""INT4 weights times activations: the meaning, in plain jnp and float32.

    y[m, n] = sx[m] * sum_k e4m3(x[m, k] / sx[m]) * w[k, n] / divisor
    w[k, n] = q[k, n] * s[k // group, n]             treatment "promote"
    w[k, n] = e4m3(q[k, n] * s[k // group, n])       treatment "table"

with sx[m] = absmax_k |x[m, k]| / 448, or x as it is when `act` is None. FireQ (arXiv 2505.20839)
looks 16 products up in a table of e4m3 values; multiplying each group's partial sum by its scale
("promote") costs nothing more on a tensor core and skips that rounding, so it is the default.

Codes are canonical: [k / 2, n] uint8, row 2i of q in the low nibble of row i, two's complement.
"""

import jax.numpy as jnp

from pallas_kernels.numerics import quantize_tokens, to_e4m3
from pallas_kernels.w4a8.nibbles import unpack_nibbles
from pallas_kernels.w4a8.packed import canonical


def dequantize(codes, scales, *, group, treatment="promote"):
    """The matrix before division by `divisor`.

    Args:
      codes: [k / 2, n] uint8, or `Fragments`.
      scales: [k / group, n], float32, bfloat16 or float8_e4m3fn.
      group: rows of q that share a scale.
      treatment: "promote" or "table"; the table saturates at 448.
    Returns:
      [k, n] float32.
    """
    n = scales.shape[1]
    q = unpack_nibbles(canonical(codes, n)).astype(jnp.float32).reshape(-1, group, n)
    w = (q * scales.astype(jnp.float32)[:, None]).reshape(-1, n)
    return to_e4m3(w).astype(jnp.float32) if treatment == "table" else w


def activations(x, sx, act):
    """x as it enters the product and the scale [m, 1] of its rows, None for 1."""
    if sx is not None or act is None:
        return x, sx
    return quantize_tokens(x)


def matmul(x, sx, codes, scales, divisor, *, group, act, treatment, out_dtype=jnp.float32):
    """The formula above.

    Args:
      x: [m, k], float32, bfloat16 or float16; float8_e4m3fn with `sx`.
      sx: [m, 1] float32, the scale of rows that are already e4m3; else None.
      codes, scales, group, treatment: see `dequantize`.
      divisor: [] float32.
      act: "e4m3" rounds x per token, None leaves it.
      out_dtype: what the caller will round to; this backend gives float32.
    Returns:
      [m, n] float32.
    """
    x, sx = activations(x, sx, act)
    w = dequantize(codes, scales, group=group, treatment=treatment)
    product = jnp.matmul(x.astype(jnp.float32), w, precision="highest")
    return (product if sx is None else sx * product) / divisor
