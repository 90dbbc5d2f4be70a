"""Documents packed into rows: every token a text of its own, no padding.

The documents of an epoch, in an order drawn for it, follow each other in one stream, which is cut
into rows. A row says of each token to which document it belongs and where in it it stands, so that
a model neither attends nor predicts across a border.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Integer

from ffnlab.errors import FFNLabError

__all__ = ["Packed", "PackedBatches"]


class Packed(NamedTuple):
    """Rows of several documents each.

    Attributes:
      tokens: [b, t] int32.
      segments: [b, t] int32, 1 for a row's first document, 2 for the next, ….
      positions: [b, t] int32, 0 at the start of every document, and of every row.
    """

    tokens: Int[np.ndarray, "b t"]
    segments: Int[np.ndarray, "b t"]
    positions: Int[np.ndarray, "b t"]


@dataclasses.dataclass(frozen=True, eq=False)
class PackedBatches:
    """Shuffled documents as packed rows: `batches(position)` is a batch, always the same one.

    Attributes:
      documents: token ids of each, [n] integer arrays, none empty.
      batch: rows of a batch (b).
      length: predictions in a row; a row has length + 1 tokens, and neighbours share one.
      seed: of the orders.
      source: what the documents are called in errors.
    """

    documents: Sequence[Integer[np.ndarray, "_"]]
    batch: int
    length: int
    seed: int = 0
    source: str = "the documents"

    def __post_init__(self) -> None:
        for name in ("batch", "length"):
            if getattr(self, name) < 1:
                raise FFNLabError(f"{name}={getattr(self, name)} must be at least 1")
        empty = [i for i, document in enumerate(self.documents) if len(document) == 0]
        if empty:
            raise FFNLabError(f"{self.source}: document {empty[0]} has no tokens")
        if self.per_epoch < 1:
            raise FFNLabError(
                f"{self.source} have {len(self._stream)} tokens; batch={self.batch} rows of "
                f"length={self.length} need at least {self.batch * self.length + 1}"
            )

    @property
    def per_epoch(self) -> int:
        """Batches in one epoch."""
        return max(len(self._stream) - 1, 0) // self.length // self.batch

    def __call__(self, position: int) -> Packed:
        """Batch number `position` (>= 0), rows of length + 1 tokens."""
        return self._rows(position, 0, self.batch)

    def part(self, index: int, count: int) -> Callable[[int], Packed]:
        """The same batches, of each only the rows of part `index` of `count` equal ones.

        Raises:
          FFNLabError: `count` does not divide the batch.
        """
        first, size = rows_of_part(self.batch, index, count)
        return lambda position: self._rows(position, first, size)

    def _rows(self, position: int, first: int, size: int) -> Packed:
        epoch, index = divmod(checked_position(position), self.per_epoch)
        order, ends = self._epoch(epoch)
        rows = index * self.batch + first + np.arange(size)
        places = rows[:, None] * self.length + np.arange(self.length + 1)
        which = np.searchsorted(ends, places, side="right")  # in the epoch's order
        document = order[which]
        begins = ends[which] - self._sizes[document]
        tokens = self._stream[self._starts[document] + places - begins]
        positions = places - np.maximum(begins, places[:, :1])
        arrays = tokens, which - which[:, :1] + 1, positions
        return Packed(*(array.astype(np.int32) for array in arrays))

    @functools.cached_property
    def _stream(self) -> np.ndarray:
        return np.concatenate(self.documents) if len(self.documents) else np.zeros(0, np.int32)

    @functools.cached_property
    def _sizes(self) -> np.ndarray:
        return np.array([len(document) for document in self.documents])

    @functools.cached_property
    def _starts(self) -> np.ndarray:
        return np.cumsum(self._sizes) - self._sizes

    @functools.cached_property
    def _epoch(self) -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
        @functools.lru_cache(maxsize=2)
        def order_and_ends(epoch: int) -> tuple[np.ndarray, np.ndarray]:
            seed = np.random.SeedSequence([self.seed, epoch])
            order = np.random.Generator(np.random.Philox(seed)).permutation(len(self.documents))
            return order, np.cumsum(self._sizes[order])

        return order_and_ends


def checked_position(position: object) -> int:
    """The number of a batch.

    Raises:
      FFNLabError: it is no integer, or negative.
    """
    try:
        found = operator.index(position)  # type: ignore[arg-type]  # that is what is tried
    except TypeError:
        found = -1
    if found < 0:
        raise FFNLabError(f"position={position!r} must be an integer of at least 0")
    return found


def rows_of_part(batch: int, index: int, count: int) -> tuple[int, int]:
    """First row and number of rows of part `index` of `count` equal parts of a batch.

    Raises:
      FFNLabError: `count` does not divide the batch.
    """
    if batch % count:
        raise FFNLabError(f"batch={batch} does not divide into {count} equal parts")
    return index * (batch // count), batch // count
