"""How good each vector of a population is: ranks, and what breaks ties between them."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from ffnlab.pruning.search.pareto import dominates

__all__ = ["Standing", "Survivors", "ranks"]


class Standing(NamedTuple):
    """How good each of a population is: by rank, then by `second`, the lower the better.

    Attributes:
      rank: int [p], the front it is on, 0 the best.
      second: f64 [p]: minus the crowding distance (NSGA-II), the distance to the reference
        direction (U-NSGA-III), or 0.
      niche: int [p]: who are compared at all; of two niches neither is better.
    """

    rank: np.ndarray
    second: np.ndarray
    niche: np.ndarray


class Survivors(NamedTuple):
    """Who goes on.

    Attributes:
      rows: int [p], of the objectives that were given, the best first.
      standing: of these rows.
    """

    rows: np.ndarray
    standing: Standing


def ranks(points: Float[np.ndarray, "n m"]) -> Int[np.ndarray, "n"]:
    """The front of each point: 0 where nothing dominates it, then without those, and so on.

    From one matrix of who dominates whom, n n m comparisons.

    >>> ranks(np.array([[1.0, 1.0], [2.0, 2.0], [0.0, 3.0], [2.0, 2.0], [3.0, 3.0]])).tolist()
    [0, 1, 0, 1, 2]
    """
    above = dominates(points, points)
    rank = np.full(len(points), -1)
    left = above.sum(axis=0)
    front, value = left == 0, 0
    while front.any():
        rank[front] = value
        left = left - above[front].sum(axis=0)
        front, value = (left == 0) & (rank < 0), value + 1
    return rank
