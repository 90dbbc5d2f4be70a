"""NetInfoF of classes of nodes: how much embeddings say of them, before anything is trained.

This is our reading of the paper (ICLR 2024, openreview KY8ZNcljVU): the released code measures
links alone. Where it bins pairs by similarity (`ffnlab.graphs.netinfof`), nodes are binned by
clusters of their rows, by k-means, and the table is of cluster and class.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int32

from ffnlab.errors import ConfigError, at_least
from ffnlab.graphs.netinfof import Views, check_views, informed
from ffnlab.probe import Probe, rows

__all__ = ["NodeRows", "netinfof_nodes"]

ROUNDS = 20  # of k-means, at most
APART = 1e-12  # squares of distances up to which points are one


class NodeRows(NamedTuple):
    """Nodes with classes, for `netinfof_nodes`.

    Attributes:
      nodes: which they are.
      y: their classes.
      scored: which are scored; of the others clusters are made.
    """

    nodes: Int32[np.ndarray, "b"]
    y: Int32[np.ndarray, "b"]
    scored: Bool[np.ndarray, "b"]


def netinfof_nodes(*, bins: int = 8) -> Probe[Views, tuple]:
    """A probe of how much embeddings say of the classes of nodes; our reading of the paper.

    It looks at a mapping from names to `View`s with batches of `NodeRows`: of those that are not
    scored clusters are made, and the table is of cluster and class of those that are.

    Args:
      bins: clusters, at most; equal rows make fewer.
    Returns:
      a Probe; its report is an `InformationReport`.
    Raises:
      ConfigError: as `netinfof`, and negative classes.
    """
    at_least(2, bins=bins)

    def measure(views: Views, batch: NodeRows) -> dict[str, Any]:
        nodes = jnp.asarray(batch.nodes)
        said = {name: view.z[nodes] for name, view in views.items()}
        return {"said": said, "answer": batch.y, "scored": batch.scored}

    def table(values: np.ndarray, found: Mapping[str, np.ndarray]) -> np.ndarray:
        y, scored = found["answer"], found["scored"]
        if y.min() < 0:
            raise ConfigError(f"y has class {y.min()}; 0 or more are accepted")
        centres = clusters(values[~scored], bins)
        counts = np.zeros((len(centres), int(y.max()) + 1))
        np.add.at(counts, (nearest(values[scored], centres), y[scored]), 1)
        return counts

    return rows(
        "netinfof_nodes", measure, lambda views, found: informed(found, table), init=check_views
    )


def clusters(points: Float[np.ndarray, "n d"], count: int) -> Float[np.ndarray, "k d"]:
    """Centres of k-means, from points that lie far from each other; fewer of fewer points."""
    points = np.asarray(points, np.float64)
    centres = points.mean(0, keepdims=True)
    chosen: list[np.ndarray] = []
    while len(chosen) < count:  # the farthest from all so far, the first from their mean
        far = squares(points, np.array(chosen or centres)).min(1)
        if not far.max() > APART:
            break
        chosen.append(points[far.argmax()])
    centres = np.array(chosen or centres)
    for _ in range(ROUNDS):
        own = nearest(points, centres)
        counts = np.bincount(own, minlength=len(centres))
        moved = np.zeros_like(centres)
        np.add.at(moved, own, points)
        moved = np.where(counts[:, None] > 0, moved / np.maximum(counts, 1)[:, None], centres)
        if np.allclose(moved, centres):
            break
        centres = moved
    return centres


def squares(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "k d"]) -> Float[np.ndarray, "n k"]:
    """Squared distances."""
    return ((a[:, None] - b) ** 2).sum(-1)


def nearest(points: Float[np.ndarray, "n d"], centres: Float[np.ndarray, "k d"]) -> np.ndarray:
    """The nearest centre of each point."""
    return squares(np.asarray(points, np.float64), centres).argmin(1)
