"""A transformer of one layer over sequences of numbers, without norms.

    h = x W_in + E,   u = h + attention(h),   y = W_2 phi(W_1 u + b_1) + b_2

Every place sees all others. E tells them apart: without it the network gives turned outputs for
turned inputs, whatever its weights are. It is what universal approximation by transformers is said
of (`ffnlab.analysis.construct`), and a small model of maps between sequences.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ffnlab.errors import ConfigError, at_least
from ffnlab.layers import MLP, Attention, AttentionSpec, Context, Linear
from ffnlab.layers.activations import check_activation
from ffnlab.weights import Dense

__all__ = ["SequenceConfig", "SequenceTransformer"]


@dataclasses.dataclass(frozen=True)
class SequenceConfig:
    """Sizes and switches of a `SequenceTransformer`.

    Attributes:
      length: places of a sequence.
      inputs, outputs: numbers of a place, in and out.
      width: of the stream.
      hidden: units of the feed-forward network.
      heads: of attention; 0 leaves places to themselves.
      head_dim: of each; 1 or more.
      activation: of the feed-forward network, a key of `layers.ACTIVATIONS`.
      positions: whether places are told apart.
    """

    length: int
    inputs: int
    outputs: int
    width: int
    hidden: int
    heads: int = 1
    head_dim: int = 8
    activation: str = "relu"
    positions: bool = True

    def __post_init__(self) -> None:
        sizes = ("length", "inputs", "outputs", "width", "hidden", "head_dim")
        at_least(1, **{name: getattr(self, name) for name in sizes})
        at_least(0, heads=self.heads)
        check_activation(self.activation)

    def make(self, *, key: Array, dtype: DTypeLike = jnp.float32) -> "SequenceTransformer":
        """A network of these sizes, drawn."""
        return SequenceTransformer(self, key=key, dtype=dtype)


class SequenceTransformer(nnx.Module):
    """x [b, n, inputs] -> [b, n, outputs].

    Attributes:
      embed: Linear from the numbers of a place.
      positions: Param [n, width], or None.
      attn: Attention that sees all places, or None.
      mlp: MLP of two maps, for each place.
      config: sizes (static).
    """

    def __init__(self, config: SequenceConfig, *, key: Array, dtype: DTypeLike = jnp.float32):
        """Draws random weights."""
        keys = jax.random.split(key, 4)
        width = config.width
        self.embed = Linear(
            config.inputs, width, key=keys[0], axes=("features", "embed"), dtype=dtype
        )
        table = jax.random.normal(keys[1], (config.length, width), jnp.float32) * width**-0.5
        self.positions = nnx.data(
            nnx.Param(Dense(table.astype(dtype)), axes=("position", "embed"))
            if config.positions
            else None
        )
        spec = AttentionSpec(config.heads, config.heads, config.head_dim, None, causal=False)
        self.attn = nnx.data(
            Attention(spec, width, key=keys[2], dtype=dtype) if config.heads else None
        )
        sizes = (width, config.hidden, config.outputs)
        self.mlp = MLP(sizes, key=keys[3], activation=config.activation, dtype=dtype)
        self.config = config

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n o"]:
        """The outputs of every place.

        Raises:
          ConfigError: other numbers of a place, or sequences of another length.
        """
        length, inputs = self.config.length, self.config.inputs
        if x.ndim != 3 or x.shape[2] != inputs:
            raise ConfigError(f"x has shape {x.shape}; [b, {length}, {inputs}] is accepted")
        if x.shape[1] != self.config.length:
            raise ConfigError(
                f"x has {x.shape[1]} places, the model was made for length={self.config.length}"
            )
        return self.mlp(self.mixed(x))

    def mixed(self, x: Float[Array, "b n d"]) -> Float[Array, "b n w"]:
        """What the feed-forward network is given of each place."""
        h = self.embed(x)
        if self.positions is not None:
            h = h + self.positions.get_value().dense().astype(h.dtype)
        if self.attn is None:
            return h
        return h + self.attn(h, Context({}, {None: None}))[0]
