"""Searches of the study of hardware-aware NAS that need no network: what is best is known or cheap.

ZDT1 (Zitzler, Deb and Thiele, 2000) has a front that can be written down. Beside it stands a space
of widths whose loss is a sum of what each adds and of what each pair adds, asked at no cost.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from ffnlab.pruning.search import SearchOptions, Space, Tactic, Variable, hypervolume, search
from ffnlab.pruning.search.loop import Measure
from ffnlab.pruning.search.nsga2 import Algorithm, Domain, Operators, crowded, evolution

__all__ = ["COUNTS", "SPACE", "TACTICS", "TRUE_VOLUME", "efficiency", "landscape", "zdt1_volumes"]

TACTICS: tuple[Tactic, ...] = ("linas", "evolution", "random")
COUNTS = (50, 100, 200)  # measurements after which fronts are looked at
ENTRIES, VALUES = 12, 4
SPACE = Space((Variable("width", tuple(range(VALUES)), ENTRIES),))
PAIRS = 0.35  # standard deviation of what a pair of widths adds
VARIABLES, POPULATION, GENERATIONS = 30, 50, 250  # of ZDT1
CORNER = (1.1, 1.1)  # that its hypervolumes are below
# Its front is f2 = 1 - sqrt(f1).
TRUE_VOLUME = 0.1 * 1.1 + 0.1 + 2 / 3


def zdt1(x: Float[np.ndarray, "b n"]) -> Float[np.ndarray, "b 2"]:
    """Both objectives, of entries in [0, 1]."""
    g = 1 + 9 * x[:, 1:].mean(axis=1)
    return np.stack([x[:, 0], g * (1 - np.sqrt(x[:, 0] / g))], axis=1)


def zdt1_volumes(seeds: Sequence[int]) -> Float[np.ndarray, "seeds"]:
    """Hypervolumes that NSGA-II reaches on ZDT1; every child is mutated with probability .9."""
    within = Domain(np.zeros(VARIABLES), np.ones(VARIABLES), lambda x: x)
    of = Algorithm("NSGA-II", crowded, Operators(mutation=0.9))
    found = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        going = evolution(zdt1, rng.random((POPULATION, VARIABLES)), within, of, rng)
        *_, last = (next(going) for _ in range(GENERATIONS))
        found.append(hypervolume(last.points, CORNER))
    return np.array(found)


def landscape(seed: int) -> Measure:
    """Loss: what each width adds, and each pair; cost: a sum. Both from 0 to 1 of 2,000 draws."""
    rng = np.random.default_rng([99, seed])
    single = np.cumsum(rng.random((ENTRIES, VALUES)), axis=1)
    pair = PAIRS * rng.normal(size=(ENTRIES, ENTRIES, VALUES, VALUES))
    cost = rng.random(ENTRIES) + 0.3
    first, second = np.triu_indices(ENTRIES, 1)

    def raw(x: np.ndarray) -> np.ndarray:
        gain = single[np.arange(ENTRIES), x].sum() + pair[first, second, x[first], x[second]].sum()
        return np.array([-gain, cost @ (x + 1)])

    drawn = np.array([raw(x) for x in SPACE.sample(rng, 2000)])
    low, span = drawn.min(axis=0), np.ptp(drawn, axis=0)

    def measure(config: dict) -> dict[str, float]:
        loss, macs = ((raw(np.array(config["width"])) - low) / span).tolist()
        return {"loss": loss, "macs": macs}

    return measure


def efficiency(seeds: Sequence[int]) -> dict[str, Float[np.ndarray, "seeds counts"]]:
    """Hypervolumes below (1, 1) after `COUNTS` measurements, by tactic; population 25."""
    found = {}
    for tactic in TACTICS:
        rows = []
        for seed in seeds:
            options = SearchOptions(
                ("loss", "macs"), COUNTS[-1], tactic, population=25, inner=2000, seed=seed
            )
            values = search(SPACE, landscape(seed), options, progress=False).values
            rows.append([hypervolume(values[:count], (1.0, 1.0)) for count in COUNTS])
        found[tactic] = np.array(rows)
    return found
