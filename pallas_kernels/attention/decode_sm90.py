"""Decode attention on Hopper (Pallas Mosaic GPU): one query per sequence, split over the keys.

A block of threads takes the query heads that share one key head, padded to the 64 rows of the
tensor core, and its share of the tiles of 64 keys. One warp group loads codes, values and scales, a
few tiles ahead; the other widens INT4 to 16 bits in shared memory and multiplies: keys and values
are the right operand, which the tensor core takes from nowhere else. Exponentials are the left one
and stay in registers. Padding costs no traffic: the keys are read once for all heads that share
them. Blocks write unfinished sums, maxima and outputs, which XLA merges:

    M = max_i m_i;   y = sum_i exp2(m_i - M) O_i / sum_i exp2(m_i - M) l_i

A cache is a set of pages and a table of which pages a sequence has; a contiguous cache is one page
per sequence.
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
from pallas_kernels.attention.fragments import (
    BY_KEY,
    BY_ROW,
    LAYOUT,
    ROWS,
    full,
    product,
    spread,
    tiled,
    weighted,
)

TILE = 64  # keys
STAGES = {4: 6, 16: 4}  # tiles in flight, by bits of a key's channel
ALIGNMENT = 128  # bytes: where a tensor copy may begin in shared memory; elsewhere it faults


@dataclasses.dataclass(frozen=True)
class Call:
    """Static facts of a call.

    Attributes:
      page: keys per page.
      d: channels of a head.
      kept: rows of the output that are written, the heads of a group rounded up to 8.
      window: keys a query sees, or None.
      splits: blocks that share a sequence's keys.
      bits: of a channel in the cache, 4 or 16; scaled: whether keys and values have scales.
      unit: multiplies the scores, for base-2 exponentials.
      dtype: of the products' operands.
      interpret: whether the interpreter runs it.
    """

    page: int
    d: int
    kept: int
    window: int | None
    splits: int
    bits: int
    scaled: bool
    unit: float
    dtype: jnp.dtype
    interpret: bool

    @property
    def stages(self):
        """Tiles in flight."""
        return STAGES[self.bits]

    def share(self, length, split):
        """First tile of a block and its number of tiles, for a sequence of `length` keys."""
        end = pl.cdiv(length, TILE)
        first = jnp.int32(0)
        if self.window is not None:
            first = lax.div(jnp.maximum(length - self.window, 0), TILE)
        each = pl.cdiv(end - first, self.splits)
        begin = first + split * each
        return begin, jnp.clip(end - begin, 0, each)


def decode(
    q, k, v, k_scale, v_scale, pages, lengths, *, scale, window, splits, interpret=False
):  # fmt: skip
    """Same contract as `reference.decode`.

    Args:
      q: [b, heads, d], bfloat16 or float16.
      k, v: [p, page, kv, d] in q's dtype, or INT4 codes [p, page, kv, d / 2] uint8.
      k_scale, v_scale: [p, kv, page] float32, bfloat16 or float8_e4m3fn; or both None.
      pages: [b, n] int32, in 0..p-1 where used; lengths: [b] int32, 1 to n * page.
      scale: multiplies the scores.
      window: keys a query sees, or None.
      splits: blocks that share a sequence's keys.
      interpret: run the body in the interpreter.
    Returns:
      [b, heads, d] float32.
    """
    (b, heads, d), (page, kv) = q.shape, k.shape[1:3]
    group, bits = heads // kv, 4 if k.dtype == jnp.uint8 else 16
    unit = scale * math.log2(math.e)
    fixed = (window, splits, bits, k_scale is not None, unit, q.dtype, interpret)
    call = Call(page, d, -(-group // 8) * 8, *fixed)
    q = jnp.pad(q.reshape(b, kv, group, d), ((0, 0), (0, 0), (0, ROWS - group), (0, 0)))
    cache = (widths(k), widths(v), *((k_scale, v_scale) if call.scaled else ()))
    largest, sums, parts = launch(call, q, cache, pages, lengths)
    weight = jnp.exp2(largest - jnp.max(largest, axis=0))[..., :group]
    y = jnp.sum(weight[..., None] * parts[..., :group, :], axis=0)
    y = y / jnp.sum(weight * sums[..., :group], axis=0)[..., None]
    return y.reshape(b, heads, d)


def widths(x):
    """A cache as the kernel sees it: bytes [..., d / 2] as int4 [..., d], low nibble first."""
    if x.dtype != jnp.uint8:
        return x
    return lax.bitcast_convert_type(x, jnp.int4).reshape(*x.shape[:-1], 2 * x.shape[-1])


def launch(call, q, cache, pages, lengths):
    """The kernel: q [b, kv, 64, d] -> m, l [splits, b, kv, 64] and o [splits, b, kv, kept, d].

    `cache` holds keys, values and, where they have them, their scales.
    """
    (b, kv, _, d), n = q.shape, call.stages
    part = (call.splits, b, kv)

    def smem(*shape, dtype):
        return plgpu.SMEM(shape, dtype, transforms=tiled(shape[-1], dtype))

    tile = smem(n, TILE, d, dtype=cache[0].dtype)
    scales = [plgpu.SMEM((n, max(TILE, ALIGNMENT // x.dtype.itemsize)), x.dtype) for x in cache[2:]]
    wide = smem(TILE, d, dtype=call.dtype) if call.bits == 4 else ()
    vector = jax.ShapeDtypeStruct((*part, ROWS), jnp.float32)
    return _compat.kernel(
        functools.partial(body, call),
        out_type=(vector, vector, jax.ShapeDtypeStruct((*part, call.kept, d), jnp.float32)),
        grid=part,
        grid_names=("split", "batch", "head"),
        num_threads=2,
        thread_name="wg",
        approx_math=True,
        interpret=call.interpret,
        scratch_types=[
            smem(ROWS, d, dtype=call.dtype),
            [tile, tile, *scales],
            [wide, wide],
            plgpu.SMEM((ROWS, d), jnp.float32),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=len(cache), num_barriers=n),
            plgpu.Barrier(num_barriers=n),
        ],
    )(pages, lengths, q, *cache)


def vector(scales, slot):
    """The scales of a tile of keys within a slot, which may be longer."""
    return scales.at[slot, pl.ds(0, TILE)]


def body(call, pages, lengths, q, *refs):
    """One block of threads: the heads of one key head over a share of the keys."""
    parts = 2 + 2 * call.scaled
    cache, (m_out, l_out, out, *scratch) = refs[:parts], refs[parts:]
    at = split, batch, head = tuple(lax.axis_index(name) for name in ("split", "batch", "head"))
    length = lengths[batch]
    begin, count = call.share(length, split)
    q_s, tiles, _, staging, q_full, loaded, free = scratch
    wg = lax.axis_index("wg")

    @pl.when(wg == 0)
    def _():
        plgpu.copy_gmem_to_smem(q.at[batch, head], q_s, q_full)
        plgpu.barrier_wait(q_full)
        m, l, total = attend(call, length, begin, count, scratch)  # noqa: E741
        _compat.store(m_out.at[*at], m)
        _compat.store(l_out.at[*at], l)
        _compat.store(staging, total)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staging.at[pl.ds(0, call.kept)], out.at[*at])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == 1)
    def _():
        def load(i, _):
            slot, key = lax.rem(i, call.stages), (begin + i) * TILE
            page, keys = pages[batch, lax.div(key, call.page)], lax.rem(key, call.page)
            places = (pl.ds(keys, TILE), head), (head, pl.ds(keys, TILE))
            pl.when(i >= call.stages)(lambda: plgpu.barrier_wait(free.at[slot]))
            for i, (source, tile) in enumerate(zip(cache, tiles, strict=True)):
                place = source.at[page, *places[i // 2]]
                target = vector(tile, slot) if i >= 2 else tile.at[slot]
                plgpu.copy_gmem_to_smem(place, target, loaded.at[slot])
            return ()

        lax.fori_loop(0, count, load, ())


def attend(call, length, begin, count, scratch):
    """The warp group that computes: maxima and sums [64], outputs [64, d], all float32."""
    q_s, (k_s, v_s, *scales), (k_w, v_w), _, _, loaded, free = scratch
    shape = (ROWS, TILE)

    def scale(source, slot):
        by_key = _compat.load(vector(source, slot), layout=BY_KEY, optimized=False)
        return spread(by_key.astype(jnp.float32), shape, 1)

    def widen(source, target):
        codes = _compat.load(source, layout=plgpu.Layout.WGMMA_8BIT, optimized=False)
        _compat.store(target, codes.astype(call.dtype))

    def clear(values, first):
        """Zeros where the last tile's values are behind the last key: 0 times NaN is NaN."""
        kept = _compat.load(values, layout=LAYOUT, optimized=False)
        key = plgpu.broadcasted_iota(jnp.int32, kept.shape, 0, layout=LAYOUT) + first
        zeros = plgpu.layout_cast(jnp.zeros(kept.shape, kept.dtype), LAYOUT)
        _compat.store(values, jnp.where(key < length, kept, zeros))
        plgpu.commit_smem()

    def step(i, carry):
        total, m, l = carry  # noqa: E741
        slot = lax.rem(i, call.stages)
        plgpu.barrier_wait(loaded.at[slot])
        keys, values, first = k_s.at[slot], v_s.at[slot], (begin + i) * TILE
        if call.bits == 16:
            pl.when(first + TILE > length)(lambda: clear(values, first))
        if call.bits == 4:
            widen(keys, k_w)
            widen(values, v_w)
            plgpu.commit_smem()
            keys, values = k_w, v_w
        s = product(shape, q_s, keys.T) * jnp.float32(call.unit)
        s = s * scale(scales[0], slot) if call.scaled else s
        key = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=LAYOUT) + first
        seen = key < length
        if call.window is not None:
            seen &= key >= length - call.window
        s = jnp.where(seen, s, -jnp.inf)
        new = jnp.maximum(m, jnp.max(s, axis=1))  # every tile of a share has a key that is seen
        shrink, p = jnp.exp2(m - new), jnp.exp2(s - spread(new, shape, 0))
        l = l * shrink + jnp.sum(p, axis=1)  # noqa: E741
        # Behind the last key scales may be anything, NaN too.
        if call.scaled:
            p = jnp.where(seen, p * scale(scales[1], slot), jnp.float32(0))
        part = weighted(p, values, interpret=call.interpret)
        plgpu.barrier_arrive(free.at[slot])
        return total * spread(shrink, part.shape, 0) + part, new, l

    start = (full((ROWS, call.d), 0, LAYOUT), *(full((ROWS,), x, BY_ROW) for x in (-jnp.inf, 0)))
    total, m, l = lax.fori_loop(0, count, step, start)  # noqa: E741
    return m, l, total
