"""How activations become small whole numbers, of which joint states are made.

    fixed     the cell of a grid over a range that is known
    adaptive  the cell of a grid that follows what a layer does at the time (EBAB,
              arXiv 1902.09037): every cell holds as many distinct values

Both give the codes of `numpy.digitize`, are pure functions that jit and vmap, and say nothing of
the width: `ffnlab.analysis.entropy` joins the units.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ffnlab.analysis.entropy import Host
from ffnlab.errors import ConfigError, at_least

__all__ = ["adaptive_codes", "edges_of", "fixed_codes"]


def edges_of(low: float, high: float, bins: int) -> Float[Array, "bins"]:
    """Evenly spaced edges, both ends among them: 30 of them are 29 cells and one beyond.

    Raises:
      ConfigError: fewer than 2, or a range of no width or without end.
    """
    at_least(2, bins=bins)
    if not -math.inf < low < high < math.inf:
        raise ConfigError(f"low={low} must lie below high={high}, and both be finite")
    return jnp.linspace(low, high, bins)


def fixed_codes(values: Float[Host, "*shape"], edges: Float[Host, "bins"]) -> Int[Array, "*shape"]:
    """How many edges lie at or below each value: 0 below all of them, `bins` beyond the last.

    Source: `numpy.digitize(values, edges)`, as arXiv 1703.00810's authors use it.
    """
    return jnp.digitize(values, edges)


def adaptive_codes(values: Float[Host, "n d"], bins: int, low: float) -> Int[Array, "n d"]:
    """Codes by edges that hold as many distinct values each, of all units of a layer together.

    With u the sorted distinct values but `low`, the edges are low, u[floor(k |u| / bins)] for k in
    0 .. bins - 1, and u's last; what is equal to `low`, the zeros of a ReLU, has a cell of its own.
    Codes depend on the order of values alone, so that no increasing map of them changes anything.

    Args:
      values: activations of n inputs in d units.
      bins: >= 1.
      low: what the nonlinearity does not go below: 0 of a ReLU, -1.000001 of a tanh.
    Returns:
      codes in 0 .. bins + 2.
    Raises:
      ConfigError: bins below 1, or too many values for int32.
    Source: EBAB, `set_up_bins` of the authors' code.
    """
    at_least(1, bins=bins)
    if values.size * bins >= 2**31:
        raise ConfigError(f"{values.size} values and bins={bins}; their product must be below 2^31")
    flat = values.reshape(-1)
    order = jnp.sort(flat)
    is_new = jnp.concatenate([jnp.ones(1, bool), order[1:] != order[:-1]]) & (order != low)
    count = is_new.sum()
    # Of each value its place among the distinct ones, from 0.
    place = (jnp.cumsum(is_new) - 1)[jnp.searchsorted(order, flat)]
    # Edges floor(k count / bins) at or below the place: k count < (place + 1) bins.
    below = jnp.minimum(bins, -(-((place + 1) * bins) // jnp.maximum(count, 1)))
    codes = (flat >= low) + below + (place == count - 1)
    return jnp.where(flat == low, 1, codes).reshape(values.shape).astype(jnp.int32)
