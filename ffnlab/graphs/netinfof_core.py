"""NetInfoF: Measuring and Exploiting Network Usable Information (ICLR 2024, openreview KY8ZNcljVU).

How much an embedding of nodes says of which are joined is measured without training: pairs are
binned by similarity, and what the bins leave unknown of the edges is the score. A matrix that is
fitted by least squares first says which coordinates of two joined nodes go together, so that unlike
neighbours are measured as well as like ones.

    z: [n, d], rows of length 1; H: [d, d], symmetric, the compatibility
    similarity of (i, j) = z_i^T H z_j
    H = argmin sum over pairs (z_i^T H z_j - joined)^2 + |H - H_0|^2, over what is not fixed to 0
    score = 2^(-H(joined | bin)), entropy in bits: 1 where bins tell all, 1/2 where nothing

H_0 is a ridge regression of z_j on z_i over edges. Its entries that make up less than 5 % of the
sum of their sizes are fixed to 0; |.|^2 counts an entry and its mirror image once.

What differs from the authors' code (models/cm.py, nui.py): no design matrix, of 8,256 columns where
d = 128, is ever made. The operator is z_i^T H z_j, two products of [pairs, d] and [d, d] in pieces,
and the normal equations are solved by conjugate gradients of a fixed number of steps. Theirs stops
LSQR at a tolerance of 1e-2: run to the end it gives the same numbers, stopped there entries that
edges hardly determine differ by up to .25 and scores by .03, on the two graphs under test. Where no
entry is small enough to be fixed, none is (their index is then out of range). Equal similarities
make fewer bins, as theirs do; but no more values than bins have a bin each, where quantiles can put
all of them into one.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from ffnlab.data.splits import pairs_of
from ffnlab.errors import ConfigError, at_least, check_seed
from ffnlab.graph import Graph
from ffnlab.graphs.conjugate import conjugate_gradients

__all__ = [
    "FittingPairs",
    "View",
    "bin_edges",
    "compatibility",
    "fitting_pairs",
    "similarities",
    "table_of",
    "usable_information",
    "view_of",
]

RIDGE = 1.0  # of the first estimate
DAMP = 1.0  # of what the solution differs from it
SMALLEST = 0.05  # share of the first estimate's size that is fixed to 0
WIDTH = 1e-8  # of a bin, at least


class View(NamedTuple):
    """An embedding of nodes.

    Attributes:
      z: rows of length 1, or 0.
      adjusted: z H, the other side of a similarity.
    """

    z: Float[Array, "n d"]
    adjusted: Float[Array, "n d"]


class FittingPairs(NamedTuple):
    """What a compatibility is fitted to.

    Attributes:
      edges: all edges in both directions, of the first estimate.
      ends: edges between nodes of two edges or more, the smaller node first, then twice as many
        pairs of nodes drawn from all, joined or not.
      joined: whether they are of the former.
    """

    edges: Int32[np.ndarray, "e 2"]
    ends: Int32[np.ndarray, "p 2"]
    joined: Bool[np.ndarray, "p"]


def fitting_pairs(graph: Graph, seed: int = 0, *, most: int = 200_000) -> FittingPairs:
    """Draws what a compatibility is fitted to.

    Args:
      graph: without directions, the part to learn from.
      seed: of the draw.
      most: edges, of which more are drawn from; the authors' 200,000.
    Raises:
      ConfigError: there is no edge between nodes of two edges or more.
    """
    check_seed(seed)
    at_least(1, most=most)
    ends, random = pairs_of(graph), np.random.default_rng(seed)
    degree = np.bincount(ends.ravel(), minlength=graph.num_nodes)
    inner = ends[(degree[ends] >= 2).all(1)]
    if not len(inner):
        raise ConfigError(
            f"none of {len(ends)} edges joins two nodes of two edges or more, to which a "
            "compatibility is fitted"
        )
    if len(inner) > most:
        inner = inner[random.choice(len(inner), most, replace=False)]
    others = random.integers(graph.num_nodes, size=(2 * len(inner), 2))
    both = np.concatenate([ends, ends[:, ::-1]])
    joined = np.repeat([True, False], [len(inner), len(others)])
    return FittingPairs(
        both.astype(np.int32), np.concatenate([inner, others]).astype(np.int32), joined
    )


def first_estimate(
    z: Float[Array, "n d"], edges: Int32[Array, "e 2"], piece: int
) -> Float[Array, "d d"]:
    """The upper triangle of the ridge regression of z_j on z_i, [read out of, read from]."""

    def add(total: tuple[Array, Array], part: tuple[Array, ...]) -> tuple[tuple, None]:
        ends, counts = part
        a, b = z[ends[:, 0]], z[ends[:, 1]]
        own = counts[:, None] * a
        return (total[0] + own.T @ a, total[1] + own.T @ b), None

    start = (jnp.zeros((z.shape[1],) * 2),) * 2
    (square, cross), _ = jax.lax.scan(add, start, in_pieces(piece, edges))
    ridged = square + RIDGE * jnp.eye(len(square))
    return jnp.triu(jnp.linalg.solve(ridged, cross).T)


def kept_entries(first: Float[Array, "d d"]) -> Bool[Array, "d d"]:
    """Which entries of an upper triangle are not fixed to 0."""
    is_upper = jnp.triu(jnp.ones_like(first, bool))
    sizes = jnp.sort(jnp.where(is_upper, jnp.abs(first), 0).ravel())  # zeros below come first
    total = jnp.cumsum(sizes)
    is_small = total < SMALLEST * total[-1]
    cut = jnp.max(jnp.where(is_small, sizes, 0), initial=0)
    return is_upper & (jnp.abs(first) >= cut)


def in_pieces(piece: int, *arrays: Array) -> tuple[Array, ...]:
    """Arrays in pieces of rows [pieces, piece, …], the last filled up, and which rows count."""
    rows = len(arrays[0])
    more = -rows % piece
    filled = (jnp.pad(a, [(0, more)] + [(0, 0)] * (a.ndim - 1)) for a in arrays)
    counts = jnp.pad(jnp.ones(rows), (0, more))
    return tuple(a.reshape(-1, piece, *a.shape[1:]) for a in (*filled, counts))


@functools.partial(jax.jit, static_argnames=("steps", "piece"))
def compatibility(
    z: Float[Array, "n d"], pairs: FittingPairs, *, steps: int = 50, piece: int = 4096
) -> Float[Array, "d d"]:
    """The symmetric matrix under which joined nodes are alike.

    Args:
      z: rows of length 1.
      pairs: see `fitting_pairs`; their order, and that of their ends, makes no difference.
      steps: of conjugate gradients.
      piece: pairs that are multiplied at once, which is all that memory grows with.
    Returns:
      H, float32.
    """
    z = z.astype(jnp.float32)
    first = first_estimate(z, jnp.asarray(pairs.edges), piece)
    kept = kept_entries(first)
    first = first * kept
    targets = jnp.asarray(pairs.joined).astype(jnp.float32)
    parts = in_pieces(piece, jnp.asarray(pairs.ends), targets)

    def pulled(upper: Float[Array, "d d"], share: float) -> Float[Array, "d d"]:
        """X^T (share y - X upper), X the operator of all pairs."""
        h = mirrored(upper)

        def add(total: Array, part: tuple[Array, ...]) -> tuple[Array, None]:
            ends, wanted, counts = part
            a, b = z[ends[:, 0]], z[ends[:, 1]]
            left = counts * (share * wanted - jnp.sum((a @ h) * b, axis=1))
            return total + a.T @ (left[:, None] * b), None

        total, _ = jax.lax.scan(add, jnp.zeros_like(h), parts)
        return kept * (jnp.triu(total) + jnp.triu(total.T, 1))

    def normal(flat: Float[Array, "dd"]) -> Float[Array, "dd"]:
        upper = flat.reshape(first.shape)
        return (DAMP**2 * upper - pulled(upper, 0.0)).ravel()

    change = conjugate_gradients(normal, pulled(first, 1.0).ravel(), steps=steps)
    return mirrored(first + change.reshape(first.shape))


def mirrored(upper: Float[Array, "d d"]) -> Float[Array, "d d"]:
    """The symmetric matrix of an upper triangle."""
    return upper + jnp.triu(upper, 1).T


def view_of(z: Float[Array | np.ndarray, "n d"], pairs: FittingPairs, *, steps: int = 50) -> View:
    """An embedding with what a compatibility makes of it."""
    z = jnp.asarray(z)
    return View(z, z @ compatibility(z, pairs, steps=steps).astype(z.dtype))


def similarities(view: View, ends: Int32[Array, "p 2"]) -> Float[Array, "p"]:
    """z_i^T H z_j of pairs of nodes."""
    return jnp.sum(view.adjusted[ends[:, 0]] * view.z[ends[:, 1]], axis=1)


def bin_edges(values: Float[np.ndarray, "p"], bins: int = 8) -> Float[np.ndarray, "k"]:
    """What lies between bins of equally many values; equal values make fewer bins.

    Where there are no more values than bins, each has its own.

    Args:
      values: of what bins are made for.
      bins: at most, at least 2.
    Returns:
      ascending, one less than there are bins; a value on an edge belongs to the bin above.

    >>> bin_edges(np.arange(9.0), 4).tolist(), bin_edges(np.ones(9), 4).tolist()
    ([2.0, 4.0, 6.0], [])
    """
    at_least(2, bins=bins)
    values = np.asarray(values, np.float64)
    known = apart(np.unique(values))
    if len(known) <= bins:
        return (known[1:] + known[:-1]) / 2
    return apart(np.percentile(values, np.linspace(0, 100, bins + 1)))[1:-1]


def apart(ascending: Float[np.ndarray, "k"]) -> Float[np.ndarray, "l"]:
    """Ascending numbers without those that are no further than `WIDTH` above the one before."""
    return ascending[np.ediff1d(ascending, to_begin=np.inf) > WIDTH]


def table_of(
    values: Float[np.ndarray, "p"], joined: Bool[np.ndarray, "p"], edges: Float[np.ndarray, "k"]
) -> Float[np.ndarray, "k1 2"]:
    """How many pairs of each bin are not joined, and how many are."""
    table = np.zeros((len(edges) + 1, 2))
    np.add.at(table, (np.searchsorted(edges, values, side="right"), joined.astype(int)), 1)
    return table


def usable_information(table: np.ndarray) -> float:
    """2^(-H(y | x)) of a table of counts of x and y, entropy in bits.

    Whoever guesses the most frequent y of each x is right at least as often.

    Args:
      table: [x, y] counts, at least one in all.
    Raises:
      ConfigError: no counts, or negative ones.

    >>> usable_information(np.array([[5, 0], [0, 5]])), usable_information(np.ones((2, 2)))
    (1.0, 0.5)
    """
    table = np.asarray(table, np.float64)
    if table.ndim != 2 or not table.sum() > 0 or table.min() < 0:
        raise ConfigError(f"table of shape {table.shape}; counts [x, y] are accepted, one at least")
    joint = table / table.sum()
    of_x = joint.sum(1, keepdims=True)
    share = np.divide(joint, of_x, out=np.ones_like(joint), where=joint > 0)
    return float(2.0 ** np.sum(joint * np.log2(share)))
