"""Evolution of vectors under one to three objectives, all minimised.

A genetic algorithm for one objective, NSGA-II (Deb et al., 2002) for two, U-NSGA-III (Seada and
Deb, 2016; `niches.py`) for three: pairs picked by tournament, simulated binary crossover (SBX; Deb
and Agrawal, 1995), polynomial mutation, and survival of the best of parents and children.
The operators are functions of the uniform numbers drawn for them, so that others' code can be
compared number by number.

What differs from pymoo, which the authors of LINAS use: tournaments compare ranks, as the paper of
NSGA-II has it, where pymoo compares pairs for domination; and whole numbers are bred between bounds
half a step wider, then rounded, for otherwise the first and last value of a variable would be drawn
half as often as the others.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped

from ffnlab.errors import ConfigError
from ffnlab.pruning.search.niches import directions, niched
from ffnlab.pruning.search.pareto import MOST
from ffnlab.pruning.search.space import Space
from ffnlab.pruning.search.standing import Standing, Survivors, ranks

__all__ = [
    "Algorithm",
    "Domain",
    "Generation",
    "Operators",
    "algorithm",
    "breed",
    "crossed",
    "crowded",
    "crowding",
    "domain",
    "evolution",
    "fittest",
    "mutated",
    "tournament",
]

DIRECTIONS = 20  # of U-NSGA-III, as in the authors' code
TRIES = 20  # broods after which children that are all there already are given up
CLOSE = 1e-14  # parents nearer than this are not crossed


class Operators(NamedTuple):
    """How children are made; the defaults are those of the authors of LINAS for one and two
    objectives.

    Attributes:
      crossover: probability that a pair is crossed; else its children are copies of it.
      crossover_eta: >= 0; the larger, the nearer children lie to their parents.
      mutation: probability that a child is mutated.
      mutation_each: probability of each of its entries; None: min(1/2, 1/n).
      mutation_eta: >= 0; the larger, the smaller the changes.
    """

    crossover: float = 0.9
    crossover_eta: float = 15.0
    mutation: float = 0.02
    mutation_each: float | None = None
    mutation_eta: float = 20.0


class Domain(NamedTuple):
    """Where vectors live.

    Attributes:
      lower: f64 [n], bounds of each entry.
      upper: f64 [n].
      repair: makes of bred vectors [b, n] such as are allowed; equal rows name equal points.
    """

    lower: np.ndarray
    upper: np.ndarray
    repair: Callable[[np.ndarray], np.ndarray]


def domain(space: Space) -> Domain:
    """The domain of a search space: whole numbers, in canonical form."""

    def repair(vectors: np.ndarray) -> np.ndarray:
        whole = np.rint(vectors).astype(np.int64)
        return space.canonical(np.clip(whole, 0, space.options - 1))

    return Domain(np.full(space.size, -0.5), space.options - 0.5, repair)


class Algorithm(NamedTuple):
    """An evolution for a number of objectives.

    Attributes:
      name: "GA", "NSGA-II" or "U-NSGA-III".
      survive: (objectives [n, m], how many, generator) -> who survives.
      operators: how children are made.
    """

    name: str
    survive: Callable[[np.ndarray, int, np.random.Generator], Survivors]
    operators: Operators


def algorithm(objectives: int, population: int) -> Algorithm:
    """The algorithm for a number of objectives, with the settings of the authors of LINAS.

    Args:
      objectives: one, two or three.
      population: vectors that survive a generation, at least 2; with fewer than 20, U-NSGA-III has
        as many reference directions.
    Raises:
      ConfigError: another number of objectives.
    """
    if objectives == 1:
        return Algorithm("GA", fittest, Operators())
    if objectives == 2:
        return Algorithm("NSGA-II", crowded, Operators())
    if objectives == MOST:
        to = directions(min(DIRECTIONS, population), objectives)
        survive = functools.partial(niched, to=to)
        return Algorithm("U-NSGA-III", survive, Operators(crossover=1.0, crossover_eta=30.0))
    raise ConfigError(f"{objectives} objectives; one to {MOST} are accepted")


def fittest(
    points: Float[np.ndarray, "n 1"], size: int, rng: np.random.Generator | None = None
) -> Survivors:
    """Survival for one objective: the lowest, of equal ones the first.

    Returns:
      the min(n, size) survivors, the best first.
    """
    rows = np.argsort(points[:, 0], kind="stable")[:size]
    rank = np.unique(points[rows, 0], return_inverse=True)[1].reshape(-1)
    return Survivors(rows, Standing(rank, np.zeros(len(rows)), np.zeros(len(rows), int)))


def crowded(
    points: Float[np.ndarray, "n m"], size: int, rng: np.random.Generator | None = None
) -> Survivors:
    """Survival of NSGA-II: whole fronts, of the last one those with the most room around them.

    Returns:
      the min(n, size) survivors, front by front, within one by falling crowding distance.
    """
    rank = ranks(points)
    room = np.zeros(len(points))
    for value in range(int(rank.max(initial=-1)) + 1):
        room[rank == value] = crowding(points[rank == value])
    rows = np.lexsort((-room, rank))[:size]
    return Survivors(rows, Standing(rank[rows], -room[rows], np.zeros(len(rows), int)))


def crowding(points: Float[np.ndarray, "n m"]) -> Float[np.ndarray, "n"]:
    """Crowding distances of a front: the sum over objectives of the gap between the neighbours.

    Gaps are in units of the objective's range, infinite at its ends (Deb et al., 2002, section
    III B); an objective without a range adds nothing.

    >>> crowding(np.array([[0.0, 4.0], [1.0, 1.0], [4.0, 0.0]])).tolist()
    [inf, 2.0, inf]
    """
    room = np.zeros(len(points))
    for column in points.T:
        span = np.ptp(column) if len(column) else 0.0
        if span > 0:
            order = np.argsort(column, kind="stable")
            ordered = np.concatenate([[-np.inf], column[order], [np.inf]])
            room[order] += (ordered[2:] - ordered[:-2]) / span
    return room


def tournament(
    standing: Standing, count: int, rng: np.random.Generator
) -> Int[np.ndarray, "count"]:
    """Winners of `count` meetings of two, drawn so that all take part about equally often.

    Within a niche the lower rank wins, then the lower `second`; else a coin decides.

    Returns:
      their rows.
    """
    size = len(standing.rank)
    rounds = -(-2 * count // size)
    drawn = np.concatenate([rng.permutation(size) for _ in range(rounds)])[: 2 * count]
    first, other = drawn.reshape(count, 2).T
    rank = standing.rank[first] - standing.rank[other]
    with np.errstate(invalid="ignore"):  # both infinite: a coin decides
        second = standing.second[first] - standing.second[other]
    lead = np.where(rank != 0, rank, np.nan_to_num(second))
    lead = np.where(standing.niche[first] == standing.niche[other], lead, 0.0)
    coin = np.where(rng.random(count) < 0.5, -1.0, 1.0)
    return np.where(np.where(lead == 0, coin, lead) < 0, first, other)


def crossed(
    pairs: Shaped[np.ndarray, "2 k n"],
    within: Domain,
    eta: float,
    chosen: Float[np.ndarray, "k n"],
    spread: Float[np.ndarray, "k n"],
    swap: Float[np.ndarray, "k n"],
) -> Float[np.ndarray, "2 k n"]:
    """Simulated binary crossover within bounds (Deb and Agrawal, 1995).

    Entries y1 < y2 become (y1 + y2)/2 -+ b (y2 - y1)/2 with b^(eta + 1) = u a, or 1/(2 - u a) where
    u > 1/a, for a = 2 - (1 + 2 d/(y2 - y1))^-(eta + 1) and d the distance of y1 (of y2) to its
    bound.

    Args:
      pairs: parents.
      within: whose bounds are kept.
      eta: the larger, the nearer children lie to their parents.
      chosen: uniform numbers in [0, 1); entries below 1/2 are crossed.
      spread: uniform numbers u.
      swap: uniform numbers; below 1/2 the first child gets the higher entry.
    Returns:
      children, not yet repaired.
    """
    mother, father = pairs.astype(float)
    low, high = np.minimum(mother, father), np.maximum(mother, father)
    gap = high - low
    used = (chosen < 0.5) & (gap > CLOSE) & (within.lower < within.upper)
    gap = np.where(used, gap, 1.0)

    def stretched(room: np.ndarray) -> np.ndarray:
        a = 2 - (1 + 2 * room / gap) ** -(eta + 1)
        b = np.where(spread <= 1 / a, spread * a, 1 / (2 - spread * a))
        return b ** (1 / (eta + 1))

    lower = 0.5 * (low + high - stretched(low - within.lower) * gap)
    upper = 0.5 * (low + high + stretched(within.upper - high) * gap)
    first = np.where(swap < 0.5, upper, lower)
    second = np.where(swap < 0.5, lower, upper)
    children = np.where(used, [first, second], [mother, father])
    return np.clip(children, within.lower, within.upper)


def mutated(
    vectors: Shaped[np.ndarray, "k n"],
    within: Domain,
    eta: float,
    each: float,
    chosen: Float[np.ndarray, "k n"],
    size: Float[np.ndarray, "k n"],
) -> Float[np.ndarray, "k n"]:
    """Polynomial mutation within bounds (Deb and Goyal, 1996).

    With d the distance to the lower (for u > 1/2 the upper) bound in units of the range, an entry
    moves by the range times v^(1/(eta + 1)) - 1 for v = 2 u + (1 - 2 u)(1 - d)^(eta + 1), or by
    the opposite with 1 - u for u.

    Args:
      vectors: what is mutated.
      within: whose bounds are kept.
      eta: the larger, the smaller the changes.
      each: probability of an entry to be mutated.
      chosen: uniform numbers in [0, 1); entries below `each` are mutated.
      size: uniform numbers u.
    Returns:
      vectors, not yet repaired.
    """
    old = vectors.astype(float)
    span = within.upper - within.lower
    used = (chosen < each) & (span > 0)
    unit = np.where(span > 0, span, 1.0)
    down = size <= 0.5
    far = 1 - np.where(down, old - within.lower, within.upper - old) / unit
    u = np.where(down, size, 1 - size)
    step = 1 - (2 * u + (1 - 2 * u) * far ** (eta + 1)) ** (1 / (eta + 1))
    moved = old + np.where(down, -step, step) * span
    return np.clip(np.where(used, moved, old), within.lower, within.upper)


def breed(
    parents: Shaped[np.ndarray, "p n"],
    standing: Standing,
    count: int,
    within: Domain,
    operators: Operators,
    rng: np.random.Generator,
    taken: frozenset[bytes] = frozenset(),
) -> Shaped[np.ndarray, "c n"]:
    """Children that are neither parents nor twins.

    Args:
      parents: the population.
      standing: how good each is.
      count: how many children are wanted.
      within: the domain.
      operators: how they are made.
      rng: drawn from, in an order that is part of what is promised for a seed.
      taken: `tobytes()` of further vectors that may not come again.
    Returns:
      the children, in order; fewer than `count` where 20 broods gave no more.
    """
    seen = {row.tobytes() for row in parents} | taken
    children: list[np.ndarray] = []
    for _ in range(TRIES):
        for child in within.repair(brood(parents, standing, count, within, operators, rng)):
            if len(children) < count and child.tobytes() not in seen:
                seen.add(child.tobytes())
                children.append(child)
        if len(children) == count:
            break
    return np.array(children, parents.dtype).reshape(-1, parents.shape[1])


def brood(
    parents: np.ndarray,
    standing: Standing,
    count: int,
    within: Domain,
    operators: Operators,
    rng: np.random.Generator,
) -> Float[np.ndarray, "k n"]:
    """At least `count` children of tournaments' winners, not yet repaired."""
    couples, n = -(-count // 2), parents.shape[1]
    pairs = parents[tournament(standing, 2 * couples, rng)].reshape(2, couples, n)
    children = crossed(pairs, within, operators.crossover_eta, *rng.random((3, couples, n)))
    is_crossed = rng.random(couples) < operators.crossover
    children = np.where(is_crossed[:, None], children, pairs).reshape(-1, n)
    each = min(0.5, 1 / n) if operators.mutation_each is None else operators.mutation_each
    drawn = rng.random((2, *children.shape))
    changed = mutated(children, within, operators.mutation_eta, each, *drawn)
    is_mutated = rng.random(len(children)) < operators.mutation
    return np.where(is_mutated[:, None], changed, children)


class Generation(NamedTuple):
    """One generation of an evolution.

    Attributes:
      vectors: [p, n], who survived, the best first.
      points: f64 [p, m], their objectives.
      standing: how good each is.
      tried: [k, n], vectors evaluated in this generation.
      tried_points: f64 [k, m], their objectives.
    """

    vectors: np.ndarray
    points: np.ndarray
    standing: Standing
    tried: np.ndarray
    tried_points: np.ndarray


def evolution(
    evaluate: Callable[[np.ndarray], np.ndarray],
    first: Shaped[np.ndarray, "p n"],
    within: Domain,
    of: Algorithm,
    rng: np.random.Generator,
) -> Iterator[Generation]:
    """Generations without end, each of as many vectors as the first.

    Args:
      evaluate: objectives [k, m] of vectors [k, n], finite.
      first: repaired, all different, at least 2.
      within: the domain.
      of: the algorithm for m objectives.
      rng: drawn from.
    Yields:
      the first population, then one generation after another.
    """
    vectors, points = first, evaluate(first)
    tried, tried_points = vectors, points
    while True:
        survivors = of.survive(points, len(first), rng)
        vectors, points = vectors[survivors.rows], points[survivors.rows]
        yield Generation(vectors, points, survivors.standing, tried, tried_points)
        tried = breed(vectors, survivors.standing, len(first), within, of.operators, rng)
        tried_points = evaluate(tried)
        vectors = np.concatenate([vectors, tried])
        points = np.concatenate([points, tried_points])
