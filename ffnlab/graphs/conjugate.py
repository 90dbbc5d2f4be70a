"""Conjugate gradients with a fixed number of steps: A x = b by products with A alone.

    r = b - A x, p = r, and in every step, for each right-hand side by itself,
    a = |r|^2 / (p^H A p),   x <- x + a p,   r' = r - a A p,   p <- r' + (|r'|^2 / |r|^2) p

of a Hermitian positive definite A (Hestenes, Stiefel 1952). As many steps as A has rows are exact
but for rounding; fewer are a truncated solution, whose error is the least that any polynomial of A
of that degree leaves, in the norm of A.

The steps are a `lax.scan` and are differentiated as they are: the derivative is that of the
truncated solution. `jax.scipy.sparse.linalg.cg` stops by a tolerance and is differentiated by the
implicit rule, that of an exact one. A right-hand side that is solved to the last bit rests, so that
steps beyond that divide by nothing.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Inexact

from ffnlab.errors import ConfigError, at_least

__all__ = ["conjugate_gradients"]


def conjugate_gradients(
    matvec: Callable[[Array], Array],
    b: Inexact[Array, "n *r"],
    *,
    steps: int,
    x0: Inexact[Array, "..."] | None = None,
) -> Inexact[Array, "n *r"]:
    """The solution of A x = b after so many steps.

    Args:
      matvec: x -> A x, of arrays like b; A is Hermitian positive definite, over the first axis.
      b: right-hand sides, real or complex: [n] for one, [n, …] for one in each column. (An unknown
        that is a matrix is one right-hand side: ravel it.)
      steps: of all, at least 0.
      x0: where to begin; zeros when None.
    Returns:
      x, like b.
    Raises:
      ConfigError: fewer steps than 0, numbers narrower than 32 bits, or a matvec or x0 of another
        shape.

    >>> a = jnp.array([[2.0, 1.0], [1.0, 2.0]])
    >>> conjugate_gradients(lambda x: a @ x, jnp.array([3.0, 3.0]), steps=2)
    Array([1., 1.], dtype=float32)
    """
    at_least(0, steps=steps)
    if not jnp.issubdtype(b.dtype, jnp.inexact) or jnp.finfo(b.dtype).bits < 32:
        raise ConfigError(
            f"b is {b.dtype}; floats or complex numbers of 32 bits or more are needed"
        )
    for name, found in (("matvec(b)", jax.eval_shape(matvec, b)), ("x0", x0)):
        if found is not None and (found.shape, found.dtype) != (b.shape, b.dtype):
            raise ConfigError(
                f"{name} is {found.dtype}{list(found.shape)}; that of b is accepted, "
                f"{b.dtype}{list(b.shape)}"
            )
    x, r = (jnp.zeros_like(b), b) if x0 is None else (x0, b - matvec(x0))
    least = jnp.finfo(b.dtype).eps ** 2 * inner(b, b)

    def step(carry: tuple, _: None) -> tuple[tuple, None]:
        x, r, p, square = carry
        product = matvec(p)
        curvature = inner(p, product)
        moves = (square > least) & (curvature > 0)
        a = ratio(moves, square, curvature)
        x, r = x + a * p, r - a * product
        after = inner(r, r)
        return (x, r, r + ratio(moves, after, square) * p, after), None

    return jax.lax.scan(step, (x, r, r, inner(r, r)), None, length=steps)[0][0]


def inner(a: Inexact[Array, "n *r"], b: Inexact[Array, "n *r"]) -> Float[Array, "*r"]:
    """Real part of a^H b, of each column."""
    return jnp.sum((jnp.conj(a) * b).real, axis=0)


def ratio(
    moves: Bool[Array, "*r"], above: Float[Array, "*r"], below: Float[Array, "*r"]
) -> Float[Array, "*r"]:
    """above / below, and 0 where nothing moves; its derivative is finite everywhere."""
    return jnp.where(moves, above / jnp.where(moves, below, 1), 0)
