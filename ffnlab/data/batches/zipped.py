"""Batches of several sources as one, each with its own number of rows."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import PyTree

from ffnlab.data.text.packing import rows_of_part
from ffnlab.errors import FFNLabError
from ffnlab.layers.logical import batch_axes

__all__ = ["Parted", "Zipped"]

Source = Callable[[int], PyTree]


@runtime_checkable
class Parted(Protocol):
    """Batches of which a process can read its rows only."""

    def part(self, index: int, count: int) -> Source:
        """The same batches, of each only the rows of part `index` of `count` equal ones."""
        ...


class Zipped:
    """A batch of each source: `batches(position)` is a tuple of them.

    Their rows may differ in number, and each source counts its epochs by itself. A batch that knows
    its own axes (`ffnlab.layers.logical.batch_axes`: a graph, whose edges are no rows) keeps whole
    what has no rows.

    Attributes:
      sources: position -> batch, each.

    >>> both = Zipped(lambda position: np.arange(4), lambda position: np.full(2, position))
    >>> both(7)
    (array([0, 1, 2, 3]), array([7, 7]))
    >>> both.part(1, 2)(7)
    (array([2, 3]), array([7]))
    """

    def __init__(self, *sources: Any):  # of any type, to name what is no source
        """Zips sources, at least one.

        Raises:
          FFNLabError: there is none, or one is no function of a position.
        """
        if not sources:
            raise FFNLabError("Zipped() takes at least one source of batches")
        for i, source in enumerate(sources):
            if not callable(source):
                kind = type(source).__name__
                raise FFNLabError(
                    f"source {i} of Zipped is a {kind}, no function of a position: "
                    "ArrayBatches(arrays, batch) makes one of arrays"
                )
        self.sources: tuple[Source, ...] = sources

    def __call__(self, position: int) -> tuple[PyTree, ...]:
        """Batch number `position` of each source."""
        return tuple(source(position) for source in self.sources)

    def part(self, index: int, count: int) -> "Zipped":
        """See `Parted`; of a source that cannot read rows alone, whole batches are cut.

        Raises:
          FFNLabError: `count` does not divide a batch; of a source that is cut, when it is read.
        """
        return Zipped(*(part_of(source, index, count) for source in self.sources))


def part_of(source: Source, index: int, count: int) -> Source:
    """Rows of a source's batches."""
    if isinstance(source, Parted):
        return source.part(index, count)

    def of_leaf(leaf: np.ndarray, names: tuple) -> np.ndarray:
        if "batch" not in names:
            return leaf
        axis = names.index("batch")
        first, size = rows_of_part(np.shape(leaf)[axis], index, count)
        return np.asarray(leaf)[(slice(None),) * axis + (slice(first, first + size),)]

    def rows(position: int) -> PyTree:
        batch = source(position)
        return jax.tree.map(of_leaf, batch, batch_axes(batch))

    return rows
