"""Noise schedules of NoProp (arXiv 2503.24322): the cosine, and one that is learned.

abar(t) is the level of signal at times from noise (0) to signal (1). The learned one:

    abar(t) = sigmoid(-gamma(t)),   gamma(t) = g0 + (g1 - g0) (1 - gbar(t)),
    gbar(t) = (m(t) - m(0)) / (m(1) - m(0)),   m(t) = slope t + sum_k out_k sigmoid(in_k t + bias_k)

m rises because its slope and the weights in and out are softplus of what is learned, and so does
abar because g1 - g0 is; gbar is 0 and 1 at the ends, whatever is learned. So abar rises from
sigmoid(-g1) to sigmoid(-g0), and SNR = exp(-gamma) with it.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ffnlab.errors import ConfigError

__all__ = ["HIGHEST", "LOWEST", "LearnedSchedule", "cosine"]

LOWEST, HIGHEST = 0.01, 0.99  # beyond, the signal-to-noise ratio and its weights explode


def cosine(t: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """abar at times from 0 to 1: .01 + .98 sin^2(pi t / 2)."""
    return LOWEST + (HIGHEST - LOWEST) * jnp.sin(0.5 * math.pi * t) ** 2


class LearnedSchedule(nnx.Module):
    """abar(t) with what is learned of it; takes the place of `cosine`.

    It starts close to logit(abar) straight in t. At any time all parameters are free: there is none
    for which abar does not rise. Its ends are learned too, from those of `cosine`, .01 and .99.

    Attributes:
      low: Param []: g0; abar(1) = sigmoid(-g0).
      span: Param []: g1 = g0 + softplus(span).
      slope: Param []: softplus of it is that of the straight part of m.
      into, bias, out: Param [k]: the hidden units of m; softplus of into and out are their weights.
    """

    def __init__(self, hidden: int = 64, *, key: Array):
        """Draws the hidden units.

        Args:
          hidden: how many (k); centres are drawn from U(0, 1).
          key: of the draw.
        """
        if hidden < 1:
            raise ConfigError(f"hidden={hidden} must be at least 1")
        end = math.log(HIGHEST / (1 - HIGHEST))
        start = math.log(LOWEST / (1 - LOWEST))
        rate = 8.0  # a unit rises over about a quarter of the time
        self.low = nnx.Param(jnp.float32(-end))
        self.span = nnx.Param(jnp.float32(inverse_softplus(end - start)))
        self.slope = nnx.Param(jnp.float32(inverse_softplus(1.0)))
        self.into = nnx.Param(jnp.full(hidden, inverse_softplus(rate), jnp.float32))
        self.bias = nnx.Param(-rate * jax.random.uniform(key, (hidden,)))
        self.out = nnx.Param(jnp.full(hidden, inverse_softplus(1.0 / hidden), jnp.float32))

    def __call__(self, t: Float[Array, "*n"]) -> Float[Array, "*n"]:
        """abar at times from 0 to 1."""
        rising = self.rising(jnp.stack([jnp.zeros_like(t), t, jnp.ones_like(t)]))
        share = (rising[1] - rising[0]) / (rising[2] - rising[0])
        gamma = self.low[...] + jax.nn.softplus(self.span[...]) * (1 - share)
        return jax.nn.sigmoid(-gamma)

    def rising(self, t: Float[Array, "*n"]) -> Float[Array, "*n"]:
        """m(t)."""
        into, out = jax.nn.softplus(self.into[...]), jax.nn.softplus(self.out[...])
        units = jax.nn.sigmoid(into * t[..., None] + self.bias[...])
        return jax.nn.softplus(self.slope[...]) * t + units @ out


def inverse_softplus(x: float) -> float:
    """What softplus maps to x > 0."""
    return x + math.log(-math.expm1(-x))
