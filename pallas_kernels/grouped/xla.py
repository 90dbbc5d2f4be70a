"""Grouped products by `lax.ragged_dot`, on any platform."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.numerics import E4M3


def multiply(x, w, scale, group_sizes, *, transposed, out_dtype):
    """Same contract as `reference.multiply`; float32 sums in another order."""
    x, w = operand(x), operand(w)
    w = w.swapaxes(1, 2) if transposed else w
    y = lax.ragged_dot(x, w, group_sizes, preferred_element_type=jnp.float32)
    return y if scale is None else y * scale[:, None]


def outer(x, dy, group_sizes):
    """Same contract as `reference.outer`."""
    rows = (((0,), (0,)), ((), ()))
    numbers = lax.RaggedDotDimensionNumbers(
        rows, lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
    )
    return lax.ragged_dot_general(
        operand(x), operand(dy), group_sizes, numbers, preferred_element_type=jnp.float32
    )


def operand(x):
    """x in a dtype that products are fast in and that holds its values."""
    if jax.default_backend() == "cpu":
        return x.astype(jnp.float32)
    return x.astype(jnp.bfloat16) if x.dtype == E4M3 else x
