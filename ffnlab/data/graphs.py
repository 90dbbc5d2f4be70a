"""Graphs whose nodes have features and classes: Cora from its file, and a generated twin."""

import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32

from ffnlab.data.folders import folder
from ffnlab.errors import (
    ConfigError,
    FFNLabError,
    FormatError,
    at_least,
    check_seed,
    first_line,
)
from ffnlab.graph import Graph, undirected
from ffnlab.storage.npz import READ_ERRORS, read_member

__all__ = ["LabelledNodes", "block_model", "cora"]

MOST = 2**28  # features that are made dense, a gigabyte


class LabelledNodes(NamedTuple):
    """A graph of n nodes with features, classes and who learns from whom.

    Attributes:
      graph: every edge in both directions, no self loops.
      x: features, [n, d] float32.
      y: classes, [n] int32.
      train, valid, test: which nodes they are, [n] bool; none is in two of them.
    """

    graph: Graph
    x: Float32[np.ndarray, "n d"]
    y: Int32[np.ndarray, "n"]
    train: Bool[np.ndarray, "n"]
    valid: Bool[np.ndarray, "n"]
    test: Bool[np.ndarray, "n"]


def block_model(
    seed: int = 0,
    *,
    nodes: int = 600,
    classes: int = 4,
    inside: float = 0.05,
    across: float = 0.005,
    width: int = 16,
    noise: float = 2.0,
    train: int = 80,
    valid: int = 120,
) -> LabelledNodes:
    """A stochastic block model: classes join their own more often than others.

        P(i joined to j) = inside where y_i = y_j, else across;   x_i = centre[y_i] + noise N(0, I)

    Args:
      seed: of everything.
      nodes: how many (n); classes are drawn evenly.
      classes: how many.
      inside, across: probabilities of an edge, in [0, 1].
      width: of the features (d); centres are drawn from N(0, I).
      noise: standard deviation of a feature around its centre.
      train, valid: nodes of each; the others are for testing.
    Raises:
      ConfigError: a number out of its range, or more nodes to learn from than there are.
    """
    check_seed(seed)
    at_least(1, nodes=nodes, classes=classes, width=width)
    at_least(0, train=train, valid=valid)
    for name, p in (("inside", inside), ("across", across)):
        if not 0 <= p <= 1:
            raise ConfigError(f"{name}={p} must lie in [0, 1]")
    if train + valid > nodes:
        raise ConfigError(f"train={train} and valid={valid} are more than nodes={nodes}")
    random = np.random.default_rng(seed)
    y = random.integers(classes, size=nodes)
    joined = [  # node by node: all pairs at once would take nodes^2 numbers
        i + 1 + np.flatnonzero(random.random(nodes - i - 1) < np.where(y[i + 1 :] == y[i], *p))
        for i, p in enumerate([(inside, across)] * nodes)
    ]
    ends = np.repeat(np.arange(nodes), [len(j) for j in joined]), np.concatenate(joined)
    centres = random.normal(size=(classes, width))
    x = centres[y] + noise * random.normal(size=(nodes, width))
    parts = np.split(random.permutation(nodes), [train, train + valid])
    masks = (np.isin(np.arange(nodes), part) for part in parts)
    graph = undirected(Graph.make(*ends, nodes=nodes))
    return LabelledNodes(graph, x.astype(np.float32), y.astype(np.int32), *masks)


def cora(path: str | Path | None = None) -> LabelledNodes:
    """The citation graph Cora with the split of Planetoid (arXiv 1603.08861), from an npz file.

    Its members: num_nodes and num_feat, [] int64 (n, d); the features as a CSR matrix [n, d] in
    feat_indptr and feat_indices, int32, and feat_data, float32; labels [n] int16; edges [e, 2]
    int32, in either direction; train_idx, val_idx and test_idx, int32. Nothing is unpickled, and
    each member is read only where its header says what is expected.

    Args:
      path: a file of this format; planetoid_cora/cora.npz in FFNLAB_DATA when None.
    Returns:
      2,708 nodes, 5,278 edges in both directions, 1,433 words that are there (1) or not (0), 7
      classes, of 140, 500 and 1,000 nodes.
    Raises:
      FFNLabError: there is no file.
      FormatError: it is damaged, or of another format.
    """
    file = folder("planetoid_cora") / "cora.npz" if path is None else Path(path)
    if not file.is_file():
        raise FFNLabError(f"{file}: there is no such file")
    try:
        with zipfile.ZipFile(file) as archive:
            return nodes_of(archive)
    except READ_ERRORS as error:
        raise FormatError(f"{file} is no graph of labelled nodes: {first_line(error)}") from None


def nodes_of(archive: zipfile.ZipFile) -> LabelledNodes:
    """What an open file holds."""

    def read(name: str, *shape: int | None, dtype: type = np.int32) -> np.ndarray:
        return read_member(archive, name, shape, np.dtype(dtype))

    n, d = (int(read(name, dtype=np.int64)) for name in ("num_nodes", "num_feat"))
    if not (0 < n <= MOST and 0 < d <= MOST and n * d <= MOST):
        raise FormatError(
            f"num_nodes={n} and num_feat={d} must be positive, at most {MOST} numbers"
        )
    starts = read("feat_indptr", n + 1)
    rows = np.diff(starts.astype(np.int64))
    if starts[0] != 0 or rows.min() < 0 or rows.max() > d:
        raise FormatError(f"feat_indptr must begin at 0 and rise by 0..{d}")
    nonzero = int(starts[-1])
    columns = read("feat_indices", nonzero)
    values = read("feat_data", nonzero, dtype=np.float32)
    check_range("feat_indices", columns, d)
    if not np.isfinite(values).all():
        raise FormatError("feat_data must be finite")
    y = read("labels", n, dtype=np.int16)
    check_range("labels", y, 2**15)
    x = np.zeros((n, d), np.float32)
    np.add.at(x, (np.repeat(np.arange(n), rows), columns), values)
    masks = [mask(name, read(name, None), n) for name in ("train_idx", "val_idx", "test_idx")]
    if np.sum(masks, axis=0).max() > 1:
        raise FormatError("train_idx, val_idx and test_idx must have no node in common")
    graph = undirected(Graph.make(*read("edges", None, 2).T, nodes=n))
    return LabelledNodes(graph, x, y.astype(np.int32), *masks)


def mask(name: str, indices: np.ndarray, count: int) -> np.ndarray:
    """Which of `count` nodes are named, [count] bool."""
    check_range(name, indices, count)
    return np.isin(np.arange(count), indices)


def check_range(name: str, indices: np.ndarray, count: int) -> None:
    """Raises FormatError unless all lie in 0..count - 1."""
    if indices.size and not (indices.min() >= 0 and indices.max() < count):
        raise FormatError(f"{name} must lie in 0..{count - 1}")
