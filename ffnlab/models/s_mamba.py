"""S-Mamba: forecasts of many series, each one token (Wang et al., arXiv 2403.11144).

    h = W_embed [x; marks]^T            a token for each series, one for each mark
    h = norm(h + forward(h) + reverse(h)),   h = norm(h + W_2 phi(W_1 h))
    y = W_out norm(h),   of the series alone

Both directions are Mamba along the SERIES, whose order therefore counts; the feed-forward network
mixes time, of which a token holds the whole window. Each series is taken from its own mean and
divided by its own deviation over the window, and the forecast is put back: a series a x + b is
forecast as a y + b. The mean is no part of the derivative, as in the authors' code. They create two
more Mamba layers and one of attention in every layer that nothing runs through; here they are not.
It does not stream: a window is needed whole, and the reverse direction begins at the last token.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ffnlab.errors import ConfigError, at_least
from ffnlab.layers import ACTIVATIONS, LayerNorm, Linear, Mamba, dropout
from ffnlab.layers.activations import check_activation
from ffnlab.layers.recurrent import uniform

__all__ = ["SMamba", "SMambaConfig"]

EPS = 1e-5  # added to the variance of a window, the authors'


@dataclasses.dataclass(frozen=True)
class SMambaConfig:
    """Sizes and switches of an `SMamba`.

    Attributes:
      length: places of a window that is read.
      horizon: places that are forecast.
      width: of a token.
      hidden: units of the feed-forward network.
      layers: how many.
      states: numbers that each channel of a Mamba remembers.
      taps: of its convolution.
      expand: its channels over the width.
      activation: of the feed-forward network, a key of `layers.ACTIVATIONS`.
      dropout: rate behind the embedding and in the feed-forward network, in training.
      normalized: whether each series is taken from its mean and divided by its deviation.
    """

    length: int
    horizon: int
    width: int
    hidden: int
    layers: int = 2
    states: int = 16
    taps: int = 2
    expand: int = 1
    activation: str = "gelu"
    dropout: float = 0.1
    normalized: bool = True

    def __post_init__(self) -> None:
        fields = ("length", "horizon", "width", "hidden", "layers", "states", "taps", "expand")
        at_least(1, **{name: getattr(self, name) for name in fields})
        check_activation(self.activation)
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout} must lie in 0..1, 1 excluded")

    def make(self, *, key: Array, dtype: DTypeLike = jnp.float32) -> "SMamba":
        """A network of these sizes, drawn."""
        return SMamba(self, key=key, dtype=dtype)


class SMambaBlock(nnx.Module):
    """One layer over tokens [b, n, d].

    Attributes:
      forward, reverse: Mamba that reads tokens from the first, and from the last.
      mixing_norm, time_norm: LayerNorm behind the sums.
      up, down: Linear [d, hidden] and back.
      activation: between them (static).
    """

    def __init__(self, config: SMambaConfig, *, key: Array, dtype: DTypeLike):
        """Draws all of it."""
        keys = jax.random.split(key, 4)
        mamba = functools.partial(
            Mamba,
            config.width,
            states=config.states,
            expand=config.expand,
            taps=config.taps,
            dtype=dtype,
        )
        self.forward, self.reverse = mamba(key=keys[0]), mamba(key=keys[1])
        self.mixing_norm, self.time_norm = (LayerNorm(config.width, dtype=dtype) for _ in "ab")
        self.up = drawn(config.width, config.hidden, keys[2], ("embed", "mlp"), dtype)
        self.down = drawn(config.hidden, config.width, keys[3], ("mlp", "embed"), dtype)
        self.activation = config.activation

    def __call__(
        self, h: Float[Array, "b n d"], rate: float = 0.0, key: Array | None = None
    ) -> Float[Array, "b n d"]:
        """The tokens after it; with a key, activations are dropped at a rate."""
        inner, outer = (None, None) if key is None else jax.random.split(key)
        h = self.mixing_norm(h + self.forward(h)[0] + self.reverse(h[:, ::-1])[0][:, ::-1])
        y = dropout(ACTIVATIONS[self.activation](self.up(h)), rate, inner)
        return self.time_norm(h + dropout(self.down(y), rate, outer))


class SMamba(nnx.Module):
    """x [b, length, n] -> [b, horizon, n], for any number n of series.

    Attributes:
      embed: Linear from a window to a token.
      layers: nnx.List of `SMambaBlock`.
      norm: LayerNorm behind them.
      output: Linear from a token to a forecast.
      config: sizes (static).
    """

    def __init__(self, config: SMambaConfig, *, key: Array, dtype: DTypeLike = jnp.float32):
        """Draws maps from U(-1, 1) / sqrt(in), as the authors' framework does."""
        embed, output, *keys = jax.random.split(key, config.layers + 2)
        self.embed = drawn(config.length, config.width, embed, ("features", "embed"), dtype)
        self.layers = nnx.List(SMambaBlock(config, key=k, dtype=dtype) for k in keys)
        self.norm = LayerNorm(config.width, dtype=dtype)
        self.output = drawn(config.width, config.horizon, output, ("embed", "features"), dtype)
        self.config = config

    def __call__(
        self,
        x: Float[Array, "b t n"],
        marks: Float[Array, "b t m"] | None = None,
        *,
        key: Array | None = None,
    ) -> Float[Array, "b s n"]:
        """What follows each series.

        Args:
          x: windows.
          marks: numbers that tell the time of each place, tokens behind the series; or None.
          key: of dropout, in training; None drops nothing.
        Raises:
          ConfigError: windows or marks of another length.
        """
        length, rate = self.config.length, self.config.dropout
        if x.shape[1] != length or (marks is not None and marks.shape[:2] != x.shape[:2]):
            told = "none" if marks is None else list(marks.shape)
            raise ConfigError(f"x {list(x.shape)}, marks {told}: [b, {length}, n] are accepted")
        mean, deviation = moments(x) if self.config.normalized else (0.0, 1.0)
        tokens = (x - mean) / deviation
        tokens = tokens if marks is None else jnp.concatenate([tokens, marks], -1)
        keys = [None] * (len(self.layers) + 1)
        keys = keys if key is None else list(jax.random.split(key, len(keys)))
        h = dropout(self.embed(jnp.swapaxes(tokens, 1, 2)), rate, keys[0])
        for layer, k in zip(self.layers, keys[1:], strict=True):
            h = layer(h, rate, k)
        y = jnp.swapaxes(self.output(self.norm(h[:, : x.shape[2]])), 1, 2)
        return y * deviation + mean


def moments(x: Float[Array, "b t n"]) -> tuple[Float[Array, "b 1 n"], Float[Array, "b 1 n"]]:
    """(mean, deviation) of every series over its window; the mean without a derivative."""
    mean = jax.lax.stop_gradient(jnp.mean(x, axis=1, keepdims=True))
    return mean, jnp.sqrt(jnp.var(x - mean, axis=1, keepdims=True) + EPS)


def drawn(rows: int, out: int, key: Array, axes: tuple[str, str], dtype: DTypeLike) -> Linear:
    """A map with a bias, both drawn from U(-1, 1) / sqrt(rows)."""
    of_weight, of_bias = jax.random.split(key)
    draw = functools.partial(uniform, bound=rows**-0.5)
    linear = Linear(rows, out, key=of_weight, axes=axes, bias=True, init=draw, dtype=dtype)
    return linear.replace(linear.weight, draw(of_bias, (out,), dtype))
