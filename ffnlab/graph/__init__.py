"""Graphs as sorted edge lists, of one kind of nodes or several, and products of learning on them.

A graph is data: a pytree of index arrays, made and checked on the host, that is an argument of
what is compiled (`jax.jit(lambda model, graph, x: …)`). A function that closes over one instead
makes it a constant of its program, and XLA folds constants: with 400,000 edges for most of a
minute. Layers on graphs belong in `ffnlab.layers`, data sets in `ffnlab.data`.
"""

from ffnlab.graph.building import disjoint, pad, undirected, with_self_loops
from ffnlab.graph.edges import Bipartite, Edges, Graph, edge_order
from ffnlab.graph.ends import at_receivers, at_senders, collected
from ffnlab.graph.hetero import Hetero, Relation, mean_over
from ffnlab.graph.norms import row_norm, symmetric_norm
from ffnlab.graph.product import aggregate
from ffnlab.graph.segments import segment_max, segment_mean, segment_softmax, segment_sum

__all__ = [
    "Bipartite",
    "Edges",
    "Graph",
    "Hetero",
    "Relation",
    "aggregate",
    "at_receivers",
    "at_senders",
    "collected",
    "disjoint",
    "edge_order",
    "mean_over",
    "pad",
    "row_norm",
    "segment_max",
    "segment_mean",
    "segment_softmax",
    "segment_sum",
    "symmetric_norm",
    "undirected",
    "with_self_loops",
]
