"""A grid of places and a mesh on a sphere, joined both ways: what a `OneForecast` runs on."""

import dataclasses

import jax
from jaxtyping import Array, Float

from ffnlab.errors import ConfigError
from ffnlab.graph import Bipartite, Graph
from ffnlab.weights.base import AxisNames, register

__all__ = ["Globe"]


@register
@dataclasses.dataclass(frozen=True)
class Globe:
    """Three graphs and what their nodes and edges look like; an argument of what is compiled.

    `ffnlab.graphs.globe_of` makes one. Features of edges are (x, y, z, length) from the receiver to
    the sender, in a frame that has the receiver straight up, over the longest of their graph.

    Attributes:
      up: from the places of the grid to nodes of the mesh.
      mesh: among the nodes of the mesh.
      down: from nodes of the mesh to the places of the grid.
      nodes: of the mesh, [m, 3].
      up_edges, mesh_edges, down_edges: of each graph in its order, [e, 4].
    """

    up: Bipartite
    mesh: Graph
    down: Bipartite
    nodes: Float[Array, "m 3"]
    up_edges: Float[Array, "u 4"]
    mesh_edges: Float[Array, "e 4"]
    down_edges: Float[Array, "v 4"]

    @property
    def places(self) -> int:
        """Places of the grid."""
        return self.down.num_receivers

    def check(self) -> None:
        """Raises ConfigError unless its graphs and features are of the same grid and mesh."""
        m = self.mesh.num_nodes
        sizes = (self.up.num_receivers, self.down.num_senders, self.nodes.shape[0])
        if sizes != (m, m, m) or self.up.num_senders != self.places:
            raise ConfigError(
                f"globe: the mesh has {m} nodes, its other parts {sizes}; its grid has "
                f"{self.places} places, up has {self.up.num_senders}"
            )
        for name in ("up", "mesh", "down"):
            wanted = getattr(self, name).num_edges
            if getattr(self, f"{name}_edges").shape[0] != wanted:
                found = getattr(self, f"{name}_edges").shape[0]
                raise ConfigError(f"globe: {name} has {wanted} edges and features of {found}")

    def leaf_axes(self) -> "Globe":
        """Names of the dimensions of each array: none, so that a mesh of devices keeps it whole."""
        return jax.tree.map(lambda leaf: AxisNames((None,) * leaf.ndim), self)
