"""Grouped-query attention: rotary positions, windows, soft caps, quantized keys and values."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from ffnlab.layers.attention.causal import causal_attention
from ffnlab.layers.attention.masked import masked_attention
from ffnlab.layers.attention.rope import Rope, rotate
from ffnlab.layers.linear import Linear, RMSNorm, together
from ffnlab.weights import kv

Angles = tuple[Array, Array]


class Context(NamedTuple):
    """What all layers of one forward pass share, computed once.

    Attributes:
      angles: (cos, sin) of each kind of rotary embedding in the model.
      masks: which keys each query may see, [b, 1, t, S] bool, by window size; a mask of None means
        plain causal attention over t tokens (within the window).
      index: cache slot of the first query token, or None without a cache.
    """

    angles: Mapping[Rope, Angles]
    masks: Mapping[int | None, Array | None]
    index: Array | None = None


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """Static facts of an attention layer.

    Attributes:
      heads, kv_heads, head_dim: sizes; heads is a multiple of kv_heads.
      rope: rotary embedding.
      window: a token sees itself and window - 1 tokens before it; None for all.
      softcap: scores become softcap * tanh(scores / softcap).
      scale: multiplies the scores; 1 / sqrt(head_dim) when None.
      kv_format: None, "float8" or "int4": how keys and values are rounded, with a cache or without.
      query_format: None or "e4m3".
    """

    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None
    kv_format: str | None = None
    query_format: str | None = None


class Attention(nnx.Module):
    """Softmax attention of [b, t, width] activations.

    Attributes:
      q, k, v, o: Linear maps.
      q_norm, k_norm: RMSNorm over head_dim before the rotation, or None.
      post_scale: Param [kv_heads, head_dim]; after the rotation keys are multiplied and queries
        divided by it (FireQ's post-RoPE scale), or None.
      spec: AttentionSpec (static).
    """

    def __init__(
        self,
        spec: AttentionSpec,
        width: int,
        *,
        key: Array,
        qkv_bias: bool = False,
        o_bias: bool = False,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        norm_offset: float = 0.0,
        out_scale: float = 1.0,
        dtype: DTypeLike = jnp.float32,
    ):
        q, k, v, o = jax.random.split(key, 4)
        inner, kv_inner = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        common = {"bias": qkv_bias, "dtype": dtype}
        self.q = Linear(width, inner, key=q, axes=("embed", "heads"), **common)
        self.k = Linear(width, kv_inner, key=k, axes=("embed", "kv_heads"), **common)
        self.v = Linear(width, kv_inner, key=v, axes=("embed", "kv_heads"), **common)
        self.o = Linear(
            inner, width, key=o, axes=("heads", "embed"), bias=o_bias, dtype=dtype, scale=out_scale
        )
        norm = lambda: (  # noqa: E731
            RMSNorm(spec.head_dim, eps=norm_eps, offset=norm_offset, axis="head_dim", dtype=dtype)
            if qk_norm
            else None
        )
        self.q_norm = nnx.data(norm())
        self.k_norm = nnx.data(norm())
        self.post_scale = nnx.data(None)
        self.spec = spec

    def project(
        self, x: Float[Array, "b t d"], angles: Angles, *, merge: bool = False
    ) -> tuple[Float[Array, "b t h hd"], Float[Array, "b t kv hd"], Float[Array, "b t kv hd"]]:
        """Queries, keys and values after norms, rotation and post-RoPE scale, before rounding.

        `merge` lets the three maps be one product (`together`): not under a mesh that shards them.
        """
        spec = self.spec
        split = lambda y, n: y.reshape(*y.shape[:2], n, spec.head_dim)  # noqa: E731
        maps = self.q, self.k, self.v
        q, k, v = together(x, *maps) if merge else (m(x) for m in maps)
        q, k, v = split(q, spec.heads), split(k, spec.kv_heads), split(v, spec.kv_heads)
        q = q if self.q_norm is None else self.q_norm(q)
        k = k if self.k_norm is None else self.k_norm(k)
        q, k = rotate(q, *angles), rotate(k, *angles)
        if self.post_scale is not None:
            scale = self.post_scale.get_value().astype(q.dtype)
            k = k * scale
            q = q / jnp.repeat(scale, spec.heads // spec.kv_heads, axis=0)
        return q, k, v

    def __call__(
        self, x: Float[Array, "b t d"], context: Context, cache: kv.KV | None = None
    ) -> tuple[Float[Array, "b t d"], kv.KV | None]:
        """Returns (output, cache with the new keys and values written)."""
        spec = self.spec
        # With a cache this is inference, and the maps are whole; training shards them.
        q, k, v = self.project(x, context.angles[spec.rope], merge=cache is not None)
        if spec.query_format is not None:
            q = kv.fake_query(spec.query_format, q)
        if cache is not None:
            cache = cache.write(k, v, context.index)
            k, v = cache.read(x.dtype)
        else:
            k, v = kv.fake(spec.kv_format, k), kv.fake(spec.kv_format, v)
        y = attend(q, k, v, context.masks[spec.window], spec)
        return self.o(y.reshape(*x.shape[:2], -1)), cache


def attend(
    q: Float[Array, "b t h hd"],
    k: Float[Array, "b s kv hd"],
    v: Float[Array, "b s kv hd"],
    mask: Bool[Array, "b 1 t s"] | None,
    spec: AttentionSpec,
) -> Float[Array, "b t h hd"]:
    """Attention by `jax.nn.dot_product_attention` where it can say it, except on a CPU.

    There it is slow, and `causal_attention` and `masked_attention` stand in; the latter also
    does the soft caps everywhere.
    """
    scale = spec.head_dim**-0.5 if spec.scale is None else spec.scale
    cpu = jax.default_backend() == "cpu"
    if spec.softcap is None and not cpu:
        window = None if spec.window is None or mask is not None else (spec.window - 1, 0)
        return jax.nn.dot_product_attention(
            q, k, v, mask=mask, scale=scale, is_causal=mask is None, local_window_size=window
        )
    if mask is None and spec.window is None and spec.softcap is None:
        q32, k32, v32 = (x.astype(jnp.float32) for x in (q, k, v))
        return causal_attention(q32, k32, v32, scale).astype(q.dtype)
    if mask is None:
        slots = jnp.arange(q.shape[1])
        mask = causal_mask(slots, slots, spec.window)[None, None]
    return masked_attention(q, k, v, mask, scale=scale, softcap=spec.softcap, causal=True)


def causal_mask(q_slots: Array, k_slots: Array, window: int | None) -> Bool[Array, "t s"]:
    """Whether the query in slot q sees the key in slot k: k <= q, and q - k < window."""
    distance = q_slots[:, None] - k_slots[None, :]
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)
