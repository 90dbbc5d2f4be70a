"""Prefill attention on Hopper (Pallas Mosaic GPU): 16-bit or FP8 products, tiles of keys in flight.

A block of threads owns 128 queries of one head: two warp groups compute 64 each (`softmax`), a
third loads. Two or three tiles of keys and values are on their way or in use at any time, so that
copies, the products of the tensor core and the softmax of another tile overlap.

    S = (q k^T) * q_scale * k_scale      tensor core, float32 sums
    m, l, P = online softmax of S        registers, times the values' scale
    O = O * exp(m_old - m) + P v         tensor core, P from registers

Of 8 bits P v is a fresh sum per tile: that bounds the short accumulation of Hopper's FP8 products
to one tile. Codes of INT4 are exact in e4m3 and in 16 bits, so XLA widens them before (a byte or
two each, against a product with every query), and only their scales enter here. The values' scale
is multiplied into P before it is rounded; P, and with it the sum that divides, is in units of the
head's largest scale, a constant added to the exponents. For FP8 queries are rounded here, by token
and head, as they are loaded, and values come transposed, [d, s]: 8-bit operands of the tensor core
must be contiguous along the sum.

Differs from FireQ: scores and exponentials stay in float32 (there float16); P is rounded after the
values' scale instead of rounding value times scale; a softmax overlaps the scores of the next tile
only, not also the last tile's product with the values: registers do not hold both.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _compat
from pallas_kernels.attention.fragments import (
    BY_ROW,
    LAYOUT,
    ROWS,
    full,
    key_order,
    spread,
    tiled,
)
from pallas_kernels.attention.softmax import attend
from pallas_kernels.numerics import E4M3, E4M3_MAX

GROUPS = 2  # warp groups that compute
BLOCK = ROWS * GROUPS
# Registers of a thread: three warp groups start with 168 each and share those 504 anew. One that
# asks for more than the others gave back waits for ever.
COMPUTING, LOADING = 232, 40
REGISTERS = 192  # of a thread, as `Call.ahead` counts: more of them spill (compiled)
TINY = 1e-30  # a scale of queries that is 0 would turn hidden scores into NaN
SHIFT = 90.0  # the most that is added to exponents of base 2: sums of long prompts stay finite


@dataclasses.dataclass(frozen=True)
class Call:
    """Static facts of a call.

    Attributes:
      queries, keys: t and s without padding.
      kv_heads, group: heads of the keys, and query heads that share one.
      d: channels of a head.
      tile: keys per tile; stages: tiles in flight.
      window: keys a query sees, or None.
      scaled: whether keys and values have scales.
      unit: multiplies the scores, for base-2 exponentials.
      dtype: of the products' operands; out: of the output.
      interpret: whether the interpreter runs it.
    """

    queries: int
    keys: int
    kv_heads: int
    group: int
    d: int
    tile: int
    stages: int
    window: int | None
    scaled: bool
    unit: float
    dtype: jnp.dtype
    out: jnp.dtype
    interpret: bool

    @property
    def narrow(self):
        """Whether the products are FP8."""
        return self.dtype.itemsize == 1

    @property
    def ahead(self):
        """Whether the scores of the next tile are computed during the softmax of this one.

        A thread then holds scores of two tiles, a sum of values, and scales and exponentials.
        """
        scales = self.scaled * self.dtype.itemsize * self.tile // 4
        return self.tile + self.d // 2 + scales <= REGISTERS

    @property
    def vectors(self):
        """How many operands are vectors, see `launch`."""
        return 2 * self.scaled

    def tiles(self, first):
        """Range of tiles that the queries from `first` on see, and of those that need no mask.

        Args:
          first: index of the block's first query, int32.
        Returns:
          (begin, inner, edge, last): a mask is needed before `inner` and from `edge` to `last`.
        """
        at = first + self.keys - self.queries  # the last key that query `first` sees
        last = lax.div(jnp.minimum(at + BLOCK, self.keys) - 1, self.tile)
        begin = inner = jnp.int32(0)
        if self.window is not None:
            begin = lax.div(jnp.maximum(at - self.window + 1, 0), self.tile)
            inner = pl.cdiv(jnp.maximum(at + BLOCK - self.window, 0), self.tile)
        inner = jnp.clip(inner, begin, last)
        return begin, inner, jnp.clip(lax.div(at + 1, self.tile), inner, last), last


class Scratch(NamedTuple):
    """Shared memory and barriers of a block: buffers of operands, and when they are full or free.

    The keys' scales fill with the keys, the values' with the values; `out` is there where `q` is
    too narrow to hold it, and holds the queries before they are rounded.
    """

    q: Any
    k: Any
    v: Any
    scales: Any
    out: Any
    q_full: Any
    k_full: Any
    v_full: Any
    k_free: Any
    v_free: Any


def prefill(q, k, v, k_scale, v_scale, *, scale, tile, precision, window, interpret=False):
    """Same contract as `reference.prefill`, to the rounding described above.

    Args:
      q: [b, t, heads, d], bfloat16 or float16.
      k, v: [b, s, kv, d], q's dtype or int8 codes; int8 with precision "fp8".
      k_scale, v_scale: [b, s, kv] float32, or both None.
      scale: a number that multiplies the scores.
      tile: 64 or 128.
      precision: "fp8", or "float32" for products of 16-bit numbers with float32 sums.
      window: keys a query sees, or None.
      interpret: run the body in the interpreter.
    Returns:
      [b, t, heads, d] in q's dtype.
    """
    t, heads, (s, kv) = *q.shape[1:3], k.shape[1:3]
    dtype = jnp.dtype(E4M3 if precision == "fp8" else q.dtype)
    stages, scaled = 3 if tile * dtype.itemsize <= 128 else 2, k_scale is not None
    # Scores are compared before they meet the unit, which therefore must be positive.
    sign = (scale > 0) - (scale < 0)
    out, q, unit = q.dtype, q if sign == 1 else q * sign, abs(scale) or 1.0
    fixed = (tile, stages, window, scaled, unit * math.log2(math.e), dtype, out, interpret)
    call = Call(t, s, kv, heads // kv, q.shape[3], *fixed)
    k, v = (pad(x.astype(dtype), 1, tile) for x in (k, v))
    if call.narrow:
        v = key_order(jnp.moveaxis(v, 1, 3))
    vectors = ()
    if scaled:  # both in one copy
        by_token = jnp.moveaxis(jnp.stack([k_scale, v_scale]), 2, 3)
        vectors = pad(by_token, 3, tile), jnp.max(jnp.abs(v_scale), axis=1)
    return launch(call, pad(q, 1, BLOCK), k, v, vectors)[:, :t]


def pad(x, axis, multiple):
    """x with zeros at the end of an axis, whose length becomes a multiple."""
    return jnp.pad(x, [(0, -n % multiple if i == axis else 0) for i, n in enumerate(x.shape)])


def launch(call, q, k, v, vectors):
    """The kernel on padded operands.

    Args:
      call: static facts.
      q: [b, T, heads, d] in call.out; k: [b, S, kv, d]; v: the same, or [b, kv, d, S] for FP8.
      vectors: with scales those of keys and values [2, b, kv, S], and the values' largest [b, kv].
    Returns:
      [b, T, heads, d] in call.out.
    """
    b, padded, heads, d = q.shape
    n, tile, dtype = call.stages, call.tile, call.dtype

    def smem(*shape, dtype=dtype):
        return plgpu.SMEM(shape, dtype, transforms=tiled(shape[-1], dtype))

    full, value = 1 + call.scaled, (n, d, tile) if call.narrow else (n, tile, d)
    scratch = Scratch(
        q=smem(GROUPS, ROWS, d),
        k=smem(n, tile, d),
        v=smem(*value),
        scales=(plgpu.SMEM((n, tile), jnp.float32),) * 2 if call.scaled else (),
        out=smem(GROUPS, ROWS, d, dtype=call.out) if call.narrow else (),
        q_full=plgpu.Barrier(num_barriers=GROUPS),
        k_full=plgpu.Barrier(num_arrivals=full, num_barriers=n),
        v_full=plgpu.Barrier(num_arrivals=full, num_barriers=n),
        k_free=plgpu.Barrier(num_arrivals=GROUPS, num_barriers=n),
        v_free=plgpu.Barrier(num_arrivals=GROUPS, num_barriers=n),
    )
    return _compat.kernel(
        functools.partial(body, call),
        out_type=jax.ShapeDtypeStruct(q.shape, call.out),
        grid=order(padded // BLOCK, heads, b),
        grid_names=("block", "head", "batch"),
        num_threads=GROUPS + 1,
        thread_name="wg",
        approx_math=True,
        interpret=call.interpret,
        scratch_types=list(scratch),
    )(q, k, v, *vectors)


def order(blocks, heads, batch):
    """The grid, whose first axis a GPU walks last: the longest blocks of all heads come first."""
    return blocks, heads, batch


def body(call, q, k, v, *refs):
    """One block of threads: 128 queries of one head of one sequence."""
    vectors, (out, *buffers) = refs[: call.vectors], refs[call.vectors :]
    scratch = Scratch(*buffers)
    batch, head = lax.axis_index("batch"), lax.axis_index("head")
    # The last queries see most keys: they start first.
    blocks = q.shape[1] // BLOCK
    first = (blocks - 1 - lax.axis_index("block")) * BLOCK
    kv_head = lax.div(head, call.group)
    wg = lax.axis_index("wg")

    @pl.when(wg < GROUPS)
    def _():
        plgpu.set_max_registers(COMPUTING, action="increase")
        row = first + wg * ROWS
        rows = pl.ds(row, ROWS)
        wide = (scratch.out if call.narrow else scratch.q).at[wg]
        plgpu.copy_gmem_to_smem(q.at[batch, rows, head], wide, scratch.q_full.at[wg])
        shift = exponent(call, vectors[1][batch, kv_head]) if call.scaled else None
        plgpu.barrier_wait(scratch.q_full.at[wg])
        unit = jnp.float32(call.unit)
        if call.narrow:
            unit = rounded(wide, scratch.q.at[wg], unit)
        y = attend(call, wg, row, call.tiles(first), unit, shift, scratch)
        wide[...] = y.astype(call.out)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(wide, out.at[batch, rows, head])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == GROUPS)
    def _():
        plgpu.set_max_registers(LOADING, action="decrease")
        values = v.at[batch, kv_head] if call.narrow else v.at[batch, :, kv_head]
        scales = [vectors[0].at[i, batch, kv_head] for i in range(2 * call.scaled)]
        feed(call, call.tiles(first), k.at[batch, :, kv_head], values, scales, scratch)


def exponent(call, largest):
    """What is added to exponents, base 2, so that P is at most 448 (FP8) or 1 (16 bits): [64].

    It multiplies the sum that divides as well, and need not be exact.

    Args:
      call: static facts.
      largest: the head's largest scale of values.
    """
    top = math.log2(E4M3_MAX) if call.narrow else 0.0
    log = jnp.log(full((ROWS,), largest, BY_ROW)) * jnp.float32(1 / math.log(2))
    return jnp.minimum(jnp.float32(top) - log, jnp.float32(SHIFT))  # where all are 0, SHIFT


def rounded(q, codes, unit):
    """Rounds queries q [64, d] to e4m3 `codes`, both in shared memory; scales times unit, [64]."""
    q = _compat.load(q, layout=LAYOUT, optimized=False).astype(jnp.float32)
    scale = jnp.max(jnp.abs(q), axis=1) * jnp.float32(1 / E4M3_MAX)
    scale = jnp.where(scale == 0, jnp.float32(1), scale)
    _compat.store(codes, (q / spread(scale, q.shape, 0)).astype(E4M3))
    plgpu.commit_smem()
    return jnp.maximum(scale * unit, jnp.float32(TINY))


def feed(call, tiles, k, v, scales, scratch):
    """The warp group that loads: tiles of keys [tile, d], of values and of their scales [tile]."""
    begin, _, _, last = tiles

    def load(i, _):
        slot, keys = lax.rem(i, call.stages), pl.ds((begin + i) * call.tile, call.tile)
        scaled = [(x.at[keys], y) for x, y in zip(scales, scratch.scales, strict=True)]
        values = v.at[:, keys] if call.narrow else v.at[keys]

        def fill(full, free, *pairs):
            pl.when(i >= call.stages)(lambda: plgpu.barrier_wait(free.at[slot]))
            for source, target in pairs:
                plgpu.copy_gmem_to_smem(source, target.at[slot], full.at[slot])

        fill(scratch.k_full, scratch.k_free, (k.at[keys], scratch.k), *scaled[:1])
        fill(scratch.v_full, scratch.v_free, (values, scratch.v), *scaled[1:])
        return ()

    lax.fori_loop(0, last + 1 - begin, load, ())
