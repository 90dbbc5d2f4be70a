"""On the Initialization of Graph Neural Networks (2023, arXiv 2312.02622): the variances.

Behind a product with a graph the second moment of a signal is another. So the variance of a layer's
weights is set from its width, from the half that ReLU lets through, and from how much one more hop
changes the squared norm of a probe: forward the mean feature of each node, backward ones.

    A: D^-1/2 (edges) D^-1/2, self loops among the edges
    c_l(s) = |A^l s|^2, summed over nodes; of several graphs the sum over all of them
    v_1 = 2 / m_0,   v_l = 2 / m_(l-1) c_(l-1)(s) / c_l(s),   s the mean of each node's features
    u_L = n / ((classes - 1) c_1(1)),   u_l = 2 / m_l c_(L-l)(1) / c_(L-l+1)(1)
    virgo: the harmonic mean of v_l and u_l

m_0 .. m_L: widths from input to output, m_L classes; n: nodes.

What differs from the authors' code (utils.py), which takes all hidden widths as equal: v has the
width that a layer reads and u the one that it gives, which is what their 2 / m_1 is there. Probes
are scaled to 1 at every hop and norms kept as logarithms, so that deep stacks and small features
neither overflow nor vanish, and a mean feature that is nothing but rounding counts as 0. Kaiming's
fan-in is what a map reads; DGL stores weights as [in, out], for which torch's `fan_in`, as the code
calls it, is the output.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ffnlab.errors import ConfigError
from ffnlab.graph import Graph, aggregate, segment_sum

__all__ = ["STARTS", "HopNorms", "check_start", "hop_norms", "joined", "nothing_seen", "variances"]

# What each start hangs on: the widths alone, or also the norms of one or both probes.
STARTS: dict[str, tuple[str, ...]] = {
    "virgo": ("forward", "backward"),
    "virgofor": ("forward",),
    "virgoback": ("backward",),
    "kaifor": (),
    "kaiback": (),
    "xavier": (),
}
MEANS = ("harmonic", "normal")
# A mean of features of this share of their mean size is the rounding of a sum of float32.
ROUNDING = 16 * float(np.finfo(np.float32).eps)


class HopNorms(NamedTuple):
    """Squared norms of probes behind each hop.

    Attributes:
      forward: log c_l(s) for l = 1 .. hops, s the mean feature of each node; -inf where c_l = 0.
      backward: log c_l(1) likewise, of ones.
      nodes: how many (n), of all graphs.
    """

    forward: Float[Array, "hops"]
    backward: Float[Array, "hops"]
    nodes: Float[Array, ""]


def nothing_seen(hops: int) -> HopNorms:
    """Norms of no graph."""
    nothing = jnp.full(hops, -jnp.inf, jnp.float32)
    return HopNorms(nothing, nothing, jnp.float32(0))


def joined(one: HopNorms, other: HopNorms) -> HopNorms:
    """Norms of the graphs of both side by side."""
    return HopNorms(
        jnp.logaddexp(one.forward, other.forward),
        jnp.logaddexp(one.backward, other.backward),
        one.nodes + other.nodes,
    )


@functools.partial(jax.jit, static_argnames="hops")
def hop_norms(
    x: Float[Array, "n d"],
    graph: Graph,
    weights: Float[Array, "e"] | None = None,
    *,
    hops: int,
) -> HopNorms:
    """Squared norms of both probes behind each of some products with a graph.

    Args:
      x: features of the nodes.
      graph: with its self loops, see `looped_norm`.
      weights: the values of A by edge; `looped_norm(graph)` when None.
      hops: how many, as many as a network has layers; 1 or more.
    Returns:
      the norms; one product with the graph a hop.

    >>> from ffnlab.graph import with_self_loops
    >>> ring = with_self_loops(Graph.make([0, 1, 2], [1, 2, 0], nodes=3))
    >>> norms = hop_norms(jnp.ones((3, 2)), ring, hops=2)
    >>> [round(float(c), 3) for c in jnp.exp(norms.backward)]
    [3.0, 3.0]
    """
    x = x.astype(jnp.float32)
    mean, size = x.mean(1), jnp.abs(x).mean(1)
    mean = jnp.where(jnp.abs(mean) <= ROUNDING * size, 0, mean)
    own, weights = looped_norm(graph) if weights is None else (jnp.zeros(len(x)), weights)
    probes = jnp.stack([mean, jnp.ones(len(x))], axis=1)

    def hop(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], Array]:
        signal, scale = scaled(*carry)
        moved = aggregate(graph, weights, signal) + own[:, None] * signal
        signal, scale = scaled(moved, scale)
        return (signal, scale), 2 * scale + jnp.log(jnp.sum(signal**2, axis=0))

    _, logs = jax.lax.scan(hop, (probes, jnp.zeros(2)), length=hops)
    return HopNorms(logs[:, 0], logs[:, 1], jnp.float32(len(x)))


def scaled(signal: Float[Array, "n k"], log: Float[Array, "k"]) -> tuple[Array, Array]:
    """Columns over their largest entries, of which the logarithm is added; zeros as they are."""
    largest = jnp.abs(signal).max(axis=0, initial=0)
    safe = jnp.where(largest > 0, largest, 1)
    return signal / safe, log + jnp.log(safe)


def looped_norm(graph: Graph) -> tuple[Float[Array, "n"], Float[Array, "e"]]:
    """D^-1/2 (edges) D^-1/2 with a self loop for each node that has none.

    Returns:
      (what is added for a loop that is not among the edges, the values of the edges).
    """
    is_loop = (graph.senders == graph.receivers).astype(jnp.float32)
    missing = (segment_sum(graph, is_loop) == 0).astype(jnp.float32)
    root = (graph.degrees + missing) ** -0.5
    return missing * root**2, root[graph.senders] * root[graph.receivers]


def check_start(start: str, mean: str, classes: int | None) -> None:
    """Raises ConfigError for names that are not known, or fewer than two classes."""
    for name, given, accepted in (("start", start, STARTS), ("mean", mean, MEANS)):
        if given not in accepted:
            raise ConfigError(f"{name}={given!r} is not one of {list(accepted)}")
    if classes is not None and classes < 2:
        raise ConfigError(f"classes={classes} must be at least 2: the norm is divided by one less")


def variances(
    start: str,
    widths: Sequence[tuple[int, int]],
    norms: HopNorms,
    *,
    mean: str = "harmonic",
    classes: int | None = None,
) -> Float[Array, "layers"]:
    """The variance of every layer's weights, from input to output.

    Args:
      start: a key of `STARTS`. "virgofor" is v, "virgoback" u, "virgo" their mean; "kaifor" is
        2 / in, "kaiback" 2 / out, "xavier" 2 / (in + out).
      widths: (in, out) of each layer.
      norms: of as many hops as there are layers.
      mean: of "virgo", "harmonic" or "normal" (arithmetic).
      classes: how many; the last width when None.
    Returns:
      the variances, positive and finite where the norms are.
    Raises:
      ConfigError: another start or mean, other than a norm for each layer, or fewer than two
        classes.

    >>> norms = HopNorms(jnp.log(jnp.array([4.0, 2.0])), jnp.zeros(2), jnp.float32(6))
    >>> [round(float(v), 4) for v in variances("virgofor", [(8, 16), (16, 3)], norms)]
    [0.25, 0.25]
    >>> [round(float(v), 4) for v in variances("virgoback", [(8, 16), (16, 3)], norms)]
    [0.125, 3.0]
    """
    wide, given = (np.array(each, np.float32) for each in zip(*widths, strict=True))
    count = int(given[-1]) if classes is None else classes
    check_start(start, mean, count if "backward" in STARTS.get(start, ()) else None)
    if len(widths) != len(norms.forward):
        raise ConfigError(f"norms of {len(norms.forward)} hops for {len(widths)} layers; as many")
    if start == "xavier":
        return jnp.asarray(2 / (wide + given))
    if start in ("kaifor", "kaiback"):
        return jnp.asarray(2 / (wide if start == "kaifor" else given))
    falls = [jnp.exp(c[:-1] - c[1:]) for c in (norms.forward, norms.backward)]
    forward = jnp.concatenate([jnp.ones(1), falls[0]]) * (2 / wide)
    last = norms.nodes / (count - 1) * jnp.exp(-norms.backward[:1])
    backward = jnp.concatenate([2 / given[:-1] * falls[1][::-1], last])
    if start != "virgo":
        return forward if start == "virgofor" else backward
    if mean == "normal":
        return (forward + backward) / 2
    return 2 / (1 / forward + 1 / backward)
