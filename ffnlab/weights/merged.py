"""A factorized matrix with its product beside it: which of them is used, the number of rows says.

Few rows are bound by latency or by memory, where one product may be faster than two; many by
arithmetic, where the factors have less of it (pre-merging in arXiv 2406.16450).
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ffnlab.errors import at_least
from ffnlab.weights.base import Axes, Indices, Weight, rebuild, register, static
from ffnlab.weights.dense import Dense

__all__ = ["Merged"]


@register
@dataclasses.dataclass(frozen=True)
class Merged(Weight):
    """y = x @ product for calls of fewer than `rows` rows, else by the factors; nothing in it
    trains, as the two would part.

    Attributes:
      factors: weight of shape [in, out].
      product: what it stands for, another weight of that shape.
      rows: of a call, from which on the factors are used, at least 0 (static). A call's rows are
        the product of all its axes but the last, known when it is compiled.
    """

    factors: Weight
    product: Weight
    rows: int = static()

    def __post_init__(self) -> None:
        at_least(0, rows=self.rows)
        if tuple(self.factors.shape) != tuple(self.product.shape):
            raise ValueError(
                f"factors are {self.factors.shape}, their product {self.product.shape}"
            )

    @classmethod
    def of(cls, factors: Weight, rows: int) -> "Merged":
        """A factorized weight and its product."""
        return cls(factors, Dense(factors.dense()), rows)

    @property
    def shape(self) -> tuple[int, int]:
        return self.factors.shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.factors.dtype

    def dense(self) -> Float[Array, "*stack in out"]:
        return self.product.dense()

    def chosen(self, rows: int) -> Weight:
        """What multiplies so many rows."""
        return self.product if rows < self.rows else self.factors

    def matmul(self, x: Float[Array, "*b in"]) -> Float[Array, "*b out"]:
        return self.chosen(x.size // max(x.shape[-1], 1)).matmul(x)

    def matmul_grouped(
        self, x: Float[Array, "m in"], sizes: Int[Array, "e"]
    ) -> Float[Array, "m out"]:
        return self.chosen(len(x)).matmul_grouped(x, sizes)

    def transpose(self) -> "Merged":
        return Merged(self.factors.transpose(), self.product.transpose(), self.rows)

    def take(self, rows: Indices = None, columns: Indices = None) -> "Merged":
        factors, product = self.factors.take(rows, columns), self.product.take(rows, columns)
        return Merged(factors, product, self.rows)

    def prepare(self, backend: str) -> "Merged":
        return Merged(self.factors.prepare(backend), self.product.prepare(backend), self.rows)

    def trains(self, field: str) -> bool:
        return False

    def leaf_axes(self, axes: Axes) -> "Merged":
        return rebuild(
            self, factors=self.factors.leaf_axes(axes), product=self.product.leaf_axes(axes)
        )
