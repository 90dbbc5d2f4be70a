"""Edge lists sorted by receiver, with what a product and its transpose need.

    m, n: senders and receivers there are; e: edges
    edge k goes from senders[k] to receivers[k]; those of receiver i are starts[i] .. starts[i + 1]

Compiled products check no index: one beyond the end reads foreign memory, a large one ends the
process. So every index is checked where a graph is made, on the host, before anything runs.
"""

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from ffnlab.errors import FFNLabError
from ffnlab.weights.base import AxisNames, rebuild, register

__all__ = ["Bipartite", "Edges", "Graph", "edge_order"]

Indices = Sequence[int] | np.ndarray | Array
MOST = 2**31 - 1  # indices are int32


@dataclasses.dataclass(frozen=True)
class Edges:
    """What `Graph` and `Bipartite` are; made by their `make`, which sorts.

    Values of edges (weights, scores, messages) are arrays [e, …] in this order: `edge_order`
    brings them into it. Under `vmap` every array may carry a leading axis.

    Attributes:
      senders: [e] int32, in 0..m - 1, ascending among the edges of one receiver.
      receivers: [e] int32, in 0..n - 1, ascending.
      starts: [n + 1] int32, the first edge of each receiver, then e.
      by_sender: [e] int32, the edges in the order of the transpose: by sender, then receiver.
      sender_starts: [m + 1] int32, where in `by_sender` each sender begins, then e.
    """

    senders: Array
    receivers: Array
    starts: Array
    by_sender: Array
    sender_starts: Array

    def __post_init__(self) -> None:
        check(self)

    @property
    def num_edges(self) -> int:
        """Edges (e)."""
        return self.senders.shape[-1]

    @property
    def num_senders(self) -> int:
        """Senders (m)."""
        return self.sender_starts.shape[-1] - 1

    @property
    def num_receivers(self) -> int:
        """Receivers (n)."""
        return self.starts.shape[-1] - 1

    @property
    def degrees(self) -> Int[Array, "n"]:
        """Edges of each receiver, [n] int32."""
        return jnp.diff(self.starts)

    def transpose(self) -> "Edges":
        """The edges the other way round; their values are `values[edges.by_sender]`."""
        places = jnp.arange(self.num_edges, dtype=self.by_sender.dtype)
        return rebuild(
            self,
            senders=self.receivers[self.by_sender],
            receivers=self.senders[self.by_sender],
            starts=self.sender_starts,
            by_sender=jnp.zeros_like(self.by_sender).at[self.by_sender].set(places),
            sender_starts=self.starts,
        )

    def leaf_axes(self) -> "Edges":
        """Names of the dimensions of each array: none, so that a mesh keeps edge lists whole."""
        return jax.tree.map(lambda leaf: AxisNames((None,)), self)


@register
@dataclasses.dataclass(frozen=True)
class Graph(Edges):
    """Directed edges among n nodes: senders and receivers are the same nodes (m = n)."""

    @classmethod
    def make(cls, senders: Indices, receivers: Indices, nodes: SupportsIndex) -> "Graph":
        """Checks and sorts edges.

        Args:
          senders, receivers: the two ends of each edge, [e] integers in 0..nodes - 1, in any order;
            an edge may occur several times, and counts as often.
          nodes: how many there are (n), >= 0.
        Returns:
          the graph; values of edges come in its order by `values[edge_order(senders, receivers)]`.
        Raises:
          FFNLabError: an index out of range, not an integer, or traced by jit.

        >>> Graph.make([2, 0, 1], [1, 1, 0], nodes=3).senders.tolist()
        [1, 0, 2]
        """
        return cls(*sorted_edges(senders, receivers, *[checked_count("nodes", nodes)] * 2))

    @property
    def num_nodes(self) -> int:
        """Nodes (n)."""
        return self.num_receivers


@register
@dataclasses.dataclass(frozen=True)
class Bipartite(Edges):
    """Directed edges from m senders to n receivers, which are not the same things."""

    @classmethod
    def make(
        cls,
        senders: Indices,
        receivers: Indices,
        num_senders: SupportsIndex,
        num_receivers: SupportsIndex,
    ) -> "Bipartite":
        """Checks and sorts edges, as `Graph.make` does.

        Args:
          senders: [e] integers in 0..num_senders - 1.
          receivers: [e] integers in 0..num_receivers - 1.
          num_senders, num_receivers: how many there are (m, n), >= 0.
        Raises:
          FFNLabError: an index out of range, not an integer, or traced by jit.

        >>> Bipartite.make([4, 0], [1, 0], num_senders=5, num_receivers=2).starts.tolist()
        [0, 1, 2]
        """
        m = checked_count("num_senders", num_senders)
        n = checked_count("num_receivers", num_receivers)
        return cls(*sorted_edges(senders, receivers, m, n))


def edge_order(senders: Indices, receivers: Indices) -> Int[np.ndarray, "e"]:
    """The order in which a graph holds edges: by receiver, then sender, then as they came.

    Args:
      senders, receivers: the edges as they are given to `make`, [e].
    Returns:
      [e] int64; `values[edge_order(senders, receivers)]` are the values of the graph's edges.

    >>> edge_order([2, 0, 1], [1, 1, 0]).tolist()
    [2, 1, 0]
    """
    return np.lexsort((on_host("senders", senders), on_host("receivers", receivers)))


def sorted_edges(senders: Indices, receivers: Indices, m: int, n: int) -> tuple[Array, ...]:
    """The arrays of `Edges`."""
    s, r = checked_indices("senders", senders, m), checked_indices("receivers", receivers, n)
    if s.shape != r.shape:
        raise FFNLabError(f"{len(s)} senders and {len(r)} receivers; each edge has one of both")
    order = np.lexsort((s, r))
    s, r = s[order], r[order]
    by_sender = np.argsort(s, kind="stable").astype(np.int32)
    found = (s, r, starts_of(r, n), by_sender, starts_of(s[by_sender], m))
    return tuple(jnp.asarray(array) for array in found)


def starts_of(ascending: np.ndarray, count: int) -> np.ndarray:
    """Where each of 0..count - 1 begins in ascending indices, then how many there are."""
    return np.searchsorted(ascending, np.arange(count + 1)).astype(np.int32)


def on_host(name: str, values: object) -> np.ndarray:
    """Values as a NumPy array.

    Raises:
      FFNLabError: they are traced.
    """
    if isinstance(values, jax.core.Tracer):
        raise FFNLabError(
            f"{name} is traced: a graph is made outside of jit, where its indices can be checked, "
            "and is an argument of the jitted function"
        )
    return np.asarray(values)


def checked_indices(name: str, values: Indices, count: int) -> np.ndarray:
    """Indices of `count` things, [e] int32."""
    array = on_host(name, values)
    if array.ndim != 1 or array.size > MOST:
        raise FFNLabError(f"{name} has shape {array.shape}; [e] is accepted, e <= {MOST}")
    if not array.size:  # NumPy makes floats of []
        return np.zeros(0, np.int32)
    if array.dtype.kind not in "iu":
        raise FFNLabError(f"{name} has dtype {array.dtype}; integers are accepted")
    bad = (array < 0) | (array >= count)
    if bad.any():
        where = int(bad.argmax())
        raise FFNLabError(f"{name}[{where}]={array[where]} must lie in 0..{count - 1}")
    return array.astype(np.int32)


def checked_count(name: str, count: Any) -> int:
    """How many nodes there are."""
    if isinstance(count, bool) or not hasattr(count, "__index__"):
        raise FFNLabError(f"{name}={count!r} must be an integer")
    if not 0 <= operator.index(count) <= MOST:
        raise FFNLabError(f"{name}={count} must lie in 0..{MOST}")
    return operator.index(count)


def check(edges: Edges) -> None:
    """Raises FFNLabError unless the arrays are what `make` builds; not run inside of jit."""
    fields = [f.name for f in dataclasses.fields(edges)]
    arrays = {name: on_host(name, getattr(edges, name)) for name in fields}
    for name, array in arrays.items():
        if array.ndim != 1 or array.dtype != np.int32:
            raise FFNLabError(f"{name} is {array.dtype}{list(array.shape)}; int32 [e] is accepted")
    s, r, starts, by_sender, sender_starts = arrays.values()
    m, n = len(sender_starts) - 1, len(starts) - 1
    sound = (
        len(s) == len(r) == len(by_sender)
        and all(within(i, size) for i, size in ((s, m), (r, n), (by_sender, len(s))))
        and is_sorted(r, s)
        and is_sorted(s[by_sender], by_sender)
        and len(np.unique(by_sender)) == len(s)
        and np.array_equal(starts, starts_of(r, n))
        and np.array_equal(sender_starts, starts_of(s[by_sender], m))
    )
    if not sound or (isinstance(edges, Graph) and n != m):
        kind = type(edges).__name__
        raise FFNLabError(f"these arrays are not what {kind}.make builds; use {kind}.make")


def within(indices: np.ndarray, count: int) -> bool:
    """Whether all indices lie in 0..count - 1."""
    return bool(np.all((indices >= 0) & (indices < count)))


def is_sorted(major: np.ndarray, minor: np.ndarray) -> bool:
    """Whether pairs ascend, by the first, then the second."""
    a, b = np.diff(major.astype(np.int64)), np.diff(minor.astype(np.int64))
    return bool(np.all((a > 0) | ((a == 0) & (b >= 0))))
