"""Sparse products on NVIDIA GPUs, in Pallas Mosaic GPU, for at most four rows of x.

Nothing here needs a tensor core or TMA: one source compiles from Turing to Hopper. A decoding step
is bound by memory, and so is this: a weight row is read by 128-bit loads that are predicated on
its activation, several rows back to back, and rows that are off cost no traffic and no index list
(compacting one in XLA takes three or more launches). The activations of the next rows are read
while these are on their way. Each block of threads adds its own rows; XLA sums the blocks' results
in a fixed order, so the same input gives the same bits.

    matvec, take   a block holds some columns and walks its share of the rows
    rows           a block holds all of x and writes one number per row
    glu            one row of x: both in one pass, a block holds x and a whole sum; more rows of x,
                   or rows too long for the registers: `rows`, then `matvec`

INT4 codes become floats where they lie: (word & 15 << 4p) | bits of 2**23 is the float
2**23 + q * 16**p, and one fused multiply-add removes the bias. That arithmetic, unlike bfloat16's,
takes as long as the traffic, so rows that are off are jumped over.

Differs from TEAL and Deja Vu (Triton): no atomics, no gathered copy of the weights.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _compat
from pallas_kernels.sparse import blocks
from pallas_kernels.sparse.blocks import GpuConfig
from pallas_kernels.sparse.packed import Int4Rows

BIAS = 0x4B000000  # the bits of float32 2**23, whose last mantissa bit counts 1


class Reader:
    """Rows of one weight inside a kernel.

    Attributes:
      refs: references to the weight, or to words and scales.
      cut: the weight's `Cut`.
      size: words of a row that are read at once.
      layout: their registers.
    """

    def __init__(self, refs, cut, size):
        self.refs, self.cut, self.size = refs, cut, size
        self.layout = plgpu.Layout.WG_STRIDED((size,), cut.width)

    def zeros(self, dtype=jnp.float32):
        """Registers full of zeros."""
        return plgpu.layout_cast(jnp.zeros((self.size,), dtype), self.layout)

    def read(self, row, start, on):
        """`size` words of a row from `start` on; zeros, and no traffic, where `on` is false."""
        source = self.refs[0].at[row, pl.ds(start, self.size)]
        off = self.zeros(self.refs[0].dtype)
        return lax.cond(on, lambda: _compat.load(source, layout=self.layout), lambda: off)

    def floats(self, words):
        """The columns of each plane, [size] float32, before the scales."""
        if self.cut.planes == 1:
            return [words.astype(jnp.float32)]
        values, high = [], lax.shift_right_logical(words, jnp.int32(16))
        for p in range(self.cut.planes):
            source, at = (words, p) if p < 4 else (high, p - 4)
            biased = (source & jnp.int32(15 << 4 * at)) | jnp.int32(BIAS)
            unit = 16.0**-at
            shifted = lax.bitcast_convert_type(biased, jnp.float32) * jnp.float32(unit)
            values.append(shifted - jnp.float32(2.0**23 * unit + 8))
        return values

    def scales(self, row):
        """Multiplier of each plane of a row."""
        return [self.refs[1][row, p] for p in range(self.cut.planes)] if len(self.refs) > 1 else [1]

    def load(self, ref, *index):
        """Each plane of a float32 vector of whole rows' length."""
        parts = [pl.ds(p * self.cut.length, self.size) for p in range(self.cut.planes)]
        return [_compat.load(ref.at[*index, part], layout=self.layout) for part in parts]

    def dot(self, words, row, x):
        """<row, x> for the planes of x."""
        terms = zip(self.floats(words), self.scales(row), x, strict=True)
        return jnp.sum(functools.reduce(jnp.add, [w * (v * s) for w, s, v in terms]))

    def add(self, sums, words, row, factors):
        """sums[a][p] + factors[a] * plane p of the row, flat."""
        planes, scales = self.floats(words), self.scales(row)
        new = [w * (v * s) for v in factors for w, s in zip(planes, scales, strict=True)]
        return tuple(total + term for total, term in zip(sums, new, strict=True))


def arrays(w):
    """What a kernel gets of a weight."""
    return (w.words, w.scales) if isinstance(w, Int4Rows) else (w,)


def any_on(values):
    """Whether one of some scalars is not 0; NaN is not."""
    return functools.reduce(jnp.logical_or, [v != 0 for v in values])


def rows_of(first, unroll, rows):
    """The rows of a turn that begins with `first`; the last one for those behind the end."""
    return [jnp.minimum(first + i, rows - 1) for i in range(unroll)]


def matvec(x, w, *, config=None, interpret=False):
    """`reference.matvec` for x [m, k] and w [k, n] or `Int4Rows`: [m, n] float32."""
    config = config or blocks.pick("matvec", x.shape[0], w)
    config = blocks.settle(config, "matvec", x.shape[0], w)
    return walk(x, w, (), x.shape[1], config, interpret)


def take(x, w, ids, count, *, config=None, interpret=False):
    """`reference.take` for x [m, k], w [k, n] or `Int4Rows`, ids [c], count []: [m, n] float32."""
    listed = (ids, jnp.reshape(count, 1))
    config = blocks.settle(config or GpuConfig(), "take", x.shape[0], w)
    return walk(x, w, listed, ids.shape[0], config, interpret)


def walk(x, w, listed, entries, config, interpret):
    """Sum over rows (all, or the listed) with an x other than 0 of x_i * w[i, :].

    Args:
      x: [m, k]; w: [k, n] or `Int4Rows`.
      listed: (), or ids [c] and count [1] int32.
      entries: k, or c.
      config: `GpuConfig`.
      interpret: run in the interpreter.
    Returns:
      [m, n] float32.
    """
    m, weight, unroll = x.shape[0], blocks.cut(w, x.shape[0]), config.unroll
    splits = blocks.deal(entries, weight.columns, unroll, config.blocks)

    def kernel(*refs):
        *stored, v_ref, out = refs[: len(refs) - 1 - len(listed)] + refs[-1:]
        ids, limit = refs[-3:-1]  # where there is a list
        reader = Reader(stored, weight, weight.step)
        split = lax.axis_index("split")
        start = jnp.minimum(lax.axis_index("column") * weight.step, weight.length - weight.step)
        live = jnp.minimum(limit[0], entries) if listed else entries

        def ahead(j):
            """The values of a turn, and its rows where they come from the list."""
            first = (j * splits + split) * unroll
            at = rows_of(first, unroll, entries)
            at = [jnp.clip(ids[i], 0, weight.rows - 1) for i in at] if listed else at
            kept = [
                [jnp.where(first + i < live, v_ref[a, row], jnp.float32(0)) for a in range(m)]
                for i, row in enumerate(at)
            ]
            return kept, at if listed else []

        def turn(j, carry):
            sums, (values, listed_rows) = carry
            at = listed_rows or rows_of((j * splits + split) * unroll, unroll, entries)
            on = [any_on(v) for v in values]
            words = [reader.read(row, start, here) for row, here in zip(at, on, strict=True)]
            following = ahead(j + 1)
            for word, row, v, here in zip(words, at, values, on, strict=True):
                more = functools.partial(reader.add, words=word, row=row, factors=v)
                jump = weight.planes > 1
                sums = lax.cond(here, more, lambda s: s, sums) if jump else more(sums)
            return sums, following

        turns = lax.div(live + (splits * unroll - 1), splits * unroll)
        zeros = (reader.zeros(),) * (m * weight.planes)
        sums, _ = lax.fori_loop(0, turns, turn, (zeros, ahead(0)))
        for at, total in enumerate(sums):
            a, p = divmod(at, weight.planes)
            out[split, a, pl.ds(p * weight.length + start, weight.step)] = total

    parts = _compat.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((splits, m, w.shape[1]), jnp.float32),
        grid=(splits, weight.columns),
        grid_names=("split", "column"),
        interpret=interpret,
    )(*arrays(w), x.astype(jnp.float32), *listed)
    return parts.sum(0)


def rows(x, w_rows, gate, *, config=None, interpret=False):
    """`reference.rows` for x [m, d], w_rows [f, d] or `Int4Rows`, gate [m, f]: [m, f] float32."""
    m, weight = x.shape[0], blocks.cut(w_rows, x.shape[0], whole=True)
    config = blocks.settle(config or blocks.pick("rows", m, w_rows), "rows", m, w_rows)
    unroll = blocks.unroll_whole(w_rows, config)
    count = blocks.deal(weight.rows, 1, unroll, config.blocks)
    turns = -(-weight.rows // (count * unroll))

    def kernel(*refs):
        *stored, x_ref, gate_ref, out = refs
        reader = Reader(stored, weight, weight.length)
        block, held = lax.axis_index("block"), [reader.load(x_ref, a) for a in range(m)]

        def ahead(j):
            at = rows_of((j * count + block) * unroll, unroll, weight.rows)
            return [[gate_ref[a, row] for a in range(m)] for row in at]

        def turn(j, gates):
            first = (j * count + block) * unroll
            at = rows_of(first, unroll, weight.rows)
            words = [reader.read(r, 0, any_on(g)) for r, g in zip(at, gates, strict=True)]
            following = ahead(j + 1)
            for i, (word, row, g) in enumerate(zip(words, at, gates, strict=True)):
                dots = lambda w=word, r=row: tuple(reader.dot(w, r, v) for v in held)  # noqa: E731
                dots = lax.cond(any_on(g), dots, lambda: (jnp.float32(0),) * m)
                for a in range(m):
                    out[a, first + i] = jnp.where(g[a] == 0, jnp.float32(0), g[a] * dots[a])
            return following

        lax.fori_loop(0, turns, turn, ahead(0))

    # Entries past f repeat the last row and are cut off.
    out = _compat.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((m, count * turns * unroll), jnp.float32),
        grid=(count,),
        grid_names=("block",),
        interpret=interpret,
    )(*arrays(w_rows), x.astype(jnp.float32), gate.astype(jnp.float32))
    return out[:, : weight.rows]


def glu(gate, up_rows, down, x, *, config=None, interpret=False):
    """`reference.glu` for gate [m, f], up_rows [f, d], down [f, n], x [m, d]: [m, n] float32."""
    config = config or blocks.pick("glu", x.shape[0], up_rows, down)
    if blocks.in_one_pass(x.shape[0], up_rows, down):
        return one_pass(gate[0], up_rows, down, x[0], config, interpret)[None]
    inner = rows(x, up_rows, gate, config=config, interpret=interpret)
    return matvec(inner, down, config=config, interpret=interpret)


def one_pass(gate, up_rows, down, x, config, interpret):
    """`glu` in one kernel: gate [f], x [d] -> [n] float32."""
    above, below = (blocks.cut(w, 1, whole=True) for w in (up_rows, down))
    unroll = min(blocks.unroll_whole(w, config) for w in (up_rows, down))
    config = blocks.settle(config, "glu", 1, up_rows, down)
    count = blocks.deal(above.rows, 1, unroll, config.blocks)
    turns = -(-above.rows // (count * unroll))

    def kernel(*refs):
        *stored, gate_ref, x_ref, out = refs
        split = len(arrays(up_rows))
        up = Reader(stored[:split], above, above.length)
        down_reader = Reader(stored[split:], below, below.length)
        block, held = lax.axis_index("block"), up.load(x_ref)

        def ahead(j):
            first = (j * count + block) * unroll
            at = rows_of(first, unroll, above.rows)
            seen = [first + i < above.rows for i in range(unroll)]
            return [
                jnp.where(here, gate_ref[row], jnp.float32(0))
                for row, here in zip(at, seen, strict=True)
            ]

        def turn(j, carry):
            sums, gates = carry
            at = rows_of((j * count + block) * unroll, unroll, above.rows)
            pairs = [
                (up.read(r, 0, g != 0), down_reader.read(r, 0, g != 0))
                for r, g in zip(at, gates, strict=True)
            ]
            following = ahead(j + 1)
            for (above_words, below_words), row, g in zip(pairs, at, gates, strict=True):

                def more(sums, a=above_words, b=below_words, row=row, g=g):
                    return down_reader.add(sums, b, row, [g * up.dot(a, row, held)])

                sums = lax.cond(g != 0, more, lambda s: s, sums)
            return sums, following

        zeros = (down_reader.zeros(),) * below.planes
        sums, _ = lax.fori_loop(0, turns, turn, (zeros, ahead(0)))
        for p, total in enumerate(sums):
            out[block, pl.ds(p * below.length, below.length)] = total

    parts = _compat.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((count, down.shape[1]), jnp.float32),
        grid=(count,),
        grid_names=("block",),
        interpret=interpret,
    )(*arrays(up_rows), *arrays(down), gate.astype(jnp.float32), x.astype(jnp.float32))
    return parts.sum(0)
