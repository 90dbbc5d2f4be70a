"""Graphs that every operation has to take, and dense matrices to compare with."""

import numpy as np

from ffnlab.graph import Bipartite, Edges, Graph


def drawn(seed: int, edges: int, m: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Edges in no order; more of them than there are pairs gives duplicates."""
    random = np.random.default_rng(seed)
    return random.integers(0, m, edges), random.integers(0, n, edges)


CASES: dict[str, Edges] = {
    "some": Graph.make(*drawn(0, 20, 9, 9), nodes=9),
    "duplicates": Graph.make(*drawn(1, 40, 3, 3), nodes=3),
    "isolated nodes": Graph.make([4, 4, 0], [4, 0, 4], nodes=6),
    "one edge": Graph.make([1], [0], nodes=2),
    "no edges": Graph.make([], [], nodes=4),
    "nothing": Graph.make([], [], nodes=0),
    "more senders": Bipartite.make(*drawn(2, 25, 11, 4), num_senders=11, num_receivers=4),
    "more receivers": Bipartite.make(*drawn(3, 25, 4, 11), num_senders=4, num_receivers=11),
}


def matrix(edges: Edges, weights: np.ndarray | None = None) -> np.ndarray:
    """The dense matrix [n, m] in float64; the oracle."""
    values = np.ones(edges.num_edges) if weights is None else np.asarray(weights, np.float64)
    dense = np.zeros((edges.num_receivers, edges.num_senders))
    np.add.at(dense, (np.asarray(edges.receivers), np.asarray(edges.senders)), values)
    return dense


def pairs(edges: Edges) -> list[tuple[int, int]]:
    """(sender, receiver) of each edge, in the order of the graph."""
    return list(zip(edges.senders.tolist(), edges.receivers.tolist(), strict=True))
