"""Nodes and edges of a graph in parts: to learn from, to choose by, to test on.

Hidden edges stand beside as many pairs that have none anywhere, in no part and not hidden; the
graphs that are given with a split hold no edge that is still to be found.
"""

import numpy as np
from jaxtyping import Int, Int32

from ffnlab.data.graphs import LabelledNodes
from ffnlab.data.links import LinkPairs, LinkSplit
from ffnlab.errors import ConfigError, at_least, check_seed
from ffnlab.graph import Graph, undirected

__all__ = ["link_split", "node_split", "non_edges"]


def node_split(
    nodes: LabelledNodes, seed: int = 0, *, train: int = 20, valid: int = 30
) -> LabelledNodes:
    """The same graph with parts drawn anew: as many nodes of every class, the rest to test on.

    Args:
      nodes: a graph; the parts that it comes with are not looked at.
      seed: of the draw.
      train, valid: nodes of each class, at least 1 and 0.
    Raises:
      ConfigError: a class has fewer, or nothing is left to test on.

    >>> from ffnlab.data import block_model
    >>> split = node_split(block_model(nodes=60, classes=2, train=1, valid=1), train=5, valid=4)
    >>> [int(part.sum()) for part in (split.train, split.valid, split.test)]
    [10, 8, 42]
    """
    check_seed(seed)
    at_least(1, train=train)
    at_least(0, valid=valid)
    random, count = np.random.default_rng(seed), len(nodes.y)
    parts = np.full(count, 2)
    for c in np.unique(nodes.y):
        own = random.permutation(np.flatnonzero(nodes.y == c))
        if len(own) < train + valid:
            raise ConfigError(
                f"class {c} has {len(own)} nodes; train={train} and valid={valid} of each are more"
            )
        parts[own[:train]], parts[own[train : train + valid]] = 0, 1
    if not np.any(parts == 2):
        raise ConfigError(f"train={train} and valid={valid} of each class leave no node to test on")
    return nodes._replace(train=parts == 0, valid=parts == 1, test=parts == 2)


def link_split(
    nodes: LabelledNodes, seed: int = 0, *, valid: float = 0.16, test: float = 0.2
) -> LinkSplit:
    """Splits the edges of a graph, and draws pairs that have none beside them.

    Args:
      nodes: a graph without directions, without self loops; its classes are not looked at.
      seed: of the parts, and of the pairs.
      valid, test: shares of the edges.
    Raises:
      ConfigError: shares that leave a part empty, or too few pairs without an edge.
    """
    check_seed(seed)
    graph, random = nodes.graph, np.random.default_rng(seed)
    edges = pairs_of(graph)
    counts = [round(share * len(edges)) for share in (valid, test)]
    if min(counts) < 1 or sum(counts) >= len(edges):
        raise ConfigError(
            f"valid={valid} and test={test} of {len(edges)} edges leave a part without any"
        )
    n = graph.num_nodes
    if n * (n - 1) // 2 < 2 * len(edges):
        raise ConfigError(f"{len(edges)} edges among {n} nodes: as many pairs have none")
    edges, others = random.permutation(edges), unjoined(edges, n, random, len(edges))
    cuts = np.cumsum(counts)
    each = zip(*(np.split(rows, cuts) for rows in (edges, others)), strict=True)
    asked, last, first = (
        LinkPairs(np.concatenate(two).astype(np.int32), np.repeat([True, False], len(two[0])))
        for two in each
    )
    seen = [part.ends[part.joined] for part in (first, asked)]
    graphs = (
        undirected(Graph.make(*seen[0].T, nodes=n)),
        undirected(Graph.make(*np.concatenate(seen).T, nodes=n)),
    )
    return LinkSplit(nodes.x, *graphs, first, asked, last)


def non_edges(graph: Graph, count: int, seed: int = 0) -> Int32[np.ndarray, "count 2"]:
    """Pairs of nodes without an edge in either direction, each once, the smaller node first.

    Args:
      graph: n nodes.
      count: how many pairs, at least 1.
      seed: of the draw.
    Raises:
      ConfigError: there are fewer.

    >>> from ffnlab.graph import Graph
    >>> non_edges(Graph.make([0, 1], [1, 2], nodes=3), 1).tolist()
    [[0, 2]]
    """
    check_seed(seed)
    at_least(1, count=count)
    edges, n = pairs_of(graph), graph.num_nodes
    free = n * (n - 1) // 2 - len(edges)
    if free < count:
        raise ConfigError(f"count={count}: {free} pairs of {n} nodes have no edge")
    return unjoined(edges, n, np.random.default_rng(seed), count).astype(np.int32)


def pairs_of(graph: Graph) -> Int[np.ndarray, "e 2"]:
    """The pairs of nodes with an edge in any direction, each once, the smaller node first."""
    ends = np.stack([np.asarray(graph.senders), np.asarray(graph.receivers)], 1)
    return np.unique(np.sort(ends[ends[:, 0] != ends[:, 1]], axis=1), axis=0).astype(np.int64)


def unjoined(
    edges: Int[np.ndarray, "e 2"], n: int, random: np.random.Generator, count: int
) -> Int[np.ndarray, "count 2"]:
    """So many pairs without an edge, each once, the smaller node first."""
    taken, found = edges[:, 0] * n + edges[:, 1], np.zeros(0, np.int64)
    while len(found) < count:
        drawn = np.sort(random.integers(n, size=(2 * count, 2)), axis=1)
        drawn = drawn[drawn[:, 0] < drawn[:, 1]]
        fresh = np.setdiff1d(drawn[:, 0] * n + drawn[:, 1], np.append(taken, found))
        found = np.append(found, fresh)
    found = random.permutation(found)[:count]
    return np.stack(np.divmod(found, n), 1)
