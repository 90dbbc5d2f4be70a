"""Pareto fronts: what no other point is better than, and how good a front is. All is minimised.

A point a dominates b when it is nowhere worse and somewhere better. The hypervolume of a front is
the volume that it dominates below one fixed reference point; of two fronts it can be compared only
with the same reference (Zitzler and Thiele, 1998).
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from ffnlab.errors import ConfigError
from ffnlab.options import nearest

__all__ = ["best_within", "dominates", "front", "hypervolume", "knee"]

MOST = 3  # objectives


def dominates(
    points: Float[np.ndarray, "n m"], others: Float[np.ndarray, "k m"]
) -> Bool[np.ndarray, "n k"]:
    """Which of some points dominate which of others.

    >>> dominates(np.array([[1.0, 2.0]]), np.array([[1.0, 3.0], [1.0, 2.0], [0.0, 9.0]])).tolist()
    [[True, False, False]]
    """
    no_worse = np.ones((len(points), len(others)), bool)
    better = np.zeros_like(no_worse)
    for ours, theirs in zip(points.T, others.T, strict=True):  # a handful; saves an axis of memory
        no_worse &= ours[:, None] <= theirs
        better |= ours[:, None] < theirs
    return no_worse & better


def front(points: Float[np.ndarray, "n m"]) -> Int[np.ndarray, "k"]:
    """The rows that no row dominates, by the first objective, then the next; equal rows once.

    Args:
      points: objectives, all finite.
    Raises:
      ConfigError: as `check`.

    >>> front(np.array([[2.0, 1.0], [1.0, 2.0], [2.0, 2.0], [2.0, 1.0]])).tolist()
    [1, 0]
    """
    check(points)
    rows = np.unique(points, axis=0, return_index=True)[1]  # sorted by the first column
    kept = points[rows]
    return rows[~dominates(kept, kept).any(axis=0)]


def hypervolume(
    points: Float[np.ndarray, "n m"], reference: Sequence[float | int] | Float[np.ndarray, "k"]
) -> float:
    """The volume that points dominate below a reference, exactly, for one to three objectives.

    In three dimensions it is a stack of slabs between neighbouring values of the last objective,
    each with the area of the points that lie at or below it; n slabs of n log n each.

    Args:
      points: objectives, all finite, in any units; those not below the reference add nothing.
      reference: the worst value of each objective that counts, in the same units.
    Returns:
      the volume, in the product of the units; 0 of no points.
    Raises:
      ConfigError: as `check`; the reference has another length or is not finite.

    >>> hypervolume(np.array([[1.0, 2.0], [2.0, 1.0]]), (3.0, 3.0))
    3.0
    """
    check(points)
    corner = np.asarray(reference, float)
    if corner.shape != points.shape[1:] or not np.isfinite(corner).all():
        raise ConfigError(
            f"reference={tuple(reference)} must be a finite number for each of the "
            f"{points.shape[1]} objectives"
        )
    gains = corner - points[(points < corner).all(axis=1)]
    return float(volume(gains))


def volume(gains: Float[np.ndarray, "n m"]) -> float:
    """The volume of a union of boxes that share the corner 0; all edges are positive."""
    if gains.shape[1] == 1:
        return gains.max(initial=0.0)
    if gains.shape[1] == 2:
        wide = gains[np.argsort(-gains[:, 0], kind="stable")]
        tall = np.maximum.accumulate(wide[:, 1])
        return float(wide[:, 0] @ np.diff(tall, prepend=0.0))
    deep = gains[np.argsort(-gains[:, 2], kind="stable")]
    slabs = deep[:, 2] - np.append(deep[1:, 2], 0.0)
    areas = [volume(deep[: i + 1, :2]) if slab else 0.0 for i, slab in enumerate(slabs)]
    return float(slabs @ np.array(areas))


def knee(points: Float[np.ndarray, "n m"]) -> int:
    """The row of the front nearest to its best values, each objective scaled to the front's range.

    Args:
      points: objectives, all finite, at least one row.
    Raises:
      ConfigError: as `check`, or no rows.

    >>> knee(np.array([[0.0, 10.0], [0.2, 2.0], [1.0, 0.0], [0.5, 5.0]]))
    1
    """
    rows = front(points)
    if not len(rows):
        raise ConfigError("points has no rows, so none is best")
    kept = points[rows]
    span = np.ptp(kept, axis=0)
    scaled = (kept - kept.min(axis=0)) / np.where(span > 0, span, 1.0)
    return int(rows[np.linalg.norm(scaled, axis=1).argmin()])


def best_within(
    points: Float[np.ndarray, "n m"], objectives: Sequence[str], limits: Mapping[str, float | int]
) -> int:
    """The row with the lowest first objective among those within limits.

    Args:
      points: objectives, all finite.
      objectives: their names.
      limits: the largest value accepted, by name; an objective without one has no limit.
    Raises:
      ConfigError: as `check`; an unknown objective; no row is within, and then the message has the
        least value found of each limited objective.

    >>> best_within(np.array([[0.1, 9.0], [0.3, 2.0], [0.2, 4.0]]), ("loss", "macs"), {"macs": 4})
    2
    """
    check(points)
    for name in limits:
        if name not in objectives:
            raise ConfigError(f"limits: {name!r} is no objective{nearest(name, objectives)}")
    caps = np.array([limits.get(name, np.inf) for name in objectives])
    rows = np.flatnonzero((points <= caps).all(axis=1))
    if not len(rows):
        least = {n: float(points[:, objectives.index(n)].min(initial=np.inf)) for n in limits}
        raise ConfigError(f"limits={dict(limits)}: no point found is within; the least are {least}")
    order = np.lexsort(points[rows].T[::-1])  # the other objectives break ties
    return int(rows[order[0]])


def check(points: Float[np.ndarray, "n m"]) -> None:
    """Raises ConfigError unless these are one to three objectives, all finite."""
    if not 1 <= points.shape[1] <= MOST:
        raise ConfigError(f"{points.shape[1]} objectives; one to {MOST} are accepted")
    if not np.isfinite(points).all():
        row = int(np.flatnonzero(~np.isfinite(points).all(axis=1))[0])
        raise ConfigError(f"objectives of point {row} are {points[row].tolist()}, not finite")
