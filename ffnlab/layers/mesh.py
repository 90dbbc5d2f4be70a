"""Layers of networks that pass messages along the edges of a mesh.

    EdgeMLP    norm(W2 silu(W_e e + W_s x_sender + W_r x_receiver + b1) + b2)
    NormedMLP  norm(W2 silu(W1 x + b1) + b2)

The first map of an edge's MLP is in three parts, so that nodes are multiplied once and not once for
each of their edges; parts of several such MLPs on the same inputs are one product (`first_maps`).

    MeshBlock  u = EdgeMLP(e, x),  e <- e + g u,  x <- x + NormedMLP([m_1 … m_h, x])

Gated (OneForecast, arXiv 2502.00338): g, in (0, 1), is the mean of the sigmoids that a small
EdgeMLP gives, three for each head; m_j = sum over incoming edges of p_j e, p_j a softmax of scores
of e, one for each head. Not gated (GraphCast, arXiv 2212.12794): g = 1, and m is the plain sum.

First biases are zero where the authors draw them as torch does.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ffnlab.errors import at_least
from ffnlab.graph import Edges, Graph, segment_softmax
from ffnlab.graph.ends import at_receivers, at_senders, collected
from ffnlab.layers.feed_forward.mlp import MLP
from ffnlab.layers.linear import Linear, together
from ffnlab.layers.norms import LayerNorm
from ffnlab.weights import Dense

__all__ = ["EdgeMLP", "MeshBlock", "NormedMLP", "first_maps", "small"]

# Bounds of 1 / sqrt(inputs), torch's own.
INIT = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
AXES = ("embed", "mlp")
GATES = 3  # of a head: of the edge, of its sender, of its receiver


def small(width: int) -> int:
    """Hidden units of gates and of scores beside a width.

    >>> small(32), small(512)
    (16, 64)
    """
    return max(16, width // 8)


class NormedMLP(nnx.Module):
    """Two maps with SiLU between them, and a norm.

    Attributes:
      mlp: MLP of two maps.
      norm: LayerNorm, or None.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        key: Array,
        norm: bool = True,
        dtype: DTypeLike = jnp.float32,
    ):
        """Draws the maps; sizes are widths in, hidden and out."""
        self.mlp = MLP(sizes, key=key, activation="silu", init=INIT, dtype=dtype)
        self.norm = nnx.data(LayerNorm(sizes[-1], dtype=dtype) if norm else None)

    def __call__(self, x: Float[Array, "*b in"]) -> Float[Array, "*b out"]:
        y = self.mlp(x)
        return y if self.norm is None else self.norm(y)


class EdgeMLP(nnx.Module):
    """An MLP on an edge, its sender and its receiver.

    Attributes:
      of_edge, of_sender: Linear [in, hidden] without a bias.
      of_receiver: Linear [in, hidden] with that of all three.
      last: Linear [hidden, out].
      norm: LayerNorm, or None.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        out: int,
        *,
        key: Array,
        norm: bool = True,
        dtype: DTypeLike = jnp.float32,
    ):
        """Draws the three parts of the first map as one of 3 * width inputs.

        Args:
          width: of edges, senders and receivers.
          hidden, out: units.
          key: of the draw.
          norm: whether there is one.
          dtype: of the parameters.
        """
        first, last = jax.random.split(key)
        parts = jnp.split(INIT(first, (3 * width, hidden), jnp.float32).astype(dtype), 3)
        of_edge, of_sender, of_receiver = (Dense(part) for part in parts)
        self.of_edge = Linear.of(of_edge, axes=AXES)
        self.of_sender = Linear.of(of_sender, axes=AXES)
        self.of_receiver = Linear.of(of_receiver, jnp.zeros((hidden,), dtype), axes=AXES)
        self.last = Linear(hidden, out, key=last, axes=AXES, bias=True, init=INIT, dtype=dtype)
        self.norm = nnx.data(LayerNorm(out, dtype=dtype) if norm else None)

    def __call__(
        self,
        edges: Edges,
        e: Float[Array, "e d"],
        senders: Float[Array, "m d"],
        receivers: Float[Array, "n d"],
    ) -> Float[Array, "e out"]:
        """What the MLP gives of every edge.

        Args:
          edges: a Graph or Bipartite.
          e: in its order.
          senders, receivers: rows of the nodes at either end.
        """
        return self.finish(*first_maps([self], edges, e, senders, receivers))

    def finish(self, h: Float[Array, "e hidden"]) -> Float[Array, "e out"]:
        """The rest, after the first map."""
        y = self.last(jax.nn.silu(h))
        return y if self.norm is None else self.norm(y)


def first_maps(
    mlps: Sequence[EdgeMLP],
    edges: Edges,
    e: Float[Array, "e d"],
    senders: Float[Array, "m d"],
    receivers: Float[Array, "n d"],
) -> list[Float[Array, "e _"]]:
    """W_e e + W_s x_sender + W_r x_receiver + b of several MLPs; nodes go to edges once for all."""
    parts = [
        jnp.concatenate(together(rows, *(getattr(mlp, name) for mlp in mlps)), axis=-1)
        for name, rows in (("of_edge", e), ("of_sender", senders), ("of_receiver", receivers))
    ]
    h = parts[0] + at_senders(edges, parts[1]) + at_receivers(edges, parts[2])
    ends = np.cumsum([mlp.last.weight.shape[0] for mlp in mlps])[:-1]
    return jnp.split(h, ends, axis=-1)


class MeshBlock(nnx.Module):
    """One round of messages on a mesh, of edges and then of nodes.

    Attributes:
      edge: EdgeMLP.
      node: NormedMLP of what is gathered and the node, in this order.
      gate: EdgeMLP to three numbers for each head, or None where the block is not gated.
      score: MLP from an edge to one number for each head, or None likewise.
    """

    def __init__(
        self,
        width: int,
        *,
        key: Array,
        heads: int = 4,
        gated: bool = True,
        dtype: DTypeLike = jnp.float32,
    ):
        """Draws every part.

        Args:
          width: of edges and nodes.
          key: of the draw.
          heads: of the gate and of the softmax.
          gated: whether it has either.
          dtype: of the parameters.
        Raises:
          ConfigError: a size below 1.
        """
        at_least(1, width=width, heads=heads)
        keys, thin = jax.random.split(key, 4), small(width)
        self.edge = EdgeMLP(width, width, width, key=keys[0], dtype=dtype)
        gathered = width * (heads if gated else 1)
        self.node = NormedMLP((gathered + width, width, width), key=keys[1], dtype=dtype)
        self.gate, self.score = nnx.data(None), nnx.data(None)
        if gated:
            self.gate = nnx.data(
                EdgeMLP(width, thin, GATES * heads, key=keys[2], norm=False, dtype=dtype)
            )
            sizes = (width, thin, heads)
            self.score = nnx.data(
                MLP(sizes, key=keys[3], activation="silu", init=INIT, dtype=dtype)
            )

    def __call__(
        self, graph: Graph, e: Float[Array, "e d"], x: Float[Array, "n d"]
    ) -> tuple[Float[Array, "e d"], Float[Array, "n d"]]:
        """(edges, nodes) after the round.

        Args:
          graph: an argument of what is compiled.
          e: of the edges, in its order.
          x: of the nodes.
        """
        mlps = [self.edge] if self.gate is None else [self.edge, self.gate]
        h, *rest = first_maps(mlps, graph, e, x, x)
        e = e + self.edge.finish(h) * self.factor(*rest)
        return e, x + self.node(jnp.concatenate([self.gathered(graph, e), x], axis=-1))

    def factor(self, h: Float[Array, "e g"] | None = None) -> Float[Array, "e 1"] | float:
        """By how much of its update an edge moves, in (0, 1); 1 without a gate.

        The authors average the three gates over heads, and then the three.

        Args:
          h: the gate's first map.
        """
        if self.gate is None or h is None:
            return 1.0
        gates = jax.nn.sigmoid(self.gate.finish(h).astype(jnp.float32))
        return jnp.mean(gates, axis=-1, keepdims=True).astype(h.dtype)

    def attention(self, graph: Graph, e: Float[Array, "e d"]) -> Float[Array, "e heads"]:
        """How much of each edge its receiver gathers, for every head; 1 in all, if it has edges.

        Raises:
          AttributeError: the block is not gated.
        """
        return segment_softmax(graph, self.score(e))

    def gathered(self, graph: Graph, e: Float[Array, "e d"]) -> Float[Array, "n _"]:
        """What nodes gather of their edges, heads side by side."""
        if self.score is None:
            return collected(graph, e)
        p = self.attention(graph, e)
        each = p[:, :, None] * e[:, None]
        return collected(graph, each.reshape(len(e), p.shape[1] * e.shape[1]))
