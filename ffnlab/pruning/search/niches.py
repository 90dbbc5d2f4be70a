"""Survival of NSGA-III: points spread over reference directions (Deb and Jain, 2014).

Objectives are scaled so that the best values are 0 and a plane through the extreme points meets the
axes at 1; each point belongs to the direction it is nearest to; of the last front those in the
emptiest niches survive. `second` of the standing is the distance to the direction, for the
tournaments of U-NSGA-III (Seada and Deb, 2016).

What differs from pymoo: best values, worst values and extreme points are those of the points given,
not of all generations, so survival is a function of its arguments; and the directions of least
energy are found from a fixed start, without random numbers.
"""

import itertools

import numpy as np
from jaxtyping import Float

from ffnlab.pruning.search.standing import Standing, Survivors, ranks

__all__ = ["directions", "nadir", "niched"]

SMALL = 1e-6  # an objective's range below which it has none
STEPS = 500  # of descent
POWER = 2  # the energy is a sum of distance ** -(POWER * dimensions)


def directions(count: int, dimensions: int) -> Float[np.ndarray, "k m"]:
    """Points spread evenly over the simplex: a local minimum of their Riesz energy.

    E = sum over pairs of |a - b|^-(2 m). From a grid the corners and then the points farthest from
    those taken are the start; a step of descent moves every point by at most as much as has been
    useful, and the simplex is kept by projection (Blank et al., 2020).

    Args:
      count: k, at least 1.
      dimensions: m, at least 2.
    Returns:
      the points, each with entries >= 0 that sum to 1.

    >>> directions(3, 3).tolist()
    [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    points = spread_start(count, dimensions)
    if count <= dimensions:
        return points
    step, (best, slope) = 0.05, energy(points)
    for _ in range(STEPS):
        slope = slope - slope.mean(axis=1, keepdims=True)
        moved = onto_simplex(points - step * slope / np.linalg.norm(slope, axis=1).max())
        value, new_slope = energy(moved)
        if value < best:
            points, best, slope, step = moved, value, new_slope, step * 1.2
        else:
            step /= 2
    return points


def spread_start(count: int, dimensions: int) -> np.ndarray:
    """The corners of the simplex, then of a grid on it the points farthest from those taken."""
    parts = 1
    while len(grid := simplex_grid(parts, dimensions)) < 8 * count:
        parts += 1
    taken = list(np.eye(dimensions)[:count])
    while len(taken) < count:
        gaps = np.linalg.norm(grid[:, None] - np.array(taken), axis=2).min(axis=1)
        taken.append(grid[int(gaps.argmax())])
    return np.array(taken)


def simplex_grid(parts: int, dimensions: int) -> np.ndarray:
    """All points of the simplex whose entries are multiples of 1 / parts (Das and Dennis, 1998)."""
    bars = itertools.combinations(range(parts + dimensions - 1), dimensions - 1)
    edges = np.array([(-1, *places, parts + dimensions - 1) for places in bars])
    return (np.diff(edges, axis=1) - 1) / parts


def energy(points: np.ndarray) -> tuple[float, np.ndarray]:
    """(log of the Riesz energy, its gradient)."""
    power = POWER * points.shape[1]
    apart = points[:, None] - points
    distance = np.linalg.norm(apart, axis=2)
    np.fill_diagonal(distance, np.inf)
    each = np.maximum(distance, 1e-9) ** -power
    total = each.sum() / 2
    pull = (-power * each / np.maximum(distance, 1e-9) ** 2)[..., None] * apart
    return float(np.log(total)), pull.sum(axis=1) / total


def onto_simplex(points: np.ndarray) -> np.ndarray:
    """The nearest points whose entries are >= 0 and sum to 1 (Duchi et al., 2008)."""
    falling = -np.sort(-points, axis=1)
    over = (np.cumsum(falling, axis=1) - 1) / np.arange(1, points.shape[1] + 1)
    last = (falling > over).sum(axis=1) - 1
    return np.maximum(points - over[np.arange(len(points)), last][:, None], 0.0)


def nadir(points: Float[np.ndarray, "n m"]) -> Float[np.ndarray, "m"]:
    """The worst values of the front, estimated by the plane through its extreme points.

    The extreme point of an objective has the least of max(f_i, 10^6 f_j) over the others j, with f
    from the best values on. Where the plane does not meet all axes beyond them, the front's worst
    values are taken; where an objective has no range on the front, its worst value of all.

    Args:
      points: objectives, n >= 1.
    """
    best, worst = points.min(axis=0), points.max(axis=0)
    front = points[ranks(points) == 0]
    gains = front - best
    shown = np.where(gains < 1e-3, 0.0, gains)
    weights = np.where(np.eye(points.shape[1]) > 0, 1.0, 1e6)
    extremes = gains[(shown * weights[:, None]).max(axis=2).argmin(axis=1)]
    found = front.max(axis=0)
    try:
        plane = np.linalg.solve(extremes, np.ones(len(extremes)))
    except np.linalg.LinAlgError:
        plane = np.zeros(len(extremes))
    if (plane > 0).all() and np.allclose(extremes @ plane, 1.0) and (1 / plane > SMALL).all():
        found = np.minimum(best + 1 / plane, worst)
    return np.where(found - best > SMALL, found, worst)


def niched(
    points: Float[np.ndarray, "n m"],
    size: int,
    rng: np.random.Generator,
    to: Float[np.ndarray, "k m"],
) -> Survivors:
    """Survival of NSGA-III: whole fronts, of the last one those in the emptiest niches.

    Args:
      points: objectives.
      size: how many survive.
      rng: decides between niches that are equally empty, and who comes into one that is not empty.
      to: reference directions.
    Returns:
      the min(n, size) survivors, front by front.
    """
    rank = ranks(points)
    order = np.argsort(rank, kind="stable")
    last = rank[order[min(size, len(order)) - 1]]
    pool = order[rank[order] <= last]
    niche, distance = associated(points[pool], nadir(points), to)
    chosen = np.flatnonzero(rank[pool] < last)
    if len(pool) <= size:
        chosen = np.arange(len(pool))
    counts = np.bincount(niche[chosen], minlength=len(to))
    left = np.setdiff1d(np.arange(len(pool)), chosen).tolist()
    chosen = chosen.tolist()
    while len(chosen) < size and left:
        open_ = np.unique(niche[left])
        emptiest = open_[counts[open_] == counts[open_].min()]
        here = int(rng.choice(emptiest))
        members = rng.permutation([i for i in left if niche[i] == here])
        taken = int(members[distance[members].argmin()] if counts[here] == 0 else members[0])
        counts[here] += 1
        left.remove(taken)
        chosen.append(taken)
    rows = pool[chosen]
    return Survivors(rows, Standing(rank[rows], distance[chosen], niche[chosen]))


def associated(
    points: np.ndarray, worst: np.ndarray, to: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(the direction nearest to each point, the distance to it), both after scaling."""
    best = points.min(axis=0)
    span = np.where(worst > best, worst - best, 1e-12)
    scaled = (points - best) / span
    unit = to / np.linalg.norm(to, axis=1, keepdims=True)
    along = scaled @ unit.T
    apart = np.linalg.norm(scaled[:, None] - along[..., None] * unit, axis=2)
    niche = apart.argmin(axis=1)
    return niche, apart[np.arange(len(points)), niche]
