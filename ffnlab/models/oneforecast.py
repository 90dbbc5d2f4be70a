"""A forecast on a globe: from a grid to a mesh, along the mesh, and back to the grid.

OneForecast: A Universal Framework for Global and Regional Weather Forecasting (2025). The fields of
a moment go to the nodes of an icosahedral multimesh, which is finer in chosen regions, pass a few
gated rounds of messages along its edges, and come back as the fields a step later: the next state
itself, not what changes. With `gated=False` the rounds are GraphCast's (arXiv 2212.12794).

    grid, nodes, edges = embedded, each by an MLP of its own
    nodes <- nodes + MLP([sum of EdgeMLP(up), nodes]),   grid <- grid + MLP(grid)
    (edges, nodes) <- block(edges, nodes)                 blocks times (`layers.mesh.MeshBlock`)
    grid <- grid + MLP([sum of EdgeMLP(down), grid]),     out = MLP(grid), without a norm

What differs from the authors' code: blocks are one stack that is scanned (`models.unstack` takes
them apart), where theirs are three, of one, of all but two and of one, so that they take no fewer
than three blocks, and neither do we; parts of the gate's first
map are kept apart, as those of the edge's are. The graphs are an argument (`Globe`,
`ffnlab.graphs.globe_of`), so several grids can share a model.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ffnlab.errors import ConfigError, at_least
from ffnlab.graph import Edges, Graph, collected
from ffnlab.layers.mesh import EdgeMLP, MeshBlock, NormedMLP
from ffnlab.layers.stacking import rematerialized, run_stack, stack_modules
from ffnlab.models.globe import Globe
from ffnlab.models.stack import Stacked

__all__ = ["Crossing", "OneForecast", "OneForecastConfig"]

OF_NODE, OF_EDGE = 3, 4  # features of a node of the mesh, and of an edge
LEAST = 3  # blocks


@dataclasses.dataclass(frozen=True)
class OneForecastConfig:
    """Sizes of a forecast and where its grid lies; what the globe is made of included.

    Attributes:
      grid: parallels and meridians, (h, w).
      inputs, outputs: fields in and out.
      level: splits of the icosahedron.
      refined: south, north, west, east of each box in which the mesh is split once more, one after
        the other; degrees.
      width: of grid, nodes and edges inside.
      blocks: rounds of messages, at least three.
      heads: of gates and of the softmax over edges.
      gated: OneForecast's blocks, else GraphCast's.
      latitudes, longitudes: what the grid covers (`ffnlab.graphs.globe.grid_axes`).
    """

    grid: tuple[int, ...]
    inputs: int
    outputs: int
    level: int = 5
    refined: tuple[float, ...] = ()
    width: int = 512
    blocks: int = 16
    heads: int = 4
    gated: bool = True
    latitudes: tuple[float, ...] = (-90.0, 90.0)
    longitudes: tuple[float, ...] = (-180.0, 180.0)

    def __post_init__(self) -> None:
        sizes = ("inputs", "outputs", "width", "heads")
        at_least(1, **{name: getattr(self, name) for name in sizes})
        at_least(0, level=self.level)
        if self.blocks < LEAST:
            raise ConfigError(f"blocks={self.blocks} must be at least {LEAST}")
        if len(self.grid) != 2 or min(self.grid) < 1:
            raise ConfigError(f"grid={list(self.grid)} must be a height and a width, at least 1")
        if len(self.refined) % 4:
            raise ConfigError(f"refined={list(self.refined)} must be four numbers for each box")
        for name in ("latitudes", "longitudes"):
            bounds = getattr(self, name)
            if len(bounds) != 2 or not bounds[0] < bounds[1]:
                raise ConfigError(f"{name}={list(bounds)} must be two ascending numbers")

    def make(self, *, key: Array, dtype: DTypeLike = jnp.float32) -> "OneForecast":
        """A network of these sizes, drawn."""
        return OneForecast(self, key=key, dtype=dtype)


class Crossing(nnx.Module):
    """Messages from one side to the other, grid to mesh or back.

    Attributes:
      edge: EdgeMLP.
      node: NormedMLP of the sum of messages and the receiver, in this order.
    """

    def __init__(self, width: int, *, key: Array, dtype: DTypeLike = jnp.float32):
        """Draws both."""
        first, second = jax.random.split(key)
        self.edge = EdgeMLP(width, width, width, key=first, dtype=dtype)
        self.node = NormedMLP((2 * width, width, width), key=second, dtype=dtype)

    def __call__(
        self,
        edges: Edges,
        e: Float[Array, "e d"],
        senders: Float[Array, "m d"],
        receivers: Float[Array, "n d"],
    ) -> Float[Array, "n d"]:
        """Receivers after the messages; arguments as those of `EdgeMLP`."""
        told = collected(edges, self.edge(edges, e, senders, receivers))
        return receivers + self.node(jnp.concatenate([told, receivers], axis=-1))


class OneForecast(nnx.Module):
    """Fields of a moment to those a step later.

    Attributes:
      of_grid, of_node, of_up, of_mesh, of_down: NormedMLPs of places, nodes and the three kinds of
        edges.
      up, down: Crossings from the grid to the mesh and back.
      keep: NormedMLP of a place on its way past the mesh.
      layers: MeshBlocks, `Stacked` or in an nnx.List.
      remat: what a block keeps for the backward pass, see `models.remat` (static).
      last: NormedMLP without a norm, to the fields.
      config: OneForecastConfig (static).
    """

    layers: Stacked | nnx.List
    remat: str | None

    def __init__(self, config: OneForecastConfig, *, key: Array, dtype: DTypeLike = jnp.float32):
        """Draws every part."""
        d, (first, second) = config.width, jax.random.split(key)
        keys = jax.random.split(first, 9)
        inputs = (config.inputs, OF_NODE, OF_EDGE, OF_EDGE, OF_EDGE)
        self.of_grid, self.of_node, self.of_up, self.of_mesh, self.of_down = (
            NormedMLP((n, d, d), key=k, dtype=dtype) for n, k in zip(inputs, keys[:5], strict=True)
        )
        self.up = Crossing(d, key=keys[5], dtype=dtype)
        self.keep = NormedMLP((d, d, d), key=keys[6], dtype=dtype)
        options = {"heads": config.heads, "gated": config.gated, "dtype": dtype}
        each = jax.random.split(second, config.blocks)
        blocks = [MeshBlock(d, key=k, **options) for k in each]
        self.layers = Stacked([stack_modules(blocks)], len(blocks))
        self.remat = None
        self.down = Crossing(d, key=keys[7], dtype=dtype)
        self.last = NormedMLP((d, d, config.outputs), key=keys[8], norm=False, dtype=dtype)
        self.config = config

    def __call__(self, x: Float[Array, "..."], globe: Globe) -> Float[Array, "h w o"]:
        """The fields a step later.

        Args:
          x: of one moment, [h, w, c]; `jax.vmap(model, (0, None))` takes several.
          globe: an argument of what is compiled.
        Raises:
          ConfigError: fields of another grid or number, several moments, or the globe of another
            grid.
        """
        self.check(x, globe)
        grid = self.of_grid(x.reshape(-1, x.shape[-1]))
        edges = (globe.up_edges, globe.mesh_edges, globe.down_edges)
        up, e, down = (
            embed(rows.astype(x.dtype))
            for embed, rows in zip((self.of_up, self.of_mesh, self.of_down), edges, strict=True)
        )
        nodes = self.up(globe.up, up, grid, self.of_node(globe.nodes.astype(x.dtype)))
        grid = grid + self.keep(grid)

        nodes = self.passed(globe.mesh, e, nodes)
        found = self.last(self.down(globe.down, down, nodes, grid))
        return found.reshape(*x.shape[:-1], -1)

    def passed(
        self, graph: Graph, e: Float[Array, "e d"], nodes: Float[Array, "m d"]
    ) -> Float[Array, "m d"]:
        """Nodes of the mesh after all rounds of messages."""

        def one(blocks: list[MeshBlock], carry: tuple, _: None) -> tuple[tuple, None]:
            for block in blocks:
                carry = block(graph, *carry)
            return carry, None

        carry = e, nodes
        if isinstance(self.layers, Stacked):
            return run_stack(list(self.layers.period), carry, one, remat=self.remat)[0][1]
        for block in self.layers:
            carry, _ = rematerialized(one, self.remat)([block], carry, None)
        return carry[1]

    def check(self, x: Float[Array, "..."], globe: Globe) -> None:
        """Raises ConfigError unless the model takes these fields on this globe."""
        wanted = (*self.config.grid, self.config.inputs)
        if x.shape != wanted:
            hint = "; jax.vmap(model, (0, None)) takes several moments" if x.ndim > 3 else ""
            raise ConfigError(
                f"x has shape {list(x.shape)}; the model takes {list(wanted)}, the fields of one "
                f"moment{hint}"
            )
        if globe.places != x.shape[0] * x.shape[1]:
            raise ConfigError(
                f"globe has {globe.places} places; the model's grid is {list(self.config.grid)}"
            )
