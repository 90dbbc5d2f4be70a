"""The block of ConvNeXt (arXiv 2201.03545): a depthwise convolution, then an FFN at every place."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ffnlab.errors import ConfigError
from ffnlab.layers.conv import Conv
from ffnlab.layers.dropout import drop_path
from ffnlab.layers.feed_forward.ffn import FFN
from ffnlab.layers.norms import LayerNorm

__all__ = ["ConvNeXt"]

EPS = 1e-6


class ConvNeXt(nnx.Module):
    """y = x + gamma * ffn(norm(conv(x))), whole or, in training, left out for some examples.

    Attributes:
      conv: Conv, depthwise.
      norm: LayerNorm.
      ffn: FFN with GELU.
      gamma: Param [d].
      drop: probability that an example skips the block where a key is given (static).
    """

    def __init__(
        self,
        d: int,
        hidden: int,
        *,
        key: Array,
        size: int = 3,
        gamma: float = 1e-6,
        drop: float = 0.0,
        dtype: DTypeLike = jnp.float32,
    ):
        """Draws the maps as `Conv` and `FFN` do.

        Args:
          d: channels.
          hidden: channels of the FFN.
          key: of the draw.
          size: side of the convolution, odd.
          gamma: at first, of every channel.
          drop: see the attribute; 0 <= drop < 1.
          dtype: of the parameters.
        Raises:
          ConfigError: an even size, or drop out of range.
        """
        if size < 1 or size % 2 == 0:
            raise ConfigError(f"size={size} must be odd")
        if not 0 <= drop < 1:
            raise ConfigError(f"drop={drop} must lie in [0, 1)")
        conv, ffn = jax.random.split(key)
        self.conv = Conv(d, d, key=conv, size=size, groups=d, bias=True, dtype=dtype)
        self.norm = LayerNorm(d, eps=EPS, dtype=dtype)
        self.ffn = FFN(d, hidden, key=ffn, activation="gelu", dtype=dtype)
        self.gamma = nnx.Param(jnp.full((d,), gamma, dtype), axes=("embed",))
        self.drop = drop

    def __call__(
        self, x: Float[Array, "n h w d"], *, key: Array | None = None
    ) -> Float[Array, "n h w d"]:
        y = self.ffn(self.norm(self.conv(x)))
        y = y * self.gamma.get_value().astype(y.dtype)
        return x + drop_path(y, self.drop, key)
