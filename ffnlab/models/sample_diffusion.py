"""Images drawn from a model that predicts noise (`ffnlab.losses.denoising`): two samplers.

The process x_t = alpha x_0 + sigma noise is run back from t = 1 to a little above 0. As the SDE

    dx = -b/2 x dt + sqrt(b) dw;  backwards  dx = (b / sigma noise(x, t) - b/2 x) dt + sqrt(b) dw

by steps of Euler and Maruyama; or as its ordinary differential equation by the second-order
multistep solver DPM-Solver++ (2M, arXiv 2211.01095), which finds x_0 and extrapolates it:

    x <- sigma' / sigma x - alpha' (e^-h - 1) (3/2 x_0 - 1/2 x_0 of the step before)

with h the step in log(alpha / sigma). Each sampler is one compiled loop.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ffnlab.errors import ConfigError, at_least
from ffnlab.models.noise import BETA, TIMES, preserving

__all__ = ["euler_maruyama", "multistep"]

Model = Callable[[Array, Array], Array]
LAST = 1e-3  # time at which sampling ends


@functools.partial(jax.jit, static_argnames=("shape", "steps"))
def euler_maruyama(
    model: Model, key: Array, *, shape: tuple[int, ...], steps: int = 1000
) -> Float[Array, "b h w c"]:
    """Images by the reverse SDE.

    Args:
      model: (x [b, h, w, c], times [b]) -> the noise in x; a pytree.
      key: of all that is drawn.
      shape: of the result, [b, h, w, c].
      steps: of equal length in t.
    Returns:
      images, 0 and 1 the ends of what was learned; values beyond are not cut off.
    Raises:
      ConfigError: no steps, or another shape.
    """
    check(shape, steps)
    start, rest = jax.random.split(key)
    times = jnp.linspace(1.0, LAST, steps + 1)

    def step(x: Array, given: tuple) -> tuple[Array, None]:
        t, dt, key = given
        rate = BETA[0] + (BETA[1] - BETA[0]) * t
        _, sigma = preserving(t)
        drift = -rate / 2 * x + rate / sigma * noise_of(model, x, t)
        noise = jax.random.normal(key, x.shape)
        return x - dt * drift + jnp.sqrt(rate * dt) * noise, None

    given = times[:-1], times[:-1] - times[1:], jax.random.split(rest, steps)
    x, _ = jax.lax.scan(step, jax.random.normal(start, shape), given)
    return (x + 1) / 2


@functools.partial(jax.jit, static_argnames=("shape", "steps"))
def multistep(
    model: Model, key: Array, *, shape: tuple[int, ...], steps: int = 50
) -> Float[Array, "b h w c"]:
    """Images by the probability-flow ODE; arguments, result and errors as `euler_maruyama`.

    Steps are of equal length in log(alpha / sigma), the first one of the first order.
    """
    check(shape, steps)
    first, last = (log_ratio(jnp.float32(t)) for t in (1.0, LAST))
    times = time_of(jnp.linspace(first, last, steps + 1))
    h = (last - first) / steps

    def step(carry: tuple, given: tuple) -> tuple[tuple, None]:
        x, before = carry
        t, to, r = given
        (alpha, sigma), (next_alpha, next_sigma) = preserving(t), preserving(to)
        clean = (x - sigma * noise_of(model, x, t)) / alpha
        mixed = (1 + r) * clean - r * before
        return (next_sigma / sigma * x - next_alpha * jnp.expm1(-h) * mixed, clean), None

    x = jax.random.normal(key, shape)
    orders = jnp.where(jnp.arange(steps) == 0, 0.0, 0.5)  # there is nothing before the first
    (x, _), _ = jax.lax.scan(step, (x, jnp.zeros(shape)), (times[:-1], times[1:], orders))
    return (x + 1) / 2


def noise_of(model: Model, x: Array, t: Array) -> Array:
    """The noise that a model finds at one time of the process."""
    return model(x, jnp.full(len(x), TIMES * t)).astype(jnp.float32)


def log_ratio(t: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """log(alpha / sigma), which falls with t."""
    alpha, sigma = preserving(t)
    return jnp.log(alpha / sigma)


def time_of(ratio: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """The time with a value of `log_ratio`: b0 t + (b1 - b0) t^2 / 2 = log(1 + e^(-2 ratio))."""
    low, high = BETA
    total = jnp.logaddexp(0.0, -2 * ratio)
    return 2 * total / (low + jnp.sqrt(low**2 + 2 * (high - low) * total))


def check(shape: tuple[int, ...], steps: int) -> None:
    """Raises ConfigError for no steps, or what is no shape of images."""
    at_least(1, steps=steps)
    if len(shape) != 4 or min(shape) < 1:
        raise ConfigError(f"shape={shape}: [b, h, w, c], all at least 1, is accepted")
