"""Causal attention for prefill: the meaning, in plain jnp and float32.

    s[i, j] = scale * sum_d q[i, d] k[j, d]        for keys p - window < j <= p = i + keys - queries
    y[i] = sum_j softmax_j(s[i]) v[j]

precision "fp8" rounds as FireQ's kernel (arXiv 2505.20839) does: queries to e4m3 per token and
head, scores to float16, and exp(s - max) times 448 to e4m3 before it meets the values.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.numerics import E4M3_MAX, quantize_tokens, to_e4m3


def split_heads(q, kv_heads):
    """[b, t, heads, d] -> [b, kv, heads / kv, t, d]: the query heads that share a key head."""
    b, t, heads, d = q.shape
    return q.reshape(b, t, kv_heads, heads // kv_heads, d).transpose(0, 2, 3, 1, 4)


def merge_heads(y):
    """The opposite of `split_heads`."""
    b, kv, group, t, d = y.shape
    return y.transpose(0, 3, 1, 2, 4).reshape(b, t, kv * group, d)


def scores(q, q_scale, k, k_scale, *, scale, precision):
    """Scaled scores of some keys, before masking.

    Args:
      q: [b, kv, g, t, d] float32, already rounded; q_scale: [b, kv, g, t, 1] float32.
      k: [b, kv, n, d] float32; k_scale: [b, kv, n] float32.
      scale: multiplies the scores.
      precision: "float32" or "fp8".
    Returns:
      [b, kv, g, t, n] float32.
    """
    s = jnp.einsum("bkgtd,bknd->bkgtn", q, k, precision="highest")
    s = s * q_scale * k_scale[:, :, None, None] * scale
    return s.astype(jnp.float16).astype(jnp.float32) if precision == "fp8" else s


def weights(p, precision):
    """exp(s - max) as the product with the values sees it, [...] float32."""
    if precision == "float32":
        return p
    return to_e4m3(p * E4M3_MAX).astype(jnp.float32) / E4M3_MAX


def rounded_queries(q, precision):
    """Queries and their scales, [..., d] and [..., 1] float32."""
    if precision == "float32":
        return q.astype(jnp.float32), jnp.ones((*q.shape[:-1], 1), jnp.float32)
    codes, scale = quantize_tokens(q)
    return codes.astype(jnp.float32), scale


def visible(queries, first_key, keys, count, window):
    """Which of `count` keys from `first_key` on each query sees, [queries, count] bool."""
    position = jnp.arange(queries)[:, None] + (keys - queries)
    key = first_key + jnp.arange(count)[None]
    seen = (key <= position) & (key < keys)
    return seen if window is None else seen & (key > position - window)


def prefill(q, k, v, k_scale, v_scale, *, scale, tile, precision, window):
    """The formula above, with all scores at once.

    Args:
      q: [b, t, heads, d], float32, bfloat16 or float16.
      k, v: [b, s, kv, d], the same or int8 codes.
      k_scale, v_scale: [b, s, kv] float32, multiply keys and values.
      scale: multiplies the scores.
      tile: not used: nothing here is tiled.
      precision: "float32" or "fp8".
      window: keys a query sees, or None for all before it.
    Returns:
      [b, t, heads, d] float32.
    """
    t, s = q.shape[1], k.shape[1]
    q, q_scale = rounded_queries(split_heads(q, k.shape[2]), precision)
    k, v = (x.astype(jnp.float32).transpose(0, 2, 1, 3) for x in (k, v))
    k_scale, v_scale = k_scale.transpose(0, 2, 1), v_scale.transpose(0, 2, 1)
    logits = scores(q, q_scale, k, k_scale, scale=scale, precision=precision)
    logits = jnp.where(visible(t, 0, s, s, window), logits, -jnp.inf)
    p = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    values = v * v_scale[..., None]
    y = jnp.einsum("bkgtn,bknd->bkgtd", weights(p, precision), values, precision="highest")
    return merge_heads(y / jnp.sum(p, axis=-1, keepdims=True))


def nibbles(x):
    """A cache's channels in float32: floats and int8 codes as they are, bytes as two codes each.

    Args:
      x: [..., d], or [..., d / 2] uint8 with channel 2i in the low nibble of byte i.
    Returns:
      [..., d] float32.
    """
    if x.dtype != jnp.uint8:
        return x.astype(jnp.float32)
    low = jax.lax.bitcast_convert_type(x << jnp.uint8(4), jnp.int8) >> jnp.int8(4)
    high = jax.lax.bitcast_convert_type(x, jnp.int8) >> jnp.int8(4)
    return jnp.stack([low, high], axis=-1).reshape(*x.shape[:-1], -1).astype(jnp.float32)


def pages_of(x, x_scale, here, seen):
    """Pages of a cache, times their scales.

    Args:
      x: [p, page, kv, d], see `nibbles`; x_scale: [p, kv, page], or None.
      here: [...] which pages.
      seen: [..., page] bool; what else a cache holds may be NaN and counts as 0, before any
        product, so that no gradient meets it either.
    Returns:
      [..., page, kv, d] float32.
    """
    seen = seen[..., None]
    values = jnp.where(seen[..., None], nibbles(x[here]), jnp.float32(0))
    if x_scale is None:
        return values
    scale = jnp.swapaxes(x_scale[here].astype(jnp.float32), -1, -2)
    return values * jnp.where(seen, scale, jnp.float32(0))[..., None]


def decode(q, k, v, k_scale, v_scale, pages, lengths, *, scale, window, splits):
    """Attention of one query per sequence, at its sequence's last key, over a cache of pages.

    y = sum_j softmax_j(scale * q . k[j]) v[j]   over keys length - window <= j < length

    Args:
      q: [b, heads, d] float.
      k, v: [p, page, kv, d] float or int8 codes, or [p, page, kv, d / 2] uint8.
      k_scale, v_scale: [p, kv, page] float, multiply keys and values; or both None.
      pages: [b, n] int32, which pages a sequence has, in order.
      lengths: [b] int32, keys a sequence has, 1 to n * page.
      scale: multiplies the scores.
      window: keys a query sees, or None for all.
      splits: not used: nothing here is split.
    Returns:
      [b, heads, d] float32.
    """
    (b, heads, d), kv = q.shape, k.shape[2]
    key = jnp.arange(pages.shape[1] * k.shape[1])
    seen = key < lengths[:, None]
    if window is not None:
        seen &= key >= lengths[:, None] - window
    paged = seen.reshape(*pages.shape, -1)
    k, v = (pages_of(*x, pages, paged).reshape(b, -1, kv, d) for x in ((k, k_scale), (v, v_scale)))
    q = q.astype(jnp.float32).reshape(b, kv, heads // kv, d)
    s = jnp.einsum("bkgd,bjkd->bkgj", q, k, precision="highest") * scale
    s = jnp.where(seen[:, None, None], s, -jnp.inf)
    p = jnp.exp(s - jnp.max(s, axis=-1, keepdims=True))
    y = jnp.einsum("bkgj,bjkd->bkgd", p, v, precision="highest")
    return (y / jnp.sum(p, axis=-1, keepdims=True)).reshape(b, heads, d)
