"""Convolution as a linear map of patches."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ffnlab.weights import Dense, Weight

__all__ = ["Conv"]


class Conv(nnx.Module):
    """y[i, j] = patch(x, i, j) @ w, same size, zeros beyond the edges.

    Attributes:
      w: Param holding a Weight of shape [size * size * in, out]; rows by row, column, channel.
      size: height and width of the kernel, odd (static).
    """

    def __init__(
        self, d_in: int, d_out: int, *, key: Array, size: int = 3, dtype: DTypeLike = jnp.float32
    ):
        """Draws w from U(-1, 1) / sqrt(rows)."""
        rows = size * size * d_in
        bound = rows**-0.5
        w = jax.random.uniform(key, (rows, d_out), dtype, -bound, bound)
        self.w = nnx.Param(Dense(w), axes=("embed", "mlp"))
        self.size = size

    @property
    def weight(self) -> Weight:
        """The weight."""
        return self.w.get_value()

    def __call__(self, x: Float[Array, "n h w in"]) -> Float[Array, "n h w out"]:
        kernel = self.weight.dense().astype(x.dtype)
        kernel = kernel.reshape(self.size, self.size, x.shape[-1], -1)
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
