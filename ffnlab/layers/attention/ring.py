"""Ring attention: queries stay, keys and values go from device to device (arXiv 2310.01889).

Each device has an equal part of every row. What its queries find is summed up as an online softmax
in float32 (arXiv 1805.02867), block by block:

    m' = max(m, max s),  o' = o exp(m - m') + exp(s - m') v,  l' = l exp(m - m') + sum exp(s - m')

The backward pass sends keys round again, with their gradients beside them, so that no device ever
holds those of all. It is a rule of reverse mode: `jax.jvp` through it is refused, gradients of
gradients are not.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from ffnlab.layers.attention.causal import BLOCK, NEGATIVE, by_head, by_token
from ffnlab.layers.attention.masked import split
from ffnlab.layers.attention.ring_order import Pair, Ring, from_zigzag, to_zigzag
from ffnlab.layers.attention.spec import seen

__all__ = ["ring_attention"]

FLOOR = NEGATIVE / 2  # of the largest score: what is masked (NEGATIVE) has exp 0 even where all is


class Facts(NamedTuple):
    """What says which keys are seen, beside slots; parts [p, ...] of a device.

    Attributes:
      segments: [p, b, t] number of each token's text, 0 for padding; None for one text.
      mask: [1, mb, t, s] of a device's queries and all keys of a row; None where slots and segments
        say it.
    """

    segments: Int[Array, "p b t"] | None = None
    mask: Bool[Array, "p mb t s"] | None = None


class Going(NamedTuple):
    """What goes round: keys, values [p, b, kv, t, hd] and the segments [p, b, t] they are of."""

    k: Float[Array, "p b kv t hd"]
    v: Float[Array, "p b kv t hd"]
    segments: Int[Array, "p b t"] | None


def ring_attention(
    ring: Ring,
    q: Float[Array, "b t h hd"],
    k: Float[Array, "b t kv hd"],
    v: Float[Array, "b t kv hd"],
    *,
    segments: Int[Array, "b t"] | None = None,
    mask: Bool[Array, "mb 1 t s"] | None = None,
) -> Float[Array, "b t h hd"]:
    """Attention of a device's queries to the keys of all; to be called within `shard_map`.

    Args:
      ring: see `ring_of`.
      q: this device's queries, part r of n of each row.
      k, v: its keys and values; h is a multiple of kv.
      segments: number of the text each token is of, 0 for padding: tokens see their own alone.
      mask: in place of causality, window and segments, which keys of a whole row are seen.
    Returns:
      [b, t, h, hd] in v's dtype; 0 for a query that sees nothing.
    """
    cut = partial(_cut, ring.parts)
    given = (cut(q), cut(k), cut(v), None if segments is None else cut(segments))
    q, k, v, segments = to_zigzag(ring, given) if ring.zigzag else given
    kv = k.shape[3]
    head = jax.vmap(lambda x: by_head(x, kv))
    facts = Facts(segments, None if mask is None else mask[None, :, 0])
    y = _ring(ring, head(q) * ring.scale, head(k)[:, :, :, 0], head(v)[:, :, :, 0], facts)
    y = jax.vmap(by_token)(y).astype(v.dtype)
    y = from_zigzag(ring, y) if ring.zigzag else y
    return jnp.moveaxis(y, 0, 1).reshape(y.shape[1], -1, *y.shape[3:])


def _cut(parts: int, x: Array) -> Array:
    """[b, t, ...] as [parts, b, t / parts, ...]."""
    b, t = x.shape[:2]
    return jnp.moveaxis(x.reshape(b, parts, t // parts, *x.shape[2:]), 1, 0)


# ---------------------------------------------------------------- once round


def _round(
    ring: Ring, going: Going, sums: PyTree, state: PyTree, meet: Callable[..., tuple]
) -> tuple[PyTree, PyTree]:
    """Lets a device meet the keys of each: meet(state, sums, going, pair) -> (state, sums).

    `sums` go round beside the keys and end where they began. The next keys are under way while a
    device computes with those that it has.
    """
    own, last = jax.lax.axis_index(ring.axes), ring.turns - 1

    def met(state: PyTree, sums: PyTree, going: Going, source: Array | None) -> tuple:
        one = lambda carry, pair: (meet(*carry, going, pair), None)  # noqa: E731
        return jax.lax.scan(one, (state, sums), ring.pairs(own, source))[0]

    def turn(carry: tuple, distance: Array) -> tuple[tuple, None]:
        state, sums, going = carry
        following, source = ring.shifted(going), (own - distance) % ring.devices
        return (*met(state, ring.shifted(sums), going, source), following), None

    if not last:
        return met(state, sums, going, None)
    following = ring.shifted(going)
    state, sums = met(state, sums, going, None)
    if last > 1:
        carry, _ = jax.lax.scan(turn, (state, sums, following), jnp.arange(1, last))
        state, sums, following = carry
    state, sums = met(state, ring.shifted(sums), following, (own - last) % ring.devices)
    return state, ring.shifted(sums, -last)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(ring: Ring, q: Array, k: Array, v: Array, facts: Facts) -> Array:
    """Outputs [p, b, kv, group, t, hd] float32, of scaled queries in that order."""
    return _forward(ring, q, k, v, facts)[0]


def _forward(ring: Ring, q: Array, k: Array, v: Array, facts: Facts) -> tuple[Array, tuple]:
    nothing = jnp.zeros((*q.shape[:-1], 1), jnp.float32)
    state = jnp.zeros(q.shape, jnp.float32), nothing + FLOOR, nothing

    def meet(state: tuple, sums: tuple, going: Going, pair: Pair) -> tuple:
        rows = jax.tree.map(lambda x: _take(x, pair.i), (q, state))
        one = partial(_add, ring, _take(going.k, pair.j), _take(going.v, pair.j))
        _, found = _by_block(one, partial(_sees, ring, facts, going, pair), (), rows)
        return jax.tree.map(lambda x, new: _put(x, new, pair.i), state, found), sums

    (o, top, total), _ = _round(ring, Going(k, v, facts.segments), (), state, meet)
    has = total > 0
    y = o / jnp.where(has, total, 1)
    # Of a query that sees nothing one that makes exp(s - L) 0.
    normalizer = jnp.where(has, top + jnp.log(jnp.where(has, total, 1)), -NEGATIVE)
    return y, (q, k, v, facts, y, normalizer)


def _backward(ring: Ring, saved: tuple, dy: Array) -> tuple:
    q, k, v, facts, y, normalizer = saved
    fixed = normalizer, dy, jnp.sum(dy * y, axis=-1, keepdims=True)
    zeros = partial(jax.tree.map, lambda x: jnp.zeros(x.shape, jnp.float32))

    def meet(dq: Array, sums: tuple, going: Going, pair: Pair) -> tuple:
        rows = jax.tree.map(lambda x: _take(x, pair.i), (q, *fixed))
        own = jax.tree.map(lambda x: _take(x, pair.j), sums)
        one = partial(_add_gradients, ring, _take(going.k, pair.j), _take(going.v, pair.j))
        own, new = _by_block(one, partial(_sees, ring, facts, going, pair), own, rows)
        sums = jax.tree.map(lambda x, new: _put(x, new, pair.j), sums, own)
        return _put(dq, _take(dq, pair.i) + new, pair.i), sums

    dq, (dk, dv) = _round(ring, Going(k, v, facts.segments), zeros((k, v)), zeros(q), meet)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_ring.defvjp(_forward, _backward)


# ---------------------------------------------------------------- a block of queries


def _add(ring: Ring, k: Array, v: Array, carry: tuple, rows: tuple, sees: Array | None) -> tuple:
    """(carry, the state of some queries after they have met some keys)."""
    q, (o, top, total) = rows
    s = _limited(ring, _product("bkgtd,bksd->bkgts", q, k), sees)
    new = jnp.maximum(top, jnp.max(s, axis=-1, keepdims=True))
    p, kept = jnp.exp(s - new), jnp.exp(top - new)
    o = o * kept + _product("bkgts,bksd->bkgtd", p.astype(v.dtype), v)
    return carry, (o, new, total * kept + jnp.sum(p, axis=-1, keepdims=True))


def _add_gradients(
    ring: Ring, k: Array, v: Array, sums: tuple, rows: tuple, sees: Array | None
) -> tuple:
    """((dk, dv) with what some queries add, their dq).

    p = exp(s - L),  dv = pᵀ dy,  ds = p (dy vᵀ - y·dy),  dq = ds k,  dk = dsᵀ q
    """
    (dk, dv), (q, normalizer, dy, y_dy) = sums, rows
    s = _product("bkgtd,bksd->bkgts", q, k)
    p, of_scores = jax.vjp(lambda s: jnp.exp(_limited(ring, s, sees) - normalizer), s)
    dy = dy.astype(v.dtype)
    (ds,) = of_scores(_product("bkgtd,bksd->bkgts", dy, v) - y_dy)
    ds = ds.astype(k.dtype)
    dv = dv + _product("bkgts,bkgtd->bksd", p.astype(v.dtype), dy)
    dk = dk + _product("bkgts,bkgtd->bksd", ds, q)
    return (dk, dv), _product("bkgts,bksd->bkgtd", ds, k)


def _limited(ring: Ring, s: Float[Array, "b kv group t s"], sees: Array | None) -> Array:
    """Scores within their cap, NEGATIVE where a key is not seen."""
    cap = ring.spec.softcap
    s = s if cap is None else cap * jnp.tanh(s / cap)
    return s if sees is None else jnp.where(sees[:, None, None], s, NEGATIVE)


def _product(subscripts: str, a: Array, b: Array) -> Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def _sees(
    ring: Ring, facts: Facts, going: Going, pair: Pair, rows: Int[Array, "t"]
) -> Bool[Array, "mb t s"] | None:
    """Which keys of a pair some rows of its queries see; None for all."""
    t = going.k.shape[3]
    first, first_key = pair.number * t, pair.key_number * t
    if facts.mask is not None:
        return jax.lax.dynamic_slice_in_dim(facts.mask[0], first_key, t, axis=2)[:, rows]
    spec, found = ring.spec, None
    if spec.causal or spec.window is not None:
        found = seen(first + rows, first_key + jnp.arange(t), spec)[None]
    if facts.segments is not None:
        asked, keys = _take(facts.segments, pair.i)[:, rows], _take(going.segments, pair.j)
        same = (asked[:, :, None] == keys[:, None, :]) & (asked[:, :, None] > 0)
        found = same if found is None else found & same
    return found


def _by_block(one: Callable, sees: Callable, carry: PyTree, rows: PyTree) -> tuple[PyTree, PyTree]:
    """one(carry, rows, what they see) of queries [..., t, d], BLOCK of them after the other."""
    t = jax.tree.leaves(rows)[0].shape[-2]
    if t <= BLOCK:
        return one(carry, rows, sees(jnp.arange(t)))
    n = -(-t // BLOCK)
    numbers = jnp.minimum(jnp.arange(n * -(-t // n)).reshape(n, -1), t - 1)
    pieces = jax.tree.map(lambda x: split(x, x.ndim - 2, n), rows)
    carry, found = jax.lax.scan(
        lambda carry, xs: one(carry, xs[0], sees(xs[1])), carry, (pieces, numbers)
    )

    def joined(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, -3)
        return x.reshape(*x.shape[:-3], -1, x.shape[-1])[..., :t, :]

    return carry, jax.tree.map(joined, found)


def _take(x: Array, i: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False)


def _put(x: Array, new: Array, i: Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(x, new, i, 0)
