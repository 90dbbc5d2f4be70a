"""The information-bottleneck curve of a known joint distribution, by Blahut-Arimoto.

    p(t|x) ~ p(t) exp(-beta KL(p(y|x) || p(y|t)))
    p(t) = sum_x p(x) p(t|x),     p(y|t) = sum_x p(y|x) p(x|t)

in turns: I(X;T) - beta I(T;Y) does not rise. Where y follows from x the curve is a straight line.

Source: Tishby, Pereira and Bialek, physics/0004057.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ffnlab.errors import ConfigError, at_least, is_known

__all__ = ["Bottleneck", "bottleneck"]

TINY = 1e-30


class Bottleneck(NamedTuple):
    """Points of the curve, in nats.

    Attributes:
      x: [betas], I(X;T).
      y: [betas], I(T;Y).
      objective: [betas, turns], I(X;T) - beta I(T;Y) after every turn.
      encoder: [betas, x, t], p(t|x).
    """

    x: Float[Array, "b"]
    y: Float[Array, "b"]
    objective: Float[Array, "b turns"]
    encoder: Float[Array, "b x t"]


def bottleneck(
    joint: Float[Array, "x y"],
    betas: Float[Array, "b"],
    *,
    states: int,
    turns: int = 200,
    key: Array,
) -> Bottleneck:
    """Points of the curve.

    Args:
      joint: p(x, y), adding up to 1.
      betas: how much I(T;Y) is worth, each > 0 and finite; every one is solved from a start of its
        own.
      states: of T, >= 1.
      turns: >= 1.
      key: of the starts, encoders that are nearly even.
    Raises:
      ConfigError: a joint that is no matrix, is negative or does not add up to 1, states or turns
        below 1, a beta that is not positive and finite.
    """
    at_least(1, states=states, turns=turns)
    if joint.ndim != 2 or betas.ndim != 1:
        raise ConfigError(f"joint {joint.shape} and betas {betas.shape}: [x, y] and [b] are needed")
    if is_known(joint) and (
        not jnp.all(joint >= 0) or not jnp.isclose(joint.sum(), 1.0, atol=1e-4)
    ):
        raise ConfigError(
            f"joint adds up to {float(joint.sum()):g}, its least is {float(joint.min()):g}; "
            "probabilities are not negative and add up to 1"
        )
    if is_known(betas) and not jnp.all((betas > 0) & (betas < math.inf)):
        raise ConfigError(f"betas={betas}: each must be positive and finite")
    px = joint.sum(1)
    given = joint / jnp.maximum(px, TINY)[:, None]  # p(y|x)
    starts = jax.random.normal(key, (len(betas), len(px), states))
    return jax.jit(jax.vmap(lambda beta, start: solved(px, given, beta, start, turns)))(
        betas, starts
    )


def solved(
    px: Float[Array, "x"],
    given: Float[Array, "x y"],
    beta: Float[Array, ""],
    start: Float[Array, "x t"],
    turns: int,
) -> Bottleneck:
    """One point."""

    def turn(encoder: Array, _: None) -> tuple[Array, Array]:
        pt, decoder = marginals(px, given, encoder)
        logs = jnp.log(jnp.maximum(given, TINY))[:, None] - jnp.log(jnp.maximum(decoder, TINY))
        apart = jnp.sum(given[:, None] * logs, axis=-1)  # KL, [x, t]
        encoder = jax.nn.softmax(jnp.log(jnp.maximum(pt, TINY)) - beta * apart, axis=-1)
        x, y = informations(px, given, encoder)
        return encoder, x - beta * y

    encoder, objective = jax.lax.scan(turn, jax.nn.softmax(start, -1), None, length=turns)
    return Bottleneck(*informations(px, given, encoder), objective, encoder)


def marginals(px: Array, given: Array, encoder: Array) -> tuple[Array, Array]:
    """(p(t), p(y|t) [t, y])."""
    pt = px @ encoder
    back = encoder * px[:, None] / jnp.maximum(pt, TINY)  # p(x|t), [x, t]
    return pt, back.T @ given


def informations(px: Array, given: Array, encoder: Array) -> tuple[Array, Array]:
    """(I(X;T), I(T;Y)) in nats."""
    pt, decoder = marginals(px, given, encoder)
    py = px @ given
    log = lambda p: jnp.log(jnp.maximum(p, TINY))  # noqa: E731
    x = jnp.sum(px[:, None] * encoder * (log(encoder) - log(pt)))
    y = jnp.sum(pt[:, None] * decoder * (log(decoder) - log(py)))
    return x, y
