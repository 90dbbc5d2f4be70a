"""What is tried for the sparse products: blocks of threads and rows in flight, at 70 % off."""

import functools
import itertools

import jax
import jax.numpy as jnp

from pallas_kernels import backend, sparse
from pallas_kernels.bench.measure import Work
from pallas_kernels.bench.rows import each, normal, tokens
from pallas_kernels.sparse import blocks
from pallas_kernels.tuning.search import Task

KEPT = 0.3  # share of rows that are on
BOUND = 1e-3  # relative norm: float32 sums of 16-bit products in another order, rounded nowhere
FIELDS = {"matvec": ("unroll", (4, 8, 16)), "glu": ("unroll_pairs", (1, 2))}
PER_CORE = (1, 2, 4, 6)  # blocks of threads for each multiprocessor


def candidates(name):
    """The configurations that could be the fastest: a list of `GpuConfig`."""
    field, values = FIELDS[name]
    cores, grid = backend.cores(), itertools.product(PER_CORE, values)
    return [blocks.GpuConfig(blocks=count * cores, **{field: value}) for count, value in grid]


def task(name, k, n, packed, backend="mosaic"):
    """The `Task` of a product with one row of x.

    Args:
      name: "matvec" (w [k, n]) or "glu" (up_rows and down [n, k], as a feed-forward layer's).
      k, n: rows and columns; of "glu" the width and the channels.
      packed: INT4 rows instead of bfloat16.
      backend: "mosaic", or "mosaic_interpret".
    """
    shapes = [(k, n)] if name == "matvec" else [(n, k)] * 2
    weights = each(*(stored(shape, packed) for shape in shapes))
    on = jax.random.uniform(jax.random.key(5), (1, shapes[0][0])) < KEPT
    active = jnp.where(on, tokens(*on.shape), 0)
    common = active if name == "matvec" else (active, tokens(1, k))
    own = functools.cache(lambda: jax.jit(weights)(jax.random.key(0)))
    expected = functools.cache(lambda: call(name, "reference", None, common, own()))

    def work(config):
        entries = KEPT * sum(a * b for a, b in shapes)
        run = functools.partial(call, name, backend, config)
        return Work(run, common, weights, entries * (0.5 if packed else 2), 2 * entries, False)

    def error(config):
        y = jax.jit(work(config).run)(common, own())
        return float(jnp.linalg.norm(y - expected()) / jnp.linalg.norm(expected()))

    stored_as = jax.eval_shape(weights, jax.random.key(0))
    facts = blocks.facts(1, *stored_as)
    kind = "int4" if packed else "bfloat16"
    title = f"sparse {name}, {kind}, 1 token, {k} x {n}"
    tried, default = candidates(name), blocks.settle(blocks.GpuConfig(), name, 1, *stored_as)
    return Task(title, f"sparse.{name}", 1, facts, default, tried, named, work, error, BOUND)


def stored(shape, packed):
    """A function of a key: a random weight as the kernel reads it."""
    make = normal(shape)
    return (lambda key: sparse.pack(make(key).astype(jnp.float32))) if packed else make


def named(config):
    """A configuration's numbers as they are kept."""
    return {name: getattr(config, name) for name in blocks.TUNED}


def call(name, backend, config, common, weights):
    """The product in float32 by one backend."""
    if name == "matvec":
        return sparse.matvec(common.astype(jnp.float32), *weights, backend=backend, config=config)
    (gate, x), (up, down) = (a.astype(jnp.float32) for a in common), weights
    return sparse.glu(gate, up, down, x, backend=backend, config=config)
