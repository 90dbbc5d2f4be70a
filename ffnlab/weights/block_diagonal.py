"""Matrices made of blocks: block diagonal alone, and products in which such a matrix is a factor.

    BlockDiagonal  w = diag(blocks)                    each block of inputs has outputs of its own
    BlockDense     w = diag(blocks) b                  rank R, of B blocks
    BlockShuffle   w = diag(first) shuffle diag(second) shuffle'       (Monarch, arXiv 2204.00595)

The last two are of the structured FFNs of arXiv 2406.16450. Symbols: N inputs, M outputs, B
blocks, R rank.

A transpose keeps the arrays and says by a static field that they are read the other way. An array
is cut for a mesh within its blocks, of which there are few.
"""

import abc
import dataclasses
import math
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ffnlab.errors import at_least
from ffnlab.weights.base import Axes, AxisNames, Weight, check_matrix, rebuild, register, static
from ffnlab.weights.dense import product, product_by_rows
from ffnlab.weights.low_rank import check_rank, halves

__all__ = ["BlockDense", "BlockDiagonal", "BlockShuffle", "polar"]

W = TypeVar("W", bound="Turnable")


def by_blocks(
    x: Float[Array, "*b n"], blocks: Float[Array, "k p q"], *, turned: bool = False
) -> Float[Array, "*b m"]:
    """x @ diag(blocks), or x @ diag(blocks).T, in x's dtype."""
    k, p, q = blocks.shape
    parts = x.reshape(*x.shape[:-1], k, q if turned else p)
    product = "...kq,kpq->...kp" if turned else "...kp,kpq->...kq"
    return jnp.einsum(product, parts, blocks.astype(x.dtype)).reshape(*x.shape[:-1], -1)


def diagonal(blocks: Float[Array, "*stack k p q"]) -> Float[Array, "*stack n m"]:
    """diag(blocks): zeros beside the blocks."""
    *stack, k, p, q = blocks.shape
    spread = blocks[..., None, :] * jnp.eye(k, dtype=blocks.dtype)[:, None, :, None]
    return spread.reshape(*stack, k * p, k * q)


def polar(w: Float[Array, "*stack m n"]) -> Float[Array, "*stack m n"]:
    """The matrix with orthonormal rows or columns nearest to w: U Vh of its SVD."""
    u, _, vh = jnp.linalg.svd(w.astype(jnp.float32), full_matrices=False)
    return jnp.matmul(u, vh).astype(w.dtype)


def check_blocks(name: str, array: object) -> None:
    """Raises ValueError unless `array` has at least three dimensions."""
    check_matrix(name, array)
    if len(array.shape) < 3:  # type: ignore[attr-defined]
        raise ValueError(
            f"{name} must have shape [blocks, in, out], got {array.shape}"  # type: ignore[attr-defined]
        )


def check_divides(blocks: int, **sizes: int) -> None:
    """Raises ValueError unless a number of blocks divides each named size."""
    at_least(1, blocks=blocks)
    for name, size in sizes.items():
        if size % blocks:
            fit = [b for b in range(1, min(size, 64) + 1) if size % b == 0]
            raise ValueError(f"blocks={blocks} does not divide {name}={size}; one of {fit} does")


class Turnable(Weight):
    """A weight whose arrays say a matrix, or its transpose.

    Attributes:
      turned: whether it is the transpose (static).
    """

    turned: bool

    @property
    @abc.abstractmethod
    def extent(self) -> tuple[int, int]:
        """Rows and columns of the matrix that is not turned."""

    @abc.abstractmethod
    def upright(self) -> Float[Array, "*stack n m"]:
        """The matrix that is not turned."""

    @abc.abstractmethod
    def named(self, stack: Axes, rows: str | None, columns: str | None) -> "Turnable":
        """`leaf_axes` of the matrix that is not turned."""

    @property
    def numbers(self) -> int:
        """Entries of one matrix's arrays; a product with a vector multiplies each once."""
        is_names = lambda node: isinstance(node, AxisNames)  # noqa: E731
        names = jax.tree.leaves(self.leaf_axes((None, None)), is_leaf=is_names)
        pairs = zip(jax.tree.leaves(self), names, strict=True)
        return sum(math.prod(leaf.shape[-len(its) :]) for leaf, its in pairs)

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.extent
        return (columns, rows) if self.turned else (rows, columns)

    def dense(self) -> Float[Array, "*stack in out"]:
        return jnp.swapaxes(self.upright(), -1, -2) if self.turned else self.upright()

    def transpose(self: W) -> W:
        return dataclasses.replace(self, turned=not self.turned)  # type: ignore[type-var]

    def leaf_axes(self, axes: Axes) -> "Turnable":
        *stack, rows, columns = axes
        if self.turned:
            rows, columns = columns, rows
        return self.named(tuple(stack), rows, columns)


@register
@dataclasses.dataclass(frozen=True)
class BlockDiagonal(Turnable):
    """w = diag(blocks): B matrices on the diagonal, zeros beside them; N M / B numbers.

    Attributes:
      blocks: [B, N / B, M / B].
      turned: whether this is its transpose (static).
    """

    blocks: Array
    turned: bool = static(False)

    def __post_init__(self) -> None:
        check_blocks("blocks", self.blocks)

    @classmethod
    def project(cls, w: Float[Array, "n m"], blocks: int) -> "BlockDiagonal":
        """The nearest one to w in Frobenius norm: its diagonal blocks.

        Raises:
          ValueError: blocks does not divide both sides.
        """
        n, m = w.shape
        check_divides(blocks, rows=n, columns=m)
        own = jnp.arange(blocks)
        return cls(w.reshape(blocks, n // blocks, blocks, m // blocks)[own, :, own])

    @property
    def extent(self) -> tuple[int, int]:
        count, n, m = self.blocks.shape[-3:]
        return count * n, count * m

    @property
    def dtype(self) -> jnp.dtype:
        return self.blocks.dtype

    def upright(self) -> Float[Array, "*stack n m"]:
        return diagonal(self.blocks)

    def matmul(self, x: Float[Array, "*b in"]) -> Float[Array, "*b out"]:
        return by_blocks(x, self.blocks, turned=self.turned)

    def named(self, stack: Axes, rows: str | None, columns: str | None) -> "BlockDiagonal":
        return rebuild(self, blocks=AxisNames((*stack, None, rows, columns)))


@register
@dataclasses.dataclass(frozen=True)
class BlockDense(Turnable):
    """w = diag(blocks) b: block i of the inputs has R / B channels, b mixes all; R (N / B + M)
    numbers (arXiv 2406.16450).

    Attributes:
      blocks: [B, N / B, R / B].
      b: [R, M].
      turned: whether this is its transpose (static).
    """

    blocks: Array
    b: Array
    turned: bool = static(False)

    def __post_init__(self) -> None:
        check_blocks("blocks", self.blocks)
        check_matrix("b", self.b)
        rank = self.blocks.shape[-3] * self.blocks.shape[-1]
        if rank != self.b.shape[-2]:
            raise ValueError(f"blocks have rank {rank}, b has {self.b.shape[-2]}; both are one")

    @classmethod
    def project(cls, w: Float[Array, "n m"], rank: int, blocks: int) -> "BlockDense":
        """The nearest one to w in Frobenius norm: a truncated SVD of the rows of each block.

        Raises:
          ValueError: rank outside 1..min(n, m), or blocks divides not both n and rank.
        """
        n, m = w.shape
        check_rank(rank, n, m)
        check_divides(blocks, rows=n, rank=rank)
        left, right = halves(w.reshape(blocks, n // blocks, m), rank // blocks)
        return cls(left.astype(w.dtype), right.reshape(rank, m).astype(w.dtype))

    @property
    def extent(self) -> tuple[int, int]:
        return self.blocks.shape[-3] * self.blocks.shape[-2], self.b.shape[-1]

    @property
    def dtype(self) -> jnp.dtype:
        return self.b.dtype

    def upright(self) -> Float[Array, "*stack n m"]:
        *stack, count, n, rank = self.blocks.shape
        parts = jnp.matmul(self.blocks, self.b.reshape(*stack, count, rank, -1))
        return parts.reshape(*stack, count * n, -1)

    def matmul(self, x: Float[Array, "*b in"]) -> Float[Array, "*b out"]:
        b = self.b.astype(x.dtype)
        if self.turned:
            return by_blocks(product_by_rows(x, b), self.blocks, turned=True)
        return product(by_blocks(x, self.blocks), b)

    def named(self, stack: Axes, rows: str | None, columns: str | None) -> "BlockDense":
        return rebuild(
            self,
            blocks=AxisNames((*stack, None, rows, None)),
            b=AxisNames((*stack, None, columns)),
        )


@register
@dataclasses.dataclass(frozen=True)
class BlockShuffle(Turnable):
    """Two block-diagonal factors with a shuffle between them: B blocks each, of which every one of
    the second reads from every one of the first.

        z = x diag(first)        [K], seen as [r, l]: z[i] is z[i // l, i % l]
        y[s l' + j] = sum_r z[r, j] second[j, r, s]

    Output s of block j stands at s l' + j, l' the number of blocks: strided, not one block after
    the other (arXiv 2406.16450 as its authors' code has it). min(N, M) (N + M) / B numbers where
    K = min(N, M).

    Attributes:
      first: [B, N / B, K / B].
      second: [l', K / l', M / l'].
      turned: whether this is its transpose (static).
    """

    first: Array
    second: Array
    turned: bool = static(False)

    def __post_init__(self) -> None:
        check_blocks("first", self.first)
        check_blocks("second", self.second)
        inner = self.first.shape[-3] * self.first.shape[-1]
        if inner != self.second.shape[-3] * self.second.shape[-2]:
            raise ValueError(
                f"first {self.first.shape} gives {inner} channels, second {self.second.shape} "
                f"takes {self.second.shape[-3] * self.second.shape[-2]}; both are one"
            )

    @classmethod
    def project(cls, w: Float[Array, "n m"], blocks: int) -> "BlockShuffle":
        """The nearest one to w in Frobenius norm, with as many blocks in both factors.

        Of inputs of block k and outputs of block j, a channel of k that falls to j is one rank: w
        seen as [k, N / B, M / B, j] falls apart into truncated SVDs.

        Raises:
          ValueError: blocks does not divide both sides.
        """
        n, m = w.shape
        check_divides(blocks, rows=n, columns=m)
        inner = min(n, m)
        parts = w.reshape(blocks, n // blocks, m // blocks, blocks).transpose(0, 3, 1, 2)
        left, right = halves(parts, -(-(inner // blocks) // blocks))
        channel, width = jnp.arange(inner), inner // blocks
        # Channels of a block go round the blocks of the second factor.
        where = channel // width, channel % blocks
        turn = channel % width // blocks
        first = left[*where, :, turn].reshape(blocks, width, -1).swapaxes(1, 2)
        second = right[*where, turn].reshape(width, blocks, -1).swapaxes(0, 1)
        return cls(first.astype(w.dtype), second.astype(w.dtype))

    @property
    def extent(self) -> tuple[int, int]:
        (k, n, _), (j, _, m) = self.first.shape[-3:], self.second.shape[-3:]
        return k * n, j * m

    @property
    def dtype(self) -> jnp.dtype:
        return self.second.dtype

    def upright(self) -> Float[Array, "*stack n m"]:
        first = diagonal(self.first)
        *stack, j, r, _ = self.second.shape
        parts = first.reshape(*stack, -1, r, j)
        mixed = jnp.einsum("...nrj,...jrs->...nsj", parts, self.second)
        return mixed.reshape(*stack, self.extent[0], -1)

    def matmul(self, x: Float[Array, "*b in"]) -> Float[Array, "*b out"]:
        second = self.second.astype(x.dtype)
        j, r, s = second.shape
        ahead = x.shape[:-1]
        if self.turned:
            z = jnp.einsum("...sj,jrs->...rj", x.reshape(*ahead, s, j), second)
            return by_blocks(z.reshape(*ahead, r * j), self.first, turned=True)
        z = by_blocks(x, self.first).reshape(*ahead, r, j)
        return jnp.einsum("...rj,jrs->...sj", z, second).reshape(*ahead, s * j)

    def named(self, stack: Axes, rows: str | None, columns: str | None) -> "BlockShuffle":
        return rebuild(
            self,
            first=AxisNames((*stack, None, rows, None)),
            second=AxisNames((*stack, None, None, columns)),
        )
