"""The meaning of the sparse products: masked dense arithmetic in float32.

Symbols: f rows of a weight, d columns; a row that takes part is one contiguous piece of memory.
"""

import jax.numpy as jnp


def matvec(x, w):
    """y = sum over i of x_i * w[i, :]; a zero x_i adds nothing.

    Args:
      x: [m, k], float.
      w: [k, n], float.
    Returns:
      [m, n], float32.
    """
    return jnp.matmul(x.astype(jnp.float32), w.astype(jnp.float32))


def rows(x, w_rows, gate):
    """m_i = gate_i * <w_rows[i, :], x>, and 0 where gate_i is 0.

    Args:
      x: [m, d], float.
      w_rows: [f, d], float.
      gate: [m, f], float.
    Returns:
      [m, f], float32.
    """
    gate = gate.astype(jnp.float32)
    inner = jnp.matmul(x.astype(jnp.float32), w_rows.astype(jnp.float32).T)
    return jnp.where(gate == 0, jnp.float32(0), gate * inner)


def glu(gate, up_rows, down, x):
    """y = sum over i of gate_i * <up_rows[i, :], x> * down[i, :].

    Args:
      gate: [m, f], float, after the activation and with dropped channels set to 0.
      up_rows: [f, d], float.
      down: [f, n], float.
      x: [m, d], float.
    Returns:
      [m, n], float32.
    """
    return matvec(rows(x, up_rows, gate), down)
