"""Linear maps, embeddings and RMS normalization: the parts that hold parameters.

Every parameter is an `nnx.Param` that carries its logical axis names as metadata (`axes=`), and
every matrix in it is a weight (`ffnlab.weights`).
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ffnlab.weights import Dense, Weight
from ffnlab.weights.dense import product_by_rows


class Linear(nnx.Module):
    """y = x @ w + b, where w is any weight.

    Attributes:
      w: Param holding a Weight of shape [in, out].
      b: Param holding [out], or None.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        key: Array,
        axes: tuple[str, str],
        bias: bool = False,
        dtype: DTypeLike = jnp.float32,
        scale: float = 1.0,
    ):
        """Draws w from N(0, scale^2 / in) and sets b, when asked for, to zero."""
        std = scale * d_in**-0.5
        w = (jax.random.normal(key, (d_in, d_out), jnp.float32) * std).astype(dtype)
        self.w = nnx.Param(Dense(w), axes=axes)
        self.b = nnx.data(nnx.Param(jnp.zeros((d_out,), dtype), axes=axes[1:]) if bias else None)

    @property
    def weight(self) -> Weight:
        """The weight."""
        return self.w.get_value()

    @property
    def bias(self) -> Array | None:
        """The bias [out], or None."""
        return None if self.b is None else self.b.get_value()

    def replace(self, weight: Weight, bias: Array | None = None) -> "Linear":
        """A new Linear with another weight; the bias stays unless one is given.

        Raises:
          ValueError: the shapes differ.
        """
        if tuple(weight.shape) != tuple(self.weight.shape):
            raise ValueError(f"weight has shape {weight.shape}, the layer {self.weight.shape}")
        new = jax.tree.map(lambda leaf: leaf, self)
        new.w = nnx.Param(weight, axes=self.w.axes)
        if bias is not None:
            new.b = nnx.data(nnx.Param(bias, axes=self.w.axes[1:]))
        return new

    def __call__(self, x: Float[Array, "*b in"]) -> Float[Array, "*b out"]:
        y = self.weight.matmul(x)
        return y if self.b is None else y + self.b.get_value().astype(y.dtype)


class Embedding(nnx.Module):
    """Rows of a [vocab, width] weight by token id; `logits` reads the same weight the other way."""

    def __init__(self, vocab: int, width: int, *, key: Array, dtype: DTypeLike = jnp.float32):
        """Draws the rows from N(0, 1 / width)."""
        w = (jax.random.normal(key, (vocab, width), jnp.float32) * width**-0.5).astype(dtype)
        self.w = nnx.Param(Dense(w), axes=("vocab", "embed"))

    @property
    def weight(self) -> Weight:
        """The weight, [vocab, width]."""
        return self.w.get_value()

    def __call__(self, tokens: Int[Array, "*b"]) -> Float[Array, "*b d"]:
        return jnp.take(self.weight.dense(), tokens, axis=0, mode="clip")

    def logits(self, h: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        """h @ w.T: the output head of a model with tied embeddings."""
        return product_by_rows(h, self.weight.dense().astype(h.dtype))


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
