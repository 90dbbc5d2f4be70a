"""Grouped products by `lax.ragged_dot`, on any platform.

It has no rule for `vmap` over some of its operands: there one product follows the other.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.numerics import E4M3


def multiply(x, w, scale, group_sizes, *, transposed, out_dtype):
    """Same contract as `reference.multiply`; float32 sums in another order."""
    x, w = operand(x), operand(w)
    w = w.swapaxes(1, 2) if transposed else w
    y = ragged(x, w, group_sizes)
    return y if scale is None else y * scale[:, None]


@jax.custom_batching.sequential_vmap
def ragged(x, w, group_sizes):
    """`lax.ragged_dot` with float32 sums; differentiate a function that knows its gradient."""
    return lax.ragged_dot(x, w, group_sizes, preferred_element_type=jnp.float32)


def outer(x, dy, group_sizes):
    """Same contract as `reference.outer`."""
    return ragged_outer(operand(x), operand(dy), group_sizes)


@jax.custom_batching.sequential_vmap
def ragged_outer(x, dy, group_sizes):
    """Each group's x^T dy, with float32 sums."""
    rows = (((0,), (0,)), ((), ()))
    numbers = lax.RaggedDotDimensionNumbers(
        rows, lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
    )
    return lax.ragged_dot_general(x, dy, group_sizes, numbers, preferred_element_type=jnp.float32)


def operand(x):
    """x in a dtype that products are fast in and that holds its values."""
    if jax.default_backend() == "cpu":
        return x.astype(jnp.float32)
    return x.astype(jnp.bfloat16) if x.dtype == E4M3 else x
