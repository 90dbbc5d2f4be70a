"""The meaning of the sparse products: masked dense arithmetic in float32.

Symbols: f rows of a weight, d columns; a row that takes part is one contiguous piece of memory.
A weight is an array, or an `Int4Rows`, which stands for the values it unpacks to.
"""

import jax.numpy as jnp

from pallas_kernels.sparse.packed import values


def matvec(x, w):
    """y = sum over i of x_i * w[i, :]; a zero x_i adds nothing.

    Args:
      x: [m, k], float.
      w: [k, n], float.
    Returns:
      [m, n], float32.
    """
    return jnp.matmul(x.astype(jnp.float32), values(w).astype(jnp.float32))


def take(x, w, ids, count):
    """y = sum over the first `count` entries i of ids of x_i * w[i, :].

    Args:
      x: [m, k], float.
      w: [k, n], float.
      ids: [c], int32; an entry outside 0..k-1 counts as the nearest row.
      count: [] int32.
    Returns:
      [m, n], float32; a row listed twice counts twice.
    """
    return matvec(only_listed(x.astype(jnp.float32), ids, count), w)


def only_listed(x, ids, count):
    """x [m, k] times how often each of its columns is among the first `count` of ids [c]."""
    live = (jnp.arange(ids.size) < count).astype(x.dtype)
    times = jnp.zeros(x.shape[-1], x.dtype).at[jnp.clip(ids, 0, x.shape[-1] - 1)].add(live)
    return jnp.where(times == 0, jnp.zeros((), x.dtype), x * times)


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
    inner = jnp.matmul(x.astype(jnp.float32), values(w_rows).astype(jnp.float32).T)
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
