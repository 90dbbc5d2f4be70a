"""What a network is shown of a graph, and what a step learns from: trees of arrays.

    N: nodes, virtual ones included; n: those without; C: classes; m: pairs; r: copies

The virtual nodes of the C classes are the last rows. A graph is shown in several copies where
labels are written into it in several ways: into features (`labels`), or into edges (each array of
`graph` is [r, …]).
"""

import dataclasses

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from ffnlab.graph import Graph
from ffnlab.weights.base import AxisNames, register

__all__ = ["GraphBatch", "GraphInputs", "Host", "parts_of"]

Host = Array | np.ndarray


@register
@dataclasses.dataclass(frozen=True)
class GraphInputs:
    """A graph as a network is shown it.

    Attributes:
      x: features, [N, d]; of virtual nodes random ones.
      graph: its edges, with self loops where layers expect them.
      labels: [r, N, C] what is appended to the features of each copy; of a network that is fed
        back [1, N, C], what its last layer reads from above. None where neither is so.
      pairs: [m, 2] nodes that are asked for an edge between them; None where classes are asked for.
    """

    x: Float[Host, "N d"]
    graph: Graph
    labels: Float[Host, "r N C"] | None = None
    pairs: Int[Host, "m 2"] | None = None

    def leaf_axes(self) -> "GraphInputs":
        """No name for any dimension: a mesh keeps a graph whole."""
        return unnamed(self, np.ndim(self.x) - 2)


@register
@dataclasses.dataclass(frozen=True)
class GraphBatch:
    """What a step learns from, and what its layers are validated on.

    Attributes:
      inputs: what is learned from.
      targets: [n] classes of the nodes to learn from, -1 for others; of pairs [m], 1 for an edge
        and 0 for none.
      held_out: likewise of validation.
      asked: what is shown for validation; `inputs` when None.
    """

    inputs: GraphInputs
    targets: Int[Host, "n"]
    held_out: Int[Host, "k"]
    asked: GraphInputs | None = None

    def leaf_axes(self) -> "GraphBatch":
        """No name for any dimension: a mesh keeps a graph whole."""
        return unnamed(self, np.ndim(self.targets) - 1)


def unnamed(tree: GraphInputs | GraphBatch, stacked: int) -> GraphInputs | GraphBatch:
    """A tree with as many None as each array has axes, but for leading ones of stacked trees."""
    return jax.tree.map(lambda leaf: AxisNames((None,) * (np.ndim(leaf) - stacked)), tree)


def parts_of(batch: GraphBatch) -> tuple[GraphInputs, ...]:
    """What of a batch is learned from, and last what is asked: the same, or another."""
    return (batch.inputs,) if batch.asked is None else (batch.inputs, batch.asked)
