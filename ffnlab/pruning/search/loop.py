"""Searching a space round by round: LINAS, plain evolution and random search with equal budgets.

After "A Hardware-Aware System for Accelerating Deep Neural Network Optimization" (2022) and its
code, DyNAS-T. LINAS (lightweight iterative neural architecture search) measures a population, fits
a predictor per objective to all that was measured, lets an evolution run on the predictors alone,
and measures the population that it ends in.

What differs: no network is measured twice, so that every round measures a whole population of new
ones (in theirs a later population may repeat networks, at the budget's cost); the last round is cut
so that the budget is met exactly; failed measurements count and are kept from the predictors; and
objectives stay in the user's order.
"""

import dataclasses
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from ffnlab.errors import ConfigError, NumericalError
from ffnlab.options import nearest
from ffnlab.parallel.log import Display
from ffnlab.pruning.search.linas import predicted_best
from ffnlab.pruning.search.nsga2 import Algorithm, algorithm, breed, domain
from ffnlab.pruning.search.pareto import knee
from ffnlab.pruning.search.settings import SearchOptions
from ffnlab.pruning.search.space import Config, Space
from ffnlab.storage import npz

__all__ = ["Log", "Measure", "measured", "new_networks", "search", "start"]

Measure = Callable[[Config], Mapping[str, float]]

# A network that does not fit, does not run or gives no number; all else is a fault of the program.
FAILURES = (ArithmeticError, MemoryError, NumericalError, RuntimeError)
DRAWS = 50  # of a population, after which new networks are counted out instead


class Log(NamedTuple):
    """State of a search, and its result: all that was measured. It can be saved after any round.

    Attributes:
      vectors: int64 [budget, n], canonical, in the order of measuring; -1 not yet.
      values: f64 [budget, m], objectives in the order of the options; NaN of failed ones and not
        yet.
      expected: f64 [budget, m], what the predictors said before; NaN where none did.
      count: int64 [], rows measured, failed ones included.
      population: int64 [population], rows that an evolution goes on from, -1 none.
      identity: uint8 [32], SHA-256 of the space and the options.
    """

    vectors: Int[np.ndarray, "b n"]
    values: Float[np.ndarray, "b m"]
    expected: Float[np.ndarray, "b m"]
    count: Int[np.ndarray, ""]
    population: Int[np.ndarray, "p"]
    identity: np.ndarray


def start(space: Space, options: SearchOptions) -> Log:
    """A search before its first round.

    Raises:
      ConfigError: the space has fewer networks than the budget.
    """
    if options.budget > space.networks:
        raise ConfigError(
            f"budget={options.budget} is more than the {space.networks} networks of the space"
        )
    content = json.dumps([dataclasses.asdict(space), dataclasses.asdict(options)])
    nothing = np.full((options.budget, len(options.objectives)), np.nan)
    return Log(
        vectors=np.full((options.budget, space.size), -1),
        values=nothing,
        expected=nothing.copy(),
        count=np.zeros((), np.int64),
        population=np.full(options.population, -1),
        identity=np.frombuffer(hashlib.sha256(content.encode()).digest(), np.uint8),
    )


def measured(log: Log) -> tuple[Int[np.ndarray, "k n"], Float[np.ndarray, "k m"]]:
    """(vectors, objectives) of what was measured and is finite, in the order of measuring."""
    rows = finite_rows(log)
    return log.vectors[rows], log.values[rows]


def search(
    space: Space,
    measure: Measure,
    options: SearchOptions,
    *,
    checkpoint: str | os.PathLike | None = None,
    progress: bool = True,
) -> Log:
    """Measures networks of a space, round by round, until the budget is spent.

    The same space, options and measurements give the same bits, however often the search was
    stopped in between: each round draws from a generator of the seed and the round alone.

    Args:
      space: of networks.
      measure: objectives of a configuration by name; it may return more than are asked for. A
        network that fails (ArithmeticError, MemoryError, NumericalError, RuntimeError) or gives a
        number that is not finite is dropped with a warning: it counts, is not measured again, and
        no predictor sees it.
      options: what is searched for.
      checkpoint: file that receives the log after every round; when it exists, the search goes on
        from there.
      progress: show a bar with the point nearest to the best values so far (quiet when the output
        is not a terminal).
    Returns:
      the log, all of the budget measured.
    Raises:
      ConfigError: the space has fewer networks than the budget; the checkpoint is of another
        search; `measure` lacks an objective.
      FormatError: the checkpoint is damaged, or of a search of another size.
      NumericalError: all networks of the first round failed.
    """
    log = start(space, options)
    of = algorithm(len(options.objectives), options.population)
    if checkpoint is not None and os.path.exists(checkpoint):
        log = resumed(log, checkpoint)
    with Display(options.budget, int(log.count), progress) as display:
        display.show(int(log.count), best_so_far(log, options))
        while log.count < options.budget:
            rng = np.random.default_rng([options.seed, int(log.count)])
            vectors, expected = proposed(space, options, of, log, rng)
            values = np.full_like(expected, np.nan)
            for i, vector in enumerate(vectors):
                values[i] = one_measurement(space.decode(vector), measure, options.objectives)
                display.show(int(log.count) + i + 1)
            log = extended(log, of, vectors, values, expected, rng)
            if checkpoint is not None:
                npz.save_stats(checkpoint, log)
            display.show(int(log.count), best_so_far(log, options))
    return log


def resumed(like: Log, checkpoint: str | os.PathLike) -> Log:
    """The log in a file, if it is of the same search."""
    log = npz.load_stats(checkpoint, like)
    if not np.array_equal(log.identity, like.identity):
        raise ConfigError(
            f"checkpoint={os.fspath(checkpoint)!r} is of another search: its space or options "
            "differ; name another file, or remove it to begin anew"
        )
    return log


def best_so_far(log: Log, options: SearchOptions) -> dict[str, float]:
    """The objectives of the point nearest to the best values, for the bar; {} of none."""
    values = measured(log)[1]
    if not len(values):
        return {}
    return dict(zip(options.objectives, values[knee(values)].tolist(), strict=True))


def one_measurement(config: Config, measure: Measure, objectives: tuple[str, ...]) -> np.ndarray:
    """The objectives of one network; NaN, and a warning, where it failed."""
    failed = np.full(len(objectives), np.nan)
    try:
        found = measure(config)
    except FAILURES as error:
        warnings.warn(
            f"dropped: measuring {config} failed with {type(error).__name__}: {error}", stacklevel=3
        )
        return failed
    for name in objectives:
        if name not in found:
            raise ConfigError(
                f"objectives: measure gives no {name!r}{nearest(name, found)}; it gives "
                f"{', '.join(map(repr, found))}"
            )
    values = np.array([float(found[name]) for name in objectives])
    if not np.isfinite(values).all():
        said = dict(zip(objectives, values.tolist(), strict=True))
        warnings.warn(f"dropped: measuring {config} gave {said}, not finite", stacklevel=3)
        return failed
    return values


def proposed(
    space: Space, options: SearchOptions, of: Algorithm, log: Log, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(the vectors of the next round, what the predictors say of them).

    All are canonical, different from each other and from what was measured.
    """
    count = min(options.population, options.budget - int(log.count))
    known = frozenset(row.tobytes() for row in log.vectors[: log.count])
    found = np.zeros((0, space.size), np.int64)
    expected = np.zeros((0, len(options.objectives)))
    if log.count and options.tactic == "linas":
        first = new_networks(space, options.population, frozenset(), rng)
        values = measured(log)
        found, expected = predicted_best(space, options, of, first, *values, count, known, rng)
    elif log.count and options.tactic == "evolution":
        rows = log.population[log.population >= 0]
        alive = of.survive(log.values[rows], len(rows), rng)
        parents = log.vectors[rows[alive.rows]]
        within = domain(space)
        found = breed(parents, alive.standing, count, within, of.operators, rng, known)
        expected = np.full((len(found), len(options.objectives)), np.nan)
    known |= {row.tobytes() for row in found}
    more = new_networks(space, count - len(found), known, rng)
    unknown = np.full((len(more), len(options.objectives)), np.nan)
    return np.concatenate([found, more]), np.concatenate([expected, unknown])


def extended(
    log: Log,
    of: Algorithm,
    vectors: np.ndarray,
    values: np.ndarray,
    expected: np.ndarray,
    rng: np.random.Generator,
) -> Log:
    """The log after a round."""
    old, new = int(log.count), int(log.count) + len(vectors)
    parts = [np.array(part) for part in (log.vectors, log.values, log.expected)]
    for part, rows in zip(parts, (vectors, values, expected), strict=True):
        part[old:new] = rows
    log = log._replace(vectors=parts[0], values=parts[1], expected=parts[2], count=np.asarray(new))
    candidates = np.concatenate([log.population, np.arange(old, new)])
    candidates = candidates[np.isin(candidates, finite_rows(log))]
    if not len(candidates):
        raise NumericalError(
            f"all {new} networks measured so far failed; see the warnings, and measure one by hand"
        )
    alive = of.survive(log.values[candidates], len(log.population), rng).rows
    population = np.full_like(log.population, -1)
    population[: len(alive)] = candidates[alive]
    return log._replace(population=population)


def finite_rows(log: Log) -> np.ndarray:
    """The rows that were measured and did not fail."""
    return np.flatnonzero(np.isfinite(log.values).all(axis=1))


def new_networks(
    space: Space, count: int, known: frozenset[bytes], rng: np.random.Generator
) -> Int[np.ndarray, "count n"]:
    """Draws canonical vectors, all different.

    Args:
      space: of networks, with at least `count` that are not known.
      count: how many.
      known: `tobytes()` of canonical vectors that are not wanted.
      rng: drawn from; where it keeps drawing what is known, the rest are the first of
        `Space.every`.
    """
    seen = set(known)
    found: list[np.ndarray] = []

    def take(row: np.ndarray) -> None:
        if len(found) < count and row.tobytes() not in seen:
            seen.add(row.tobytes())
            found.append(row)

    for _ in range(DRAWS):
        if len(found) == count:
            break
        for row in space.canonical(space.sample(rng, max(count, 1))):
            take(row)
    if len(found) < count:
        for row in space.every():
            take(row)
            if len(found) == count:
                break
    return np.array(found, np.int64).reshape(-1, space.size)
