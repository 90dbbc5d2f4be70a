"""Records on disk as shuffled batches by position: a Grain pipeline over any indexed source.

A source has a length and gives record i when asked, as TFDS data sources, folders of images and
lists do. Which record stands where is a function of the seed and the position alone, so a batch
is the same whoever reads it, with however many threads, from whatever position the run resumed.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import PyTree

from ffnlab.data.text.packing import checked_position, rows_of_part
from ffnlab.errors import FFNLabError, require

__all__ = ["RecordBatches", "Source"]

AHEAD = 2  # batches read before they are asked for, at least; one per thread


@runtime_checkable
class Source(Protocol):
    """Records by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> PyTree:
        """Record `index`: a tree of arrays and numbers."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class RecordBatches:
    """Shuffled records: `batches(position)` is a batch, always the same one.

    Every epoch takes all records once, in an order of its own; a batch may hold the last of one
    epoch and the first of the next.

    Attributes:
      source: records by index.
      batch: rows of a batch, at least 1.
      seed: of the orders.
      transform: record -> record, all of one structure, shapes and dtypes; None for as they are.
      threads: that read ahead; 0 reads when asked.
      name: what the source is called in errors.
    """

    source: Source
    batch: int
    seed: int = 0
    transform: Callable[[PyTree], PyTree] | None = None
    threads: int = 4
    name: str = "the records"

    def __post_init__(self) -> None:
        require("grain", extra="data")
        if self.batch < 1 or self.threads < 0:
            raise FFNLabError(
                f"batch={self.batch} must be at least 1 and threads={self.threads} at least 0"
            )
        if len(self.source) == 0:
            raise FFNLabError(f"{self.name} has no records")

    def __call__(self, position: int) -> PyTree:
        """Batch number `position` (>= 0): a record's tree with [batch, …] arrays.

        Raises:
          FFNLabError: a record cannot be read, or is not like the others; it is named.
        """
        return self._reader(0, 1)(position)

    def part(self, index: int, count: int) -> Callable[[int], PyTree]:
        """The same batches, of each only the rows of part `index` of `count` equal ones.

        Raises:
          FFNLabError: `count` does not divide the batch.
        """
        rows_of_part(self.batch, index, count)
        return self._reader(index, count)

    @functools.cached_property
    def _reader(self) -> Callable[[int, int], "Reader"]:
        return functools.cache(self._open)

    def _open(self, index: int, count: int) -> "Reader":
        grain = require("grain", extra="data")
        checked = Checked(self.source, self.transform, self.name)
        ordered = grain.MapDataset.source(checked).seed(self.seed).shuffle().repeat()
        _, rows = rows_of_part(self.batch, index, count)
        # Batch p of `rows` records is part p % count of batch p // count.
        return Reader(ordered.batch(rows)[index::count], self.threads)


class Reader:
    """Elements of an endless Grain dataset by position; those that follow are read ahead."""

    def __init__(self, dataset: Any, threads: int):
        """Wraps a `grain.MapDataset`; with no threads it is asked directly."""
        self.dataset, self.next, self.elements = dataset, 0, None
        if threads:
            # Grain warns of a buffer that does not hold a batch for every thread.
            options = require("grain", extra="data").ReadOptions(threads, max(AHEAD, threads))
            self.elements = iter(dataset.to_iter_dataset(options))

    def __call__(self, position: int) -> PyTree:
        """Element `position`."""
        position = checked_position(position)
        if self.elements is None:
            return self.dataset[position]
        if position != self.next:
            self.elements.set_state({"next_index": position})
        self.next = position + 1
        return next(self.elements)


class Checked:
    """A source whose records are transformed and compared with the first one.

    Attributes:
      source, transform, name: see `RecordBatches`.
    """

    def __init__(self, source: Source, transform: Callable | None, name: str):
        self.source, self.transform, self.name = source, transform, name

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> PyTree:
        record, found = self._read(index)
        if found != self._like:
            raise FFNLabError(
                f"record {index} of {self.name} is {found}, unlike record 0, which is {self._like}"
            )
        return record

    @functools.cached_property
    def _like(self) -> str:
        return self._read(0)[1]

    def _read(self, index: int) -> tuple[PyTree, str]:
        """A record and what it is; one that holds nothing would make Grain look for the next."""
        try:
            record = self.source[index]
            record = record if self.transform is None else self.transform(record)
            found = described(record)
        except Exception as error:
            raise FFNLabError(f"record {index} of {self.name} cannot be read: {error}") from error
        if not found or " object[" in f" {found}":
            raise FFNLabError(
                f"record {index} of {self.name} is {record!r:.80}; a tree of arrays and numbers is "
                "accepted"
            )
        return record, found


def described(record: PyTree) -> str:
    """A record's structure, shapes and dtypes, to compare and to show.

    >>> described({"x": np.zeros((2, 3), np.uint8)})
    "['x'] uint8[2, 3]"
    """
    parts = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(record):
        array = np.asarray(leaf)
        parts.append(f"{jax.tree_util.keystr(path)} {array.dtype}{list(array.shape)}".strip())
    return ", ".join(parts)
