"""Edges of a graph hidden for learning to find them, beside pairs of nodes that have none."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32

from ffnlab.data.graphs import LabelledNodes
from ffnlab.errors import ConfigError, check_seed
from ffnlab.graph import Graph, undirected

__all__ = ["LinkSplit", "LinkPairs", "link_split"]


class LinkPairs(NamedTuple):
    """Pairs of nodes.

    Attributes:
      ends: [m, 2] int32, the smaller node first.
      joined: [m] bool, whether they have an edge; as many have as have not.
    """

    ends: Int32[np.ndarray, "m 2"]
    joined: Bool[np.ndarray, "m"]


class LinkSplit(NamedTuple):
    """A graph whose edges are in three parts.

    Attributes:
      x: features of its nodes, [n, d] float32.
      graph: edges of the first part, in both directions.
      seen: those of the first and the second part, which is what is seen when the third is asked.
      train, valid, test: the parts with as many pairs without an edge; no pair is in two of them.
    """

    x: Float32[np.ndarray, "n d"]
    graph: Graph
    seen: Graph
    train: LinkPairs
    valid: LinkPairs
    test: LinkPairs


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
    ends = np.stack([np.asarray(graph.senders), np.asarray(graph.receivers)], 1)
    edges = np.unique(np.sort(ends[ends[:, 0] != ends[:, 1]], axis=1), axis=0).astype(np.int64)
    counts = [round(share * len(edges)) for share in (valid, test)]
    if min(counts) < 1 or sum(counts) >= len(edges):
        raise ConfigError(
            f"valid={valid} and test={test} of {len(edges)} edges leave a part without any"
        )
    n = graph.num_nodes
    if n * (n - 1) // 2 < 2 * len(edges):
        raise ConfigError(f"{len(edges)} edges among {n} nodes: as many pairs have none")
    edges, others = random.permutation(edges), unjoined(edges, n, random)
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


def unjoined(
    edges: Int[np.ndarray, "e 2"], n: int, random: np.random.Generator
) -> Int[np.ndarray, "e 2"]:
    """As many pairs without an edge, each once, the smaller node first."""
    taken, found = edges[:, 0] * n + edges[:, 1], np.zeros(0, np.int64)
    while len(found) < len(edges):
        drawn = np.sort(random.integers(n, size=(2 * len(edges), 2)), axis=1)
        drawn = drawn[drawn[:, 0] < drawn[:, 1]]
        fresh = np.setdiff1d(drawn[:, 0] * n + drawn[:, 1], np.append(taken, found))
        found = np.append(found, fresh)
    found = random.permutation(found)[: len(edges)]
    return np.stack(np.divmod(found, n), 1)
