"""Grouped products: the meaning, in plain jnp and float32.

    multiply   y[i] = x[i] @ w[e(i)]            or x[i] @ w[e(i)].T with `transposed`
    outer      dw[e] = sum over i with e(i) = e of x[i]^T dy[i]

where the first group_sizes[0] rows belong to expert 0, and so on; rows beyond belong to none.
"""

import jax.numpy as jnp
from jax import lax


def experts_of(group_sizes, m):
    """[m] int32, the expert of each row; the number of experts for rows that have none."""
    ends = jnp.cumsum(group_sizes.astype(jnp.int32))
    return jnp.searchsorted(ends, jnp.arange(m), side="right").astype(jnp.int32)


def multiply(x, w, scale, group_sizes, *, transposed, out_dtype):
    """Each row of x times its expert's matrix.

    Args:
      x: [m, k], any float dtype.
      w: [e, k, n], or [e, n, k] with `transposed`, of the same dtype.
      scale: [m] float32, multiplies the rows of the result; None for 1.
      group_sizes: [e] int32, with a sum of at most m.
      transposed: see above.
      out_dtype: what the caller will round to; this backend gives float32.
    Returns:
      [m, n] float32; zeros in rows without an expert.
    """
    expert = experts_of(group_sizes, x.shape[0])
    x = x.astype(jnp.float32)

    def add(total, numbered):
        number, matrix = numbered
        matrix = matrix.T if transposed else matrix
        y = jnp.matmul(x, matrix.astype(jnp.float32), precision="highest")
        return total + jnp.where((expert == number)[:, None], y, 0), None

    n = w.shape[1] if transposed else w.shape[2]
    zeros = jnp.zeros((x.shape[0], n), jnp.float32)
    y = lax.scan(add, zeros, (jnp.arange(len(w)), w))[0]
    return y if scale is None else y * scale[:, None]


def outer(x, dy, group_sizes):
    """The gradient of the matrices.

    Args:
      x: [m, k], dy: [m, n].
      group_sizes: [e] int32.
    Returns:
      [e, k, n] float32; zeros for an expert without rows.
    """
    expert = experts_of(group_sizes, x.shape[0])
    x, dy = x.astype(jnp.float32), dy.astype(jnp.float32)

    def one(number):
        own = jnp.where((expert == number)[:, None], x, 0)
        return jnp.matmul(own.T, dy, precision="highest")

    return lax.map(one, jnp.arange(len(group_sizes)))
