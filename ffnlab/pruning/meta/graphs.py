"""A network as nodes and edges with numbers, and back: no bit of it changes on the way.

Nodes are neurons or channels, those of the input first, then layer after layer. An edge goes from
what is read to what reads it; the edges of a node are neighbours, in the order of what they come
from, which is the order of `ffnlab.graph.Graph`. How each kind of model is laid out is said in
`ffnlab.pruning.meta.layouts`.

    f, g: numbers of a node and of an edge        n, e: nodes and edges
"""

import dataclasses
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from ffnlab import tree
from ffnlab.errors import ConfigError
from ffnlab.graph import Graph
from ffnlab.models.groups import owner_of
from ffnlab.models.stack import Stacked, in_list, unstack
from ffnlab.weights import Dense, Weight

__all__ = ["Column", "Fan", "Kernel", "Layout", "NodeLayer"]

M = TypeVar("M")


class Column(NamedTuple):
    """One number of each node of a layer, from a vector of the model.

    Attributes:
      path: of the variable, in the list form of the model.
      slot: which number.
      is_written: whether the way back takes it; statistics keep what they were.
    """

    path: str
    slot: int
    is_written: bool = True


class Kernel(NamedTuple):
    """Numbers of edges from a matrix [taps * in, out], rows by tap and then by input.

    Attributes:
      path: of the variable.
      taps: how many numbers of an edge it gives.
      slot: the first of them.
    """

    path: str
    taps: int
    slot: int


class Fan(NamedTuple):
    """Edges from all nodes of one layer to all of another.

    Attributes:
      first, count: nodes that they come from.
      kernels: in the order of their slots; what none of them gives is 0.
      fixed: [out, in] numbers at `slot` of a shortcut without parameters, which the way back does
        not read; None where there are kernels.
      slot: see `fixed`.
    """

    first: int
    count: int
    kernels: tuple[Kernel, ...] = ()
    fixed: np.ndarray | None = None
    slot: int = 0


class NodeLayer(NamedTuple):
    """Neighbouring nodes, and the edges that end there.

    Attributes:
      first, count: of the nodes.
      columns: their numbers; the rest are the layout's defaults.
      fans: by the nodes that they come from, ascending.
    """

    first: int
    count: int
    columns: tuple[Column, ...] = ()
    fans: tuple[Fan, ...] = ()

    @property
    def edges(self) -> int:
        """How many end at its nodes."""
        return self.count * sum(fan.count for fan in self.fans)


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """What of a model is where in its graph; made by `layout_of`.

    Attributes:
      name: of the kind of layout.
      defaults: [f], numbers of a node that nothing else gives.
      edge_numbers: of an edge (g).
      layers: in the order of their nodes.
    """

    name: str
    defaults: tuple[float, ...]
    edge_numbers: int
    layers: tuple[NodeLayer, ...]

    @property
    def nodes(self) -> int:
        """How many there are (n)."""
        return sum(layer.count for layer in self.layers)

    @property
    def edges(self) -> int:
        """How many there are (e)."""
        return sum(layer.edges for layer in self.layers)

    def graph(self) -> Graph:
        """Its edges, on the host: an argument of what is compiled (see `ffnlab.graph`)."""
        senders, receivers = [np.zeros(0, int)], [np.zeros(0, int)]
        for layer in self.layers:
            read = [np.arange(fan.first, fan.first + fan.count) for fan in layer.fans]
            below = np.concatenate([np.zeros(0, int), *read])
            senders.append(np.tile(below, layer.count))
            receivers.append(np.repeat(np.arange(layer.count) + layer.first, len(below)))
        return Graph.make(np.concatenate(senders), np.concatenate(receivers), nodes=self.nodes)

    def read(self, model: Any) -> tuple[Float[Array, "n f"], Float[Array, "e g"]]:
        """The numbers of nodes and edges, float32.

        Args:
          model: that it is the layout of, stacked or not; it may be traced.
        """
        flat = unstack(model) if isinstance(getattr(model, "layers", None), Stacked) else model
        at = dict(tree.walk(flat))
        rows = [self.rows(at, layer) for layer in self.layers]
        edges = [self.fanned(at, layer) for layer in self.layers if layer.fans]
        return jnp.concatenate(rows), jnp.concatenate(edges)

    def rows(self, at: dict[str, Any], layer: NodeLayer) -> Float[Array, "count f"]:
        """The nodes of a layer."""
        given = {column.slot: column for column in layer.columns}
        columns = [
            array_at(at, given[slot].path) if slot in given else jnp.full(layer.count, value)
            for slot, value in enumerate(self.defaults)
        ]
        return jnp.stack([column.astype(jnp.float32) for column in columns], axis=1)

    def fanned(self, at: dict[str, Any], layer: NodeLayer) -> Float[Array, "edges g"]:
        """The edges that end at the nodes of a layer."""
        blocks = []
        for fan in layer.fans:
            if fan.fixed is not None:
                parts = [(fan.slot, jnp.asarray(fan.fixed, jnp.float32)[..., None])]
            else:
                parts = [(kernel.slot, unfolded(at, kernel)) for kernel in fan.kernels]
            blocks.append(placed(parts, (layer.count, fan.count), self.edge_numbers))
        return jnp.concatenate(blocks, axis=1).reshape(-1, self.edge_numbers)

    def write(self, model: M, nodes: Float[Array, "n f"], edges: Float[Array, "e g"]) -> M:
        """The model with these numbers, in the dtypes that its parameters have; what the layout
        does not write stays.

        Raises:
          ConfigError: not the numbers of this layout.
        """
        for name, found, wanted in (
            ("nodes", nodes.shape, (self.nodes, len(self.defaults))),
            ("edges", edges.shape, (self.edges, self.edge_numbers)),
        ):
            if tuple(found) != wanted:
                raise ConfigError(f"{name} {list(found)}: this {self.name} has {list(wanted)}")

        def put(flat: M) -> M:
            new = tree.copy(flat)
            at, first = dict(tree.walk(new)), 0
            for layer in self.layers:
                own = nodes[layer.first : layer.first + layer.count]
                for column in layer.columns:
                    if column.is_written:
                        assign(at, column.path, own[:, column.slot])
                block = edges[first : first + layer.edges]
                first += layer.edges
                self.assign_kernels(at, layer, block.reshape(layer.count, -1, self.edge_numbers))
            return new

        return in_list(model, put)

    def assign_kernels(
        self, at: dict[str, Any], layer: NodeLayer, block: Float[Array, "out in g"]
    ) -> None:
        """Writes the matrices of a layer's edges."""
        first = 0
        for fan in layer.fans:
            own = block[:, first : first + fan.count]
            first += fan.count
            for path, taps, slot in fan.kernels:
                numbers = own[..., slot : slot + taps]
                assign(at, path, numbers.transpose(2, 1, 0).reshape(-1, layer.count))


def array_at(at: dict[str, Any], path: str) -> Array:
    """The array of the variable at a path."""
    value = at[path].get_value()
    return value.dense() if isinstance(value, Weight) else value


def unfolded(at: dict[str, Any], kernel: Kernel) -> Float[Array, "out in taps"]:
    """A matrix by output, input and tap."""
    w = array_at(at, kernel.path).astype(jnp.float32)
    return w.reshape(kernel.taps, -1, w.shape[1]).transpose(2, 1, 0)


def placed(
    parts: list[tuple[int, Array]], shape: tuple[int, int], width: int
) -> Float[Array, "out in g"]:
    """Numbers side by side from their slots on, zeros between them."""
    found, end = [], 0
    for slot, numbers in parts:
        found += [jnp.zeros((*shape, slot - end)), numbers]
        end = slot + numbers.shape[2]
    return jnp.concatenate([*found, jnp.zeros((*shape, width - end))], axis=2)


def assign(at: dict[str, Any], path: str, array: Array) -> None:
    """Puts an array into the variable at a path, in its dtype."""
    owner, attribute = owner_of(at, path)
    variable: nnx.Variable = getattr(owner, attribute)
    value = variable.get_value()
    array = array.astype(value.dtype)
    new = Dense(array, value.act) if isinstance(value, Dense) else array
    setattr(owner, attribute, variable.replace(new))
