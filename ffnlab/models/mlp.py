"""The configuration of a plain feed-forward network (`ffnlab.layers.MLP`)."""

import dataclasses

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from ffnlab.layers import MLP
from ffnlab.layers.feed_forward.mlp import check_mlp

__all__ = ["MLPConfig"]


@dataclasses.dataclass(frozen=True)
class MLPConfig:
    """Sizes and switches of an `MLP`.

    Attributes:
      sizes: widths from input to output, two or more.
      activation: name of the nonlinearity, a key of `layers.ACTIVATIONS`, or "prelu" or "srelu",
        which learn.
      bias: whether maps have one.
    """

    sizes: tuple[int, ...]
    activation: str = "relu"
    bias: bool = True

    def __post_init__(self) -> None:
        check_mlp(self.sizes, self.activation)

    def make(self, *, key: Array, dtype: DTypeLike = jnp.float32) -> MLP:
        """A network of these sizes, drawn as `MLP` draws it."""
        return MLP(self.sizes, key=key, activation=self.activation, bias=self.bias, dtype=dtype)
