"""What the weights of codes and scales share."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ffnlab.weights.activations import fake_e4m3
from ffnlab.weights.base import Weight
from ffnlab.weights.dense import Dense


class Quantized(Weight):
    """A matrix of codes with scales, whose values are float32.

    Attributes:
      act: None, or "e4m3": `matmul` first rounds x to e4m3 with one scale per row (static).
    """

    act: str | None

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(jnp.float32)

    def matmul_grouped(
        self, x: Float[Array, "m in"], sizes: Int[Array, "e"]
    ) -> Float[Array, "m out"]:
        return super().matmul_grouped(fake_e4m3(x) if self.act == "e4m3" else x, sizes)

    def trains(self, field: str) -> bool:
        return False  # a step of an optimizer on codes or scales has no meaning

    def prepare(self, backend: str) -> Weight:
        # XLA on a CPU writes the dequantized matrix at every call; do it once.
        return Dense(self.dense(), self.act) if backend == "cpu" else self


def whole_groups(
    rows: Int[np.ndarray, "n"], size: int, count: int, what: str
) -> Int[np.ndarray, "g"]:
    """The groups that rows are the whole of.

    Args:
      rows: numbers in ascending order.
      size: rows of a group; the last may have fewer.
      count: rows of the matrix.
      what: a group is, for the message.
    Raises:
      ValueError: a group of which some rows are there and some are not.

    >>> whole_groups(np.array([2, 3, 6]), 2, 7, "a pair").tolist()
    [1, 3]
    """
    groups = np.unique(rows // size)
    inside = (groups[:, None] * size + np.arange(size)).reshape(-1)
    inside = inside[inside < count]
    if not np.array_equal(rows, inside):
        parts = sorted({int(row) // size for row in np.setxor1d(inside, rows)})
        raise ValueError(
            f"{len(rows)} of {count} rows: {what} of {size} rows goes as a whole, and of group "
            f"{parts[0] if parts else 0} only a part is there"
        )
    return groups
