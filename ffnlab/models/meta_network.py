"""A network on the graph of another network, whose weights it corrects.

Meta Pruning via Graph Metanetworks (2025): neurons are nodes and weights are edges, from what is
read to what reads it, each with a few numbers. Of an edge e from a to b, in every round with one
set of maps (l1 … l4: affine, SiLU; down: affine) and x normed rows of the nodes,

    m = l2(x_b) l1(x_a) v e       gathered at b        v = +1 in the first half of the width, -1 in
    w = l2(x_a) l1(x_b) e         gathered at a        the second: what tells the directions apart
    x <- x + down(gathered m) + down(gathered w)
    e <- e + e (l3(x_a) l4(x_b) + l3(x_b) l4(x_a))

where gathered is (mean, standard deviation, maximum, minimum) over the edges of a node, 0 where it
has none, and a deviation is 0 where the variance is 1e-5 or less. In the end

    node <- node + ratio dec(norm(x)),   edge <- edge + ratio dec(norm(e))

with decoders of two maps. Norms have neither scale nor bias. Nothing depends on how nodes or edges
are numbered: relabelled neurons get relabelled corrections.

What differs from the authors' code: both directions share l1 … l4 of the same rows, which are
computed once; the maps `mlps`, which nothing reads there, are not there; biases begin at zero, and
not as weights do. Rounds are scanned, and each is computed again in the backward pass.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ffnlab.errors import ConfigError
from ffnlab.graph import Edges, Graph, segment_max, segment_mean
from ffnlab.layers import MLP, Linear
from ffnlab.layers.norms import standardized
from ffnlab.layers.stacking import run_stack, stack_modules

__all__ = ["MetaNetwork", "MetaNetworkConfig", "MetaRound"]

EPS = 1e-5  # of norms, and the least variance
# Bounds of 1 / sqrt(inputs), torch's own.
INIT = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
AXES = ("embed", "mlp")


@dataclasses.dataclass(frozen=True)
class MetaNetworkConfig:
    """Sizes of a metanetwork.

    Attributes:
      nodes: numbers of a node.
      edges: numbers of an edge.
      layers: rounds of messages.
      width: of nodes and edges inside.
      ratio: of what is found in what is given back.
    """

    nodes: int
    edges: int
    layers: int = 3
    width: int = 16
    ratio: float = 0.05

    def __post_init__(self) -> None:
        for name in ("nodes", "edges", "layers", "width"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.ratio <= 1:
            raise ConfigError(f"ratio={self.ratio} must lie in 0..1")

    def make(self, *, key: Array, dtype: DTypeLike = jnp.float32) -> "MetaNetwork":
        """A network of these sizes, drawn."""
        return MetaNetwork(self, key=key, dtype=dtype)


class MetaRound(nnx.Module):
    """One round of messages over all edges, both ways.

    Attributes:
      sides: Linear [h, 4 h], l1 … l4 side by side.
      down: Linear [4 h, h].
    """

    def __init__(self, width: int, *, key: Array, dtype: DTypeLike = jnp.float32):
        """Draws both maps."""
        first, second = jax.random.split(key)
        common = {"axes": AXES, "bias": True, "init": INIT, "dtype": dtype}
        self.sides = Linear(width, 4 * width, key=first, **common)
        self.down = Linear(4 * width, width, key=second, **common)

    def __call__(
        self, x: Float[Array, "n h"], e: Float[Array, "e h"], graph: Graph, back: Edges
    ) -> tuple[Float[Array, "n h"], Float[Array, "e h"]]:
        """Nodes and edges after the round.

        Args:
          x: of the nodes.
          e: of the edges, in the graph's order.
          graph: of what is corrected.
          back: its transpose.
        """
        width = x.shape[1]
        sides = jax.nn.silu(self.sides(normed(x)))
        low = jnp.split(sides[graph.senders], 4, axis=1)
        high = jnp.split(sides[graph.receivers], 4, axis=1)
        forth = high[1] * low[0] * e * signs(width, e.dtype)
        against = low[1] * high[0] * e
        gathered = self.down(spread(graph, forth)) + self.down(
            spread(back, against[graph.by_sender])
        )
        return x + gathered, e + e * (low[2] * high[3] + high[2] * low[3])


class MetaNetwork(nnx.Module):
    """(nodes, edges) of a network to those of a corrected one.

    Attributes:
      of_node, of_edge: Linear from their numbers to the width.
      rounds: `MetaRound`s as one, to be scanned; leaves [layers, …].
      to_node, to_edge: MLP of two maps, back from the width.
      config: MetaNetworkConfig (static).
    """

    def __init__(self, config: MetaNetworkConfig, *, key: Array, dtype: DTypeLike = jnp.float32):
        """Draws every map."""
        keys = jax.random.split(key, config.layers + 4)
        h = config.width
        common = {"axes": AXES, "bias": True, "init": INIT, "dtype": dtype}
        self.of_node = Linear(config.nodes, h, key=keys[0], **common)
        self.of_edge = Linear(config.edges, h, key=keys[1], **common)
        self.rounds = stack_modules([MetaRound(h, key=k, dtype=dtype) for k in keys[4:]])
        back = {"activation": "silu", "init": INIT, "dtype": dtype}
        self.to_node = MLP((h, h, config.nodes), key=keys[2], **back)
        self.to_edge = MLP((h, h, config.edges), key=keys[3], **back)
        self.config = config

    def __call__(
        self, nodes: Float[Array, "n f"], edges: Float[Array, "e g"], graph: Graph
    ) -> tuple[Float[Array, "n f"], Float[Array, "e g"]]:
        """The corrected numbers.

        Args:
          nodes: [n, config.nodes].
          edges: [e, config.edges], in the graph's order.
          graph: an argument of what is compiled (see `ffnlab.graph`).
        Raises:
          ConfigError: other numbers of a node or of an edge, or not as many as the graph has.
        """
        config = self.config
        for name, found, wanted in (
            ("nodes", nodes.shape, (graph.num_nodes, config.nodes)),
            ("edges", edges.shape, (graph.num_edges, config.edges)),
        ):
            if tuple(found) != wanted:
                raise ConfigError(
                    f"{name} {list(found)}: the graph and this metanetwork take {list(wanted)}"
                )
        back = graph.transpose()

        def one(each: MetaRound, carry: tuple, _: None) -> tuple[tuple, None]:
            x, e = carry
            return each(x, e, graph, back), None

        start = self.of_node(nodes), self.of_edge(edges)
        (x, e), _ = run_stack(self.rounds, start, one, remat="nothing")
        ratio = config.ratio
        corrected = nodes + ratio * self.to_node(normed(x)), edges + ratio * self.to_edge(normed(e))
        return corrected[0].astype(nodes.dtype), corrected[1].astype(edges.dtype)


def normed(x: Float[Array, "r h"]) -> Float[Array, "r h"]:
    """Rows of mean 0 and variance 1, in their dtype."""
    return standardized(x, (-1,), EPS).astype(x.dtype)


def signs(width: int, dtype: DTypeLike) -> Float[Array, "h"]:
    """+1 for the first half of a width, -1 for the rest.

    >>> signs(3, jnp.float32).tolist()
    [1.0, -1.0, -1.0]
    """
    return jnp.where(jnp.arange(width) < width // 2, 1, -1).astype(dtype)


def spread(edges: Edges, m: Float[Array, "e h"]) -> Float[Array, "n 4*h"]:
    """Mean, standard deviation, maximum and minimum of the values at each receiver; 0 where there
    are none.

    Args:
      edges: of which m has a value each.
      m: values.
    """
    mean, square = segment_mean(edges, m), segment_mean(edges, m * m)
    variance = square - mean * mean
    deviation = jnp.where(variance > EPS, jnp.sqrt(jnp.maximum(variance, EPS)), 0)
    ends = segment_max(edges, m), -segment_max(edges, -m)
    return jnp.concatenate([mean, deviation, *ends], axis=1)
