"""Oracles: what is looked for by a network at once, climbed to for each sample by itself.

They know what they are judged by and take hundreds of steps for every channel: no method that must
answer at once, but what such a method could reach with the same parts.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Complex, Float, PyTree

from ffnlab.errors import at_least
from ffnlab.graphs.precoding import Host, Number, check_channels, gram_of, gram_rates, structured

__all__ = ["ascend", "ascended_precoder"]


def ascend(
    value: Callable[[PyTree], Float[Array, "*b"]],
    start: PyTree,
    *,
    steps: int,
    rate: float | Array,
) -> PyTree:
    """Where Adam ends that climbs so many steps; samples do not touch each other.

    Args:
      value: of each sample, what is to be large.
      start: pytree of arrays [*b, …].
      steps: how many.
      rate: of Adam.
    """
    at_least(0, steps=steps)
    optimizer = optax.adam(rate)

    def step(carry: tuple, _: None) -> tuple[tuple, None]:
        x, memory = carry
        slope = jax.grad(lambda x: -value(x).sum())(x)
        updates, memory = optimizer.update(slope, memory, x)
        return (optax.apply_updates(x, updates), memory), None

    return jax.lax.scan(step, (start, optimizer.init(start)), None, length=steps)[0][0]


def ascended_precoder(
    h: Complex[Host, "*b k n"],
    power: Number,
    noise: Number,
    *,
    valid: Bool[Host, "*b k"] | None = None,
    steps: int = 300,
    rate: float = 0.1,
) -> Complex[Array, "*b n k"]:
    """The oracle: p and q searched for each channel by itself, from equal ones, by `ascend`.

    Arguments as `wmmse`; steps and rate are those of the search.
    """
    h, power, noise, there = check_channels(h, power, noise, valid)
    return searched(h, power, noise, there, steps, rate)


@functools.partial(jax.jit, static_argnames="steps")
def searched(
    h: Array, power: Array, noise: Array, there: Array, steps: int, rate: float | Array
) -> Array:
    """`ascended_precoder`, checked."""
    gram = gram_of(h)

    def split(logits: Array) -> Array:
        kept = jnp.where(there[..., None], logits, -jnp.inf)
        return power[..., None, None] * jax.nn.softmax(kept, axis=-2)

    value = lambda logits: gram_rates(gram, *parts(split(logits)), noise).sum(-1)  # noqa: E731
    found = split(ascend(value, jnp.zeros((*there.shape, 2)), steps=steps, rate=rate))
    return structured(h, *parts(found), noise)


def parts(both: Float[Array, "*b k 2"]) -> tuple[Array, Array]:
    """p and q."""
    return both[..., 0], both[..., 1]
