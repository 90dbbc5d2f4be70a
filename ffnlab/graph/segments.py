"""Values of edges, taken together at their receivers.

Sums and softmax are computed in float32, or in float64 where values are; results have the dtype of
the values.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ffnlab.errors import FFNLabError
from ffnlab.graph.edges import Edges

__all__ = ["check_values", "segment_max", "segment_mean", "segment_softmax", "segment_sum", "wide"]


def wide(array: Array) -> Array:
    """An array in float32 if it was narrower."""
    return array.astype(jnp.float32) if array.dtype.itemsize < 4 else array


def check_values(name: str, values: Array, rows: int, what: str) -> None:
    """Raises FFNLabError unless values are floating, one row for each of what is counted."""
    if not values.ndim or values.shape[0] != rows or not jnp.issubdtype(values.dtype, jnp.floating):
        raise FFNLabError(
            f"{name} is {values.dtype}{list(values.shape)}; floats are accepted, "
            f"[{rows}, …] for {rows} {what}"
        )


def segment_sum(edges: Edges, values: Float[Array, "e *f"]) -> Float[Array, "n *f"]:
    """y[i] = sum of values[k] over the edges k of receiver i; 0 where there are none.

    Args:
      edges: a Graph or Bipartite.
      values: [e, …].
    Returns:
      [n, …] in the dtype of the values.
    Raises:
      FFNLabError: there is not one value for each edge, or they are not floats.
    """
    check_values("values", values, edges.num_edges, "edges")
    total = jax.ops.segment_sum(
        wide(values), edges.receivers, edges.num_receivers, indices_are_sorted=True
    )
    return total.astype(values.dtype)


def segment_mean(edges: Edges, values: Float[Array, "e *f"]) -> Float[Array, "n *f"]:
    """The mean of the values of each receiver's edges, [n, …]; 0 where there are none."""
    check_values("values", values, edges.num_edges, "edges")
    total = segment_sum(edges, wide(values))
    count = jnp.maximum(edges.degrees, 1).reshape(-1, *[1] * (values.ndim - 1))
    return (total / count.astype(total.dtype)).astype(values.dtype)


def segment_max(edges: Edges, values: Float[Array, "e *f"]) -> Float[Array, "n *f"]:
    """The largest of the values of each receiver's edges, [n, …]; 0 where there are none."""
    check_values("values", values, edges.num_edges, "edges")
    largest = jax.ops.segment_max(
        values, edges.receivers, edges.num_receivers, indices_are_sorted=True
    )
    empty = (edges.degrees == 0).reshape(-1, *[1] * (values.ndim - 1))
    return jnp.where(empty, 0, largest)


def segment_softmax(edges: Edges, scores: Float[Array, "e *f"]) -> Float[Array, "e *f"]:
    """p[k] = exp(scores[k]) / sum of exp(scores) over the edges of k's receiver.

    A score of -inf gives 0, also where all those of a receiver are -inf.

    Args:
      edges: a Graph or Bipartite.
      scores: [e, …].
    Returns:
      [e, …] in the dtype of the scores.
    Raises:
      FFNLabError: there is not one score for each edge, or they are not floats.
    """
    check_values("scores", scores, edges.num_edges, "edges")
    largest = jax.lax.stop_gradient(segment_max(edges, wide(scores)))
    shift = jnp.where(jnp.isfinite(largest), largest, 0)
    powers = jnp.exp(wide(scores) - shift[edges.receivers])
    total = segment_sum(edges, powers)
    total = jnp.where(total == 0, 1, total)
    return (powers / total[edges.receivers]).astype(scores.dtype)
