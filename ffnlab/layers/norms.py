"""Normalization over the channels of one position, in float32 whatever the input's dtype."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

__all__ = ["LayerNorm", "RMSNorm"]


class RMSNorm(nnx.Module):
    """x / rms(x) * (offset + scale), computed in float32 (arXiv 1910.07467).

    Attributes:
      scale: Param holding [d].
      eps: added to the mean square.
      offset: 0, or 1 where the checkpoint stores scale - 1 (Gemma).
    """

    def __init__(
        self,
        d: int,
        *,
        eps: float = 1e-6,
        offset: float = 0.0,
        axis: str = "embed",
        dtype: DTypeLike = jnp.float32,
    ):
        self.scale = nnx.Param(jnp.full((d,), 1.0 - offset, dtype), axes=(axis,))
        self.eps = eps
        self.offset = offset

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        x32 = x.astype(jnp.float32)
        rms = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        gain = self.offset + self.scale.get_value().astype(jnp.float32)
        return (x32 * rms * gain).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean(x)) / sqrt(var(x) + eps) * scale + bias over the last axis (arXiv 1607.06450).

    Mean and variance (divided by d, as everywhere) are computed in float32.

    Attributes:
      scale: Param holding [d], or None.
      bias: Param holding [d], or None.
      eps: added to the variance (static).
    """

    def __init__(
        self,
        d: int,
        *,
        eps: float = 1e-5,
        scale: bool = True,
        bias: bool = True,
        axis: str = "embed",
        dtype: DTypeLike = jnp.float32,
    ):
        """Sets the scale to one and the bias to zero.

        Args:
          d: width.
          eps: added to the variance; 1e-5 is torch's, BERT has 1e-12.
          scale, bias: whether there is one.
          axis: logical name of the width.
          dtype: of the parameters.
        """
        self.scale = nnx.data(nnx.Param(jnp.ones((d,), dtype), axes=(axis,)) if scale else None)
        self.bias = nnx.data(nnx.Param(jnp.zeros((d,), dtype), axes=(axis,)) if bias else None)
        self.eps = eps

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        # Of the centred values: the mean of squares less the squared mean loses all digits where
        # the mean is large.
        y = centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + self.eps)
        if self.scale is not None:
            y = y * self.scale.get_value().astype(jnp.float32)
        if self.bias is not None:
            y = y + self.bias.get_value().astype(jnp.float32)
        return y.astype(x.dtype)
