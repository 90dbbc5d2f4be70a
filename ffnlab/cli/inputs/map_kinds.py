"""`[data]` of maps that are learned: permutations, and maps between sequences of numbers."""

import dataclasses

from ffnlab.errors import ConfigError, at_least, check_seed

__all__ = ["PermutationConfig", "SequencesConfig"]


@dataclasses.dataclass(frozen=True)
class PermutationConfig:
    """Basis vectors and where a permutation sends each, all of them in a batch.

    It is scored on binary inputs divided by their norms: the share of them all of whose outputs are
    on the right side of the cut that parts an ensemble's means.

    Attributes:
      length: k, of inputs and outputs.
      permutation: seed of the draw of the permutation.
    """

    length: int = 5
    permutation: int = 0

    def __post_init__(self) -> None:
        at_least(1, length=self.length)
        check_seed(self.permutation)

    @property
    def batch(self) -> int:
        """Rows of a batch, k."""
        return self.length


@dataclasses.dataclass(frozen=True)
class SequencesConfig:
    """Sequences of numbers and what each is mapped to; one pair in ten is held out.

    Attributes:
      sequences: a map by name, "waves" or "first", of uniform draws; or a safetensors file with
        tensors "x" [rows, places, numbers] and "y" alike.
      rows: how many are drawn.
      low, high: ends of the draws.
      draw: their seed.
      batch: pairs of a batch.
    """

    sequences: str = "waves"
    rows: int = 6000
    low: float = -1.0
    high: float = 1.0
    draw: int = 0
    batch: int = 64

    def __post_init__(self) -> None:
        at_least(1, rows=self.rows, batch=self.batch)
        check_seed(self.draw)
        if not self.low < self.high:
            raise ConfigError(f"low={self.low} must lie below high={self.high}")
