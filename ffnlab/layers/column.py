"""A column of levels that is undone level by level, from what it gives (arXiv 2212.11696).

    c'_l = level_l(c'_(l-1), c_(l+1)) + alpha_l * c_l,        c'_(-1) = x

c is what the column before gave, coarser with every level; its new value is used at once. From c'
alone, the coarsest level first,

    c_l = (c'_l - level_l(c'_(l-1), c_(l+1))) / alpha_l

so that a backward pass needs no activation but those of the last column.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ffnlab import tree
from ffnlab.layers.conv import Conv
from ffnlab.layers.convnext import EPS, ConvNeXt
from ffnlab.layers.linear import Linear
from ffnlab.layers.norms import LayerNorm

__all__ = ["Column", "ColumnSpec", "Level", "Undone"]

Grids = tuple[Float[Array, "n _ _ _"], ...]  # one for each level


class ColumnSpec(NamedTuple):
    """Sizes of a column.

    Attributes:
      widths: channels of each level.
      blocks: of each level.
      size: side of the blocks' convolutions.
      expansion: channels of their FFNs for each of a level.
      gamma, alpha: scales at first, of what a block adds and of the column before.
      drop: probability that an example skips the last block; it rises linearly from 0 at the first.
    """

    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    size: int = 3
    expansion: int = 4
    gamma: float = 1e-6
    alpha: float = 0.5
    drop: float = 0.0

    def drops(self, level: int) -> list[float]:
        """Of each block of a level.

        >>> ColumnSpec((1, 1), (1, 2), drop=0.5).drops(1)
        [0.25, 0.5]
        """
        first, last = sum(self.blocks[:level]), max(sum(self.blocks) - 1, 1)
        return [self.drop * (first + i) / last for i in range(self.blocks[level])]


class Level(nnx.Module):
    """y = blocks(below + above): what comes from the finer level, its grid halved, and what the
    column before had on the coarser one, doubled.

    Attributes:
      down: Conv of 2 x 2 places, and down_norm: LayerNorm; None of the finest level.
      up: Linear, and up_norm: LayerNorm; None of the coarsest level, and in a first column.
      blocks: nnx.List of ConvNeXt.
    """

    def __init__(
        self,
        spec: ColumnSpec,
        level: int,
        *,
        first: bool = False,
        key: Array,
        dtype: DTypeLike = jnp.float32,
    ):
        """A level of a column.

        Args:
          spec: of the column.
          level: its place, 0 the finest.
          first: whether there is no column before.
          key: of the draw.
          dtype: of the parameters.
        """
        down, up, *keys = jax.random.split(key, spec.blocks[level] + 2)
        widths, d = spec.widths, spec.widths[level]
        is_coarsest = level == len(widths) - 1
        self.down = self.down_norm = self.up = self.up_norm = nnx.data(None)
        if level:
            options = {"size": 2, "stride": 2, "padding": "VALID", "bias": True, "dtype": dtype}
            self.down = nnx.data(Conv(widths[level - 1], d, key=down, **options))
            self.down_norm = nnx.data(LayerNorm(d, eps=EPS, dtype=dtype))
        if not (first or is_coarsest):
            axes = ("embed", "mlp")
            self.up = nnx.data(
                Linear(widths[level + 1], d, key=up, axes=axes, bias=True, dtype=dtype)
            )
            self.up_norm = nnx.data(LayerNorm(d, eps=EPS, dtype=dtype))
        options = {"size": spec.size, "gamma": spec.gamma, "dtype": dtype}
        self.blocks = nnx.List(
            [
                ConvNeXt(d, spec.expansion * d, key=k, drop=drop, **options)
                for k, drop in zip(keys, spec.drops(level), strict=True)
            ]
        )

    def __call__(
        self,
        below: Float[Array, "n _ _ _"],
        above: Float[Array, "n _ _ _"] | None = None,
        *,
        key: Array | None = None,
    ) -> Float[Array, "n _ _ _"]:
        """Features of this level.

        Args:
          below: of the finer level [n, 2 h, 2 w, c]; of the finest one what the column reads,
            [n, h, w, d].
          above: of the coarser level [n, h / 2, w / 2, e]; None where there is no `up`.
          key: of what blocks draw; None in inference.
        Returns:
          [n, h, w, d].
        """
        y = below if self.down is None else self.down_norm(self.down(below))
        if self.up is not None:
            coarse = self.up_norm(self.up(above))
            y = y + jnp.repeat(jnp.repeat(coarse, 2, axis=1), 2, axis=2)
        for i, block in enumerate(self.blocks):
            y = block(y, key=None if key is None else jax.random.fold_in(key, i))
        return y


class Undone(NamedTuple):
    """What of a column its backward pass gives.

    Attributes:
      c: what it read of the column before, rebuilt.
      of_c, of_x, of_column: gradients of that, of the shared input and of the parameters.
    """

    c: Grids
    of_c: Grids
    of_x: Array
    of_column: "Column"


class Column(nnx.Module):
    """c' = column(x, c).

    Between columns numbers are at least float32: what is rounded to fewer bits cannot be rebuilt.
    Levels compute in the dtype of x.

    Attributes:
      levels: nnx.List of Level, the finest first.
      alphas: nnx.List of Param [d] of every level; empty in a first column, which reads x alone.
    """

    def __init__(
        self,
        spec: ColumnSpec,
        *,
        first: bool = False,
        key: Array,
        dtype: DTypeLike = jnp.float32,
    ):
        """Arguments as `Level`."""
        keys = jax.random.split(key, len(spec.widths))
        self.levels = nnx.List(
            [Level(spec, i, first=first, key=k, dtype=dtype) for i, k in enumerate(keys)]
        )
        each = () if first else spec.widths
        self.alphas = nnx.List(
            [nnx.Param(jnp.full((d,), spec.alpha, dtype), axes=("embed",)) for d in each]
        )

    def __call__(
        self,
        x: Float[Array, "n h w d"],
        c: Sequence[Float[Array, "n _ _ _"]] | None = None,
        *,
        key: Array | None = None,
    ) -> Grids:
        """Features of every level.

        Args:
          x: what every column reads.
          c: what the column before gave; None of a first column.
          key: of what blocks draw.
        """
        wide, new = jnp.promote_types(x.dtype, jnp.float32), []
        for i in range(len(self.levels)):
            y = self.level(i, x, new, c, key).astype(wide)
            new.append(y if c is None else y + self.alpha(i, wide) * c[i])
        return tuple(new)

    def level(
        self,
        i: int,
        x: Array,
        new: Sequence[Array],
        c: Sequence[Array | None] | None,
        key: Array | None,
    ) -> Float[Array, "n _ _ _"]:
        """What level i makes of the new finer level and the old coarser one."""
        below, above = inputs_of(i, x, new, c)
        own = None if key is None else jax.random.fold_in(key, i)
        return applied(self.levels[i], below, above, x.dtype, own)

    def alpha(self, i: int, dtype: DTypeLike) -> Float[Array, "d"]:
        """The scale of level i of the column before."""
        return self.alphas[i].get_value().astype(dtype)

    def undo(
        self, x: Float[Array, "n h w d"], new: Grids, of_new: Grids, *, key: Array | None = None
    ) -> Undone:
        """The backward pass: what was read, rebuilt on the way, and gradients.

        Args:
          x, key: as of the call.
          new: what the call gave.
          of_new: the gradient of that.
        """
        n, wide = len(self.levels), new[0].dtype
        c: list = [None] * n
        of_c, of_levels, of_alphas = list(c), list(c), list(c)
        g, of_x = list(of_new), None
        for i in reversed(range(n)):
            below, above = inputs_of(i, x, new, c)
            own = None if key is None else jax.random.fold_in(key, i)
            y, pull = jax.vjp(
                lambda level, below, above, own=own: applied(level, below, above, x.dtype, own),
                self.levels[i],
                below,
                above,
            )
            of_levels[i], of_below, of_above = pull(g[i].astype(y.dtype))
            alpha = self.alpha(i, wide)
            c[i] = (new[i] - y.astype(wide)) / alpha
            of_c[i] = alpha * g[i]
            of_alpha = jnp.sum(g[i] * c[i], axis=(0, 1, 2))
            of_alphas[i] = self.alphas[i].replace(of_alpha.astype(self.alphas[i].dtype))
            if above is not None:
                of_c[i + 1] = of_c[i + 1] + of_above
            if i:
                g[i - 1] = g[i - 1] + of_below
            else:
                of_x = of_below
        of_column = tree.copy(self)
        of_column.levels, of_column.alphas = nnx.List(of_levels), nnx.List(of_alphas)
        return Undone(tuple(c), tuple(of_c), of_x, of_column)


def inputs_of(
    i: int, x: Array, new: Sequence[Array], c: Sequence[Array | None] | None
) -> tuple[Array, Array | None]:
    """What level i reads: of the new finer level, or x; of the old coarser one, where there is."""
    above = None if c is None or i + 1 == len(c) else c[i + 1]
    return (new[i - 1] if i else x), above


def applied(
    level: Level, below: Array, above: Array | None, dtype: DTypeLike, key: Array | None
) -> Array:
    """A level of inputs rounded to a dtype."""
    given = None if above is None else above.astype(dtype)
    return level(below.astype(dtype), given, key=key)
