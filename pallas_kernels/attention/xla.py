"""Prefill: causal attention over tiles of keys in FireQ's three-stage order, as one `lax.scan`.

FireQ's kernel (arXiv 2505.20839) keeps three key tiles in flight: while the tensor cores multiply
tile i with its values and take the scores of tile i + 2, the vector units do the softmax of tile
i + 1. The carry is (S: scores of tile i + 1, P: exponentials of tile i, m, l, O):

    prologue     S0 = q k0;  S1 = q k1;  softmax 0
    iteration i  O += P_i v_i;  S_(i+2) = q k_(i+2);  softmax of S_(i+1);  O *= exp(m_old - m_new)
    epilogue     O += P_(n-2) v_(n-2);  softmax n - 1;  O += P_(n-1) v_(n-1);  O / l

XLA sees what may overlap; a kernel for one chip would issue it so.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.attention.reference import (
    merge_heads,
    pages_of,
    rounded_queries,
    scores,
    split_heads,
    visible,
    weights,
)


class Softmax(NamedTuple):
    """An unfinished softmax over keys.

    Attributes:
      p: exponentials of the last tile relative to m, [b, kv, g, t, tile].
      m: largest score so far, l: sum of exponentials relative to m, [b, kv, g, t, 1].
      o: sum of exponentials times values, without the last tile, [b, kv, g, t, d].
    """

    p: jax.Array
    m: jax.Array
    l: jax.Array  # noqa: E741  the paper's letter
    o: jax.Array


def softmax_step(state, s):
    """Takes the scores of the next tile into m, l and p, and rescales o."""
    m = jnp.maximum(state.m, jnp.max(s, axis=-1, keepdims=True))
    # A query with a window may see no key of the first tiles.
    base = jnp.where(m == -jnp.inf, jnp.float32(0), m)
    shrink = jnp.exp(state.m - base)
    p = jnp.exp(s - base)
    return Softmax(p, m, state.l * shrink + jnp.sum(p, axis=-1, keepdims=True), state.o * shrink)


def tiles(x, tile):
    """[b, s, kv, ...] -> [n, b, kv, tile, ...], the last tile padded with zeros."""
    x = jnp.pad(x, [(0, -x.shape[1] % tile) if axis == 1 else (0, 0) for axis in range(x.ndim)])
    x = x.reshape(x.shape[0], -1, tile, *x.shape[2:])
    return jnp.moveaxis(x, (1, 3), (0, 2))


def prefill(q, k, v, k_scale, v_scale, *, scale, tile, precision, window):
    """Same contract as `reference.prefill`.

    Args:
      q: [b, t, heads, d]; k, v: [b, s, kv, d]; k_scale, v_scale: [b, s, kv].
      scale: multiplies the scores.
      tile: keys per tile.
      precision: "float32" or "fp8".
      window: keys a query sees, or None for all before it.
    Returns:
      [b, t, heads, d] float32.
    """
    t, s = q.shape[1], k.shape[1]
    q, q_scale = rounded_queries(split_heads(q, k.shape[2]), precision)
    k, v, k_scale, v_scale = (tiles(x.astype(jnp.float32), tile) for x in (k, v, k_scale, v_scale))
    values, n = v * v_scale[..., None], k.shape[0]

    def score(i, k, k_scale):
        logits = scores(q, q_scale, k, k_scale, scale=scale, precision=precision)
        return jnp.where(visible(t, i * tile, s, tile, window), logits, -jnp.inf)

    def gather(state, v):
        product = jnp.einsum(
            "bkgtn,bknd->bkgtd", weights(state.p, precision), v, precision="highest"
        )
        return state._replace(o=state.o + product)

    def iteration(carry, xs):
        (following, state), (i, k, k_scale, v) = carry, xs
        state = gather(state, v)
        after = score(i + 2, k, k_scale)
        return (after, softmax_step(state, following)), None

    first = score(0, k[0], k_scale[0])
    start = Softmax(first, jnp.full((*first.shape[:-1], 1), -jnp.inf), jnp.zeros(()), jnp.zeros(()))
    state = softmax_step(start._replace(l=jnp.zeros_like(start.m), o=jnp.zeros_like(q)), first)
    if n > 1:
        carry = score(1, k[1], k_scale[1]), state
        xs = jnp.arange(n - 2), k[2:], k_scale[2:], values[: n - 2]
        (following, state), _ = jax.lax.scan(iteration, carry, xs)
        state = softmax_step(gather(state, values[n - 2]), following)
    state = gather(state, values[n - 1])
    return merge_heads(state.o / state.l)


def decode(
    q, k, v, k_scale, v_scale, pages, lengths, *, scale, window, splits, whole=False
):  # fmt: skip
    """Same contract as `reference.decode`, one page after another up to the longest sequence.

    Args:
      q, k, v, k_scale, v_scale, pages, lengths, scale, window: see `reference.decode`.
      splits: not used: XLA runs one page at a time.
      whole: take all pages, a number that does not depend on `lengths`: then there is a gradient,
        for which each page is computed again.
    Returns:
      [b, heads, d] float32.
    """
    (b, heads, d), (page, kv) = q.shape, k.shape[1:3]
    q = q.astype(jnp.float32).reshape(b, kv, heads // kv, 1, d) * scale
    oldest = jnp.zeros_like(lengths) if window is None else jnp.maximum(lengths - window, 0)

    def take(i, state):
        here = pages[:, i]
        key = i * page + jnp.arange(page, dtype=jnp.int32)
        seen = (key < lengths[:, None]) & (key >= oldest[:, None])
        keys = pages_of(k, k_scale, here, seen)
        s = jnp.einsum("bkgtd,bjkd->bkgtj", q, keys, precision="highest")
        state = softmax_step(state, jnp.where(seen[:, None, None, None], s, -jnp.inf))
        values = pages_of(v, v_scale, here, seen)
        part = jnp.einsum("bkgtj,bjkd->bkgtd", state.p, values, precision="highest")
        return state._replace(o=state.o + part)

    zeros = jnp.zeros((*q.shape[:-1], 1), jnp.float32)
    start = Softmax(jnp.zeros((*q.shape[:-1], page)), zeros - jnp.inf, zeros, jnp.zeros_like(q))
    if whole:
        state = jax.lax.fori_loop(0, pages.shape[1], jax.checkpoint(take), start)
    else:
        end = (jnp.max(lengths) + page - 1) // page
        state = jax.lax.fori_loop(jnp.min(oldest) // page, end, take, start)
    return (state.o / state.l).reshape(b, heads, d)
