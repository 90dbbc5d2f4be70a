"""What classes a node's surroundings have, its own left out exactly.

RpHGNN's groups of labels: those to learn from as one-hot rows, a uniform row for every other node,
one round of means. Of a relation and its reverse, with row-normalized M (to the target) and M'
(from it), a node's even echo holds its own row with the weight

    diag_i = sum_j M_ij M'_ji,    so    h_i <- (h_i - diag_i l_i) / (1 - diag_i)

Echoes of nodes that hear nobody else become uniform. Relations within the target's kind have a
group of what its nodes hear directly too, with loops left out likewise; there nothing heard is 0.

What differs from the authors' code: it takes diag from the reverse of a relation within a kind also
where that is directed and the echo goes M M, so that a node's own class stays in; and divides by
1 - diag + 1e-8 in float32, which where diag is near 1 blows rounding up. Here diag is that of the
echo itself, and all is done once, in float64, on the host.
"""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from ffnlab.errors import ConfigError, at_least
from ffnlab.graph import Edges, Hetero
from ffnlab.graphs.rounds import Entry
from ffnlab.graphs.rphgnn import Features

__all__ = ["label_groups"]

ALONE = 1e-9  # of 1 - diag, below which a node hears nobody but itself


def label_groups(
    graph: Hetero,
    target: str,
    y: Int[np.ndarray, "_"],
    known: Bool[np.ndarray, "_"],
    classes: int,
    *,
    dtype: str = "float16",
) -> Features:
    """Groups of one round of classes, to stand beside those of `precomputed`.

    Args:
      graph: nodes and relations.
      target: the kind whose nodes have classes.
      y: class of each, in 0..classes - 1; looked at where it is known.
      known: which are learned from.
      classes: how many (c).
      dtype: of what is stored.
    Returns:
      for every relation of the target a group (1, c) of its even echo; before it, for a relation
      within the kind, one of what is heard directly.
    Raises:
      ConfigError: another number of classes or of nodes, a class out of range, or a target without
        relations.
    """
    at_least(2, classes=classes)
    n, relations = graph.counts.get(target, 0), graph.touching(target)
    if not relations or y.shape != (n,) or known.shape != (n,):
        raise ConfigError(
            f"target={target!r} with {len(relations)} relations, y {list(y.shape)}, known "
            f"{list(known.shape)}: a kind with relations and [{n}] of both are accepted"
        )
    if not known.any() or y[known].min() < 0 or y[known].max() >= classes:
        raise ConfigError(f"y must have known classes, in 0..{classes - 1}")
    rows = np.full((n, classes), 1 / classes)
    rows[known] = np.eye(classes)[y[known]]
    entries, groups = [], []
    for relation in relations:
        inward = means_of(graph.edges[graph.names.index(relation)])
        outward = inward
        if relation[0] != relation[2]:
            back = means_of(graph.edges[graph.names.index(relation)].transpose())
            inward, outward = (inward, back) if relation[2] == target else (back, inward)
        else:
            entries.append(Entry("odd", relation))
            groups.append(others_of(inward @ rows, rows, inward.diagonal(), 0.0))
        diagonal = np.asarray(inward.multiply(outward.T).sum(axis=1)).ravel()
        entries.append(Entry("even", relation))
        groups.append(others_of(inward @ (outward @ rows), rows, diagonal, 1 / classes))
    sizes = ((1, classes),) * len(entries)
    return Features(np.concatenate(groups, axis=1).astype(dtype), tuple(entries), sizes)


def means_of(edges: Edges) -> Any:
    """The row-normalized matrix of edges, a SciPy array [n, m] in float64; duplicates add up."""
    import scipy.sparse  # half a second of import that others do without

    shape = edges.num_receivers, edges.num_senders
    ends = np.asarray(edges.receivers), np.asarray(edges.senders)
    counts = scipy.sparse.coo_array((np.ones(edges.num_edges), ends), shape=shape).tocsr()
    degrees = np.maximum(np.asarray(counts.sum(axis=1)).ravel(), 1)
    return scipy.sparse.diags_array(1 / degrees).tocsr() @ counts


def others_of(
    h: Float[np.ndarray, "n c"],
    own: Float[np.ndarray, "n c"],
    weight: Float[np.ndarray, "n"],
    nothing: float,
) -> Float[np.ndarray, "n c"]:
    """Means of which the own row, of such a weight, is taken out; `nothing` where none is left."""
    rest = 1 - weight
    hears = (rest > ALONE) & (h.sum(axis=1) > 0)
    others = (h - weight[:, None] * own) / np.where(hears, rest, 1)[:, None]
    return np.where(hears[:, None], np.maximum(others, 0), nothing)
