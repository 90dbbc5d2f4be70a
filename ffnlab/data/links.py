"""What a graph is whose edges are hidden for learning to find them (`ffnlab.data.splits`)."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32

from ffnlab.graph import Graph

__all__ = ["LinkPairs", "LinkSplit"]


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
