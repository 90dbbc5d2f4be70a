"""Normalization of each example by itself, in float32 whatever the input's dtype, or float64.

`BatchNorm`, which normalizes over examples, has a file of its own.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ffnlab.errors import ConfigError

__all__ = ["GroupNorm", "InstanceNorm", "LayerNorm", "RMSNorm", "ScaleNorm", "unit_rows"]


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


class ScaleNorm(nnx.Module):
    """scale * x / max(|x|, eps), |x| the length of the last axis (arXiv 1910.05895, eq. 5).

    Attributes:
      scale: Param holding [], sqrt(d) at first. MossFormer's, which divides by rms(x), is this over
        sqrt(d).
      eps: the least length that is divided by (static).
    """

    def __init__(self, d: int, *, eps: float = 1e-5, dtype: DTypeLike = jnp.float32):
        self.scale = nnx.Param(jnp.asarray(d**0.5, dtype), axes=())
        self.eps = eps

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        x32 = x.astype(jnp.float32)
        squares = jnp.sum(x32 * x32, axis=-1, keepdims=True)
        # The square root after the maximum: its derivative at a length of zero is finite.
        inverse = jax.lax.rsqrt(jnp.maximum(squares, self.eps**2))
        return (x32 * inverse * self.scale.get_value().astype(jnp.float32)).astype(x.dtype)


class Scaled(nnx.Module):
    """What norms with a scale and a bias of every channel have in common.

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
          d: channels.
          eps: added to the variance; 1e-5 is torch's, BERT has 1e-12.
          scale, bias: whether there is one.
          axis: logical name of the channels.
          dtype: of the parameters.
        """
        self.scale = nnx.data(nnx.Param(jnp.ones((d,), dtype), axes=(axis,)) if scale else None)
        self.bias = nnx.data(nnx.Param(jnp.zeros((d,), dtype), axes=(axis,)) if bias else None)
        self.eps = eps

    def scaled(self, y: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """y * scale + bias, in the dtype of y, float32 or float64."""
        if self.scale is not None:
            y = y * self.scale.get_value().astype(y.dtype)
        return y if self.bias is None else y + self.bias.get_value().astype(y.dtype)


class LayerNorm(Scaled):
    """(x - mean(x)) / sqrt(var(x) + eps) * scale + bias over the last axis (arXiv 1607.06450).

    Attributes: scale, bias, eps; see `Scaled`. The variance is divided by d, as everywhere.
    """

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        return self.scaled(standardized(x, (-1,), self.eps)).astype(x.dtype)


class GroupNorm(Scaled):
    """Each example's groups of channels, with all their positions, to mean 0 and variance 1; then
    * scale + bias (arXiv 1803.08494).

    Attributes:
      scale, bias, eps: as in LayerNorm, of every channel.
      groups: how many; channels of a group are neighbours (static).
    """

    def __init__(
        self,
        d: int,
        groups: int,
        *,
        eps: float = 1e-5,
        scale: bool = True,
        bias: bool = True,
        axis: str = "embed",
        dtype: DTypeLike = jnp.float32,
    ):
        """As LayerNorm's, with a number of groups.

        Raises:
          ConfigError: groups that do not divide the channels.
        """
        if groups < 1 or d % groups:
            raise ConfigError(f"groups={groups} must divide the {d} channels")
        super().__init__(d, eps=eps, scale=scale, bias=bias, axis=axis, dtype=dtype)
        self.groups = groups

    def __call__(self, x: Float[Array, "n *grid d"]) -> Float[Array, "n *grid d"]:
        grouped = x.reshape(*x.shape[:-1], self.groups, -1)
        axes = (*range(1, x.ndim - 1), -1)
        return self.scaled(standardized(grouped, axes, self.eps).reshape(x.shape)).astype(x.dtype)


class InstanceNorm(Scaled):
    """Each channel of each example, over its positions, to mean 0 and variance 1; then * scale +
    bias (arXiv 1607.08022). A channel of one position becomes its bias.

    Attributes: scale, bias, eps; as in LayerNorm.
    """

    def __call__(self, x: Float[Array, "n *grid d"]) -> Float[Array, "n *grid d"]:
        axes = tuple(range(1, x.ndim - 1))
        return self.scaled(standardized(x, axes, self.eps)).astype(x.dtype)


def standardized(x: Float[Array, "..."], axes: Sequence[int], eps: float) -> Float[Array, "..."]:
    """(x - mean) / sqrt(variance + eps) over some axes, in float32, or float64 of such an x.

    Of centred values: the mean of squares less the squared mean loses all digits where a mean is
    large.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = wide - jnp.mean(wide, axis=axes, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=axes, keepdims=True) + eps)


def unit_rows(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """x / (|x| + 1e-8) over the last axis: the direction of each row; zeros stay, with a gradient.

    >>> unit_rows(jnp.array([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    square = jnp.sum(wide * wide, axis=-1, keepdims=True)
    norm = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
    return (wide / (norm + 1e-8)).astype(x.dtype)
