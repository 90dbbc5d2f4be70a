"""Attention under any mask, in float32: softmax(cap(q kᵀ scale) + mask) v.

What `jax.nn.dot_product_attention` cannot say (soft caps), and what it does slowly: on a CPU its
products come out as loops. Here all query heads of a group are rows of one plain batched product,
many queries go in a loop over blocks, so that their scores never all exist at once, and where the
mask is known to be causal the keys that no query of a block may see are left out.

Measured on one core, float32, 4 heads of 32 channels, 2 KV heads, batch 1, CPU time: 512 queries
on 640 keys take 3.4 ms (`jax.nn.dot_product_attention`: 28 ms); one query on 1024 keys takes 56 µs
(163 µs). A cache stored by head is slower at batch 1 (74 µs) and faster at batch 8 (300 against
460 µs), so caches stay in the order [b, S, kv, hd].
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from ffnlab.layers.attention.causal import BLOCK, NEGATIVE, blocks, by_head, by_token


def masked_attention(
    q: Float[Array, "b t h hd"],
    k: Float[Array, "b s kv hd"],
    v: Float[Array, "b s kv hd"],
    mask: Bool[Array, "mb 1 t s"],
    *,
    scale: float,
    softcap: float | None = None,
    bias: Float[Array, "bb h t s"] | None = None,
    causal: bool = False,
) -> Float[Array, "b t h hd"]:
    """Attention of each query to the keys that its mask allows.

    s = q·k scale, s = softcap tanh(s / softcap) where capped, y = softmax(s + bias where mask) v

    Args:
      q: queries, [b, t, h, hd]; h is a multiple of kv.
      k, v: keys and values, [b, s, kv, hd].
      mask: True where a query sees a key, [b, 1, t, s] or [1, 1, t, s]; a query that sees none
        gets an average of all values (of those before it, where causal).
      scale: multiplies the scores.
      softcap: bound of the scores (Gemma 2, arXiv 2408.00118), or None.
      bias: added to the scores, [b, h, t, s] or [1, h, t, s], or None.
      causal: a promise about the mask: query i sees no key after s - t + i, as in the last t of at
        most s tokens. What the mask forbids beyond that, it still has to say.
    Returns:
      [b, t, h, hd] in v's dtype.
    """
    queries, t, s = by_head(q * scale, k.shape[2]), q.shape[1], k.shape[1]
    if bias is not None:  # heads as the queries have them
        bias = bias.reshape(bias.shape[0], k.shape[2], -1, t, s)
    if not causal or s < t:
        return by_token(attend(queries, k, v, mask, softcap, bias))
    parts = []
    for low, high in blocks(t):
        block, end = queries[:, :, :, low:high], s - t + high
        added = None if bias is None else bias[..., low:high, :end]
        seen = mask[:, :, low:high, :end]
        parts.append(attend(block, k[:, :end], v[:, :end], seen, softcap, added))
    return by_token(jnp.concatenate(parts, axis=3))


def attend(
    queries: Float[Array, "b kv group t hd"],
    k: Float[Array, "b s kv hd"],
    v: Float[Array, "b s kv hd"],
    mask: Bool[Array, "mb 1 t s"],
    softcap: float | None,
    bias: Float[Array, "bb kv group t s"] | None = None,
) -> Float[Array, "b kv group t hd"]:
    """`masked_attention` of scaled queries in the order of `by_head`, BLOCK of them at a time."""

    def one(block: Array, seen: Array, added: Array | None) -> Array:
        s = jnp.einsum("bkgtd,bskd->bkgts", block, k, preferred_element_type=jnp.float32)
        s = s if softcap is None else softcap * jnp.tanh(s / softcap)
        s = s if added is None else s + added
        s = jnp.where(seen[:, :, None], s, NEGATIVE)
        p = jnp.exp(s - jax.lax.stop_gradient(jnp.max(s, axis=-1, keepdims=True)))
        y = jnp.einsum("bkgts,bskd->bkgtd", p.astype(v.dtype), v)
        return y / jnp.sum(p, axis=-1, keepdims=True).astype(v.dtype)

    t = queries.shape[3]
    if t <= BLOCK:
        return one(queries, mask, bias)
    n = -(-t // BLOCK)
    pieces = split(queries, 3, n), split(mask, 2, n), None if bias is None else split(bias, 3, n)
    out = jnp.concatenate(jnp.unstack(jax.lax.map(lambda xs: one(*xs), pieces)), axis=3)
    return out[:, :, :, :t]


def split(x: Shaped[Array, "..."], axis: int, n: int) -> Shaped[Array, "n ..."]:
    """n equal pieces along an axis, padded with zeros at its end, on a new leading axis."""
    size = -(-x.shape[axis] // n)
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, n * size - x.shape[axis])
    x = jnp.pad(x, pad)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], n, size, *x.shape[axis + 1 :]), axis, 0)
