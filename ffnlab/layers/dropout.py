"""Dropout as a function: no layer stores a key."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ffnlab.errors import ConfigError

__all__ = ["drop_path", "dropout"]


def dropout(
    x: Float[Array, "*b d"], rate: float | Array, key: Array | None
) -> Float[Array, "*b d"]:
    """x / (1 - rate) where kept, which each entry is with probability 1 - rate, and 0 elsewhere
    (arXiv 1207.0580; scaled so that the mean is x).

    Args:
      x: activations.
      rate: probability of being dropped, 0 to 1; may be traced, as a schedule's is, and is not
        checked then.
      key: of the draw, of a loss's `Moment` for instance; None is inference: x itself.
    Raises:
      ConfigError: a rate outside 0..1.
    """
    return kept_of(x, rate, key, x.shape)


def drop_path(
    x: Float[Array, "n *b"], rate: float | Array, key: Array | None
) -> Float[Array, "n *b"]:
    """`dropout` of whole examples: what a residual block adds, of some of them left out
    (stochastic depth, arXiv 1603.09382).

    Args: as `dropout`, x with the examples first.
    Raises: as `dropout`.
    """
    return kept_of(x, rate, key, (len(x), *(1,) * (x.ndim - 1)))


def kept_of(
    x: Float[Array, "..."], rate: float | Array, key: Array | None, shape: tuple[int, ...]
) -> Float[Array, "..."]:
    """x / (1 - rate) where a draw of a shape keeps it."""
    if isinstance(rate, int | float) and not 0 <= rate <= 1:
        raise ConfigError(f"rate={rate} must lie in 0..1")
    if key is None:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, shape)
    # At a rate of 1 nothing is kept, and a finite factor keeps the gradient from being 0 * inf.
    factor = 1 / jnp.maximum(1 - rate, jnp.finfo(jnp.float32).eps)
    return jnp.where(kept, x * factor.astype(x.dtype), jnp.zeros((), x.dtype))
