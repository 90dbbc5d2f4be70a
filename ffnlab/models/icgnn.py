"""A network on nodes that are all of one kind and all see each other, whatever their number.

A Homogeneous Graph Neural Network for Precoding and Power Allocation in Scalable Wireless Networks
(ICGNN, 2024): transmitters and users are not told apart; a virtual graph has nodes of one kind (a
user; or a link of a transmitter and a user), which share one network. So it serves any number of
users, antennas, points and links, and outputs are renumbered as the nodes are. In every round

    m = W_m mean over others j of relu(own(x) + near(x_j) + edge(e_j))        information carried
    x <- x + W_2 relu(W_1 [x, m])

from an embedding of two maps, to outputs by two maps; ReLU, drawn after He et al. Nodes lie on a
grid of one axis (users) or two (points, users); a node sees those that share all its places but
one, and of two axes it reads a mean for each, side by side in m. The graph is complete along an
axis: its edges are all pairs, so arrays of pairs are the edge list, and nothing is stored that is
no edge but the diagonal. Where edges have no numbers, a message is the sender's alone and a mean
costs as much as there are nodes. A mean, and not a sum, is what carries over to other sizes.

There is no official code; only the abstract was to be had, and this is a design that fits it. The
last map of a message is linear, and is taken behind the mean, which gives the same for less.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from ffnlab.errors import ConfigError, at_least
from ffnlab.layers import MLP, Linear
from ffnlab.layers.stacking import run_stack, stack_modules

__all__ = ["ICGNN", "ICGNNConfig", "ICGNNRound"]

AXES = ("embed", "mlp")


@dataclasses.dataclass(frozen=True)
class ICGNNConfig:
    """Sizes of an `ICGNN`.

    Attributes:
      nodes: numbers of a node.
      outputs: numbers given of a node.
      edges: numbers of an edge, of a grid of one axis; 0 for none.
      axes: of the grid of nodes, 1 or 2.
      layers: rounds of messages.
      width: of the nodes inside.
    """

    nodes: int
    outputs: int
    edges: int = 0
    axes: int = 1
    layers: int = 2
    width: int = 32

    def __post_init__(self) -> None:
        sizes = ("nodes", "outputs", "layers", "width")
        at_least(1, **{name: getattr(self, name) for name in sizes})
        at_least(0, edges=self.edges)
        if self.axes not in (1, 2) or (self.edges and self.axes != 1):
            raise ConfigError(
                f"axes={self.axes}, edges={self.edges}: one axis, or two without numbers of edges"
            )

    def make(self, *, key: Array, dtype: DTypeLike = jnp.float32) -> "ICGNN":
        """A network of these sizes, drawn."""
        return ICGNN(self, key=key, dtype=dtype)


class ICGNNRound(nnx.Module):
    """One round of messages.

    Attributes:
      near: Linear [h, axes h] of senders, with the bias.
      own: Linear [h, h] of receivers; None where edges have no numbers.
      edge: Linear [edges, h]; None likewise.
      message: Linear [axes h, h], W_m.
      update: MLP of two maps, W_1 and W_2.
    """

    def __init__(self, config: ICGNNConfig, *, key: Array, dtype: DTypeLike = jnp.float32):
        """Draws every map; near, own and edge as the one map that they are together."""
        near, own, edge, message, update = jax.random.split(key, 5)
        h, e = config.width, config.edges
        inputs = 2 * h + e if e else h
        self.near = Linear(h, config.axes * h, key=near, bias=True, **drawn(h, inputs, dtype))
        self.own = nnx.data(Linear(h, h, key=own, **drawn(h, inputs, dtype)) if e else None)
        self.edge = nnx.data(Linear(e, h, key=edge, **drawn(e, inputs, dtype)) if e else None)
        wide = config.axes * h
        self.message = Linear(wide, h, key=message, bias=True, **drawn(wide, wide, dtype))
        self.update = MLP((2 * h, h, h), key=update, dtype=dtype)

    def __call__(
        self,
        x: Float[Array, "b *g h"],
        valid: Bool[Array, "b *g"],
        edges: Float[Array, "b k k e"] | None = None,
    ) -> Float[Array, "b *g h"]:
        """Nodes after the round; arguments as those of `ICGNN`, x of its width."""
        near = self.near(x)
        if self.own is None or self.edge is None:
            size, one = x.shape[-1], jax.nn.relu(near)
            split = (one[..., i : i + size] for i in range(0, near.shape[-1], size))
            gathered = [mean_of_others(s, valid, axis) for axis, s in enumerate(split, start=1)]
            carried = jnp.concatenate(gathered, axis=-1)
        else:
            pairs = self.own(x)[:, :, None] + near[:, None] + self.edge(edges)
            carried = mean_of_pairs(jax.nn.relu(pairs), valid)
        return x + self.update(jnp.concatenate([x, self.message(carried)], axis=-1))


class ICGNN(nnx.Module):
    """Numbers of nodes, and perhaps of edges, to outputs of nodes.

    Attributes:
      embed: MLP of two maps.
      rounds: `ICGNNRound`s as one, to be scanned; leaves [layers, …].
      out: MLP of two maps.
      config: ICGNNConfig (static).
    """

    def __init__(self, config: ICGNNConfig, *, key: Array, dtype: DTypeLike = jnp.float32):
        """Draws every map."""
        first, last, *keys = jax.random.split(key, config.layers + 2)
        h = config.width
        self.embed = MLP((config.nodes, h, h), key=first, dtype=dtype)
        self.rounds = stack_modules([ICGNNRound(config, key=k, dtype=dtype) for k in keys])
        self.out = MLP((h, h, config.outputs), key=last, dtype=dtype)
        self.config = config

    def __call__(
        self,
        nodes: Float[Array, "b *g f"],
        valid: Bool[Array, "b *g"] | None = None,
        edges: Float[Array, "b k k e"] | None = None,
    ) -> Float[Array, "b *g o"]:
        """The outputs of every node.

        Args:
          nodes: a batch of grids, [b, k, f] or [b, l, k, f].
          valid: which nodes are there; all when None. Others are read by none.
          edges: from node j to node i at [:, i, j], where the configuration has some.
        Raises:
          ConfigError: a grid of other axes, other numbers of nodes or edges, or edges where there
            are to be none.
        """
        config, grid = self.config, nodes.shape[:-1]
        if nodes.ndim != config.axes + 2 or nodes.shape[-1] != config.nodes:
            raise ConfigError(
                f"nodes {list(nodes.shape)}: this network takes a batch of grids of {config.axes} "
                f"axes, {config.nodes} numbers each"
            )
        wanted = (*grid, grid[-1], config.edges) if config.edges else None
        if (None if edges is None else edges.shape) != wanted:
            found = None if edges is None else list(edges.shape)
            raise ConfigError(f"edges {found}: this network takes {wanted and list(wanted)} here")
        if valid is None:
            valid = jnp.ones(grid, bool)

        def one(each: ICGNNRound, x: Array, _: None) -> tuple[Array, None]:
            return each(x, valid, edges).astype(x.dtype), None

        return self.out(run_stack(self.rounds, self.embed(nodes), one)[0])


def drawn(part: int, inputs: int, dtype: DTypeLike) -> dict:
    """How a map is drawn that has `part` of the inputs of a sum before a ReLU (He et al.)."""
    init = jax.nn.initializers.variance_scaling(2 * part / inputs, "fan_in", "normal")
    return {"axes": AXES, "init": init, "dtype": dtype}


def mean_of_others(
    sent: Float[Array, "b *g h"], valid: Bool[Array, "b *g"], axis: int
) -> Float[Array, "b *g h"]:
    """The mean over the valid others along an axis, of each node; 0 where there are none.

    >>> mean_of_others(jnp.array([[[1.0], [2.0], [6.0]]]), jnp.array([[True, True, False]]), 1)
    Array([[[2.],
            [1.],
            [0.]]], dtype=float32)
    """
    there = valid[..., None].astype(sent.dtype)
    own, counted = sent * there, there.sum(axis, keepdims=True) - there
    others = own.sum(axis, keepdims=True) - own
    return there * others / jnp.maximum(counted, 1)


def mean_of_pairs(
    pairs: Float[Array, "b k k h"], valid: Bool[Array, "b k"]
) -> Float[Array, "b k h"]:
    """The mean over valid j != i of [:, i, j]; 0 where there are none."""
    others = ~jnp.eye(valid.shape[-1], dtype=bool) & valid[:, None] & valid[:, :, None]
    weights = others.astype(pairs.dtype)
    total = jnp.einsum("bij,bijh->bih", weights, pairs)
    return total / jnp.maximum(weights.sum(-1), 1)[..., None]
