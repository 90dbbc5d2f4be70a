"""Noise schedules: of NoProp (arXiv 2503.24322), the cosine and one that is learned, and that of a
variance-preserving diffusion, `preserving`.

abar(t) is the level of signal at times from noise (0) to signal (1). The learned one:

    abar(t) = sigmoid(-gamma(t)),   gamma(t) = g0 + (g1 - g0) (1 - gbar(t)),
    gbar(t) = (m(t) - m(0)) / (m(1) - m(0)),   m(t) = slope t + sum_k out_k sigmoid(in_k t + bias_k)

m rises because its slope and the weights in and out are softplus of what is learned, and so does
abar because g1 - g0 is; gbar is 0 and 1 at the ends, whatever is learned. So abar rises from
sigmoid(-g1) to sigmoid(-g0), and SNR = exp(-gamma) with it.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from ffnlab.errors import ConfigError

__all__ = [
    "BETA",
    "HIGHEST",
    "LOWEST",
    "TIMES",
    "LearnedSchedule",
    "cosine",
    "denoising",
    "noised",
    "preserving",
]

BETA = (0.1, 20.0)  # rate of noise of a variance-preserving diffusion, at times 0 and 1
TIMES = 999.0  # what a model that finds such noise is told of a time of 1
LOWEST, HIGHEST = 0.01, 0.99  # beyond, the signal-to-noise ratio and its weights explode


def cosine(t: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """abar at times from 0 to 1: .01 + .98 sin^2(pi t / 2)."""
    return LOWEST + (HIGHEST - LOWEST) * jnp.sin(0.5 * math.pi * t) ** 2


def preserving(t: Float[Array, "*n"]) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
    """(alpha, sigma) of x_t = alpha x_0 + sigma noise at times from 0 (signal) to 1 (noise).

    alpha^2 = exp(-b0 t - (b1 - b0) t^2 / 2),  sigma^2 = 1 - alpha^2,   b0 = .1, b1 = 20

    Source:
      The VP SDE of arXiv 2011.13456, dx = -b(t) x / 2 dt + sqrt(b(t)) dw, b linear in t.

    >>> [round(float(x), 4) for x in preserving(jnp.float32(1.0))]
    [0.0066, 1.0]
    """
    low, high = BETA
    log = -low * t - (high - low) * t**2 / 2
    return jnp.exp(log / 2), jnp.sqrt(-jnp.expm1(log))


def noised(
    images: Float[Array, "b h w c"], key: Key[Array, ""]
) -> tuple[Float[Array, "b h w c"], Float[Array, "b"], Float[Array, "b h w c"]]:
    """Images at times drawn from U(0, 1): (x_t, t, the noise in them).

    Args:
      images: with values in [0, 1]; x_0 is them in [-1, 1].
      key: of times and noise.
    """
    of_time, of_noise = jax.random.split(key)
    t = jax.random.uniform(of_time, (len(images),))
    noise = jax.random.normal(of_noise, images.shape)
    alpha, sigma = (value[:, None, None, None] for value in preserving(t))
    return alpha * (2 * images.astype(jnp.float32) - 1) + sigma * noise, t, noise


def denoising(
    model: Callable, batch: Float[Array | np.ndarray, "b h w c"], moment: Any
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean squared error of the noise that a model finds in noised images.

    mean (model(x_t, 999 t) - e)^2,  x_t = alpha x_0 + sigma e,  t ~ U(0, 1),  e ~ N(0, 1)

    Args:
      model: (images [b, h, w, c], times [b]) -> noise [b, h, w, c].
      batch: images in [0, 1]; x_0 is them in [-1, 1].
      moment: a `ffnlab.losses.Moment`, whose key draws times and noise.
    Source:
      arXiv 2310.13545, `sde.py` of its code; alpha and sigma are those of `preserving`.
    """
    x, t, noise = noised(jnp.asarray(batch), moment.key)
    mean = jnp.mean(jnp.square(model(x, TIMES * t).astype(jnp.float32) - noise))
    return mean, {}


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
