"""A kernel's value with the gradient of a formula that XLA differentiates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def call(run, plain, options, operands):
    """run(*operands, **options), differentiated as plain(*operands, **options).

    Args:
      run: the kernel.
      plain: the differentiable formula of the same value.
      options: a tuple of pairs (name, value), hashable.
      operands: a tuple of trees of arrays; integers get float0.
    Returns:
      an array.
    """
    return run(*operands, **dict(options))


def call_forward(run, plain, options, operands):
    """The value, and the operands for the gradient."""
    return call(run, plain, options, operands), operands


def call_backward(run, plain, options, operands, dy):
    """Cotangents of the operands."""
    leaves, tree = jax.tree.flatten(operands)
    moves = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]

    def formula(floats):
        floats = iter(floats)
        merged = [next(floats) if m else leaf for m, leaf in zip(moves, leaves, strict=True)]
        return plain(*tree.unflatten(merged), **dict(options))

    y, pull = jax.vjp(formula, [leaf for m, leaf in zip(moves, leaves, strict=True) if m])
    found = iter(pull(dy.astype(y.dtype))[0])
    return (
        tree.unflatten(
            [
                next(found) if m else np.zeros(leaf.shape, jax.dtypes.float0)
                for m, leaf in zip(moves, leaves, strict=True)
            ]
        ),
    )


call.defvjp(call_forward, call_backward)
