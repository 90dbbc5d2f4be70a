"""A decoder-only language model: embeddings, blocks, norm, head.

One class covers the Llama-shaped families (`DecoderConfig`). The blocks are a list, or a stack
that is scanned (`ffnlab.models.stack`); a block may have lost a sublayer or both.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from ffnlab.layers import (
    Attention,
    AttentionSpec,
    Block,
    Context,
    Embedding,
    GatedFFN,
    Linear,
    RMSNorm,
)
from ffnlab.layers.attention.attention import causal_mask
from ffnlab.layers.attention.rope import tables
from ffnlab.layers.logical import constrain
from ffnlab.models.config import DecoderConfig
from ffnlab.models.remat import run_block
from ffnlab.models.stack import Stacked
from ffnlab.weights import kv, register


@register
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of a decode in progress.

    Attributes:
      layers: one cache per block (None where attention is removed); of a stacked model, one per
        block of its period, with a leading axis.
      index: [] int32, slots filled so far; all rows fill the same slots (prompts are padded on the
        left).
      valid: [b, S] bool, slots that hold a real token.
      positions: [b] int32, position of each row's next token.
    """

    layers: tuple
    index: Array
    valid: Array
    positions: Array


class Decoder(nnx.Module):
    """logits = model(tokens).

    Attributes:
      embed: Embedding [vocab, width].
      layers: nnx.List of Block, or Stacked.
      norm: final RMSNorm.
      head: Linear [width, vocab], or None where the embedding is the head (one Param read twice).
      config: DecoderConfig (static).
      remat: what blocks keep for a backward pass, see `ffnlab.models.remat` (static).
    """

    def __init__(self, config: DecoderConfig, *, key: Array, dtype: DTypeLike = jnp.float32):
        """Draws random weights; residual outputs are scaled down by sqrt(2 * layers)."""
        embed, head, *blocks = jax.random.split(key, 2 + config.layers)
        self.embed = Embedding(config.vocab, config.width, key=embed, dtype=dtype)
        self.layers = nnx.List(
            [make_block(config, i, key=k, dtype=dtype) for i, k in enumerate(blocks)]
        )
        self.norm = _norm(config, dtype)
        self.head = nnx.data(
            None
            if config.tie_embeddings
            else Linear(config.width, config.vocab, key=head, axes=("embed", "vocab"), dtype=dtype)
        )
        self.config = config
        self.remat: str | None = None

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        *,
        positions: Int[Array, "b t"] | None = None,
        segments: Int[Array, "b t"] | None = None,
        gates: Float[Array, "n 2"] | None = None,
    ) -> Float[Array, "b t v"]:
        """Next-token logits, float32.

        Args:
          tokens: token ids, [b, t].
          positions: position of each token; 0 .. t-1 when None.
          segments: 0 for padding, else the number of the text a token belongs to; tokens attend
            causally within their segment. None: each row is one text.
          gates: [layers, 2] multipliers of every block's attention and FFN branch; 1 when None.
        """
        return self.logits(self.hidden(tokens, positions=positions, segments=segments, gates=gates))

    def hidden(
        self,
        tokens: Int[Array, "b t"],
        *,
        positions: Int[Array, "b t"] | None = None,
        segments: Int[Array, "b t"] | None = None,
        gates: Float[Array, "n 2"] | None = None,
    ) -> Float[Array, "b t d"]:
        """The residual stream after the last block, before the final norm; see `__call__`."""
        t = tokens.shape[1]
        positions = jnp.arange(t)[None] if positions is None else positions
        masks = dict.fromkeys(self._windows())
        if segments is not None:
            same = (segments[:, :, None] == segments[:, None, :]) & (segments[:, None, :] > 0)
            slots = jnp.arange(t)
            masks = {w: (same & causal_mask(slots, slots, w))[:, None] for w in masks}
        context = Context(self._angles(positions), masks)
        return self._run(self._embed(tokens), context, gates, None)[0]

    def logits(self, h: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        """Final norm, head and soft cap: hidden states to logits, float32."""
        h = self.norm(h)
        logits = self.embed.logits(h) if self.head is None else self.head(h)
        logits = constrain(logits.astype(jnp.float32), ("batch", "length", "vocab"))
        cap = self.config.logit_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def init_cache(
        self, batch: int, length: int, *, kind: str | None = None, dtype: DTypeLike | None = None
    ) -> Cache:
        """An empty cache of `length` slots.

        Args:
          kind: "dense", "float8" or "int4" for every layer; what each layer's `kv_format` says when
            None.
          dtype: of dense caches; the compute dtype when None.
        """
        dtype = self.compute_dtype if dtype is None else dtype

        def empty(block: Block) -> kv.KV | None:
            if block.attn is None:
                return None
            spec = block.attn.spec
            wanted = kind or spec.kv_format or "dense"
            return kv.empty(wanted, batch, length, spec.kv_heads, spec.head_dim, dtype)

        if isinstance(self.layers, Stacked):
            n = self.layers.repeats
            layers = tuple(
                jax.tree.map(lambda x: jnp.broadcast_to(x, (n, *x.shape)), empty(block))
                for block in self.layers.period
            )
        else:
            layers = tuple(empty(block) for block in self.layers)
        valid = jnp.zeros((batch, length), bool)
        return Cache(layers, jnp.int32(0), valid, jnp.zeros((batch,), jnp.int32))

    def extend(
        self,
        tokens: Int[Array, "b t"],
        cache: Cache,
        *,
        valid: Bool[Array, "b t"] | None = None,
        last: bool = False,
    ) -> tuple[Float[Array, "b u v"], Cache]:
        """Logits of the next t tokens of each row, and the cache with them in it.

        Args:
          tokens: [b, t]; they fill slots index .. index + t - 1. The caller keeps within the
            length.
          valid: [b, t], False for padding (on the left of a prompt); all True when None.
          last: return the logits of the last token only, [b, 1, v].
        """
        t, length = tokens.shape[1], cache.valid.shape[1]
        valid = jnp.ones(tokens.shape, bool) if valid is None else valid
        steps = jnp.cumsum(valid, axis=1)
        positions = jnp.maximum(cache.positions[:, None] + steps - 1, 0)
        seen = jax.lax.dynamic_update_slice_in_dim(cache.valid, valid, cache.index, axis=1)
        slots = cache.index + jnp.arange(t)
        masks = {
            w: (seen[:, None, :] & causal_mask(slots, jnp.arange(length), w))[:, None]
            for w in self._windows()
        }
        context = Context(self._angles(positions), masks, cache.index)
        h, layers = self._run(self._embed(tokens), context, None, cache.layers)
        logits = self.logits(h[:, -1:] if last else h)
        new = Cache(layers, cache.index + t, seen, cache.positions + steps[:, -1])
        return logits, new

    @property
    def compute_dtype(self) -> jnp.dtype:
        """Dtype of activations: float32 on a CPU (bf16 is slow there), else the parameters'."""
        if jax.default_backend() == "cpu":
            return jnp.dtype(jnp.float32)
        return jnp.dtype(self.embed.weight.dtype)

    def blocks(self) -> list[Block]:
        """The blocks in order; of a stacked model, those of one period."""
        return list(self.layers.period if isinstance(self.layers, Stacked) else self.layers)

    def _windows(self) -> set[int | None]:
        return {block.attn.spec.window for block in self.blocks() if block.attn is not None}

    def _angles(self, positions: Int[Array, "b t"]) -> dict:
        specs = {block.attn.spec for block in self.blocks() if block.attn is not None}
        ropes = {(spec.rope, spec.head_dim) for spec in specs}
        return {rope: tables(rope, head_dim, positions) for rope, head_dim in ropes}

    def _embed(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        h = self.embed(tokens).astype(self.compute_dtype)
        scale = self.config.embed_scale
        # Rounded to the parameters' dtype first, as the models that scale embeddings were trained.
        return (
            h if scale == 1.0 else h * jnp.asarray(scale, self.embed.weight.dtype).astype(h.dtype)
        )

    def _run(
        self, h: Array, context: Context, gates: Array | None, caches: tuple | None
    ) -> tuple[Array, tuple | None]:
        if isinstance(self.layers, Stacked):
            return self.layers(h, context, gates=gates, caches=caches, remat=self.remat)
        new = []
        for i, block in enumerate(self.layers):
            h, cache = run_block(
                block,
                self.remat,
                h,
                context,
                gates=None if gates is None else gates[i],
                cache=None if caches is None else caches[i],
            )
            new.append(cache)
        return h, None if caches is None else tuple(new)


def abstract(config: DecoderConfig) -> Decoder:
    """A decoder without arrays, float32: each kind of block is traced once, however many it has."""
    key = jax.random.key(0)
    windows = None if config.windows is None else config.windows[:1]
    outer = dataclasses.replace(config, layers=1, windows=windows)
    model = jax.eval_shape(lambda key: Decoder(outer, key=key), key)
    kinds = {}
    for i in range(config.layers):
        kind = config.window(i), config.layer_rope(i)
        if kind not in kinds:
            kinds[kind] = jax.eval_shape(functools.partial(make_block, config, i), key=key)
    order = [kinds[config.window(i), config.layer_rope(i)] for i in range(config.layers)]
    model.layers = nnx.List([jax.tree.map(lambda leaf: leaf, block) for block in order])
    model.config = config
    return model


def _norm(config: DecoderConfig, dtype: DTypeLike) -> RMSNorm:
    return RMSNorm(config.width, eps=config.eps, offset=config.norm_offset, dtype=dtype)


def make_block(
    config: DecoderConfig, layer: int, *, key: Array, dtype: DTypeLike = jnp.float32
) -> Block:
    """A block of random weights as layer number `layer` of a decoder has it."""
    attn_key, ffn_key = jax.random.split(key)
    out_scale = (2 * config.layers) ** -0.5
    spec = AttentionSpec(
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        rope=config.layer_rope(layer),
        window=config.window(layer),
        softcap=config.attn_softcap,
        scale=config.query_scale,
    )
    attn = Attention(
        spec,
        config.width,
        key=attn_key,
        qkv_bias=config.qkv_bias,
        o_bias=config.o_bias,
        qk_norm=config.qk_norm,
        norm_eps=config.eps,
        norm_offset=config.norm_offset,
        out_scale=out_scale,
        dtype=dtype,
    )
    ffn = GatedFFN(
        config.width,
        config.hidden,
        key=ffn_key,
        activation=config.activation,
        bias=config.mlp_bias,
        out_scale=out_scale,
        dtype=dtype,
    )
    norm = functools.partial(_norm, config, dtype)
    post = norm if config.sandwich_norms else lambda: None
    return Block(norm(), attn, norm(), ffn, post_attn_norm=post(), post_ffn_norm=post())
