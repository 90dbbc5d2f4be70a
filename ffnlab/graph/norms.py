"""Weights of edges that normalize a graph's product."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from ffnlab.graph.edges import Edges, Graph
from ffnlab.graph.segments import segment_sum

__all__ = ["row_norm", "symmetric_norm"]


def symmetric_norm(graph: Graph, weights: Float[Array, "e"] | None = None) -> Float[Array, "e"]:
    """w_ij / sqrt(d_i d_j), d_i the summed weights of the edges that node i receives.

    D^-1/2 A D^-1/2 of Kipf and Welling (arXiv 1609.02907, eq. 2), for a graph that has its self
    loops (`with_self_loops`).

    Args:
      graph: n nodes, e edges.
      weights: [e] float, >= 0; ones when None.
    Returns:
      [e]; 0 at the edges of a node that receives nothing.
    """
    weights = jnp.ones(graph.num_edges) if weights is None else weights
    degree = segment_sum(graph, weights)
    root = jnp.where(degree > 0, jnp.where(degree > 0, degree, 1) ** -0.5, 0)
    return weights * root[graph.receivers] * root[graph.senders]


def row_norm(edges: Edges, weights: Float[Array, "e"] | None = None) -> Float[Array, "e"]:
    """w_ij / d_i: the product becomes a weighted mean over the edges of each receiver.

    Args:
      edges: a Graph or Bipartite.
      weights: [e] float, >= 0; ones when None.
    Returns:
      [e]; 0 at the edges of a receiver whose weights are all 0.
    """
    weights = jnp.ones(edges.num_edges) if weights is None else weights
    degree = segment_sum(edges, weights)
    return weights / jnp.where(degree > 0, degree, 1)[edges.receivers]
