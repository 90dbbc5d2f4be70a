"""Annealed Gaussian noise on gradients (arXiv 1511.06807).

    g_t <- g_t + N(0, sigma_t^2),   sigma_t^2 = eta / (1 + t)^gamma,   t = 0, 1, 2, ...

For every entry of every leaf, drawn anew at each step. Clipping belongs before it, the optimizer
after it, and in data-parallel training it is added once, to the mean gradient: as a piece of the
optimizer that is so by construction. It helps networks that start badly to leave a plateau and
harms those that do not need it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from ffnlab.errors import ConfigError, is_known

__all__ = ["NoiseState", "gradient_noise", "noise_scale"]


class NoiseState(NamedTuple):
    """What the noise depends on; a checkpoint must hold it, or noise would start anew at eta.

    Attributes:
      step: [] int32, steps taken.
      key: of the next draw.
    """

    step: Int[Array, ""]
    key: Array


def noise_scale(
    eta: float | Array, gamma: float | Array, step: Int[Array, "*n"] | int
) -> Float[Array, "*n"]:
    """sigma_t = sqrt(eta / (1 + t)^gamma), the standard deviation at step t."""
    return jnp.sqrt(eta / (1.0 + jnp.asarray(step)) ** gamma)


def gradient_noise(
    eta: float | Array, gamma: float | Array = 0.55, *, key: Array | None
) -> optax.GradientTransformation:
    """Adds the noise; `optax.add_noise`, drawn in float32 whatever the gradient's dtype.

    A draw in bfloat16 has a coarse grid, on which small noise is rounded away. Wrap it in
    `optax.masked` for some of the leaves only.

    Args:
      eta: variance of the first step, >= 0; the paper takes .01, .3 or 1.
      gamma: exponent of the decay, >= 0.
      key: a random key; the same key, gradients and mesh or none give the same noise.
    Returns:
      an optax transformation, with eta = 0 the identity, bit for bit.
    Raises:
      ConfigError: eta or gamma is negative or not a number, or there is no key.
      ValueError: from `update`, when a leaf is not of floating dtype.
    """
    for name, value in {"eta": eta, "gamma": gamma}.items():
        if is_known(value) and not value >= 0:
            raise ConfigError(f"{name}={value} must not be negative")
    if key is None:
        raise ConfigError("key=None: gradient noise needs a jax.random.key")

    def init(params: PyTree) -> NoiseState:
        del params
        return NoiseState(jnp.int32(0), jnp.copy(key))  # a step donates it; the caller's stays

    def update(
        updates: PyTree, state: NoiseState, params: PyTree = None
    ) -> tuple[PyTree, NoiseState]:
        del params
        following, draw = jax.random.split(state.key)
        after = NoiseState(optax.safe_increment(state.step), following)
        if is_known(eta) and not eta:
            return updates, after
        sigma = noise_scale(eta, gamma, state.step)
        noise = optax.tree.random_like(draw, updates, unit_normal)
        return jax.tree.map(lambda g, n: noisy(g, n, sigma), updates, noise), after

    return optax.GradientTransformation(init, update)


def unit_normal(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """N(0, 1) in float32, or in `dtype` where that is wider."""
    return jax.random.normal(key, shape, jnp.promote_types(dtype, jnp.float32))


def noisy(gradient: Array, noise: Array, sigma: Array) -> Array:
    """One leaf plus noise of unit variance times sigma, in the dtype of the leaf."""
    if not jnp.issubdtype(gradient.dtype, jnp.floating):
        raise ValueError(f"a gradient has dtype {gradient.dtype}; floating ones are accepted")
    return (gradient + sigma * noise).astype(gradient.dtype)
