"""Batches of one source, then of another."""

import dataclasses
from collections.abc import Callable

from jaxtyping import PyTree

__all__ = ["Extended"]


@dataclasses.dataclass(frozen=True)
class Extended:
    """Batches by position: of one source for some steps, then of another from its start.

    Attributes:
      first, then: the sources.
      steps: positions of the first.
    """

    first: Callable[[int], PyTree]
    then: Callable[[int], PyTree]
    steps: int

    def __call__(self, position: int) -> PyTree:
        """The batch of a position."""
        source, start = (self.first, 0) if position < self.steps else (self.then, self.steps)
        return source(position - start)

    def part(self, index: int, count: int) -> "Extended":
        """See `ffnlab.parallel.Parted`; both sources are such."""
        first, then = self.first.part(index, count), self.then.part(index, count)
        return Extended(first, then, self.steps)
