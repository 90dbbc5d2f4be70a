"""Sparse products on TPUs (plain Pallas, which any device can interpret), for at most four rows.

A TPU moves memory by its own engine, so skipping is not to ask: the weight stays in HBM, and each
row that is on is one copy into VMEM, issued while the rows before it are multiplied. What a copy
can name is a whole 32-bit sublane: one row of float32 or of INT4 words, two rows of bfloat16, which
are then read when either is on. That is a unit; UNITS of them are a block.

XLA sorts each block's units, those that are on first, and their factors with them (128 numbers in
many blocks side by side; compacting all rows at once would need one long sort). The kernel walks
over the blocks with two buffers: the copies of the next block fly while this block's rows, GROUP at
a time and only as many as are on, meet their factors on the vector unit in float32.

    matvec, take   the rows' sums, kept in VMEM to the last block
    rows           one number per row, in sorted order; XLA sorts them back
    glu            `rows`, then `matvec`
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.sparse import blocks
from pallas_kernels.sparse.packed import Int4Rows
from pallas_kernels.sparse.reference import only_listed

UNITS = 128  # of a block: the lanes of a register, along which the factors lie
GROUP = 32  # rows multiplied at a time: whole tiles of bfloat16


def matvec(x, w, *, interpret=False):
    """`reference.matvec` for x [m, k] and w [k, n] or `Int4Rows`: [m, n] float32."""
    m, planes, stored = x.shape[0], blocks.planes(w), words(w)
    unit, length = blocks.unit(w), stored.shape[1]
    ids, counts, factors = deal(x.astype(jnp.float32), w)
    width = blocks.tpu_columns(w)
    run = pl.pallas_call(
        functools.partial(add_rows, m, planes),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(length // width, counts.shape[0]),
            in_specs=[
                pl.BlockSpec((1, *factors.shape[1:]), lambda i, s, *_: (s, 0, 0)),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=pl.BlockSpec((m, planes, width), lambda i, s, *_: (0, 0, i)),
            scratch_shapes=[
                *buffers(stored, width, unit, factors),
                pltpu.VMEM((m * planes, 8, width), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((m, planes, length), jnp.float32),
        interpret=interpret,
    )
    return run(ids, counts, factors, stored).reshape(m, planes * length)


def take(x, w, ids, count, *, interpret=False):
    """`reference.take`: `matvec` of x with the entries that are not listed set to 0."""
    return matvec(only_listed(x.astype(jnp.float32), ids, count), w, interpret=interpret)


def rows(x, w_rows, gate, *, interpret=False):
    """`reference.rows` for x [m, d], w_rows [f, d] or `Int4Rows`, gate [m, f]: [m, f] float32."""
    m, planes, stored = x.shape[0], blocks.planes(w_rows), words(w_rows)
    unit, length = blocks.unit(w_rows), stored.shape[1]
    gate = gate.astype(jnp.float32)
    ids, counts, factors = deal(gate, w_rows)
    count, size = counts.shape[0], UNITS * unit
    x = x.astype(jnp.float32).reshape(m * planes, length)
    run = pl.pallas_call(
        functools.partial(write_dots, m, planes),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(1, count),
            in_specs=[
                pl.BlockSpec((1, *factors.shape[1:]), lambda i, s, *_: (s, 0, 0)),
                pl.BlockSpec(x.shape, lambda i, s, *_: (0, 0)),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=pl.BlockSpec((1, 8, size), lambda i, s, *_: (s, 0, 0)),
            scratch_shapes=[
                *buffers(stored, length, unit, factors),
                pltpu.VMEM((size, 8), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((count, 8, size), jnp.float32),
        interpret=interpret,
    )
    y = run(ids, counts, factors, x, stored)[:, :m].reshape(count, m, UNITS, unit)
    return jnp.where(gate == 0, jnp.float32(0), put_back(ids, y)[:, : gate.shape[1]])


def glu(gate, up_rows, down, x, *, interpret=False):
    """`reference.glu`: `rows`, then `matvec`."""
    inner = rows(x, up_rows, gate, interpret=interpret)
    return matvec(inner, down, interpret=interpret)


def words(w):
    """The array whose rows are copied."""
    return w.words if isinstance(w, Int4Rows) else w


def buffers(stored, width, unit, factors):
    """Scratch of both kernels: two blocks of rows, their semaphores, the turned factors."""
    return (
        pltpu.VMEM((2, UNITS * unit, width), stored.dtype),
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.VMEM(factors.shape[:0:-1], jnp.float32),
    )


def deal(values, w):
    """Sorts the units of each block, those with a value other than 0 first.

    Args:
      values: [m, k] float32; NaN counts as on.
      w: array [k, n], k a multiple of its unit, or `Int4Rows`.
    Returns:
      ids [b, UNITS] int32, units of w; counts [b] int32, how many of a block's are on; factors
      [b, f, UNITS * unit] float32 in the order of ids: value a, times the scale of plane p, at
      a * planes + p of axis 1, which is padded to a multiple of 8.
    """
    m, unit = values.shape[0], blocks.unit(w)
    scales = (w.scales.T,) if isinstance(w, Int4Rows) else ()
    carried = jnp.concatenate([values, *scales])
    k = values.shape[1] // unit
    carried = carried.reshape(carried.shape[0], k, unit)
    carried = jnp.pad(carried, ((0, 0), (0, -k % UNITS), (0, 0)))
    carried = carried.reshape(carried.shape[0], -1, UNITS, unit)
    off = (carried[:m] == 0).all((0, 3))
    ids = lax.broadcasted_iota(jnp.int32, (off.size, 1), 0).reshape(off.shape)
    lanes = [carried[c, :, :, r] for c in range(carried.shape[0]) for r in range(unit)]
    operands = (off.astype(jnp.int32), ids, *lanes)
    _, ids, *lanes = lax.sort(operands, dimension=1, num_keys=1)
    lanes = jnp.stack(lanes, -1).reshape(*off.shape, -1, unit)
    lanes = lanes.transpose(0, 2, 1, 3).reshape(off.shape[0], -1, UNITS * unit)
    factors = lanes[:, :m]
    if scales:
        factors = (factors[:, :, None] * lanes[:, None, m:]).reshape(off.shape[0], -1, UNITS)
    factors = jnp.pad(factors, ((0, 0), (0, -factors.shape[1] % 8), (0, 0)))
    return ids, jnp.sum(1 - off.astype(jnp.int32), 1, dtype=jnp.int32), factors


def put_back(ids, y):
    """Numbers of sorted units in the units' own order: y [b, m, UNITS, unit] -> [m, k]."""
    lanes = [y[:, a, :, r] for a in range(y.shape[1]) for r in range(y.shape[3])]
    lanes = jnp.stack(lax.sort((ids, *lanes), dimension=1, num_keys=1)[1:])
    lanes = lanes.reshape(y.shape[1], y.shape[3], -1)
    return lanes.transpose(0, 2, 1).reshape(y.shape[1], -1)


def copying(ids, counts, w, buffer, arrived):
    """Two functions of a block: one starts the copies of its units, one waits for them."""
    width, unit = buffer.shape[2], buffer.shape[1] // UNITS
    columns = pl.ds(pl.multiple_of(pl.program_id(0) * width, 128), width)

    def copy(block, j):
        row, slot = pl.multiple_of(ids[block, j] * unit, unit), lax.rem(block, 2)
        place = pl.ds(pl.multiple_of(j * unit, unit), unit)
        return pltpu.make_async_copy(
            w.at[pl.ds(row, unit), columns], buffer.at[slot, place], arrived.at[slot]
        )

    def start(block):
        lax.fori_loop(0, counts[block], lambda j, _: copy(block, j).start(), None)

    def wait(block):
        lax.fori_loop(0, counts[block], lambda j, _: copy(block, j).wait(), None)

    return start, wait


def over_groups(planes, ids, counts, factors, w, buffer, arrived, held, step):
    """Reads the rows of this turn's block that are on and gives them to `step`, GROUP at a time.

    step: called with the first row's place in the block and the planes of the rows, each
    [GROUP, width] float32, zeros past the last row that is on.
    """
    block, unit = pl.program_id(1), buffer.shape[1] // UNITS
    start, wait = copying(ids, counts, w, buffer, arrived)
    pl.when(block == 0)(lambda: start(block))
    pl.when(block + 1 < pl.num_programs(1))(lambda: start(block + 1))
    wait(block)
    held[...] = factors[0].T
    live = counts[block] * unit

    def group(i, _):
        first = pl.multiple_of(i * GROUP, GROUP)
        here = first + lax.broadcasted_iota(jnp.int32, (GROUP, 1), 0) < live
        read = buffer[lax.rem(block, 2), pl.ds(first, GROUP), :]
        step(first, [jnp.where(here, v, jnp.float32(0)) for v in floats(read, planes)])

    lax.fori_loop(0, lax.div(live + (GROUP - 1), GROUP), group, None)


def floats(read, planes):
    """The columns of each plane of some rows, [GROUP, width] float32, before the scales."""
    if planes == 1:
        return [read.astype(jnp.float32)]
    return [((read >> (4 * p) & 15) - 8).astype(jnp.float32) for p in range(planes)]


def add_rows(m, planes, ids, counts, factors, w, out, buffer, arrived, held, total):
    """The kernel of `matvec`: total[a * planes + p] += factor * plane p, over all blocks."""

    @pl.when(pl.program_id(1) == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    def step(first, values):
        for at in range(m * planes):
            factor = held[pl.ds(first, GROUP), at : at + 1]
            terms = values[at % planes] * factor
            total[at] += terms.reshape(GROUP // 8, 8, terms.shape[1]).sum(0)

    over_groups(planes, ids, counts, factors, w, buffer, arrived, held, step)

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _():
        for at in range(m * planes):
            out[at // planes, at % planes, :] = total[at].sum(0)


def write_dots(m, planes, ids, counts, factors, x, w, out, buffer, arrived, held, dots):
    """The kernel of `rows`: out[a] = sum over planes of factor * <plane, x>, in sorted order."""

    def step(first, values):
        for a in range(m):
            products = [
                (v * x[a * planes + p : a * planes + p + 1, :]).sum(1, keepdims=True)
                * held[pl.ds(first, GROUP), a * planes + p : a * planes + p + 1]
                for p, v in enumerate(values)
            ]
            dots[pl.ds(first, GROUP), a : a + 1] = functools.reduce(jnp.add, products)

    over_groups(planes, ids, counts, factors, w, buffer, arrived, held, step)
    out[0] = dots[...].T
