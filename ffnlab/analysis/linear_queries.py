"""What the affine map of a function says: votes, the share of its constant, singular vectors.

Columns and rows are `Interpreter.matvec` and `rmatvec` of unit vectors (arXiv 1908.05168).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from ffnlab.analysis.linear_interpreter import Interpreter
from ffnlab.errors import ConfigError, at_least, is_known

__all__ = ["Singular", "Votes", "singular", "votes"]


Index = int | Int[Array, ""]


class Votes(NamedTuple):
    """What an output is made of at x0: entries of the input, and a constant.

    Attributes:
      of: each entry's part, F[i] x0; in the input's shape.
      residual: r[i]; `of.sum() + residual` is the output.
      share: |r| / (|r| + |sum of the parts|).
    """

    of: Float[Array, "*in"]
    residual: Float[Array, ""]
    share: Float[Array, ""]


def votes(at: Interpreter, index: Index | tuple[Index, ...]) -> Votes:
    """The parts of one output.

    Args:
      at: the map.
      index: of the output, an integer for each axis; one that is traced is taken as it is.
    Raises:
      ConfigError: index outside of the output.
    """
    out = jax.eval_shape(at, at.x0)
    index = index if isinstance(index, tuple) else (index,)
    if len(index) != len(out.shape) or not all(
        -n <= i < n for i, n in zip(index, out.shape, strict=False) if is_known(i)
    ):
        raise ConfigError(f"index={index} is outside of an output of shape {out.shape}")
    parts = at.rmatvec(jnp.zeros(out.shape, out.dtype).at[index].set(1)) * at.x0
    residual = at.residual[index]
    whole = jnp.abs(residual) + jnp.abs(parts.sum())
    share = jnp.abs(residual) / jnp.where(whole == 0, 1, whole)
    return Votes(parts, residual, share)


class Singular(NamedTuple):
    """Leading singular triplets of F, F v_i = s_i u_i.

    Attributes:
      u: [k, *out], orthonormal.
      s: [k], falling.
      v: [k, *in], orthonormal.
    """

    u: Float[Array, "k *out"]
    s: Float[Array, "k"]
    v: Float[Array, "k *in"]


def singular(at: Interpreter, k: int = 8, *, key: Key[Array, ""], turns: int = 100) -> Singular:
    """Leading singular vectors of F by block iteration; F is never built.

    A turn is F' F of all vectors of the block and a QR decomposition; where singular values lie
    close together, their vectors need more turns than they do themselves.

    Args:
      at: the map.
      k: triplets, in 1..min(inputs, outputs).
      key: of the vectors to begin with.
      turns: at least 1.
    Raises:
      ConfigError: k or turns out of range.
    """
    out = jax.eval_shape(at, at.x0)
    most = min(at.x0.size, out.size)
    at_least(1, turns=turns)
    if not 1 <= k <= most:
        raise ConfigError(f"k={k} must lie in 1..{most}")
    return iterated(at, k, key, turns)


@functools.partial(jax.jit, static_argnums=(1, 3))
def iterated(at: Interpreter, k: int, key: Key[Array, ""], turns: int) -> Singular:
    """`singular`, of checked arguments."""
    shape, out = at.x0.shape, jax.eval_shape(at, at.x0).shape
    ahead = jax.vmap(lambda v: at.matvec(v.reshape(shape)).reshape(-1), 1, 1)
    back = jax.vmap(lambda u: at.rmatvec(u.reshape(out)).reshape(-1), 1, 1)

    def turn(block: Float[Array, "n k"], _: None) -> tuple[Float[Array, "n k"], None]:
        return jnp.linalg.qr(back(ahead(block)))[0], None

    start = jnp.linalg.qr(jax.random.normal(key, (at.x0.size, k), at.x0.dtype))[0]
    block, _ = jax.lax.scan(turn, start, None, length=turns)
    # The singular vectors of F on the span of the block, by a small decomposition.
    u, s, turned = jnp.linalg.svd(ahead(block), full_matrices=False)
    v = block @ turned.T
    return Singular(u.T.reshape(k, *out), s, v.T.reshape(k, *shape))
