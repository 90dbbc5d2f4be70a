"""Timing a product, and the floor that its bytes and operations set."""

import math
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

SETS, TURNS, LARGEST = 8, 15, 4e9  # weight sets, repeats, bytes of all sets
ROUNDS = 4  # times that the longer of two programs goes through the sets
# Bytes, bfloat16 and FP8 operations per second by the makers' data sheets; H200's are measured on
# such a card (a copy, a large product), its FP8 is assumed.
RATES = {
    "H200": (4.3e12, 790e12, 1500e12),
    "H100": (3.35e12, 989e12, 1979e12),
    "A100": (1.555e12, 312e12, 312e12),
    "L4": (0.3e12, 121e12, 242e12),
    "T4": (0.32e12, 65e12, 65e12),
}


class Absent(Exception):
    """What a row needs is not on this machine; the message says what."""


class Work(NamedTuple):
    """A product to time.

    Attributes:
      run: called with `common` and one weight set.
      common: a tree of arrays, the activations.
      weights: gives a weight set for a key (torch's for a number).
      nbytes: that must move: a weight set, what comes in and what goes out.
      flops: operations.
      fp8: whether the operations are the FP8 ones.
    """

    run: Callable[..., object]
    common: object
    weights: Callable[..., object]
    nbytes: float
    flops: float
    fp8: bool


def measure(work, *, sets=SETS, turns=TURNS):
    """Seconds of one product, without what a call costs the host.

    Two programs hold `sets` products and several times as many; the difference of their medians
    over turns, divided by the products between them, leaves out the dispatch. Every product has
    tokens of its own, so that nothing is rounded once for several.

    Args:
      work: a `Work`.
      sets: weight sets; fewer where they, or results and tokens, would not fit LARGEST bytes.
      turns: repeats of each program.
    Returns:
      seconds.
    """
    weights, own = jax.eval_shape(work.weights, key(0)), nbytes(work.common)
    own += nbytes(jax.eval_shape(work.run, work.common, weights))
    sets, rounds = counts(nbytes(weights) + own, own, sets)
    make = jax.jit(work.weights)
    held = [make(key(i)) for i in range(sets)]
    once = jax.jit(work.run)  # lowered once, not for every set
    program = jax.jit(lambda own: [once(*pair) for pair in own])
    pairs = [(varied(work.common, i), held[i % sets]) for i in range(sets * rounds)]
    few, many = ((lambda pairs=some: program(pairs)) for some in (pairs[:sets], pairs))
    return alone(few, many, sets, sets * rounds, turns, jax.block_until_ready)


def counts(product, kept, sets):
    """How many weight sets fit, and how often the longer program goes through them.

    Args:
      product: bytes of a weight set, its tokens and its result.
      kept: of them tokens and result, which every product of a program has.
      sets: as many are wanted.

    >>> counts(6e7, 1e5, 8), counts(1e9, 5e8, 8)
    ((8, 4), (4, 2))
    """
    sets = max(1, min(sets, int(LARGEST // max(product, 1))))
    return sets, max(2, min(ROUNDS, int(LARGEST // max(kept * sets, 1))))


def alone(few, many, fewer, more, turns, wait):
    """Seconds of one product, from two programs that hold `fewer` and `more` of them.

    Args:
      few, many: run the programs; wait: waits for what they return.
      fewer, more: products in each.
      turns: repeats of each.
    """
    seconds: dict[int, list[float]] = {fewer: [], more: []}
    for run in (few, many):
        wait(run())
    for _ in range(turns):
        for run, count in ((few, fewer), (many, more)):
            start = time.perf_counter()
            wait(run())
            seconds[count].append(time.perf_counter() - start)
    short, long = (statistics.median(seconds[count]) for count in (fewer, more))
    # Where the clock cannot tell them apart, the dispatch is counted in.
    return (long - short) / (more - fewer) if long > short else long / more


def nbytes(tree):
    """Bytes of a tree of arrays or of their shapes."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def varied(common, i):
    """Tokens of a product of its own: the floats of a tree, their channels turned by i."""

    def turned(x):
        return jnp.roll(x, i, axis=-1) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(turned, common)


class Row(NamedTuple):
    """A line of the table.

    Attributes:
      task: what is computed; rows of one task are compared.
      name: by what.
      make: gives the `Work`; nothing is allocated before. Raises `Absent`.
      anywhere: whether a CPU can run it in reasonable time.
      measure: gives the seconds of the `Work`, with `sets` and `turns`.
      early: whether it is timed before all that is not: what is asked first on a GPU.
    """

    task: str
    name: str
    make: Callable[[], Work]
    anywhere: bool
    measure: Callable[..., float] = measure
    early: bool = False


def key(i):
    """A random key per weight set."""
    return jax.random.key(i)


def floor(work, kind):
    """Seconds below which no kernel can be on a device of this name; None for unknown ones.

    Args:
      work: a `Work`; of it `nbytes`, `flops` and `fp8`.
      kind: the device's name, as its driver gives it.
    """
    name = next((name for name in RATES if name in kind.upper().split() or name in kind), None)
    if name is None:
        return None
    rate, bfloat16, fp8 = RATES[name]
    return max(work.nbytes / rate, work.flops / (fp8 if work.fp8 else bfloat16))
