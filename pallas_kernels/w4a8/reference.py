"""INT4 weights times activations: the meaning, in plain jnp and float32.

    y[m, n] = sx[m] * sum_k e4m3(x[m, k] / sx[m]) * w[k, n] / divisor
    w[k, n] = q[k, n] * s[k // group, n]             treatment "promote"
    w[k, n] = e4m3(q[k, n] * s[k // group, n])       treatment "table"

with sx[m] = absmax_k |x[m, k]| / 448, or x as it is when `act` is None. FireQ (arXiv 2505.20839)
looks 16 products up in a table of e4m3 values; multiplying each group's partial sum by its scale
("promote") costs nothing more on a tensor core and skips that rounding, so it is the default.

Codes are canonical: [k / 2, n] uint8, row 2i of q in the low nibble of row i, two's complement.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.numerics import quantize_tokens, to_e4m3


def pack_nibbles(q):
    """Codes two per byte along k, the opposite of `unpack_nibbles`.

    Args:
      q: [k, n] integers in -8..7, k even.
    Returns:
      [k / 2, n] uint8.
    """
    nibbles = q.astype(jnp.uint8) & jnp.uint8(15)
    return nibbles[0::2] | (nibbles[1::2] << jnp.uint8(4))


def unpack_nibbles(codes):
    """The codes -8..7 of a packed matrix.

    Args:
      codes: [k / 2, n] uint8.
    Returns:
      [k, n] int8.

    >>> unpack_nibbles(jnp.array([[0x8F]], jnp.uint8))
    Array([[-1],
           [-8]], dtype=int8)
    """
    low = jax.lax.bitcast_convert_type(codes << jnp.uint8(4), jnp.int8) >> jnp.int8(4)
    high = jax.lax.bitcast_convert_type(codes, jnp.int8) >> jnp.int8(4)
    return jnp.stack([low, high], axis=1).reshape(2 * codes.shape[0], codes.shape[1])


def dequantize(codes, scales, *, group, treatment="promote"):
    """The matrix before division by `divisor`.

    Args:
      codes: [k / 2, n] uint8.
      scales: [k / group, n], float32, bfloat16 or float8_e4m3fn.
      group: rows of q that share a scale.
      treatment: "promote" or "table"; the table saturates at 448.
    Returns:
      [k, n] float32.
    """
    q = unpack_nibbles(codes).astype(jnp.float32).reshape(-1, group, codes.shape[1])
    w = (q * scales.astype(jnp.float32)[:, None]).reshape(-1, codes.shape[1])
    return to_e4m3(w).astype(jnp.float32) if treatment == "table" else w


def matmul(x, codes, scales, divisor, *, group, act, treatment):
    """The formula above.

    Args:
      x: [m, k], float32, bfloat16 or float16.
      codes, scales, group, treatment: see `dequantize`.
      divisor: [] float32.
      act: "e4m3" rounds x per token, None leaves it.
    Returns:
      [m, n] float32.
    """
    sx = jnp.ones((x.shape[0], 1), jnp.float32)
    if act == "e4m3":
        x, sx = quantize_tokens(x)
    w = dequantize(codes, scales, group=group, treatment=treatment)
    product = jnp.matmul(x.astype(jnp.float32), w, precision="highest")
    return sx * product / divisor
