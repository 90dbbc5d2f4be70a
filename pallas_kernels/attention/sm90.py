"""Prefill attention on Hopper (Pallas Mosaic GPU): 16-bit or FP8 products, tiles of keys in flight.

A block of threads owns 128 queries of one head: two warp groups compute 64 each, a third loads.
Three tiles of keys and values (two of 16 bits) are on their way or in use at any time, so that
copies, the tensor core's products of one group and the softmax of the other overlap. FireQ (arXiv
2505.20839) also overlaps products and softmax inside a group; here the groups take turns.

    S = (q k^T) * q_scale * k_scale      tensor core, float32 sums
    m, l, P = online softmax of S        registers; P times the values' scale goes to shared memory
    O = O * exp(m_old - m) + P v         tensor core, a fresh float32 sum per tile

The fresh sum also bounds the short accumulation of Hopper's FP8 products to one tile. Codes of INT4
are exact in e4m3 and in 16 bits, so XLA widens them before (a byte or two each, against a product
with every query), and only their scales enter here. The values' scale is multiplied into P before
it is rounded, relative to the head's largest scale. Values come transposed, [d, s]: 8-bit operands
of the tensor core must be contiguous along the sum.

Differs from FireQ: scores and exponentials stay in float32 (there float16); P is rounded after the
values' scale instead of rounding value times scale.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _compat
from pallas_kernels.attention.reference import rounded_queries
from pallas_kernels.numerics import E4M3, E4M3_MAX

ROWS, GROUPS = 64, 2  # queries of a warp group; warp groups that compute
BLOCK = ROWS * GROUPS
BY_QUERY, BY_KEY = 1, 0  # axis of the scores that a vector of the other axis lacks


@dataclasses.dataclass(frozen=True)
class Call:
    """Static facts of a call.

    Attributes:
      queries, keys: t and s without padding.
      kv_heads, group: heads of the keys, and query heads that share one.
      d: channels of a head.
      tile: keys per tile; stages: tiles in flight.
      window: keys a query sees, or None.
      dtype: of the products' operands; out: of the output.
    """

    queries: int
    keys: int
    kv_heads: int
    group: int
    d: int
    tile: int
    stages: int
    window: int | None
    dtype: jnp.dtype
    out: jnp.dtype

    @property
    def narrow(self):
        """Whether the products are FP8."""
        return self.dtype.itemsize == 1

    def tiles(self, first):
        """Range of tiles that the queries from `first` on see, and of those that need no mask.

        Args:
          first: index of the block's first query, int32.
        Returns:
          (begin, inner, edge, end): a mask is needed in begin..inner and edge..end.
        """
        at = first + self.keys - self.queries  # the last key that query `first` sees
        end = pl.cdiv(jnp.minimum(at + BLOCK, self.keys), self.tile)
        begin = inner = jnp.int32(0)
        if self.window is not None:
            begin = lax.div(jnp.maximum(at - self.window + 1, 0), self.tile)
            inner = pl.cdiv(jnp.maximum(at + BLOCK - self.window, 0), self.tile)
        inner = jnp.clip(inner, begin, end)
        return begin, inner, jnp.clip(lax.div(at + 1, self.tile), inner, end), end


def prefill(q, k, v, k_scale, v_scale, *, scale, tile, precision, window, interpret=False):
    """Same contract as `reference.prefill`, to the rounding described above.

    Args:
      q: [b, t, heads, d], bfloat16 or float16.
      k, v: [b, s, kv, d], q's dtype or int8 codes; int8 with precision "fp8".
      k_scale, v_scale: [b, s, kv] float32.
      scale: multiplies the scores.
      tile: a multiple of 64, up to 256.
      precision: "fp8", or "float32" for products of 16-bit numbers with float32 sums.
      window: keys a query sees, or None.
      interpret: run the body in the interpreter.
    Returns:
      [b, t, heads, d] in q's dtype.
    """
    t, heads, (s, kv) = *q.shape[1:3], k.shape[1:3]
    dtype = jnp.dtype(E4M3 if precision == "fp8" else q.dtype)
    stages = 3 if dtype.itemsize == 1 else 2
    call = Call(t, s, kv, heads // kv, q.shape[3], tile, stages, window, dtype, q.dtype)
    q, q_scale = rounded_queries(q, precision)
    q_scale = jnp.moveaxis(q_scale[..., 0], 1, 2) * (scale * math.log2(math.e))
    largest = jnp.max(v_scale, axis=1)
    largest = jnp.where(largest == 0, jnp.float32(1), largest)
    v_scale = v_scale / largest[:, None]
    y = launch(
        call,
        pad(q.astype(call.dtype), 1, BLOCK),
        pad(q_scale, 2, BLOCK),
        pad(k.astype(call.dtype), 1, tile),
        pad(jnp.moveaxis(k_scale, 1, 2), 2, tile),
        pad(jnp.moveaxis(v.astype(call.dtype), 1, 3), 3, tile),
        pad(jnp.moveaxis(v_scale, 1, 2), 2, tile),
        largest,
        interpret,
    )
    return y[:, :t]


def pad(x, axis, multiple):
    """x with zeros at the end of an axis, whose length becomes a multiple."""
    return jnp.pad(x, [(0, -n % multiple if i == axis else 0) for i, n in enumerate(x.shape)])


def tiled(minor, dtype):
    """How shared memory holds rows of `minor` numbers for the tensor core."""
    bits = 4 if dtype == jnp.int4 else 8 * jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(minor * bits, "attention")
    return plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle)


def launch(call, q, q_scale, k, k_scale, v, v_scale, largest, interpret):
    """The kernel on padded operands: q [b, T, heads, d], q_scale [b, heads, T], k [b, S, kv, d],
    k_scale and v_scale [b, kv, S], v [b, kv, d, S], largest [b, kv] -> [b, T, heads, d]."""
    b, padded, heads, d = q.shape
    n, tile, dtype = call.stages, call.tile, call.dtype

    def smem(shape, dtype):
        return plgpu.SMEM(shape, dtype, transforms=tiled(shape[-1], dtype))

    return _compat.kernel(
        functools.partial(body, call),
        out_type=jax.ShapeDtypeStruct(q.shape, call.out),
        grid=(heads, padded // BLOCK, b),
        grid_names=("head", "block", "batch"),
        num_threads=GROUPS + 1,
        thread_name="wg",
        approx_math=True,
        interpret=interpret,
        scratch_types=[
            smem((GROUPS, ROWS, d), dtype),
            smem((n, tile, d), dtype),
            plgpu.SMEM((n, tile), jnp.float32),
            smem((n, d, tile), dtype),
            plgpu.SMEM((n, tile), jnp.float32),
            smem((GROUPS, ROWS, tile), dtype),
            smem((GROUPS, ROWS, d), call.out) if call.narrow else (),
            plgpu.Barrier(num_barriers=GROUPS),
            plgpu.Barrier(num_arrivals=3, num_barriers=n),
            plgpu.Barrier(num_barriers=n),
            *(plgpu.Barrier(num_arrivals=GROUPS, num_barriers=n),) * 2,
        ],
    )(q, q_scale, k, k_scale, v, v_scale, largest)


def body(call, q, q_scale, k, k_scale, v, v_scale, largest, out, *scratch):
    """One block of threads: 128 queries of one head of one sequence."""
    batch, head = lax.axis_index("batch"), lax.axis_index("head")
    # The last queries see most keys: they start first.
    blocks = q.shape[1] // BLOCK
    first = (blocks - 1 - lax.axis_index("block")) * BLOCK
    kv_head = lax.div(head, call.group)
    wg = lax.axis_index("wg")

    @pl.when(wg < GROUPS)
    def _():
        plgpu.set_max_registers(240, action="increase")
        row = first + wg * ROWS
        rows = pl.ds(row, ROWS)
        sources = q.at[batch, rows, head], q_scale.at[batch, head, rows]
        y = attend(call, wg, row, call.tiles(first), *sources, scratch)
        y = y * largest[batch, kv_head]
        staging = (scratch[6] if call.narrow else scratch[0]).at[wg]
        staging[...] = y.astype(call.out)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staging, out.at[batch, rows, head])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == GROUPS)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        sources = k.at[batch, :, kv_head], k_scale.at[batch, kv_head]
        sources += v.at[batch, kv_head], v_scale.at[batch, kv_head]
        feed(call, call.tiles(first), *sources, scratch)


def feed(call, tiles, k, k_scale, v, v_scale, scratch):
    """The warp group that loads: tiles of keys [tile, d], values [d, tile] and their scales."""
    _, k_s, ks_s, v_s, vs_s, _, _, _, k_full, v_full, k_free, v_free = scratch
    begin, _, _, end = tiles

    def load(i, _):
        slot, keys = lax.rem(i, call.stages), pl.ds((begin + i) * call.tile, call.tile)
        pl.when(i >= call.stages)(lambda: plgpu.barrier_wait(k_free.at[slot]))
        plgpu.copy_gmem_to_smem(k.at[keys], k_s.at[slot], k_full.at[slot])
        plgpu.copy_gmem_to_smem(k_scale.at[keys], ks_s.at[slot], k_full.at[slot])
        plgpu.copy_gmem_to_smem(v_scale.at[keys], vs_s.at[slot], k_full.at[slot])
        pl.when(i >= call.stages)(lambda: plgpu.barrier_wait(v_free.at[slot]))
        plgpu.copy_gmem_to_smem(v.at[:, keys], v_s.at[slot], v_full.at[slot])
        return ()

    lax.fori_loop(0, end - begin, load, ())


def attend(call, wg, row, tiles, q, q_scale, scratch):
    """A warp group that computes: 64 queries over all their keys, [64, d] float32.

    Args:
      call: static facts.
      wg: which group it is.
      row: index of its first query.
      tiles: see `Call.tiles`.
      q, q_scale: references to [64, d] and [64]; the scale is for base-2 exponentials.
      scratch: shared memory and barriers.
    """
    q_s, k_s, ks_s, v_s, vs_s, p_s, _, q_full, k_full, v_full, k_free, v_free = scratch
    layout, shape = plgpu.Layout.WGMMA, (ROWS, call.tile)
    begin, inner, edge, end = tiles
    plgpu.copy_gmem_to_smem(q, q_s.at[wg], q_full.at[wg])
    query = _compat.load(q_scale, layout=layout.reduce(BY_QUERY), optimized=False)
    plgpu.barrier_wait(q_full.at[wg])

    def step(j, carry, masked):
        total, m, l = carry  # noqa: E741  the paper's letter
        slot = lax.rem(j - begin, call.stages)
        plgpu.barrier_wait(k_full.at[slot])
        s = product((ROWS, call.tile), q_s.at[wg], k_s.at[slot].T)
        key, value = (
            _compat.load(x.at[slot], layout=layout.reduce(BY_KEY), optimized=False)
            for x in (ks_s, vs_s)
        )
        plgpu.barrier_arrive(k_free.at[slot])
        s = s * lax.broadcast_in_dim(query, shape, [0]) * lax.broadcast_in_dim(key, shape, [1])
        s = hidden(call, s, row, j * call.tile) if masked else s
        new = jnp.maximum(m, jnp.max(s, axis=1))
        # A query may see no key of the first tiles of its block: exp2(-inf - 0) is 0.
        base = jnp.where(new == -jnp.inf, jnp.float32(0), new) if masked else new
        shrink, p = jnp.exp2(m - base), jnp.exp2(s - lax.broadcast_in_dim(base, shape, [0]))
        l = l * shrink + jnp.sum(p, axis=1)  # noqa: E741
        unit = jnp.float32(E4M3_MAX if call.narrow else 1)
        p_s.at[wg][...] = (p * lax.broadcast_in_dim(value * unit, shape, [1])).astype(call.dtype)
        plgpu.commit_smem()
        plgpu.barrier_wait(v_full.at[slot])
        part = product((ROWS, call.d), p_s.at[wg], v_s.at[slot].T)
        plgpu.barrier_arrive(v_free.at[slot])
        return total * lax.broadcast_in_dim(shrink, part.shape, [0]) + part, new, l

    zeros = lambda shape, layout, x=0.0: plgpu.layout_cast(jnp.full(shape, x, jnp.float32), layout)  # noqa: E731
    by_row = layout.reduce(BY_QUERY)
    carry = zeros((ROWS, call.d), layout), zeros((ROWS,), by_row, -jnp.inf), zeros((ROWS,), by_row)
    if call.window is not None:
        carry = lax.fori_loop(begin, inner, functools.partial(step, masked=True), carry)
    carry = lax.fori_loop(inner, edge, functools.partial(step, masked=False), carry)
    total, _, l = lax.fori_loop(edge, end, functools.partial(step, masked=True), carry)  # noqa: E741
    norm = l * jnp.float32(E4M3_MAX) if call.narrow else l
    return total / lax.broadcast_in_dim(norm, total.shape, [0])


def product(shape, a, b):
    """a @ b by the tensor core, float32 in registers."""

    def run(total):
        plgpu.wgmma(total, a, b)
        return total[...]

    return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))


def hidden(call, s, row, key):
    """Scores s [64, tile] of queries from `row` and keys from `key` on, -inf where unseen."""
    iota = functools.partial(plgpu.broadcasted_iota, jnp.int32, s.shape, layout=plgpu.Layout.WGMMA)
    at, keys = iota(0) + (row + call.keys - call.queries), iota(1) + key
    seen = keys <= at
    if call.window is not None:
        seen &= keys > at - call.window
    return jnp.where(seen, s, -jnp.inf)
