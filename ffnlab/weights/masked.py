"""Weights with some of their entries, or some of their inputs, switched off."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ffnlab.weights.base import Axes, AxisNames, Indices, Weight, rebuild, register, taken
from ffnlab.weights.dense import Dense
from pallas_kernels import sparse


@register
@dataclasses.dataclass(frozen=True)
class Masked(Weight):
    """A weight of which only some entries count: w * mask.

    Attributes:
      w: weight of shape [in, out].
      keep_mask: [in, out] bool, True where the entry is kept.
    """

    w: Weight
    keep_mask: Array

    def __post_init__(self) -> None:
        if tuple(self.keep_mask.shape[-2:]) != tuple(self.w.shape):
            raise ValueError(
                f"keep_mask has shape {self.keep_mask.shape}, the weight {self.w.shape}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.w.shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.w.dtype

    def dense(self) -> Float[Array, "*stack in out"]:
        dense = self.w.dense()
        return jnp.where(self.keep_mask, dense, jnp.zeros((), dense.dtype))

    def transpose(self) -> "Masked":
        return Masked(self.w.transpose(), jnp.swapaxes(self.keep_mask, -1, -2))

    def take(self, rows: Indices = None, columns: Indices = None) -> "Masked":
        return Masked(self.w.take(rows, columns), taken(self.keep_mask, rows, columns))

    def leaf_axes(self, axes: Axes) -> "Masked":
        return rebuild(self, w=self.w.leaf_axes(axes), keep_mask=AxisNames(axes))


@register
@dataclasses.dataclass(frozen=True)
class SparseInput(Weight):
    """A weight that ignores small inputs: y = (x where |x| > threshold else 0) @ w.

    CHESS applies it to the query and output projections of attention (arXiv 2409.01366).

    Attributes:
      w: weight of shape [in, out].
      threshold: [] float32, >= 0; a negative threshold keeps every input.
    """

    w: Weight
    threshold: Array

    @property
    def shape(self) -> tuple[int, int]:
        return self.w.shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.w.dtype

    def sparsify(self, x: Float[Array, "*b in"]) -> Float[Array, "*b in"]:
        """x with the entries of magnitude at most `threshold` set to 0."""
        keep = jnp.abs(x.astype(jnp.float32)) > self.threshold
        return jnp.where(keep, x, jnp.zeros((), x.dtype))

    def dense(self) -> Float[Array, "*stack in out"]:
        return self.w.dense()

    def matmul(self, x: Float[Array, "*b in"]) -> Float[Array, "*b out"]:
        x, w = self.sparsify(x), self.w
        # One row is a decoding step: the rows of dropped inputs need not be read.
        if x.size == x.shape[-1] and isinstance(w, Dense):
            return sparse.matvec(w.rounded(x), w.w)
        return w.matmul(x)

    def matmul_grouped(
        self, x: Float[Array, "m in"], sizes: Int[Array, "e"]
    ) -> Float[Array, "m out"]:
        of_row = jnp.repeat(self.threshold, sizes, total_repeat_length=len(x))
        keep = jnp.abs(x.astype(jnp.float32)) > of_row[:, None]
        return self.w.matmul_grouped(jnp.where(keep, x, jnp.zeros((), x.dtype)), sizes)

    def trains(self, field: str) -> bool:
        return field != "threshold"

    def take(self, rows: Indices = None, columns: Indices = None) -> "SparseInput":
        return SparseInput(self.w.take(rows, columns), self.threshold)

    def prepare(self, backend: str) -> "SparseInput":
        return SparseInput(self.w.prepare(backend), self.threshold)

    def leaf_axes(self, axes: Axes) -> "SparseInput":
        names = self.w.leaf_axes(axes)
        return rebuild(self, w=names, threshold=AxisNames(axes[:-2]))
