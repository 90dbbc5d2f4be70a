"""From the features of the coarsest level back to an image: what supervises reversible columns."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ffnlab.layers import ConvNeXt, LayerNorm, Linear

__all__ = ["ImageDecoder", "doubled", "shuffled"]

EPS = 1e-6


class ImageDecoder(nnx.Module):
    """pixels = decoder(features): a map, norm and GELU, the grid doubled and a block, for each
    level; then a map to the pixels of every place.

    A flat one (of one width) is a norm and that map.

    Attributes:
      norm: LayerNorm of a flat one, else None.
      maps, norms, blocks: nnx.Lists of Linear, LayerNorm and ConvNeXt.
      out: Linear to patch * patch * channels.
      patch: pixels of a place along a side (static).
    """

    def __init__(
        self,
        widths: Sequence[int],
        patch: int,
        channels: int,
        *,
        gamma: float = 1e-6,
        key: Array,
        dtype: DTypeLike = jnp.float32,
    ):
        """A decoder.

        Args:
          widths: channels of the levels, the coarsest first.
          patch: see the attribute.
          channels: of a pixel.
          gamma: scale of what blocks add, at first.
          key: of the draw.
          dtype: of the parameters.
        """
        out, *keys = jax.random.split(key, 2 * len(widths) - 1)
        common, axes = {"bias": True, "dtype": dtype}, ("embed", "mlp")
        is_flat, after = len(widths) == 1, widths[1:]
        self.norm = nnx.data(LayerNorm(widths[0], eps=EPS, dtype=dtype) if is_flat else None)
        pairs = zip(itertools.pairwise(widths), keys[::2], strict=True)
        self.maps = nnx.List([Linear(a, b, key=k, axes=axes, **common) for (a, b), k in pairs])
        self.norms = nnx.List([LayerNorm(d, eps=EPS, dtype=dtype) for d in after])
        self.blocks = nnx.List(
            [
                ConvNeXt(d, d, key=k, gamma=gamma, dtype=dtype)
                for d, k in zip(after, keys[1::2], strict=True)
            ]
        )
        self.out = Linear(widths[-1], patch * patch * channels, key=out, axes=axes, **common)
        self.patch = patch

    def __call__(self, x: Float[Array, "n h w d"]) -> Float[Array, "n _ _ c"]:
        x = x if self.norm is None else self.norm(x)
        for step, norm, block in zip(self.maps, self.norms, self.blocks, strict=True):
            x = block(doubled(jax.nn.gelu(norm(step(x)), approximate=False)))
        return shuffled(self.out(x), self.patch)


def doubled(x: Float[Array, "n h w d"]) -> Float[Array, "n _ _ d"]:
    """A grid of twice the rows and columns, linear between those of x; corners stay corners.

    >>> (3 * doubled(jnp.arange(2.0).reshape(1, 1, 2, 1)))[0, 0, :, 0].round().tolist()
    [0.0, 1.0, 2.0, 3.0]
    """
    down, across = (between(n).astype(x.dtype) for n in x.shape[1:3])
    return jnp.einsum("yh,xw,nhwd->nyxd", down, across, x)


def between(n: int) -> Float[np.ndarray, "m n"]:
    """The matrix from n samples to 2 n between the first and the last."""
    at = np.linspace(0, n - 1, 2 * n)
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(n))).astype(np.float32)


def shuffled(x: Float[Array, "n h w d"], patch: int) -> Float[Array, "n _ _ c"]:
    """The pixels of every place, channels [c, patch, patch] of it, beside each other."""
    n, h, w, _ = x.shape
    parts = x.reshape(n, h, w, -1, patch, patch).transpose(0, 1, 4, 2, 5, 3)
    return parts.reshape(n, h * patch, w * patch, -1)
