"""Gradient reversal (arXiv 1409.7495): what passes it is unchanged, its gradient turns around."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ffnlab.errors import ConfigError, is_known

__all__ = ["check_strength", "reverse_gradient"]


def check_strength(strength: float | Array) -> None:
    """Raises ConfigError unless a strength that is known is one finite number of at least 0."""
    if is_known(strength) and not (np.ndim(strength) == 0 and 0 <= float(strength) < np.inf):
        raise ConfigError(f"strength={strength} must be a finite number of at least 0")


def reverse_gradient(x: Float[Array, "*d"], strength: float | Array) -> Float[Array, "*d"]:
    """x, through which a gradient g comes back as -strength g.

    What reads x learns as usual, what x is made of learns the opposite: the saddle point of two
    players is found by descending one loss.

    Args:
      x: any array of floats.
      strength: lambda, at least 0, at 0 nothing comes back; it may be traced, and no gradient
        reaches it.
    Raises:
      ConfigError: the strength is known, and negative or not finite.
    Source: Ganin et al., arXiv 1505.07818, section 4.2.

    >>> float(jax.grad(lambda x: 3 * reverse_gradient(x, 0.5))(2.0))
    -1.5
    """
    check_strength(strength)
    return reversed_by(jnp.asarray(x), jnp.asarray(strength))


@jax.custom_vjp
def reversed_by(x: Array, strength: Array) -> Array:
    """`reverse_gradient` of a strength that is an array."""
    return x


def forward(x: Array, strength: Array) -> tuple[Array, Array]:
    """(x, what the way back needs)."""
    return x, strength


def backward(strength: Array, g: Array) -> tuple[Array, Array]:
    """(-strength g in g's dtype, no gradient of the strength)."""
    return -strength.astype(g.dtype) * g, jnp.zeros_like(strength)


reversed_by.defvjp(forward, backward)
