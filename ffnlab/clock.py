"""Times of several forms of a computation, taken in turns: what else the machine does falls on all.

    turn t: each form once, each until its result is there, beginning with form t mod n

Forms are compiled and run before the first turn. What is said is the median over turns and the
middle half of them; of two forms it is said of the ratio in each turn, which a machine that is slow
for a while changes little.
"""

import dataclasses
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import numpy as np
from jaxtyping import Float, PyTree

from ffnlab.errors import ConfigError, at_least
from ffnlab.progress import track

__all__ = ["Call", "Spread", "Times", "compiled", "in_turns", "timed"]

Call = Callable[[], PyTree]
N = TypeVar("N", bound=Hashable)


class Spread(NamedTuple):
    """What turns gave.

    Attributes:
      median: over turns.
      low, high: the first and the third quartile.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Float[np.ndarray, "turns"]) -> "Spread":
        """The median and the quartiles of values.

        >>> Spread.of(np.array([3.0, 1.0, 2.0, 4.0, 9.0]))
        Spread(median=3.0, low=2.0, high=4.0)
        """
        low, median, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
        return cls(median, low, high)


@dataclasses.dataclass(frozen=True)
class Times(Generic[N]):
    """What forms took.

    Attributes:
      seconds: of each form, [turns].

    >>> times = Times({"small": np.array([1.0, 2.0, 1.0]), "large": np.array([2.0, 8.0, 3.0])})
    >>> times.of("large").median, times.over("small", "large").median
    (3.0, 0.3333333333333333)
    """

    seconds: Mapping[N, Float[np.ndarray, "turns"]]

    def of(self, name: N) -> Spread:
        """Seconds of a form."""
        return Spread.of(self.seconds[name])

    def over(self, name: N, other: N) -> Spread:
        """Seconds of a form over those of another in the same turn."""
        return Spread.of(self.seconds[name] / self.seconds[other])


def compiled(form: Callable[..., PyTree], *operands: PyTree, device: Any = None) -> Call:
    """form(*operands) as a call without arguments, compiled when it is first called.

    Operands lie on the device, flattened: a call takes a module apart no more.

    Args:
      form: of pytrees of arrays.
      operands: what it is called with.
      device: one `jax.Device`; the first one when None.

    >>> import jax.numpy as jnp
    >>> compiled(jnp.add, jnp.ones(2), jnp.ones(2))().tolist()
    [2.0, 2.0]
    """
    leaves, structure = jax.tree.flatten(operands)
    leaves = jax.device_put(leaves, jax.devices()[0] if device is None else device)
    run = jax.jit(lambda leaves: form(*structure.unflatten(leaves)))
    return lambda: run(leaves)


def timed(call: Call) -> float:
    """Seconds until the result of a call is there."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def in_turns(
    calls: Mapping[N, Call], turns: int = 21, *, warm: int = 1, label: str | None = None
) -> Times[N]:
    """Times calls in turns.

    Args:
      calls: forms by name.
      turns: in which each runs once; 20 or more where a claim rests on it.
      warm: how often each runs before, to be compiled and to fill caches.
      label: of a bar on a terminal; none when None.
    Raises:
      ConfigError: no calls, or turns or warm below 1.

    >>> in_turns({"sum": lambda: jax.numpy.ones(3).sum()}, turns=2).seconds["sum"].shape
    (2,)
    """
    at_least(1, turns=turns, warm=warm)
    if not calls:
        raise ConfigError("calls={} leaves nothing to time")
    for call in calls.values():
        for _ in range(warm):
            jax.block_until_ready(call())
    names, seconds = list(calls), np.empty((turns, len(calls)))
    for turn in track(range(turns), label or "", enabled=label is not None):
        for i in range(len(names)):
            which = (turn + i) % len(names)
            seconds[turn, which] = timed(calls[names[which]])
    return Times(dict(zip(names, seconds.T, strict=True)))
