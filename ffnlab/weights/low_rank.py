"""Products of thin matrices: alone (LowRank) or added to a frozen base (LoRA)."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ffnlab.weights.base import (
    Axes,
    AxisNames,
    Indices,
    Weight,
    check_matrix,
    rebuild,
    register,
    static,
    taken,
)
from pallas_kernels import grouped


def check_factors(a: Array, b: Array) -> None:
    """Raises ValueError unless a [in, r] and b [r, out] can be multiplied."""
    check_matrix("a", a)
    check_matrix("b", b)
    if a.shape[-1] != b.shape[-2]:
        raise ValueError(f"a has rank {a.shape[-1]}, b has rank {b.shape[-2]}; they must be equal")


def check_rank(rank: int, rows: int, columns: int) -> None:
    """Raises ValueError unless a [rows, columns] matrix has factors of this rank."""
    if not 1 <= rank <= min(rows, columns):
        raise ValueError(
            f"rank={rank} is outside 1..{min(rows, columns)} of a {(rows, columns)} matrix"
        )


def halves(
    w: Float[Array, "*stack n m"], rank: int
) -> tuple[Float[Array, "*stack n r"], Float[Array, "*stack r m"]]:
    """The truncated SVD of each matrix, float32, either factor with the roots of the values."""
    u, s, vh = jnp.linalg.svd(w.astype(jnp.float32), full_matrices=False)
    root = jnp.sqrt(s[..., :rank])
    return u[..., :rank] * root[..., None, :], root[..., None] * vh[..., :rank, :]


def thin_grouped(
    x: Float[Array, "m in"], a: Array, b: Array, sizes: Int[Array, "e"]
) -> Float[Array, "m out"]:
    """x[i] @ a[group of i] @ b[group of i]."""
    thin = grouped.matmul(x, a.astype(x.dtype), sizes)
    return grouped.matmul(thin, b.astype(x.dtype), sizes)


@register
@dataclasses.dataclass(frozen=True)
class LowRank(Weight):
    """A matrix of rank at most r: w = a @ b.

    Attributes:
      a: [in, r].
      b: [r, out].
    """

    a: Array
    b: Array

    def __post_init__(self) -> None:
        check_factors(self.a, self.b)

    @classmethod
    def truncate(cls, w: Float[Array, "in out"], rank: int) -> "LowRank":
        """The best rank-`rank` approximation of w in Frobenius norm (truncated SVD).

        Raises:
          ValueError: rank outside 1..min(in, out).
        """
        check_rank(rank, *w.shape)
        a, b = halves(w, rank)
        return cls(a.astype(w.dtype), b.astype(w.dtype))

    @property
    def shape(self) -> tuple[int, int]:
        return self.a.shape[-2], self.b.shape[-1]

    @property
    def dtype(self) -> jnp.dtype:
        return self.a.dtype

    def dense(self) -> Float[Array, "*stack in out"]:
        return jnp.matmul(self.a, self.b)

    def matmul(self, x: Float[Array, "*b in"]) -> Float[Array, "*b out"]:
        return jnp.matmul(jnp.matmul(x, self.a.astype(x.dtype)), self.b.astype(x.dtype))

    def matmul_grouped(
        self, x: Float[Array, "m in"], sizes: Int[Array, "e"]
    ) -> Float[Array, "m out"]:
        return thin_grouped(x, self.a, self.b, sizes)

    def transpose(self) -> "LowRank":
        return LowRank(jnp.swapaxes(self.b, -1, -2), jnp.swapaxes(self.a, -1, -2))

    def take(self, rows: Indices = None, columns: Indices = None) -> "LowRank":
        return LowRank(taken(self.a, rows), taken(self.b, columns=columns))

    def leaf_axes(self, axes: Axes) -> "LowRank":
        stack = axes[:-2]
        a, b = AxisNames((*stack, axes[-2], None)), AxisNames((*stack, None, axes[-1]))
        return rebuild(self, a=a, b=b)


@register
@dataclasses.dataclass(frozen=True)
class LoRA(Weight):
    """A frozen base and a trainable low-rank update: w = base + (alpha / r) a @ b (arXiv
    2106.09685).

    Attributes:
      base: weight of shape [in, out]; no gradient flows into it.
      a: [in, r].
      b: [r, out], zero at the start so that the update begins at nothing.
      alpha: scale of the update (static).
    """

    base: Weight
    a: Array
    b: Array
    alpha: float = static(16.0)

    def __post_init__(self) -> None:
        check_factors(self.a, self.b)
        if (self.a.shape[-2], self.b.shape[-1]) != tuple(self.base.shape):
            raise ValueError(
                f"a @ b has shape {(self.a.shape[-2], self.b.shape[-1])}, base {self.base.shape}"
            )

    @classmethod
    def init(cls, base: Weight, rank: int, key: Array, *, alpha: float = 16.0) -> "LoRA":
        """A LoRA that equals `base` until trained: a is N(0, 1/in), b is zero."""
        rows, columns = base.shape
        check_rank(rank, rows, columns)
        a = jax.random.normal(key, (rows, rank), jnp.float32) * rows**-0.5
        return cls(base, a, jnp.zeros((rank, columns), jnp.float32), alpha)

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.base.dtype

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.a.shape[-1]

    def dense(self) -> Float[Array, "*stack in out"]:
        update = self.scale * jnp.matmul(self.a, self.b)
        return jax.lax.stop_gradient(self.base.dense()) + update.astype(self.dtype)

    def matmul(self, x: Float[Array, "*b in"]) -> Float[Array, "*b out"]:
        base = jax.tree.map(jax.lax.stop_gradient, self.base)
        update = jnp.matmul(jnp.matmul(x, self.a.astype(x.dtype)), self.b.astype(x.dtype))
        return base.matmul(x) + self.scale * update

    def matmul_grouped(
        self, x: Float[Array, "m in"], sizes: Int[Array, "e"]
    ) -> Float[Array, "m out"]:
        base = jax.tree.map(jax.lax.stop_gradient, self.base)
        update = thin_grouped(x, self.a, self.b, sizes)
        return base.matmul_grouped(x, sizes) + self.scale * update

    def trains(self, field: str) -> bool:
        return field != "base"

    def take(self, rows: Indices = None, columns: Indices = None) -> "LoRA":
        a, b = taken(self.a, rows), taken(self.b, columns=columns)
        return LoRA(self.base.take(rows, columns), a, b, self.alpha)

    def prepare(self, backend: str) -> "LoRA":
        return dataclasses.replace(self, base=self.base.prepare(backend))

    def leaf_axes(self, axes: Axes) -> "LoRA":
        return rebuild(
            self,
            base=self.base.leaf_axes(axes),
            a=AxisNames((*axes[:-1], None)),
            b=AxisNames((*axes[:-2], None, axes[-1])),
        )
