"""What may follow a product while its values are at hand: a residual added, squares summed."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp


def after(run) -> Callable[..., Any]:
    """A product with the epilogue in plain jnp, which XLA fuses into what follows.

    Args:
      run: a backend of `reference.matmul`'s contract.
    Returns:
      a function of the same operands, and of `finish`'s `residual` and `with_sumsq` by name, that
      returns what `finish` does.
    """

    def followed(*operands, residual=None, with_sumsq=False, **options):
        return finish(run(*operands, **options), residual, with_sumsq)

    return followed


def finish(y, residual, with_sumsq):
    """y + residual and the sum of squares of its rows.

    Args:
      y: [m, n].
      residual: [m, n], or None for nothing to add.
      with_sumsq: whether the sums are wanted.
    Returns:
      [m, n] (float32 where something was added), and [m] float32 or None.
    """
    if residual is not None:
        y = y.astype(jnp.float32) + residual.astype(jnp.float32)
    return y, sumsq(y) if with_sumsq else None


def sumsq(y):
    """Sums of squares over the last axis, float32."""
    return jnp.sum(jnp.square(y.astype(jnp.float32)), axis=-1)


def backward(y, dy, dsumsq):
    """The cotangent of y + residual, which is both terms' own, from those of `finish`'s results.

    Args:
      y: [m, n], looked at only for `dsumsq`.
      dy: [m, n]; dsumsq: [m] or None.
    """
    return dy if dsumsq is None else dy + 2 * dsumsq[:, None] * y
