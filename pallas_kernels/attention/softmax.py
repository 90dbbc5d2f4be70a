"""Prefill on Hopper: the warp groups that compute.

The tensor core multiplies the queries with the keys of tile j + 1 while the vector units do the
softmax of tile j, as long as registers last (`Call.ahead`) and no mask is needed; a group that
has to wait leaves the tensor core to the other one. The rest of a step is in order: exponentials go
from their registers into the product with the values, which the step waits for.
"""

import functools

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
    spread,
    weighted,
)


def attend(call, wg, row, tiles, unit, shift, scratch):
    """64 queries over all their keys, [64, d] float32.

    Args:
      call: static facts, `sm90.Call`.
      wg: which group it is.
      row: index of its first query.
      tiles: see `sm90.Call.tiles`.
      unit: positive, multiplies the scores, for base-2 exponentials; a number, or one per query.
      shift: added to the exponents, one per query, where keys and values have scales.
      scratch: shared memory and barriers, `sm90.Scratch`.
    """
    begin, inner, edge, last = tiles
    group = Group(call, scratch, wg, row, begin, unit, shift)
    m, l = (full((ROWS,), x, BY_ROW) for x in (-jnp.inf, 0))  # noqa: E741  the paper's letters
    carry = group.scores(begin), full((ROWS, call.d), 0, LAYOUT), m, l
    if call.window is not None:
        carry = lax.fori_loop(begin, inner, functools.partial(group.step, masked=True), carry)
    carry = lax.fori_loop(inner, edge, functools.partial(group.step, masked=False), carry)
    s, *state = lax.fori_loop(edge, last, functools.partial(group.step, masked=True), carry)
    total, _, l = group.gather(last, s, *state, masked=True)  # noqa: E741
    return total / spread(l, total.shape, 0)


class Group:
    """A warp group and its queries, over tiles of keys."""

    def __init__(self, call, scratch, wg, row, begin, unit, shift):
        """See `attend`; `begin` is the first tile."""
        self.call, self.scratch, self.unit, self.shift = call, scratch, unit, shift
        self.wg, self.row, self.begin = wg, row, begin

    def slot(self, j):
        """Where tile j is."""
        return lax.rem(j - self.begin, self.call.stages)

    def start(self, total, j):
        """Gives the tensor core the scores of tile j to compute."""
        plgpu.barrier_wait(self.scratch.k_full.at[self.slot(j)])
        keys = self.scratch.k.at[self.slot(j)]
        plgpu.wgmma(total, self.scratch.q.at[self.wg], keys.T)

    def finish(self, s, j):
        """Scores of tile j that have arrived, times the keys' scales; frees the keys."""
        if self.call.scaled:
            s = s * self.by_key(self.scratch.scales[0], j)
        plgpu.barrier_arrive(self.scratch.k_free.at[self.slot(j)])
        return s

    def by_key(self, scales, j):
        """The scales of tile j, [64, tile]."""
        scale = _compat.load(scales.at[self.slot(j)], layout=BY_KEY, optimized=False)
        return spread(scale, (ROWS, self.call.tile), 1)

    @property
    def accumulator(self):
        """Registers for the scores of a tile."""
        return plgpu.ACC((ROWS, self.call.tile), jnp.float32)

    def scores(self, j):
        """Scores of tile j, [64, tile] float32."""

        def scope(total):
            self.start(total, j)
            return total[...]

        return self.finish(pl.run_scoped(scope, self.accumulator), j)

    def step(self, j, carry, masked):
        """Tile j, whose scores are there, and the scores of tile j + 1."""
        s, *state = carry
        if masked or not self.call.ahead:
            state = self.gather(j, s, *state, masked=masked)
            return self.scores(j + 1), *state

        def scope(total):
            self.start(total, j + 1)
            after = self.gather(j, s, *state, masked=masked)
            return total[...], after

        following, state = pl.run_scoped(scope, self.accumulator)
        return self.finish(following, j + 1), *state

    def gather(self, j, s, total, m, l, masked):  # noqa: E741  the paper's letter
        """Softmax of tile j and its values: (total [64, d], m [64], l [64]); frees the values.

        Waits for all products under way.
        """
        call, slot = self.call, self.slot(j)
        s = hidden(call, s, self.row, j * call.tile) if masked else s
        new = jnp.maximum(m, jnp.max(s, axis=1) * self.unit)
        # A query may see no key of the first tiles of its block: exp2(-inf - 0) is 0.
        base = jnp.where(new == -jnp.inf, jnp.float32(0), new) if masked else new
        unit = spread(self.unit, s.shape, 0) if call.narrow else self.unit
        shrink = jnp.exp2(m - base)
        base = base - self.shift if call.scaled else base
        p = jnp.exp2(s * unit - spread(base, s.shape, 0))
        l = l * shrink + jnp.sum(p, axis=1)  # noqa: E741
        plgpu.barrier_wait(self.scratch.v_full.at[slot])
        p = p * self.by_key(self.scratch.scales[1], j) if call.scaled else p
        gather = functools.partial(weighted, p, self.scratch.v.at[slot], interpret=call.interpret)
        total = total * spread(shrink, total.shape, 0)
        total = total + gather() if call.narrow else gather(total)
        plgpu.barrier_arrive(self.scratch.v_free.at[slot])
        return total, new, l


def hidden(call, s, row, key):
    """Scores s [64, tile] of queries from `row` and keys from `key` on, -inf where unseen."""
    iota = functools.partial(plgpu.broadcasted_iota, jnp.int32, s.shape, layout=LAYOUT)
    at, keys = iota(0) + (row + call.keys - call.queries), iota(1) + key
    seen = keys <= at
    if call.window is not None:
        seen &= keys > at - call.window
    return jnp.where(seen, s, -jnp.inf)
