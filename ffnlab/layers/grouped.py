"""Tokens sorted by group: what a mixture of experts, a switch and layers by modality are made of.

    groups = group(ids, e)            who comes where, and how many each group has
    rows = take(x, groups)            the tokens, those of group 0 first
    y = linear(rows, groups)          each by its group's matrix
    back(y, groups)                   in the order of the ids again

An id of `e` is no group: its rows come last and become zeros.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ffnlab.errors import ConfigError
from ffnlab.layers.linear import Map, drawn
from ffnlab.layers.stacking import stack_modules, with_axes
from ffnlab.weights import Dense, cost

__all__ = ["GroupedLinear", "GroupedNorm", "Groups", "back", "group", "take"]


class Groups(NamedTuple):
    """An order of rows by group.

    Attributes:
      order: [m] which of the rows comes i-th.
      inverse: [m] where each row comes.
      ids: [m] group of the i-th row, ascending; the number of groups for rows of none.
      sizes: [e] rows of each group.
    """

    order: Int[Array, "m"]
    inverse: Int[Array, "m"]
    ids: Int[Array, "m"]
    sizes: Int[Array, "e"]


def group(ids: Int[Array, "*b"], groups: int) -> Groups:
    """The stable order of rows by their group.

    Args:
      ids: group of each row, flattened; a number outside 0..groups - 1 is none.
      groups: how many (e).

    >>> found = group(jnp.array([1, 0, 2, 0]), 2)
    >>> found.order, found.sizes
    (Array([1, 3, 0, 2], dtype=int32), Array([2, 1], dtype=int32))
    """
    ids = ids.reshape(-1).astype(jnp.int32)
    ids = jnp.where((ids >= 0) & (ids < groups), ids, groups)
    order = jnp.argsort(ids, stable=True).astype(jnp.int32)
    numbers = jnp.arange(len(ids), dtype=jnp.int32)
    inverse = jnp.zeros_like(order).at[order].set(numbers, unique_indices=True)
    sizes = jnp.bincount(ids, length=groups + 1)[:groups].astype(jnp.int32)
    return Groups(order, inverse, ids[order], sizes)


def take(x: Float[Array, "n d"], groups: Groups) -> Float[Array, "m d"]:
    """Rows in the order of the groups; where m is k n, each row stands for k ids, one after the
    other."""
    return _take(x, groups.order, groups.inverse)


def back(y: Float[Array, "m d"], groups: Groups) -> Float[Array, "m d"]:
    """Rows in the order of the ids again."""
    return _back(y, groups.order, groups.inverse)


# The gradient of either is the other, which knows that no row is written twice; that of an index is
# a sum into rows, several times as slow.
@jax.custom_vjp
def _take(x: Array, order: Array, inverse: Array) -> Array:
    return x[order // (len(order) // len(x))] if len(x) else x


def _take_backward(residuals: tuple, dy: Array) -> tuple:
    inverse, rows = residuals
    dx = dy[inverse].reshape(rows, -1, dy.shape[1]).sum(1)
    return dx, None, None


_take.defvjp(lambda x, o, i: (_take(x, o, i), (i, len(x))), _take_backward)


@jax.custom_vjp
def _back(y: Array, order: Array, inverse: Array) -> Array:
    return y[inverse]


_back.defvjp(lambda y, o, i: (y[i], o), lambda order, dy: (dy[order], None, None))


class GroupedLinear(Map):
    """y_i = x_i @ w[g_i] + b[g_i], rows sorted by group; w is any weight with an axis of groups.

    Attributes:
      w: Param holding a Weight whose arrays are [e, ...], of shape [in, out] each.
      b: Param holding [e, out], or None.
    """

    by_group = True  # beside rows it takes their groups; a block gives it the modalities

    def __init__(
        self,
        groups: int,
        d_in: int,
        d_out: int,
        *,
        key: Array,
        axes: tuple[str, str],
        bias: bool = False,
        dtype: DTypeLike = jnp.float32,
        scale: float = 1.0,
        group_axis: str = "expert",
    ):
        """Draws w from N(0, scale^2 / in) and sets b, when asked for, to zero.

        Args:
          groups: how many (e).
          d_in, d_out: widths.
          key: of the draw.
          axes: logical names of both widths; `group_axis` comes before them.
          bias: whether there is one.
          dtype: of the parameters.
          scale: of the draw.
        """
        init = jax.nn.initializers.normal(scale * d_in**-0.5)
        w = drawn(init, key, (groups, d_in, d_out), dtype)
        self.w = nnx.Param(Dense(w), axes=(group_axis, *axes))
        b = nnx.Param(jnp.zeros((groups, d_out), dtype), axes=(group_axis, axes[1]))
        self.b = nnx.data(b if bias else None)

    @property
    def groups(self) -> int:
        """How many matrices there are (e)."""
        return jax.tree.leaves(self.weight)[0].shape[0]

    def __call__(self, x: Float[Array, "m in"], groups: Groups) -> Float[Array, "m out"]:
        """Each row times its group's matrix; zeros, without a bias, in rows of no group."""
        y = self.weight.matmul_grouped(x, groups.sizes)
        if self.b is None:
            return y
        b = jnp.take(
            self.b.get_value().astype(y.dtype), groups.ids, axis=0, mode="fill", fill_value=0
        )
        return y + b

    def flops_per_token(self, share: None) -> float:
        """Operations of a row, by the matrix of its group (`ffnlab.models.account`)."""
        return float(cost.flops(self.weight))


class GroupedNorm(nnx.Module):
    """A norm for each group, of rows sorted by group.

    Attributes:
      norms: one norm whose parameters have an axis of groups before their own.
    """

    by_group = True

    def __init__(self, norms: Sequence[nnx.Module], *, group_axis: str = "expert"):
        """Puts alike norms on one axis.

        Raises:
          ConfigError: there are none.
        """
        if not norms:
            raise ConfigError("norms is empty; one for each group is accepted")
        stacked = stack_modules(list(norms))
        self.norms = with_axes(stacked, lambda axes: (group_axis, *axes[1:]))

    @property
    def groups(self) -> int:
        """How many norms there are (e)."""
        return jax.tree.leaves(self.norms)[0].shape[0]

    def __call__(self, x: Float[Array, "m d"], groups: Groups) -> Float[Array, "m d"]:
        """Each row by its group's norm; rows of no group as they are."""
        return self.each(x, groups.ids)

    def each(self, x: Float[Array, "*b d"], ids: Int[Array, "..."]) -> Float[Array, "*b d"]:
        """`__call__` of rows in any order.

        Args:
          x: rows.
          ids: group of each, [*b] or the first axes of it.
        """
        ids, y = ids.reshape(*ids.shape, *(1,) * (x.ndim - ids.ndim)), x
        for i in range(self.groups):  # elementwise work: less than to look up gains by row
            own = jax.tree.map(lambda leaf, i=i: leaf[i], self.norms)
            y = jnp.where(ids == i, own(x), y)
        return y
