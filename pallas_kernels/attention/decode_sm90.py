"""Decode attention on Hopper (Pallas Mosaic GPU): one query per sequence, split over the keys.

A block of threads takes the query heads that share one key head, padded to the 64 rows of the
tensor core, and its share of the tiles of 64 keys. One warp group loads codes, values and scales, a
few tiles ahead; two others take turns with the tiles, so that one widens INT4 to 16 bits in shared
memory while the other one's products are under way: keys and values are the right operand, which
the tensor core takes from nowhere else. Exponentials are the left one and stay in registers.
Padding costs no traffic: the keys are read once for all heads that share them. Groups leave
unfinished sums, maxima and outputs, which are merged, those of blocks by XLA:

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
GROUPS = 2  # warp groups that compute
# Tiles in flight, by bits of a key's channel: a multiple of GROUPS, so that a slot is always the
# same group's, which sees every time that it fills.
STAGES = {4: 6, 16: 4}
Q_LOADED, HALF_DONE = 0, 1  # barriers that are passed once
COMPUTING, LOADING = 224, 56  # registers of a thread, of 504 for three groups (`sm90`)
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

    def turns(self, length, begin, count, wg):
        """A group's number of tiles in a block's share, and how many of them need no mask."""
        own = lax.div(count - wg + (GROUPS - 1), GROUPS)
        if self.window is not None:
            return own, None
        whole = jnp.clip(lax.div(length, TILE) - begin, 0, count)
        return own, lax.div(whole - wg + (GROUPS - 1), GROUPS)


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
    wide = smem(GROUPS, TILE, d, dtype=call.dtype) if call.bits == 4 else ()
    vector = jax.ShapeDtypeStruct((*part, ROWS), jnp.float32)
    return _compat.kernel(
        functools.partial(body, call),
        out_type=(vector, vector, jax.ShapeDtypeStruct((*part, call.kept, d), jnp.float32)),
        grid=part,
        grid_names=("split", "batch", "head"),
        num_threads=GROUPS + 1,
        thread_name="wg",
        approx_math=True,
        interpret=call.interpret,
        scratch_types=[
            smem(ROWS, d, dtype=call.dtype),
            [tile, tile, *scales],
            [wide, wide],
            plgpu.SMEM((ROWS, d), jnp.float32),
            plgpu.SMEM((2, ROWS), jnp.float32),
            plgpu.Barrier(num_barriers=2),
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
    q_s, tiles, _, staging, vectors, once, loaded, free = scratch
    wg = lax.axis_index("wg")

    @pl.when(wg < GROUPS)
    def _():
        plgpu.set_max_registers(COMPUTING, action="increase")
        plgpu.barrier_wait(once.at[Q_LOADED])
        m, l, total = attend(call, lengths[batch], split, scratch)  # noqa: E741

        @pl.when(wg == 1)
        def _():
            for i, x in enumerate((m, l)):
                _compat.store(vectors.at[i], x)
            _compat.store(staging, total)
            plgpu.barrier_arrive(once.at[HALF_DONE])

        @pl.when(wg == 0)
        def _():
            plgpu.barrier_wait(once.at[HALF_DONE])
            largest, sums, merged = merge((m, l, total), staging, vectors)
            _compat.store(m_out.at[*at], largest)
            _compat.store(l_out.at[*at], sums)
            _compat.store(staging, merged)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(staging.at[pl.ds(0, call.kept)], out.at[*at])
            plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == GROUPS)
    def _():
        plgpu.set_max_registers(LOADING, action="decrease")
        plgpu.copy_gmem_to_smem(q.at[batch, head], q_s, once.at[Q_LOADED])
        begin, count = call.share(lengths[batch], split)

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


def merge(own, staging, vectors):
    """A group's maxima, sums and outputs together with the other group's in shared memory."""
    m, l, total = own  # noqa: E741
    m_other, l_other = (_compat.load(vectors.at[i], layout=BY_ROW, optimized=False) for i in (0, 1))
    largest = jnp.maximum(m, m_other)
    base = jnp.where(largest == -jnp.inf, jnp.float32(0), largest)  # neither had a tile
    weight, weight_other = jnp.exp2(m - base), jnp.exp2(m_other - base)
    other = _compat.load(staging, layout=LAYOUT, optimized=False)
    spread_by_row = functools.partial(spread, shape=total.shape, axis=0)
    merged = total * spread_by_row(weight) + other * spread_by_row(weight_other)
    return largest, l * weight + l_other * weight_other, merged


def attend(call, length, split, scratch):
    """A warp group that computes: maxima and sums [64], outputs [64, d], all float32."""
    begin, count = call.share(length, split)
    q_s, (k_s, v_s, *scales), wide, *_, loaded, free = scratch
    shape, wg = (ROWS, TILE), lax.axis_index("wg")

    def scale(source, slot, unit=1.0):
        by_key = _compat.load(vector(source, slot), layout=BY_KEY, optimized=False)
        return spread(by_key.astype(jnp.float32) * jnp.float32(unit), shape, 1)

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

    def hidden(first):
        """Which scores of the tile from key `first` on do not count."""
        key = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=LAYOUT) + first
        unseen = key >= length
        return unseen if call.window is None else unseen | (key < length - call.window)

    def step(i, carry, masked):
        total, m, l = carry  # noqa: E741
        at = i * GROUPS + wg
        slot = lax.rem(at, call.stages)
        plgpu.barrier_wait(loaded.at[slot])
        keys, values, first = k_s.at[slot], v_s.at[slot], (begin + at) * TILE
        if call.bits == 16 and masked:
            pl.when(first + TILE > length)(lambda: clear(values, first))
        if call.bits == 4:
            k_w, v_w = (buffer.at[wg] for buffer in wide)
            widen(keys, k_w)
            widen(values, v_w)
            plgpu.commit_smem()
            keys, values = k_w, v_w
        s = product(shape, q_s, keys.T)
        s = s * (scale(scales[0], slot, call.unit) if call.scaled else jnp.float32(call.unit))
        s = jnp.where(hidden(first), -jnp.inf, s) if masked else s
        new = jnp.maximum(m, jnp.max(s, axis=1))  # every tile of a share has a key that is seen
        shrink, p = jnp.exp2(m - new), jnp.exp2(s - spread(new, shape, 0))
        l = l * shrink + jnp.sum(p, axis=1)  # noqa: E741
        p = p * scale(scales[1], slot) if call.scaled else p
        if call.scaled and masked:  # behind the last key scales may be anything, NaN too
            p = jnp.where(hidden(first), jnp.float32(0), p)
        part = weighted(p, values, interpret=call.interpret)
        plgpu.barrier_arrive(free.at[slot])
        return total * spread(shrink, part.shape, 0) + part, new, l

    start = (full((ROWS, call.d), 0, LAYOUT), *(full((ROWS,), x, BY_ROW) for x in (-jnp.inf, 0)))
    turns, whole = call.turns(length, begin, count, wg)
    if whole is not None:
        start = lax.fori_loop(0, whole, functools.partial(step, masked=False), start)
    masked = functools.partial(step, masked=True)
    total, m, l = lax.fori_loop(0 if whole is None else whole, turns, masked, start)  # noqa: E741
    return m, l, total
