"""Many summaries of a node as one of a fixed width: sums, means, and random projections.

    project_norm_sum     x' = sum_i u(h_i R_i)          u(v) = v / max(|v|, 1e-12)
    project_norm_mean    that over the number of terms
    norm_sum, norm_mean  without R_i;    norm_mean_norm  u of the latter;    sum, mean  as they are

Terms are added one after the other, so that one at a time is held. R_i [width of h_i, width of the
node's kind] is drawn anew for every term: "sparse" has +-sqrt(3) with probability 1/6 each and else
0, "gaussian" N(0, 1), "xavier" N(0, 2 / (rows + columns)), whose scale the norm takes out again.
"""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ["PROJECTIONS", "SQUASHES", "Squash", "direction"]

LEAST = 1e-12  # length that is divided by: a row of zeros stays one


class Squash(NamedTuple):
    """A way to make one summary of many.

    Attributes:
      projects: whether terms are projected to the width of the kind; else they must have it.
      norms: whether each term is divided by its length.
      averages: whether the sum is divided by the number of terms.
      ends_normed: whether the result is divided by its length.
    """

    projects: bool = False
    norms: bool = False
    averages: bool = False
    ends_normed: bool = False

    def term(self, h: Float[Array, "n a"], matrix: Array | None) -> Float[Array, "n d"]:
        """What a summary adds to the sum, float32.

        Args:
          h: the summary.
          matrix: [a, d] of a way that projects; else None.
        """
        h = h.astype(jnp.float32)
        h = h if matrix is None else h @ matrix
        return direction(h) if self.norms else h

    def end(self, total: Float[Array, "n d"], terms: int) -> Float[Array, "n d"]:
        """The new rows, of the sum of so many terms."""
        total = total / terms if self.averages else total
        return direction(total) if self.ends_normed else total


SQUASHES: Mapping[str, Squash] = MappingProxyType(
    {
        "project_norm_sum": Squash(projects=True, norms=True),
        "project_norm_mean": Squash(projects=True, norms=True, averages=True),
        "norm_sum": Squash(norms=True),
        "norm_mean": Squash(norms=True, averages=True),
        "norm_mean_norm": Squash(norms=True, averages=True, ends_normed=True),
        "sum": Squash(),
        "mean": Squash(averages=True),
    }
)


@functools.partial(jax.jit, static_argnums=(1, 2))
def sparse(key: Array, rows: int, columns: int) -> Float[Array, "rows columns"]:
    """+-sqrt(3) with probability 1/6 each, else 0."""
    drawn = jax.random.uniform(key, (rows, columns))
    return jnp.sqrt(3.0) * ((drawn >= 5 / 6).astype(jnp.float32) - (drawn < 1 / 6))


@functools.partial(jax.jit, static_argnums=(1, 2))
def gaussian(key: Array, rows: int, columns: int) -> Float[Array, "rows columns"]:
    """N(0, 1)."""
    return jax.random.normal(key, (rows, columns))


@functools.partial(jax.jit, static_argnums=(1, 2))
def xavier(key: Array, rows: int, columns: int) -> Float[Array, "rows columns"]:
    """N(0, 2 / (rows + columns))."""
    return gaussian(key, rows, columns) * (2 / (rows + columns)) ** 0.5


PROJECTIONS: Mapping[str, Callable[[Array, int, int], Array]] = MappingProxyType(
    {"sparse": sparse, "gaussian": gaussian, "xavier": xavier}
)


def direction(x: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """x / max(|x|, 1e-12) by rows, with a finite gradient at zeros.

    >>> direction(jnp.array([[3.0, 4.0], [0.0, 0.0]])).round(4).tolist()[1]
    [0.0, 0.0]
    """
    squares = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(squares, LEAST**2))
