"""Causal attention for CPUs: softmax(q kᵀ scale) v in blocks of queries.

A block of queries sees only the keys up to its own end, so the upper triangle is never computed
beyond a block. Derivatives recompute the probabilities from the saved log-normalizer
(FlashAttention, arXiv 2205.14135) instead of reading them back from memory. XLA on a CPU gets plain
batched products over (batch, kv head), with all query heads of a group in one product.

    s = q kᵀ,  L = log Σ exp(s),  p = exp(s - L),  o = p v             (q already scaled)
    ds = dq kᵀ + q dkᵀ,  dL = Σ p ds,  do = (p ds) v - o dL + p dv

The derivative is written once, as this linear map, under `jax.checkpoint`: forward mode runs it,
reverse mode is its transpose, found by JAX, and both can be differentiated again.

Measured on two cores, 8 x 256 tokens, 4 heads of 32 channels, forward and backward of the whole
1.6 M parameter model: three quarters of the time of `jax.nn.dot_product_attention`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

BLOCK = 128  # queries of one block; at most MAX_BLOCKS blocks, larger ones for longer rows
MAX_BLOCKS = 8
NEGATIVE = -1e30


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
      [b, t, h, hd]. Differentiable in both modes, any number of times.
    """
    kv = k.shape[2]
    queries = by_head(q * scale, kv)
    queries, keys, values = _settle((queries, by_head(k, kv), by_head(v, kv)))
    return by_token(_attend(queries, keys, values)[0])


@jax.custom_jvp
def _settle(x):
    """Computes a value once where fusion would repeat it; linear, unlike the bare barrier."""
    return jax.lax.optimization_barrier(x)


_settle.defjvp(lambda primals, tangents: (_settle(*primals), *tangents))


@jax.custom_jvp
def _attend(queries: Array, keys: Array, values: Array) -> tuple[Array, Array]:
    """(o, L), each [b, kv, group, t, ...], from queries and keys in the order of `by_head`."""
    outputs, normalizers = [], []
    for low, high in blocks(queries.shape[3]):
        s = _scores(queries, keys, low, high)
        top = jnp.max(s, axis=-1, keepdims=True)
        p = _settle(jnp.exp(s - top))
        total = jnp.sum(p, axis=-1, keepdims=True)
        o = jnp.einsum("bkqs,bksd->bkqd", p, values[:, :, 0, :high]) / total
        outputs.append(_ungroup(o, high - low))
        normalizers.append(_ungroup(top + jnp.log(total), high - low))
    return jnp.concatenate(outputs, axis=3), jnp.concatenate(normalizers, axis=3)


@_attend.defjvp
def _attend_jvp(primals: tuple, tangents: tuple) -> tuple[tuple, tuple]:
    results = _attend(*primals)
    return results, _tangents(primals, results, tangents)


@jax.checkpoint
def _tangents(primals: tuple, results: tuple, tangents: tuple) -> tuple[Array, Array]:
    """(do, dL); linear in the tangents, and p is computed again wherever it runs."""
    (queries, keys, values), (output, normalizer) = primals, results
    d_queries, d_keys, d_values = tangents
    d_outputs, d_normalizers = [], []
    for low, high in blocks(queries.shape[3]):
        seen = (slice(None), slice(None), 0, slice(high))
        p = _settle(jnp.exp(_scores(queries, keys, low, high) - _group(normalizer, low, high)))
        d_s = jnp.einsum("bkqd,bksd->bkqs", _group(d_queries, low, high), keys[seen])
        d_s += jnp.einsum("bkqd,bksd->bkqs", _group(queries, low, high), d_keys[seen])
        d_s *= p
        d_total = jnp.sum(d_s, axis=-1, keepdims=True)
        d_o = jnp.einsum("bkqs,bksd->bkqd", d_s, values[seen]) - d_total * _group(output, low, high)
        d_o += jnp.einsum("bkqs,bksd->bkqd", p, d_values[seen])
        d_outputs.append(_ungroup(d_o, high - low))
        d_normalizers.append(_ungroup(d_total, high - low))
    return jnp.concatenate(d_outputs, axis=3), jnp.concatenate(d_normalizers, axis=3)


def blocks(t: int) -> list[tuple[int, int]]:
    """First and last + 1 query of each block."""
    size = max(BLOCK, -(-t // MAX_BLOCKS))
    return [(low, min(low + size, t)) for low in range(0, t, size)]


def _scores(queries: Array, keys: Array, low: int, high: int) -> Array:
    """Masked scores of one block, [b, kv, group * (high - low), high]."""
    s = jnp.einsum("bkqd,bksd->bkqs", _group(queries, low, high), keys[:, :, 0, :high])
    seen = jnp.arange(low, high)[:, None] >= jnp.arange(high)
    # Made once per block and added: a comparison fused into the scores is repeated for each head.
    mask = _settle(jnp.where(seen, jnp.float32(0), jnp.float32(NEGATIVE)))
    return s + jnp.tile(mask, (queries.shape[2], 1))


def by_head(x: Array, kv: int) -> Array:
    """[b, t, heads, d] as [b, kv, heads / kv, t, d]: the heads that share keys together."""
    b, t, heads, hd = x.shape
    return x.reshape(b, t, kv, heads // kv, hd).transpose(0, 2, 3, 1, 4)


def by_token(x: Array) -> Array:
    """The inverse of `by_head`."""
    b, kv, group, t, hd = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(b, t, kv * group, hd)


def _group(x: Array, low: int, high: int) -> Array:
    b, kv, group, _, width = x.shape
    return x[:, :, :, low:high].reshape(b, kv, group * (high - low), width)


def _ungroup(x: Array, t: int) -> Array:
    return x.reshape(*x.shape[:2], -1, t, x.shape[-1])
