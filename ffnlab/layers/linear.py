"""Linear maps and embeddings.

Every parameter is an `nnx.Param` that carries its logical axis names as metadata (`axes=`), and
every matrix in it is a weight (`ffnlab.weights`).
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ffnlab.errors import ConfigError
from ffnlab.weights import Dense, Weight
from ffnlab.weights.dense import product_by_rows

MANY_ROWS = 64  # from here on copying a weight costs little beside multiplying by it

L = TypeVar("L", bound="Map")


class Map(nnx.Module):
    """What a `Linear` and a `Conv` have in common: a weight and perhaps a bias.

    Attributes:
      w: Param holding a Weight of shape [rows, out].
      b: Param holding [out], or None.
    """

    w: nnx.Param
    b: nnx.Param | None

    @property
    def weight(self) -> Weight:
        """The weight."""
        return self.w.get_value()

    @property
    def bias(self) -> Array | None:
        """The bias [out], or None."""
        return None if self.b is None else self.b.get_value()

    def replace(self: L, weight: Weight, bias: Array | None = None) -> L:
        """A new map with another weight; the bias stays unless one is given.

        Raises:
          ValueError: the shapes differ.
        """
        if tuple(weight.shape) != tuple(self.weight.shape):
            raise ValueError(f"weight has shape {weight.shape}, the layer {self.weight.shape}")
        new = jax.tree.map(lambda leaf: leaf, self)
        new.w = nnx.Param(weight, axes=self.w.axes)
        if bias is not None:
            axes = self.w.axes[1:] if self.b is None else self.b.axes
            new.b = nnx.data(nnx.Param(bias, axes=axes))
        return new


class Linear(Map):
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
        init: Initializer | None = None,
    ):
        """Draws w from N(0, scale^2 / in) and sets b, when asked for, to zero.

        Args:
          d_in, d_out: widths.
          key: of the draw.
          axes: logical names of both.
          bias: whether there is one.
          dtype: of the parameters.
          scale: of the draw.
          init: draws w [in, out] instead, one of `jax.nn.initializers` for instance.
        Raises:
          ConfigError: scale beside init.
        """
        if init is None:
            init = jax.nn.initializers.normal(scale * d_in**-0.5)
        elif scale != 1.0:
            raise ConfigError(f"scale={scale} and init both say how w is drawn; give one of them")
        self.w = nnx.Param(Dense(drawn(init, key, (d_in, d_out), dtype)), axes=axes)
        self.b = nnx.data(nnx.Param(jnp.zeros((d_out,), dtype), axes=axes[1:]) if bias else None)

    @classmethod
    def of(cls, weight: Weight, bias: Array | None = None, *, axes: tuple[str, str]) -> "Linear":
        """The map of a ready weight.

        Args:
          weight: [in, out].
          bias: [out], or None.
          axes: logical names of both.
        """
        new = jax.eval_shape(lambda: cls(1, 1, key=jax.random.key(0), axes=axes))
        new.w = nnx.Param(weight, axes=axes)
        new.b = nnx.data(None if bias is None else nnx.Param(bias, axes=axes[1:]))
        return new

    def __call__(self, x: Float[Array, "*b in"]) -> Float[Array, "*b out"]:
        y = self.weight.matmul(x)
        return y if self.b is None else y + self.b.get_value().astype(y.dtype)


def drawn(init: Initializer, key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """What an initializer draws, in float32 and rounded: a dtype does not change the draw."""
    return init(key, shape, jnp.float32).astype(dtype)


def together(x: Float[Array, "*b in"], *maps: nnx.Module) -> list[Array]:
    """[m(x) for m in maps], as one product where that is faster: dense weights, many rows, a CPU.

    There narrow products use one core each, one after the other. 512 rows of 128 times 128, 64 and
    64 columns take 0.42 ms apart and 0.26 as one, the copy of the weights included (two cores).

    Args:
      x: [..., in].
      maps: `Linear`s from `in` channels, or what stands for them.
    Returns:
      one [..., out] array per map, what the maps give up to the order of sums.
    """
    if not all(isinstance(m, Linear) for m in maps):  # what stands for one has more than a weight
        return [m(x) for m in maps]
    ws = [m.weight for m in maps]
    alike = all(isinstance(w, Dense) and w.act == ws[0].act for w in ws)
    if not alike or x.size < MANY_ROWS * x.shape[-1] or jax.default_backend() != "cpu":
        return [m(x) for m in maps]
    joined = Dense(jnp.concatenate([w.dense().astype(x.dtype) for w in ws], axis=1), ws[0].act)
    ends = np.cumsum([w.shape[1] for w in ws])[:-1]
    ys = jnp.split(joined.matmul(x), ends, axis=-1)
    biases = [m.bias for m in maps]
    return [y if b is None else y + b.astype(y.dtype) for y, b in zip(ys, biases, strict=True)]


class Embedding(nnx.Module):
    """Rows of a [vocab, width] weight by token id; `logits` reads the same weight the other way."""

    def __init__(
        self,
        vocab: int,
        width: int,
        *,
        key: Array,
        axes: tuple[str, str] = ("vocab", "embed"),
        dtype: DTypeLike = jnp.float32,
    ):
        """Draws the rows from N(0, 1 / width)."""
        w = (jax.random.normal(key, (vocab, width), jnp.float32) * width**-0.5).astype(dtype)
        self.w = nnx.Param(Dense(w), axes=axes)

    @property
    def weight(self) -> Weight:
        """The weight, [vocab, width]."""
        return self.w.get_value()

    def __call__(self, tokens: Int[Array, "*b"]) -> Float[Array, "*b d"]:
        return jnp.take(self.weight.dense(), tokens, axis=0, mode="clip")

    def logits(self, h: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        """h @ w.T: the output head of a model with tied embeddings."""
        return product_by_rows(h, self.weight.dense().astype(h.dtype))
