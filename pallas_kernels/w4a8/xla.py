"""INT4 weights times activations on any platform XLA knows.

Up to four tokens each group's partial sum is taken on the integer codes and then scaled: on a GPU
XLA fuses the unpacking into that product, so the dequantized matrix is never written. With more
tokens the partial sums (groups x m x n) would cost more than the matrix, which is dequantized.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.numerics import quantize_tokens
from pallas_kernels.w4a8.reference import dequantize, unpack_nibbles

FEW_TOKENS = 4


def matmul(x, codes, scales, divisor, *, group, act, treatment):
    """Same contract as `reference.matmul`; float32 accumulation in another order.

    Args:
      x: [m, k], float32, bfloat16 or float16.
      codes: [k / 2, n] uint8.
      scales: [k / group, n], float32, bfloat16 or float8_e4m3fn.
      divisor: [] float32.
      group, act, treatment: see `reference.matmul`.
    Returns:
      [m, n] float32.
    """
    sx = None
    if act == "e4m3":
        x, sx = quantize_tokens(x)
    x = x.astype(operand_dtype(x.dtype))
    if treatment == "promote" and x.shape[0] <= FEW_TOKENS:
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


def operand_dtype(dtype):
    """Dtype of the product's operands; bfloat16 holds e4m3 and int4 exactly (slow on a CPU)."""
    if jax.default_backend() == "cpu":
        return jnp.float32
    return jnp.bfloat16 if dtype == jnp.float8_e4m3fn else dtype
