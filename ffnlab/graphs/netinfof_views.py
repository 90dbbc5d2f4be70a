"""NetInfoF: five embeddings of the nodes of a graph, each of one source of information.

    U  structure            rank-d SVD of A:  u sqrt(s)
    R  neighbourhood        the same of counts of what random walks visit
    F  features             principal components of X
    P  from neighbours      principal components of (D^-1 A)^2 X
    S  with a node's own    principal components of ((D + I)^-1 (A + I))^2 X

A: [n, n], edges without directions and without loops; D its degrees; X: [n, f], features. Each is
divided by the standard deviation of its columns, which are not centred, and its rows then have
length 1. All of it is done once, on the host, by SciPy.

What differs from the authors' code (models/proposed.py, rwcpp.cpp): singular vectors are exact, by
ARPACK, where theirs are randomised, and of a fixed sign. Every node is walked from `walks` times;
their loop runs in all threads of a parallel region, so that counts are that many times as large.
Where a matrix has a lower rank than d, what is missing are columns of zeros, which add nothing to
any product; they scale the rounding of such columns up to 1.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Float, Float32
from scipy import linalg, sparse
from scipy.sparse.linalg import svds

from ffnlab.data.splits import pairs_of
from ffnlab.errors import ConfigError, at_least, check_seed
from ffnlab.graph import Graph

__all__ = ["VIEWS", "adjacency", "embeddings", "normalised_features", "spectral", "walk_counts"]

VIEWS: Mapping[str, str] = MappingProxyType(
    {
        "U": "structure",
        "R": "neighbourhood",
        "F": "features",
        "P": "features of neighbours",
        "S": "features, own and of neighbours",
    }
)
SMALL = 512  # nodes up to which all singular vectors are found at once
AT_ONCE = 2**20  # walkers
NOTHING = 1e-9  # length of a row, over the longest: what float64 leaves of a node without edges
SEEN = 1  # visits up to which a node counts as not visited


def adjacency(graph: Graph) -> sparse.csr_array:
    """The symmetric matrix of a graph without its loops, each pair once; float64."""
    ends, n = pairs_of(graph), graph.num_nodes
    both = np.concatenate([ends, ends[:, ::-1]])
    return sparse.csr_array((np.ones(len(both)), tuple(both.T)), shape=(n, n))


def normalised_features(x: Float[np.ndarray, "n f"]) -> Float32[np.ndarray, "n f"]:
    """Features less the smallest of all, each row over its sum, or over 1 where that is less.

    >>> normalised_features(np.array([[1.0, 2.0, 4.0], [1.0, 1.0, 1.0]])).tolist()
    [[0.0, 0.25, 0.75], [0.0, 0.0, 0.0]]
    """
    x = np.asarray(x, np.float64) - np.min(x)
    return (x / np.maximum(x.sum(1, keepdims=True), 1)).astype(np.float32)


def embeddings(
    x: Float[np.ndarray, "n f"],
    graph: Graph,
    *,
    dimension: int = 128,
    walks: int = 200,
    length: int = 3,
    seed: int = 0,
) -> dict[str, Float32[np.ndarray, "n d"]]:
    """All five, by the names of `VIEWS`; d is the smallest of `dimension`, f and n.

    Args:
      x: features; the authors give `normalised_features` of them.
      graph: without directions; its loops are not looked at. Of a split, the part to learn from.
      dimension: of each, at most.
      walks: from each node; the authors take 200, of generated graphs 1,000.
      length: nodes of a walk with its first, at least 2.
      seed: of the walks, and of where ARPACK begins.
    Raises:
      ConfigError: a number out of its range, features that are not one row for each node or not
        finite, or a graph without edges.
    """
    check_seed(seed)
    at_least(1, dimension=dimension, walks=walks)
    at_least(2, length=length)
    x = np.asarray(x, np.float64)
    if x.ndim != 2 or len(x) != graph.num_nodes or not np.isfinite(x).all():
        raise ConfigError(
            f"x has shape {x.shape}; finite features [{graph.num_nodes}, f] are accepted"
        )
    a, random = adjacency(graph), np.random.default_rng(seed)
    if not a.nnz:
        raise ConfigError("the graph has no edges: nothing is to be said of them")
    d = min(dimension, *x.shape)
    near = mean_of(a)
    own = mean_of(a + sparse.eye_array(len(x), format="csr"))
    found = {
        "U": spectral(a, d, random),
        "R": spectral(walk_counts(a, walks, length, random), d, random),
        "F": components(x, d),
        "P": components(near @ (near @ x), d),
        "S": components(own @ (own @ x), d),
    }
    return {name: standardised(z) for name, z in found.items()}


def mean_of(a: sparse.csr_array) -> sparse.csr_array:
    """Each row over its sum; a row of zeros as it is."""
    degree = a.sum(1)
    return sparse.diags_array(1 / np.where(degree > 0, degree, 1)) @ a


def walk_counts(
    a: sparse.csr_array, walks: int, length: int, random: np.random.Generator
) -> sparse.csr_array:
    """How often walks from each node visit each other node; once is not at all.

    A walk goes to a neighbour that is not the one it came from, with equal chances, and ends where
    there is none.

    Args:
      a: symmetric, of zeros and ones.
      walks: from each node.
      length: nodes of a walk, its first included, which is not counted.
      random: of the walks.
    Returns:
      [n, n], by (first, visited).
    """
    n = len(a.indptr) - 1
    a.sort_indices()
    total, most = sparse.csr_array((n, n)), max(1, AT_ONCE // max(n, 1))
    for done in range(0, walks, most):
        total = total + visits(a, min(most, walks - done), length, random)
    total.data[total.data <= SEEN] = 0
    total.eliminate_zeros()
    return total


def visits(
    a: sparse.csr_array, walks: int, length: int, random: np.random.Generator
) -> sparse.csr_array:
    """The counts of walks that go at the same time."""
    n, degree = len(a.indptr) - 1, np.diff(a.indptr)
    keys = np.repeat(np.arange(n), degree) * n + a.indices  # ascending
    first = np.repeat(np.flatnonzero(degree), walks)
    here, before, pairs = first, np.full(len(first), -1), []
    for step in range(length - 1):
        ways = degree[here] - (step > 0)
        goes = ways > 0
        first, here, before, ways = (each[goes] for each in (first, here, before, ways))
        chosen = np.floor(random.random(len(here)) * ways).astype(int)
        if step:  # passes over the neighbour that it came from
            came = np.searchsorted(keys, here * n + before) - a.indptr[here]
            chosen += chosen >= came
        here, before = a.indices[a.indptr[here] + chosen].astype(int), here  # they are 32 bits
        pairs.append(np.stack([first, here]))
    ends = np.concatenate(pairs, axis=1)
    return sparse.coo_array((np.ones(ends.shape[1]), tuple(ends)), shape=(n, n)).tocsr()


def spectral(
    matrix: sparse.csr_array, d: int, random: np.random.Generator
) -> Float[np.ndarray, "n d"]:
    """u sqrt(s) of the d largest singular values, in order; zeros beyond the rank."""
    n = len(matrix.indptr) - 1
    if n <= SMALL or d >= n - 1:
        u, s, _ = np.linalg.svd(matrix.toarray())
    else:
        u, s, _ = svds(matrix, k=d, v0=random.normal(size=n))
        order = np.argsort(-s)
        u, s = u[:, order], s[order]
    u, s = u[:, :d], s[:d]
    is_there = s > n * np.finfo(float).eps * s[0]
    return signed(u) * np.sqrt(s * is_there)


def components(x: Float[np.ndarray, "n f"], d: int) -> Float[np.ndarray, "n d"]:
    """What centred rows are along their d principal axes; zeros beyond the rank."""
    x = x - x.mean(0)
    is_long = len(x) >= x.shape[1]
    gram = x.T @ x if is_long else x @ x.T
    found: Any = linalg.eigh(gram, subset_by_index=[len(gram) - d, len(gram) - 1])
    values, vectors = found
    values, vectors = values[::-1], vectors[:, ::-1]
    is_there = values > len(gram) * np.finfo(float).eps * max(values[0], 0)
    along = x @ vectors if is_long else vectors * np.sqrt(np.maximum(values, 0))
    return signed(along) * is_there


def signed(u: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Columns turned so that the largest entry of each is positive."""
    return u * np.sign(np.take_along_axis(u, np.abs(u).argmax(0)[None], 0))


def standardised(z: Float[np.ndarray, "n d"]) -> Float32[np.ndarray, "n d"]:
    """Columns over their deviation, not centred, then rows of length 1; rows of rounding are 0."""
    deviation = z.std(0)
    z = z / np.where(deviation > 0, deviation, 1)
    length = np.linalg.norm(z, axis=1, keepdims=True)
    is_there = length > NOTHING * length.max()
    return (z * is_there / np.where(is_there, length, 1)).astype(np.float32)
