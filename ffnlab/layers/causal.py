"""Causal attention for CPUs: softmax(q kᵀ / sqrt(d)) v in blocks of queries.

A block of queries sees only the keys up to its own end, so the upper triangle is never computed
beyond a block; the backward pass recomputes the probabilities from the saved log-normalizer
(FlashAttention, arXiv 2205.14135) instead of reading them back from memory. XLA on a CPU gets plain
batched products over (batch, kv head), with all query heads of a group in one product.

Measured on two cores, 8 x 256 tokens, 4 heads of 32 channels, forward and backward of the whole
1.6 M parameter model: three quarters of the time of `jax.nn.dot_product_attention`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

BLOCK = 128  # queries of one block; at most MAX_BLOCKS blocks, larger ones for longer rows
MAX_BLOCKS = 8
NEGATIVE = -1e30

_settle = jax.lax.optimization_barrier  # computes a value once where fusion would repeat it


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def causal_attention(
    q: Float[Array, "b t h hd"],
    k: Float[Array, "b t kv hd"],
    v: Float[Array, "b t kv hd"],
    scale: float,
) -> Float[Array, "b t h hd"]:
    """Attention of every token to itself and those before it, in float32.

    Args:
      q: queries, [b, t, h, hd]; h is a multiple of kv.
      k, v: keys and values, [b, t, kv, hd].
      scale: multiplies the scores.
    Returns:
      [b, t, h, hd]. Differentiable in reverse mode, once.
    """
    return _forward(q, k, v, scale)[0]


def _forward(q: Array, k: Array, v: Array, scale: float) -> tuple[Array, tuple]:
    kv = k.shape[2]
    queries = by_head(q * scale, kv)
    queries, keys, values = _settle((queries, by_head(k, kv), by_head(v, kv)))
    outputs, normalizers = [], []
    for low, high in _blocks(q.shape[1]):
        s = _scores(queries, keys, low, high)
        top = jnp.max(s, axis=-1, keepdims=True)
        p = _settle(jnp.exp(s - top))
        total = jnp.sum(p, axis=-1, keepdims=True)
        o = jnp.einsum("bkqs,bksd->bkqd", p, values[:, :, 0, :high]) / total
        outputs.append(_ungroup(o, high - low))
        normalizers.append(_ungroup(top + jnp.log(total), high - low))
    output = jnp.concatenate(outputs, axis=3)
    saved = (queries, keys, values, output, jnp.concatenate(normalizers, axis=3))
    return by_token(output), saved


def _backward(scale: float, saved: tuple, cotangent: Array) -> tuple[Array, Array, Array]:
    queries, keys, values, output, normalizer = saved
    d_output = _settle(by_head(cotangent, keys.shape[1]))
    inner = jnp.sum(d_output * output, axis=-1, keepdims=True)
    d_queries, d_keys, d_values = [], jnp.zeros_like(keys), jnp.zeros_like(values)
    for low, high in _blocks(queries.shape[3]):
        p = jnp.exp(_scores(queries, keys, low, high) - _group(normalizer, low, high))
        block = _group(d_output, low, high)
        d_p = jnp.einsum("bkqd,bksd->bkqs", block, values[:, :, 0, :high])
        p, d_s = _settle((p, p * (d_p - _group(inner, low, high))))
        d_q = jnp.einsum("bkqs,bksd->bkqd", d_s, keys[:, :, 0, :high]) * scale
        d_queries.append(_ungroup(d_q, high - low))
        d_k = jnp.einsum("bkqs,bkqd->bksd", d_s, _group(queries, low, high))
        d_keys = d_keys.at[:, :, 0, :high].add(d_k)
        d_values = d_values.at[:, :, 0, :high].add(jnp.einsum("bkqs,bkqd->bksd", p, block))
    return by_token(jnp.concatenate(d_queries, axis=3)), by_token(d_keys), by_token(d_values)


causal_attention.defvjp(_forward, _backward)


def _blocks(t: int) -> list[tuple[int, int]]:
    size = max(BLOCK, -(-t // MAX_BLOCKS))
    return [(low, min(low + size, t)) for low in range(0, t, size)]


def _scores(queries: Array, keys: Array, low: int, high: int) -> Array:
    """Masked scores of one block, [b, kv, group * (high - low), high]."""
    s = jnp.einsum("bkqd,bksd->bkqs", _group(queries, low, high), keys[:, :, 0, :high])
    seen = np.arange(low, high)[:, None] >= np.arange(high)
    mask = np.where(seen, np.float32(0), np.float32(NEGATIVE))
    return s + np.tile(mask, (queries.shape[2], 1))


def by_head(x: Array, kv: int) -> Array:
    b, t, heads, hd = x.shape
    return x.reshape(b, t, kv, heads // kv, hd).transpose(0, 2, 3, 1, 4)


def by_token(x: Array) -> Array:
    b, kv, group, t, hd = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(b, t, kv * group, hd)


def _group(x: Array, low: int, high: int) -> Array:
    b, kv, group, _, width = x.shape
    return x[:, :, :, low:high].reshape(b, kv, group * (high - low), width)


def _ungroup(x: Array, t: int) -> Array:
    return x.reshape(*x.shape[:2], -1, t, x.shape[-1])
