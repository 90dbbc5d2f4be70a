"""The diffusion behind NoProp (arXiv 2503.24322): schedules, posterior steps, weights, the ODE.

Time runs from noise (0) to signal. A class y stands for a row u of an embedding, and

    q(z_t | y) = N(sqrt(abar_t) u, (1 - abar_t) I),   abar increasing,   SNR = abar / (1 - abar)
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ffnlab.errors import ConfigError
from ffnlab.models.noise import cosine

__all__ = [
    "Posterior",
    "check_schedule",
    "cosine",
    "flow_field",
    "heun",
    "kl_to_noise",
    "posterior",
    "sample",
    "snr",
    "weights_of",
]


class Posterior(NamedTuple):
    """One step of inference from z_{t-1} to z_t, for t = 1 .. T.

        z_t = a u_hat + b z_{t-1} + sqrt(c) eps

    Attributes:
      a, b, c: [T]; entry t - 1 is that of step t.
    """

    a: Float[Array, "T"]
    b: Float[Array, "T"]
    c: Float[Array, "T"]


def check_schedule(abar: Float[np.ndarray, "times"]) -> None:
    """Raises ConfigError unless abar has two or more values that rise strictly inside (0, 1)."""
    abar = np.asarray(abar)
    if abar.ndim != 1 or len(abar) < 2:
        raise ConfigError(f"abar of shape {abar.shape} needs the times 0 .. T with T >= 1")
    if not (np.all(abar > 0) and np.all(abar < 1) and np.all(np.diff(abar) > 0)):
        raise ConfigError(f"abar={abar.tolist()} must rise strictly, inside (0, 1)")


def snr(abar: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """The signal-to-noise ratio abar / (1 - abar)."""
    return abar / (1 - abar)


def weights_of(abar: Float[Array, "times"]) -> Float[Array, "T"]:
    """What a squared error of block t counts: SNR(t) - SNR(t - 1), [T]."""
    return jnp.diff(snr(abar))


def posterior(abar: Float[Array, "times"]) -> Posterior:
    """The steps of inference of a schedule, abar [T + 1]."""
    before, after = abar[:-1], abar[1:]
    alpha = before / after
    noise = 1 - before
    return Posterior(
        jnp.sqrt(after) * (1 - alpha) / noise,
        jnp.sqrt(alpha) * (1 - after) / noise,
        (1 - after) * (1 - alpha) / noise,
    )


def sample(u: Float[Array, "*n d"], abar: Float[Array, "*m"], key: Array) -> Float[Array, "*n d"]:
    """A draw of q(z | y) at noise level abar, which broadcasts against u without its last axis."""
    abar = jnp.asarray(abar)[..., None]
    return jnp.sqrt(abar) * u + jnp.sqrt(1 - abar) * jax.random.normal(key, u.shape, u.dtype)


def kl_to_noise(u: Float[Array, "*n d"], abar: Float[Array, ""]) -> Float[Array, "*n"]:
    """KL(q(z_0 | y) || N(0, I)) of q's mean sqrt(abar) u and variance 1 - abar."""
    d = u.shape[-1]
    return 0.5 * (abar * jnp.sum(u * u, -1) - d * abar - d * jnp.log1p(-abar))


def flow_field(
    abar: Callable[[Array], Array], t: Float[Array, ""], z: Float[Array, "*n d"], u: Array
) -> Float[Array, "*n d"]:
    """dz/dt of the probability flow towards u: abar' / (2 (1 - abar)) (u / sqrt(abar) - z)."""
    level, slope = jax.value_and_grad(abar)(t)
    return slope / (2 * (1 - level)) * (u / jnp.sqrt(level) - z)


def heun(
    field: Callable[[Array, Array], Array], z: Float[Array, "*n d"], steps: int
) -> Float[Array, "*n d"]:
    """Integrates dz/dt = field(t, z) from 0 to 1 by Heun's method, second order."""
    h = 1.0 / steps

    def step(z: Array, i: Array) -> tuple[Array, None]:
        t = i * h
        slope = field(t, z)
        return z + 0.5 * h * (slope + field(t + h, z + h * slope)), None

    return jax.lax.scan(step, z, jnp.arange(steps))[0]
