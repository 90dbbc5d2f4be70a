"""Rows of nodes brought to their edges, and values of edges brought to their nodes.

The first is a gather, whose gradient adds up at the nodes; the second adds up, and its gradient is
a gather. JAX's own rule for the gradient of a gather scatters: here both sums are the product of
`ffnlab.graph.product`, which on a CPU is a compiled CSR product. One of reverse mode, as that is.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ffnlab.errors import FFNLabError
from ffnlab.graph.edges import Edges
from ffnlab.graph.product import product
from ffnlab.graph.segments import check_values, wide

__all__ = ["at_receivers", "at_senders", "collected"]


def at_senders(edges: Edges, x: Float[Array, "m d"]) -> Float[Array, "e d"]:
    """x[senders[k]] of every edge k.

    Args:
      edges: a Graph or Bipartite, an argument of the jitted function (see `ffnlab.graph`).
      x: a row for each sender.
    Raises:
      FFNLabError: there is not one row for each sender, or they are not floats.

    >>> from ffnlab.graph import Graph
    >>> at_senders(Graph.make([0, 1, 2], [1, 1, 0], nodes=3), jnp.arange(3.0)[:, None]).tolist()
    [[2.0], [0.0], [1.0]]
    """
    check_rows("x", x, edges.num_senders, "senders")
    return sent(edges, x)


def at_receivers(edges: Edges, x: Float[Array, "n d"]) -> Float[Array, "e d"]:
    """x[receivers[k]] of every edge k; arguments and errors as those of `at_senders`."""
    check_rows("x", x, edges.num_receivers, "receivers")
    return received(edges, x)


def collected(
    edges: Edges, values: Float[Array, "e d"], weights: Float[Array, "e"] | None = None
) -> Float[Array, "n d"]:
    """y[i] = sum of weights[k] * values[k] over the edges k of receiver i.

    Args:
      edges: a Graph or Bipartite.
      values: a row for each edge; narrower than float32 it is widened, and the sum rounded once.
      weights: of the edges; ones when None.
    Returns:
      [n, d] in the dtype of the values; 0 for a receiver without edges.
    Raises:
      FFNLabError: there is not one row, or not one weight, for each edge, or they are no floats.

    >>> from ffnlab.graph import Graph
    >>> graph = Graph.make([0, 1, 2], [1, 1, 0], nodes=3)
    >>> collected(graph, jnp.array([[1.0], [10.0], [100.0]])).ravel().tolist()
    [1.0, 110.0, 0.0]
    """
    check_rows("values", values, edges.num_edges, "edges")
    if weights is None:
        weights = jnp.ones(edges.num_edges, wide(values).dtype)
    check_values("weights", weights, edges.num_edges, "edges")
    total = added(edges, weights.astype(wide(values).dtype), wide(values))
    return total.astype(values.dtype)


def check_rows(name: str, rows: Array, count: int, what: str) -> None:
    """Raises FFNLabError unless there is one row of floats for each of what is counted."""
    check_values(name, rows, count, what)
    if rows.ndim != 2:
        raise FFNLabError(f"{name} has shape {rows.shape}; [{what}, d] is accepted")


def picked(x: Array, places: Array) -> Array:
    """x[places], whose indices were checked where the graph was made."""
    if not places.size:  # perhaps no node either, and an axis of 0 takes no index
        return jnp.zeros((0, *x.shape[1:]), x.dtype)
    return x.at[places].get(mode="promise_in_bounds")


def summed(starts: Array, rows: Array, columns: Array, values: Array) -> Array:
    """Rows of values added up, those in `columns` from starts[i] on at i; float32 or wider."""
    ones = jnp.ones(columns.shape, wide(values).dtype)
    return product(starts, rows, columns, ones, wide(values)).astype(values.dtype)


def places_of(edges: Edges) -> Array:
    """0 … e - 1, the edges in their own order."""
    return jnp.arange(edges.num_edges, dtype=edges.senders.dtype)


@jax.custom_vjp
def sent(edges: Edges, x: Array) -> Array:
    """`at_senders`."""
    return picked(x, edges.senders)


def sent_back(edges: Edges, gradient: Array) -> tuple[None, Array]:
    rows = picked(edges.senders, edges.by_sender)
    return None, summed(edges.sender_starts, rows, edges.by_sender, gradient)


sent.defvjp(lambda edges, x: (sent(edges, x), edges), sent_back)


@jax.custom_vjp
def received(edges: Edges, x: Array) -> Array:
    """`at_receivers`."""
    return picked(x, edges.receivers)


def received_back(edges: Edges, gradient: Array) -> tuple[None, Array]:
    return None, summed(edges.starts, edges.receivers, places_of(edges), gradient)


received.defvjp(lambda edges, x: (received(edges, x), edges), received_back)


@jax.custom_vjp
def added(edges: Edges, weights: Array, values: Array) -> Array:
    """`collected` of one wide dtype."""
    return product(edges.starts, edges.receivers, places_of(edges), weights, values)


def added_back(saved: tuple, gradient: Array) -> tuple[None, Array, Array]:
    edges, weights, values = saved
    there = received(edges, gradient)
    return None, jnp.sum(there * values, axis=1), weights[:, None] * there


added.defvjp(
    lambda edges, weights, values: (added(edges, weights, values), (edges, weights, values)),
    added_back,
)
