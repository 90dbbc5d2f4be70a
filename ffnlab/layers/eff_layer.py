"""A mixer of tokens that learns no mixing: a maximum over neighbours between two maps
(arXiv 2202.02777)."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ffnlab.errors import ConfigError
from ffnlab.layers.activations import ACTIVATIONS
from ffnlab.layers.linear import Linear
from ffnlab.layers.pooling import shifted_max_pool

__all__ = ["EffLayer"]


class EffLayer(nnx.Module):
    """y = down(gelu(pool(gelu(up(x))))), where pool is the largest value of a window of the grid.

    Tokens are a grid, row by row; the window moves by one, and what lies beyond the edges is -inf.

    Attributes:
      up: Linear [d, ratio * d]; down: [ratio * d, d].
      size: side of the window, odd (static).
      leading: tokens before the grid (a class token), which are not pooled (static).
      grid: rows and columns; None for a square of as many tokens as there are (static).
    """

    def __init__(
        self,
        width: int,
        *,
        key: Array,
        ratio: int = 3,
        size: int = 3,
        leading: int = 0,
        grid: tuple[int, int] | None = None,
        out_scale: float = 1.0,
        dtype: DTypeLike = jnp.float32,
    ):
        """Draws both maps as `Linear` does, with biases of zero.

        Raises:
          ConfigError: an even size, or a ratio, grid or number of leading tokens that is too small.
        """
        check_window(size, ratio)
        if leading < 0:
            raise ConfigError(f"leading={leading} must be at least 0")
        if grid is not None and (len(grid) != 2 or min(grid) < 1):
            raise ConfigError(f"grid={tuple(grid)}: rows and columns, 1 or more, are accepted")
        first, second = jax.random.split(key)
        inner, common = ratio * width, {"bias": True, "dtype": dtype}
        self.up = Linear(width, inner, key=first, axes=("embed", "mlp"), **common)
        axes = ("mlp", "embed")
        self.down = Linear(inner, width, key=second, axes=axes, scale=out_scale, **common)
        self.size, self.leading, self.grid = size, leading, grid

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """What is added to the tokens.

        Raises:
          ConfigError: the tokens after the leading ones are no square, or not those of the grid.
        """
        rows, columns = self.grid_of(x.shape[1])
        gelu = ACTIVATIONS["gelu"]
        u = gelu(self.up(x))
        before, patches = u[:, : self.leading], u[:, self.leading :]
        grid = patches.reshape(len(u), rows, columns, -1)
        pooled = shifted_max_pool(grid, self.size, stride=1, padding=self.size // 2)
        pooled = pooled.reshape(patches.shape)
        u = jnp.concatenate([before, pooled], axis=1) if self.leading else pooled
        return self.down(gelu(u))

    def grid_of(self, tokens: int) -> tuple[int, int]:
        """Rows and columns of so many tokens."""
        count = tokens - self.leading
        if self.grid is not None:
            if math.prod(self.grid) != count:
                raise ConfigError(
                    f"{count} tokens after {self.leading} leading ones; a grid of "
                    f"{self.grid[0]} x {self.grid[1]} is accepted"
                )
            return self.grid
        side = math.isqrt(max(count, 0))
        if side < 1 or side * side != count:
            raise ConfigError(
                f"{count} tokens after {self.leading} leading ones are no square grid; "
                f"{side * side} or {(side + 1) ** 2} would be; set grid or leading"
            )
        return side, side


def check_window(size: int, ratio: int) -> None:
    """Raises ConfigError for an even window, or too few channels."""
    if size < 1 or size % 2 == 0:
        raise ConfigError(f"size={size} must be odd: an even window has no middle")
    if ratio < 1:
        raise ConfigError(f"ratio={ratio} must be at least 1")
