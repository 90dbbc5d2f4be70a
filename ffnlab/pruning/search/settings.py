"""What a search is for and how long it goes on."""

import dataclasses
from typing import Literal

from ffnlab.errors import ConfigError, at_least, check_seed
from ffnlab.pruning.search.pareto import MOST
from ffnlab.pruning.search.predictor import COARSE, Grid, check_grid

__all__ = ["SearchOptions", "Tactic"]

Tactic = Literal["linas", "evolution", "random"]


@dataclasses.dataclass(frozen=True)
class SearchOptions:
    """What is searched for, and how long. Defaults are those of the authors.

    Attributes:
      objectives: one to three names of what `measure` returns, all to be made small.
      budget: networks measured in all, at least one population.
      tactic: "linas", "evolution" (without predictors) or "random".
      population: networks measured per round, at least 2.
      inner: evaluations of predictors per round, at least one population. (The authors have 5,000
        for ResNet-50 to 20,000 for spaces of forty variables.)
      seed: 0 .. 2^32 - 1. The first round of all tactics is the same for the same seed.
      grid: what the predictors are tuned over.
    Raises:
      ConfigError: a value outside of what is said here.
    """

    objectives: tuple[str, ...]
    budget: int
    tactic: Tactic = "linas"
    population: int = 50
    inner: int = 5000
    seed: int = 0
    grid: Grid = COARSE

    def __post_init__(self) -> None:
        if not 1 <= len(self.objectives) <= MOST:
            raise ConfigError(
                f"objectives={self.objectives} are {len(self.objectives)}; 1 to {MOST} are accepted"
            )
        if len(set(self.objectives)) != len(self.objectives):
            raise ConfigError(f"objectives={self.objectives} has a name twice")
        if self.tactic not in ("linas", "evolution", "random"):
            raise ConfigError(
                f"tactic={self.tactic!r} is not one of 'linas', 'evolution', 'random'"
            )
        at_least(2, population=self.population)
        for name in ("budget", "inner"):
            if getattr(self, name) < self.population:
                raise ConfigError(
                    f"{name}={getattr(self, name)} is smaller than population={self.population}; "
                    "give at least one population"
                )
        check_seed(self.seed)
        check_grid(self.grid)
