"""Grouped-query attention: causal or not, rotary positions or none, windows, soft caps, biases,
quantized keys and values, and keys from elsewhere."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from ffnlab.errors import ConfigError
from ffnlab.layers.attention.causal import causal_attention
from ffnlab.layers.attention.context_parallel import context_axes, context_parallel
from ffnlab.layers.attention.masked import masked_attention
from ffnlab.layers.attention.rope import rotate
from ffnlab.layers.attention.spec import AttentionSpec, seen
from ffnlab.layers.context import Angles, Context, TokenFacts
from ffnlab.layers.linear import Linear, together
from ffnlab.layers.modality import through
from ffnlab.layers.norms import RMSNorm
from ffnlab.layers.stacking import Statistic
from ffnlab.weights import kv


class Attention(nnx.Module):
    """Softmax attention of [b, t, width] activations.

    Attributes:
      q, k, v, o: Linear maps; or grouped ones, of which each token goes through that of its
        modality (`ffnlab.layers.modality`), as it does through grouped norms.
      q_norm, k_norm: RMSNorm over head_dim before the rotation, or None.
      prefix: Param [2, n, kv_heads, head_dim], keys and values of n further positions that every
        query sees, whatever its mask says (prefix tuning, arXiv 2101.00190), or None.
      beside: Statistic holding a cache [b, n, kv_heads, head_dim] of further positions of each row
        of a batch, or of all (b = 1), with `beside_mask` [b, n] bool of what is there; see
        `with_beside`. None for none.
      post_scale: Param [kv_heads, head_dim]; after the rotation keys are multiplied and queries
        divided by it (FireQ's post-RoPE scale), or None.
      spec: AttentionSpec (static).
    """

    mixes = True  # a block calls it with the context and a cache
    # Set only where there is one, as older files know none.
    prefix: nnx.Param | None = None
    beside: Statistic | None = None
    beside_mask: Statistic | None = None

    def __init__(
        self,
        spec: AttentionSpec,
        width: int,
        *,
        key: Array,
        source: int | None = None,
        qkv_bias: bool = False,
        o_bias: bool = False,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        norm_offset: float = 0.0,
        out_scale: float = 1.0,
        dtype: DTypeLike = jnp.float32,
    ):
        """Draws random maps; `source` is the width of what keys are made of, `width` when None."""
        source = width if source is None else source
        q, k, v, o = jax.random.split(key, 4)
        inner, kv_inner = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        common = {"bias": qkv_bias, "dtype": dtype}
        self.q = Linear(width, inner, key=q, axes=("embed", "heads"), **common)
        self.k = Linear(source, kv_inner, key=k, axes=("embed", "kv_heads"), **common)
        self.v = Linear(source, kv_inner, key=v, axes=("embed", "kv_heads"), **common)
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
        self,
        x: Float[Array, "b t d"],
        angles: Angles | None,
        *,
        source: Float[Array, "b s m"] | None = None,
        merge: bool = False,
        tokens: TokenFacts | None = None,
    ) -> tuple[Float[Array, "b t h hd"], Float[Array, "b s kv hd"], Float[Array, "b s kv hd"]]:
        """Queries, keys and values after norms, rotation and post-RoPE scale, before rounding.

        Args:
          angles: of the rotation; None for none.
          source: what keys and values are made of; x itself when None.
          merge: lets the three maps be one product (`together`): not under a mesh that shards them.
          tokens: facts of x; nothing is known of a source.
        """
        maps, of_source = (self.q, self.k, self.v), tokens if source is None else None
        if merge and source is None and all(isinstance(m, Linear) for m in maps):
            q, k, v = together(x, *maps)
        else:
            source = x if source is None else source
            q = through(self.q, x, tokens)
            k, v = through(self.k, source, of_source), through(self.v, source, of_source)
        q = self._split(q, self.spec.heads)
        q = q if self.q_norm is None else through(self.q_norm, q, tokens)
        if angles is not None:
            q = rotate(q, *angles)
        if self.post_scale is not None:
            scale = self.post_scale.get_value().astype(q.dtype)
            q = q / jnp.repeat(scale, self.spec.heads // self.spec.kv_heads, axis=0)
        return q, *self._keys(k, v, angles, of_source)

    def _split(self, y: Float[Array, "b t hhd"], heads: int) -> Float[Array, "b t h hd"]:
        return y.reshape(*y.shape[:2], heads, self.spec.head_dim)

    def unrotated(
        self, x: Float[Array, "b s m"], tokens: TokenFacts | None = None
    ) -> Float[Array, "b s kv hd"]:
        """Keys after their norm, before rotation and post-RoPE scale."""
        return self._normed(through(self.k, x, tokens), tokens)

    def _normed(self, k: Array, tokens: TokenFacts | None) -> Array:
        k = self._split(k, self.spec.kv_heads)
        return k if self.k_norm is None else through(self.k_norm, k, tokens)

    def _keys(
        self, k: Array, v: Array, angles: Angles | None, tokens: TokenFacts | None = None
    ) -> tuple[Array, Array]:
        """Keys and values of what their maps give."""
        k, v = self._normed(k, tokens), self._split(v, self.spec.kv_heads)
        k = k if angles is None else rotate(k, *angles)
        if self.post_scale is not None:
            k = k * self.post_scale.get_value().astype(k.dtype)
        return k, v

    def cache_of(self, x: Float[Array, "b s m"], angles: Angles | None) -> kv.KV:
        """A full cache of the keys and values of s positions, in this layer's format.

        Args:
          x: what they are made of, normed as the layer's input is.
          angles: of their rotation; None for none.
        """
        spec = self.spec
        k, v = self._keys(through(self.k, x, None), through(self.v, x, None), angles)
        b, s = x.shape[:2]
        return kv.empty(spec.kv_format, b, s, spec.kv_heads, spec.head_dim, k.dtype).write(k, v, 0)

    def with_beside(self, cache: kv.KV, mask: Bool[Array, "b n"]) -> "Attention":
        """This layer with further positions that all queries see, whatever their mask and window.

        A row's own tokens keep their places: without any position that is there the layer is what
        it was.

        Args:
          cache: their keys and values, of each row or (b = 1) for all.
          mask: which of them are there.
        """
        new = jax.tree.map(lambda leaf: leaf, self)
        new.beside, new.beside_mask = Statistic(cache), Statistic(mask)
        return new

    def __call__(
        self, x: Float[Array, "b t d"], context: Context, cache: kv.KV | None = None
    ) -> tuple[Float[Array, "b t d"], kv.KV | None]:
        """Returns (output, cache with the new keys and values written).

        Raises:
          ConfigError: it reads from elsewhere and the context has no memory.
        """
        spec = self.spec
        if spec.memory:
            return self._from_memory(x, context), cache
        angles = None if spec.rope is None else context.angles[spec.rope]
        # With a cache this is inference, and the maps are whole; training shards them.
        q, k, v = self.project(x, angles, merge=cache is not None, tokens=context.tokens)
        if spec.query_format is not None:
            q = kv.fake_query(spec.query_format, q)
        if cache is not None:
            cache = cache.write(k, v, context.index)
            k, v = cache.read(x.dtype)
        else:
            k, v = kv.fake(spec.kv_format, k), kv.fake(spec.kv_format, v)
        mask, bias = context.masks[spec.window], context.bias
        if self.prefix is not None or self.beside is not None:
            k, v, mask, bias = self._further(k, v, mask, bias, x.shape[1])
        segments = None if context.tokens is None else context.tokens.segments
        y = attend(q, k, v, mask, spec, bias, segments=segments)
        return through(self.o, y.reshape(*x.shape[:2], -1), context.tokens), cache

    def _further(
        self, k: Array, v: Array, mask: Array | None, bias: Array | None, t: int
    ) -> tuple[Array, Array, Array, Array | None]:
        """Keys, values, mask and bias with those of prefix and further positions before them."""
        (b, s), parts = k.shape[:2], []
        if mask is None:
            mask = seen(jnp.arange(t), jnp.arange(s), self.spec)[None, None]
        if self.prefix is not None:
            more = self.prefix.get_value().astype(k.dtype)[:, None]
            parts.append((*more, jnp.ones((1, more.shape[2]), bool)))
        if self.beside is not None:
            cache = self.beside.get_value()
            if cache.shape[0] not in (1, b):
                raise ConfigError(
                    f"{b} rows, and what stands beside them is of {cache.shape[0]}; as many or 1 "
                    "are accepted"
                )
            parts.append((*cache.read(k.dtype), self.beside_mask.get_value()))
        for more_k, more_v, there in parts:
            n, rows = there.shape[1], max(mask.shape[0], there.shape[0])
            k, v = (
                jnp.concatenate([jnp.broadcast_to(new, (b, *new.shape[1:])), old], axis=1)
                for new, old in ((more_k, k), (more_v, v))
            )
            there = jnp.broadcast_to(there[:, None, None], (rows, 1, t, n))
            mask = jnp.broadcast_to(mask, (rows, *mask.shape[1:]))
            mask = jnp.concatenate([there, mask], axis=3)
            bias = None if bias is None else jnp.pad(bias, [(0, 0), (0, 0), (0, 0), (n, 0)])
        return k, v, mask, bias

    def _from_memory(self, x: Float[Array, "b t d"], context: Context) -> Float[Array, "b t d"]:
        if context.memory is None:
            raise ConfigError(
                "an attention layer reads keys from elsewhere, and Context.memory is None"
            )
        states, mask = context.memory
        source = states.astype(x.dtype)
        q, k, v = self.project(x, None, source=source, tokens=context.tokens)
        if self.spec.query_format is not None:
            q = kv.fake_query(self.spec.query_format, q)
        k, v = kv.fake(self.spec.kv_format, k), kv.fake(self.spec.kv_format, v)
        if mask is not None:
            mask = jnp.broadcast_to(mask, (*mask.shape[:2], x.shape[1], states.shape[1]))
        y = attend(q, k, v, mask, self.spec)
        return through(self.o, y.reshape(*x.shape[:2], -1), context.tokens)


def attend(
    q: Float[Array, "b t h hd"],
    k: Float[Array, "b s kv hd"],
    v: Float[Array, "b s kv hd"],
    mask: Bool[Array, "mb 1 t s"] | None,
    spec: AttentionSpec,
    bias: Float[Array, "bb h t s"] | None = None,
    *,
    segments: Int[Array, "b t"] | None = None,
) -> Float[Array, "b t h hd"]:
    """Attention on one device, or over the mesh that is set where that cuts rows.

    Over such a mesh (`sp`) no device ever has the keys of whole rows (`context_parallel`), unless
    they are not those of the queries' own tokens (a cache, a memory, a prefix), or a bias is added:
    the compiler then cuts what it can.

    Args:
      mask: which keys a query sees; what the spec says where None.
      segments: where keys are of the queries' own tokens, number of the text each is of, 0 for
        padding: another way to say the mask, which does not grow with the square of t.
    Raises:
      ConfigError: rows that the mesh does not divide.
    """
    own = q.shape[1] == k.shape[1] and not spec.memory
    if bias is None and own and context_axes():
        return context_parallel(alone, q, k, v, mask, spec, segments=segments)
    return alone(q, k, v, mask, spec, bias)


def alone(
    q: Float[Array, "b t h hd"],
    k: Float[Array, "b s kv hd"],
    v: Float[Array, "b s kv hd"],
    mask: Bool[Array, "mb 1 t s"] | None,
    spec: AttentionSpec,
    bias: Float[Array, "bb h t s"] | None = None,
) -> Float[Array, "b t h hd"]:
    """Attention by `jax.nn.dot_product_attention` where it can say it, except on a CPU.

    There it is slow, and `causal_attention` and `masked_attention` stand in; the latter also
    does the soft caps everywhere.
    """
    scale = spec.head_dim**-0.5 if spec.scale is None else spec.scale
    cpu = jax.default_backend() == "cpu"
    if spec.softcap is None and not cpu:
        reach = None if spec.window is None or mask is not None else spec.window - 1
        window = None if reach is None else (reach, 0 if spec.causal else reach)
        causal = spec.causal and mask is None
        return jax.nn.dot_product_attention(
            q, k, v, bias, mask, scale=scale, is_causal=causal, local_window_size=window
        )
    plain = spec.window is None and spec.softcap is None and bias is None
    if mask is None and plain and spec.causal:
        q32, k32, v32 = (x.astype(jnp.float32) for x in (q, k, v))
        return causal_attention(q32, k32, v32, scale).astype(q.dtype)
    if mask is None:
        mask = seen(jnp.arange(q.shape[1]), jnp.arange(k.shape[1]), spec)[None, None]
    return masked_attention(
        q, k, v, mask, scale=scale, softcap=spec.softcap, bias=bias, causal=spec.causal
    )
