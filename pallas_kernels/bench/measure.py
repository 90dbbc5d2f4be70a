"""Timing a product, and the floor that its bytes and operations set."""

import math
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax

SETS, TURNS, LARGEST = 8, 15, 4e9  # weight sets in one program, repeats, bytes of all sets
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
    """Seconds of one product: the median over turns of a program that holds `sets` of them.

    Args:
      work: a `Work`.
      sets: weight sets; fewer where they would not fit LARGEST bytes.
      turns: repeats of the program.
    Returns:
      seconds.
    """
    leaves = jax.tree.leaves(jax.eval_shape(work.weights, key(0)))
    one = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    sets = max(1, min(sets, int(LARGEST // max(one, 1))))
    make = jax.jit(work.weights)
    own = [make(key(i)) for i in range(sets)]
    once = jax.jit(work.run)  # lowered once, not for every set
    program = jax.jit(lambda common, own: [once(common, weights) for weights in own])
    jax.block_until_ready(program(work.common, own))
    seconds = []
    for _ in range(turns):
        start = time.perf_counter()
        jax.block_until_ready(program(work.common, own))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) / sets


class Row(NamedTuple):
    """A line of the table.

    Attributes:
      task: what is computed; rows of one task are compared.
      name: by what.
      make: gives the `Work`; nothing is allocated before. Raises `Absent`.
      anywhere: whether a CPU can run it in reasonable time.
      measure: gives the seconds of the `Work`, with `sets` and `turns`.
    """

    task: str
    name: str
    make: Callable[[], Work]
    anywhere: bool
    measure: Callable[..., float] = measure


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
