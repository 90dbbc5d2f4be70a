"""Dense arrays as weights, and the same matrix stored the other way round."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ffnlab.weights.activations import fake_e4m3
from ffnlab.weights.base import (
    Axes,
    AxisNames,
    Indices,
    Weight,
    check_act,
    check_matrix,
    nbytes,
    rebuild,
    register,
    static,
    taken,
)
from pallas_kernels import sparse

# Bytes of a matrix that stays in no cache, so that one row times it is bound by memory.
LARGE = 4 << 20


def product(x: Float[Array, "*b in"], w: Float[Array, "*stack in out"]) -> Float[Array, "*b out"]:
    """x @ w.

    On a CPU the rows are flattened first: the gradient for w is then one plain matrix product, and
    a training step of the 1.6 M parameter model takes 15 % less time. Not on a mesh: rows of which
    the second axis is cut (the sequence) cannot be flattened in place, and every device would
    multiply them all. One row times a large matrix,
    a step of decoding, is written as partial sums: XLA takes 1.3 to 1.6 times as long for [1, in] @
    [in, out].
    """
    if is_memory_bound(x, w):
        return sparse.matvec(x, w, backend="dense")
    if w.ndim != 2 or x.ndim < 3 or jax.default_backend() != "cpu" or on_mesh():
        return jnp.matmul(x, w)
    rows = math.prod(x.shape[:-1])
    return jnp.matmul(x.reshape(rows, x.shape[-1]), w).reshape(*x.shape[:-1], w.shape[-1])


def product_by_rows(
    x: Float[Array, "*b in"], w: Float[Array, "*stack out in"]
) -> Float[Array, "*b out"]:
    """x @ w.T for a matrix stored [out, in].

    One row times a large matrix on a CPU is written w @ x: XLA takes up to twenty times as long for
    [1, in] @ w.T, because it transposes w at every call.
    """
    if is_memory_bound(x, w):
        return jnp.matmul(w, x.reshape(-1)).reshape(*x.shape[:-1], w.shape[0])
    return product(x, jnp.swapaxes(w, -1, -2))


def is_memory_bound(x: Float[Array, "*b in"], w: Float[Array, "*stack m n"]) -> bool:
    """Whether x is one row, and w a matrix on a CPU that is too large for a cache."""
    one_row = x.ndim > 0 and x.size == x.shape[-1] and w.ndim == 2
    return one_row and nbytes(w) >= LARGE and jax.default_backend() == "cpu"


def on_mesh() -> bool:
    """Whether a mesh of several devices is set."""
    return math.prod(jax.sharding.get_abstract_mesh().shape.values()) > 1


@register
@dataclasses.dataclass(frozen=True)
class Dense(Weight):
    """A dense matrix.

    Attributes:
      w: [in, out], any float dtype; cast to the activations' dtype when used.
      act: None, or "e4m3": `matmul` first rounds x to e4m3 with one scale per row (static).
    """

    w: Array
    act: str | None = static(None)

    def __post_init__(self) -> None:
        check_matrix("w", self.w)
        check_act(self.act)

    @property
    def shape(self) -> tuple[int, int]:
        return self.w.shape[-2:]

    @property
    def dtype(self) -> jnp.dtype:
        return self.w.dtype

    def dense(self) -> Float[Array, "*stack in out"]:
        return self.w

    def matmul(self, x: Float[Array, "*b in"]) -> Float[Array, "*b out"]:
        return product(self.rounded(x), self.w.astype(x.dtype))

    def matmul_grouped(
        self, x: Float[Array, "m in"], sizes: Int[Array, "e"]
    ) -> Float[Array, "m out"]:
        return super().matmul_grouped(self.rounded(x), sizes)

    def rounded(self, x: Float[Array, "*b in"]) -> Float[Array, "*b in"]:
        """x as this weight multiplies it: rounded to e4m3 where `act` says so."""
        return fake_e4m3(x) if self.act == "e4m3" else x

    def transpose(self) -> "Dense":
        return Dense(jnp.swapaxes(self.w, -1, -2), self.act)

    def take(self, rows: Indices = None, columns: Indices = None) -> "Dense":
        return Dense(taken(self.w, rows, columns), self.act)

    def prepare(self, backend: str) -> "Dense":
        # A bf16 product on a CPU is widened inside every call; widening once is several times
        # faster.
        if backend != "cpu" or self.w.dtype == jnp.float32:
            return self
        return Dense(self.w.astype(jnp.float32), self.act)

    def leaf_axes(self, axes: Axes) -> "Dense":
        return rebuild(self, w=AxisNames(axes))


@register
@dataclasses.dataclass(frozen=True)
class Transposed(Weight):
    """A weight whose storage is [out, in]: each output channel is contiguous.

    Sparse decode reads single rows of it (`ffnlab.layers.SparseGatedFFN`).

    Attributes:
      w: weight of logical shape [out, in].
    """

    w: Weight

    @property
    def shape(self) -> tuple[int, int]:
        out, rows = self.w.shape
        return rows, out

    @property
    def dtype(self) -> jnp.dtype:
        return self.w.dtype

    def dense(self) -> Float[Array, "*stack in out"]:
        return jnp.swapaxes(self.w.dense(), -1, -2)

    def matmul(self, x: Float[Array, "*b in"]) -> Float[Array, "*b out"]:
        x = fake_e4m3(x) if getattr(self.w, "act", None) == "e4m3" else x
        return product_by_rows(x, self.w.dense().astype(x.dtype))

    def matmul_grouped(
        self, x: Float[Array, "m in"], sizes: Int[Array, "e"]
    ) -> Float[Array, "m out"]:
        x = fake_e4m3(x) if getattr(self.w, "act", None) == "e4m3" else x
        return super().matmul_grouped(x, sizes)

    def transpose(self) -> Weight:
        return self.w

    def take(self, rows: Indices = None, columns: Indices = None) -> "Transposed":
        return Transposed(self.w.take(columns, rows))

    def prepare(self, backend: str) -> "Transposed":
        return Transposed(self.w.prepare(backend))

    def leaf_axes(self, axes: Axes) -> "Transposed":
        names = (*axes[:-2], axes[-1], axes[-2])
        return rebuild(self, w=self.w.leaf_axes(names))
