"""Regression: the mean squared error of what a model gives."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ["squares"]


def squares(
    model: Callable, batch: tuple[Any, Any]
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean squared error of outputs, in float32.

    Args:
      model: inputs -> outputs.
      batch: inputs, and outputs of the model's shape.
    Returns:
      (mean over all numbers [], {"rms": its root []}).
    """
    apart = model(batch[0]).astype(jnp.float32) - batch[1]
    mean = jnp.mean(apart**2)
    return mean, {"rms": jnp.sqrt(mean)}
