"""Layers on graphs: y = layer(x, graph), a row of x and of y for each node.

    GCN        y = A (x W) + b, A the normalized edges         (Kipf, Welling; arXiv 1609.02907)
    GraphSAGE  y = x W_own + mean over senders (x W_near) + b  (Hamilton et al.; arXiv 1706.02216)
    GAT        y = A(x) (x W) + b, A softmax of scores         (Veličković et al.; arXiv 1710.10903)

The graph is an argument of what is compiled, like x. GCN and GAT want one with its self loops
(`graph.with_self_loops`): PyTorch Geometric's layers add them in every call, here it is done once,
on the host. Nothing is dropped out. A product with a graph costs its edges times its width, so GCN
and GraphSAGE take it on the narrower side of their linear map: (A x) W where the layer widens, and
then the gradient of a first layer, which wants none for x, needs no product at all.

Each layer is two halves, `layer.transformed(layer.propagated(x, graph), graph)`, and what is
learned is in the second: rows that stay the same while a layer learns are propagated once. (GAT's
edges depend on what it learns, so its first half leaves rows as they are.)
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ffnlab.errors import ConfigError
from ffnlab.graph import Graph, aggregate, row_norm, segment_softmax, symmetric_norm
from ffnlab.layers.linear import Linear

__all__ = ["GAT", "GCN", "GraphSAGE"]

AXES = ("embed", "mlp")


class GCN(nnx.Module):
    """y = A (x W) + b with A = D^-1/2 (edges) D^-1/2, or given weights.

    Attributes:
      linear: Linear without a bias, [in, out].
      b: Param holding [out].
    """

    def __init__(self, d_in: int, d_out: int, *, key: Array, dtype: DTypeLike = jnp.float32):
        """Draws W as `Linear` does; b is zero."""
        self.linear = Linear(d_in, d_out, key=key, axes=AXES, dtype=dtype)
        self.b = nnx.Param(jnp.zeros((d_out,), dtype), axes=AXES[1:])

    def __call__(
        self, x: Float[Array, "n in"], graph: Graph, weights: Float[Array, "e"] | None = None
    ) -> Float[Array, "n out"]:
        """The layer's output.

        Args:
          x: [n, in].
          graph: n nodes, e edges, self loops among them.
          weights: of the edges, [e], the values of A; `symmetric_norm(graph)` when None.
        """
        weights = symmetric_norm(graph) if weights is None else weights
        y = spread(self.linear, graph, weights, x)
        return y + self.b.get_value().astype(y.dtype)

    @property
    def d_in(self) -> int:
        """Channels in."""
        return self.linear.weight.shape[0]

    def propagated(self, x: Float[Array, "n in"], graph: Graph) -> Float[Array, "1 n in"]:
        """A x, of a graph with its self loops."""
        return aggregate(graph, symmetric_norm(graph), x)[None]

    def transformed(self, read: Float[Array, "1 n in"], graph: Graph) -> Float[Array, "n out"]:
        """(A x) W + b, the output, of what `propagated` gives."""
        y = self.linear(read[0])
        return y + self.b.get_value().astype(y.dtype)


class GraphSAGE(nnx.Module):
    """y = x W_own + (mean of x over a node's senders) W_near + b; no senders give a mean of 0.

    Attributes:
      own: Linear with the bias, [in, out].
      near: Linear without one, [in, out].
    """

    def __init__(self, d_in: int, d_out: int, *, key: Array, dtype: DTypeLike = jnp.float32):
        """Draws both maps as `Linear` does."""
        keys = jax.random.split(key)
        self.own = Linear(d_in, d_out, key=keys[0], axes=AXES, bias=True, dtype=dtype)
        self.near = Linear(d_in, d_out, key=keys[1], axes=AXES, dtype=dtype)

    def __call__(
        self, x: Float[Array, "n in"], graph: Graph, weights: Float[Array, "e"] | None = None
    ) -> Float[Array, "n out"]:
        """The layer's output.

        Args:
          x: [n, in].
          graph: n nodes, e edges.
          weights: of the edges, [e], what the mean weighs with; `row_norm(graph)` when None.
        """
        weights = row_norm(graph) if weights is None else weights
        return self.own(x) + spread(self.near, graph, weights, x)

    @property
    def d_in(self) -> int:
        """Channels in."""
        return self.own.weight.shape[0]

    def propagated(self, x: Float[Array, "n in"], graph: Graph) -> Float[Array, "2 n in"]:
        """x and its mean over senders."""
        return jnp.stack([x, aggregate(graph, row_norm(graph), x)])

    def transformed(self, read: Float[Array, "2 n in"], graph: Graph) -> Float[Array, "n out"]:
        """The output, of what `propagated` gives."""
        return self.own(read[0]) + self.near(read[1])


class GAT(nnx.Module):
    """y = sum over a node's senders of p x W + b, for each of several heads.

        p = softmax over senders j of leaky_relu(a_send . x_j W + a_receive . x_i W)

    Attributes:
      linear: Linear without a bias, [in, heads * channels].
      sending, receiving: Params holding a_send and a_receive, [heads, channels].
      b: Param holding [out].
      is_joined: whether out is heads * channels, side by side, or the mean of the heads (static).
      slope: of the leaky ReLU below zero (static).
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        key: Array,
        heads: int = 1,
        is_joined: bool = True,
        slope: float = 0.2,
        dtype: DTypeLike = jnp.float32,
    ):
        """Draws W as `Linear` does, a_send and a_receive from N(0, 1 / channels).

        Args:
          d_in: channels in.
          d_out: channels out: of all heads where they are joined, else of each.
          key: of the draw.
          heads: how many; they divide d_out where they are joined.
          is_joined: heads side by side (the authors' hidden layers), or their mean (their last).
          slope: of the leaky ReLU, the authors' by default.
          dtype: of the parameters.
        Raises:
          ConfigError: heads below 1, or that do not divide d_out.
        """
        if heads < 1 or (is_joined and d_out % heads):
            raise ConfigError(f"heads={heads} must be at least 1 and divide d_out={d_out}")
        channels = d_out // heads if is_joined else d_out
        first, second, third = jax.random.split(key, 3)
        self.linear = Linear(d_in, heads * channels, key=first, axes=AXES, dtype=dtype)
        shape, axes = (heads, channels), ("heads", None)
        for name, k in (("sending", second), ("receiving", third)):
            drawn = (jax.random.normal(k, shape) * channels**-0.5).astype(dtype)
            setattr(self, name, nnx.Param(drawn, axes=axes))
        self.b = nnx.Param(jnp.zeros((d_out,), dtype), axes=AXES[1:])
        self.is_joined = is_joined
        self.slope = slope

    def __call__(self, x: Float[Array, "n in"], graph: Graph) -> Float[Array, "n out"]:
        """The layer's output.

        Args:
          x: [n, in].
          graph: n nodes, e edges, self loops among them.
        """
        y = self.linear(x).reshape(len(x), *self.sending.get_value().shape)
        sent, received = (
            jnp.sum(y.astype(jnp.float32) * a.get_value().astype(jnp.float32), axis=-1)
            for a in (self.sending, self.receiving)
        )
        scores = jax.nn.leaky_relu(sent[graph.senders] + received[graph.receivers], self.slope)
        p = segment_softmax(graph, scores)
        y = jax.vmap(aggregate, (None, 1, 1), 1)(graph, p, y)
        y = y.reshape(len(x), -1) if self.is_joined else y.mean(axis=1)
        return y + self.b.get_value().astype(y.dtype)

    @property
    def d_in(self) -> int:
        """Channels in."""
        return self.linear.weight.shape[0]

    def propagated(self, x: Float[Array, "n in"], graph: Graph) -> Float[Array, "1 n in"]:
        """x as it is: which edges count, and how much, is learned."""
        return x[None]

    def transformed(self, read: Float[Array, "1 n in"], graph: Graph) -> Float[Array, "n out"]:
        """The output, of what `propagated` gives."""
        return self(read[0], graph)


def spread(linear: Linear, graph: Graph, weights: Array, x: Array) -> Float[Array, "n out"]:
    """A (x W), the product with the graph on the narrower side of W."""
    d_in, d_out = linear.weight.shape
    if d_in <= d_out:
        return linear(aggregate(graph, weights, x))
    return aggregate(graph, weights, linear(x))
