"""Arrays in memory as shuffled batches by position."""

import dataclasses
import functools

import jax
import numpy as np
from jaxtyping import Int, PyTree

from ffnlab.data.text.packing import checked_position
from ffnlab.errors import FFNLabError

__all__ = ["ArrayBatches"]


@dataclasses.dataclass(frozen=True, eq=False)
class ArrayBatches:
    """Shuffled rows of a tree of arrays: `batches(position)` is a batch, always the same one.

    An epoch takes every row at most once, in an order drawn from (seed, epoch); the rows that do
    not fill a last batch wait for the next epoch's order.

    Attributes:
      arrays: a tree of NumPy arrays with an equal leading axis of n rows.
      batch: rows of a batch, 1 <= batch <= n.
      seed: of the orders.
    """

    arrays: PyTree
    batch: int
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(self.arrays)}
        if len(sizes) != 1 or () in sizes:
            raise FFNLabError(f"arrays need one leading axis of equal size; found {sorted(sizes)}")
        if not 1 <= self.batch <= self.rows:
            raise FFNLabError(f"batch={self.batch} must lie in 1..{self.rows}, the rows there are")

    @property
    def rows(self) -> int:
        """Rows of the arrays (n)."""
        return len(jax.tree.leaves(self.arrays)[0])

    @property
    def per_epoch(self) -> int:
        """Batches in one epoch."""
        return self.rows // self.batch

    def __call__(self, position: int) -> PyTree:
        """Batch number `position` (>= 0): the same tree with [batch, …] arrays."""
        epoch, index = divmod(checked_position(position), self.per_epoch)
        order = _order(self.seed, epoch, self.rows)
        chosen = order[index * self.batch : (index + 1) * self.batch]
        return jax.tree.map(lambda leaf: leaf[chosen], self.arrays)


@functools.lru_cache(maxsize=8)
def _order(seed: int, epoch: int, rows: int) -> Int[np.ndarray, "n"]:
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch])))
    return random.permutation(rows)
