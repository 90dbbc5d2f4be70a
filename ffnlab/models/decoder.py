"""A decoder-only language model: embeddings, blocks, norm, head.

One class covers the Llama-shaped families (`DecoderConfig`). The blocks are a list, or a stack
that is scanned (`ffnlab.models.stack`); a block may have lost a sublayer or both.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from ffnlab.errors import ConfigError
from ffnlab.layers import (
    FFN,
    Attention,
    AttentionSpec,
    Block,
    Context,
    Embedding,
    EnsembleScale,
    GatedFFN,
    LayerInputs,
    LayerOutputs,
    Linear,
    Modalities,
    MoE,
    RMSNorm,
    TokenFacts,
)
from ffnlab.layers.attention.spec import seen
from ffnlab.layers.logical import constrain
from ffnlab.models import trunk
from ffnlab.models.audio_input import make_connectors
from ffnlab.models.config import DecoderConfig
from ffnlab.models.stack import Pipelined, Stacked, period_of
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
      layers: nnx.List of Block, Stacked, or Pipelined.
      norm: final RMSNorm.
      head: Linear [width, vocab], or None where the embedding is the head (one Param read twice).
      connectors: nnx.List of `MLP`, from the features of sound to the residual stream, of a config
        with `audio`; None of others.
      modalities: Modalities, of a decoder with copies of its modules for each
        (`ffnlab.routing.mixture_of_transformers`); None of others.
      ensemble: EnsembleScale, of a decoder whose head reads its paths with weights
        (`ffnlab.pruning.path_ensemble`); None of others.
      config: DecoderConfig (static).
      remat: what blocks keep for a backward pass, see `ffnlab.models.remat` (static).
    """

    pipelines = True  # `ffnlab.models.pipeline` takes it

    # Set only where there are any, as older files know none.
    connectors: nnx.List | None = None
    modalities: Modalities | None = None
    ensemble: EnsembleScale | None = None

    def __init__(self, config: DecoderConfig, *, key: Array, dtype: DTypeLike = jnp.float32):
        """Draws random weights; residual outputs are scaled down by sqrt(2 * layers)."""
        embed, head, *blocks = jax.random.split(key, 2 + config.layers)
        self.embed = Embedding(config.vocab, config.width, key=embed, dtype=dtype)
        self.layers: Sequence[nnx.Module] | Stacked | Pipelined = nnx.List(
            [make_block(config, i, key=k, dtype=dtype) for i, k in enumerate(blocks)]
        )
        self.norm = _norm(config, dtype)
        self.head = nnx.data(
            None
            if config.tie_embeddings
            else Linear(config.width, config.vocab, key=head, axes=("embed", "vocab"), dtype=dtype)
        )
        if config.audio is not None:
            key = jax.random.fold_in(key, config.layers)
            made = make_connectors(config.audio, config.width, key=key, dtype=dtype)
            self.connectors = nnx.List(made)
        self.config = config
        self.remat: str | None = None

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        *,
        positions: Int[Array, "b t"] | None = None,
        segments: Int[Array, "b t"] | None = None,
        inputs: LayerInputs | None = None,
    ) -> Float[Array, "b t v"]:
        """Next-token logits, float32.

        Args:
          tokens: token ids, [b, t].
          positions: position of each token; 0 .. t-1 when None.
          segments: 0 for padding, else the number of the text a token belongs to; tokens attend
            causally within their segment. None: each row is one text.
          inputs: what each layer is given of its own, leaves [layers, ...]: gates of the branches,
            choices, keys.
        """
        return self.logits(
            self.hidden(tokens, positions=positions, segments=segments, inputs=inputs)
        )

    def hidden(
        self,
        tokens: Int[Array, "b t"] | None = None,
        *,
        embeddings: Float[Array, "b t d"] | None = None,
        positions: Int[Array, "b t"] | None = None,
        segments: Int[Array, "b t"] | None = None,
        inputs: LayerInputs | None = None,
    ) -> Float[Array, "b t d"]:
        """What the final norm reads: the residual stream after the last block, or the ensemble of
        its paths; see `run`."""
        options = {"positions": positions, "segments": segments, "inputs": inputs}
        return self.run(tokens, embeddings=embeddings, **options)[0]

    def run(
        self,
        tokens: Int[Array, "b t"] | None = None,
        *,
        embeddings: Float[Array, "b t d"] | None = None,
        positions: Int[Array, "b t"] | None = None,
        segments: Int[Array, "b t"] | None = None,
        inputs: LayerInputs | None = None,
        facts: TokenFacts | None = None,
        branches: bool = False,
    ) -> tuple[Float[Array, "b t d"], LayerOutputs]:
        """The residual stream before the final norm, and what the layers report.

        Args:
          tokens, positions, segments, inputs: see `__call__`.
          embeddings: instead of tokens, what would stand for them (see `embed_tokens`), [b, t, d].
          facts: of each token, for layers that treat tokens differently; padding of `segments` is
            not valid unless they say otherwise, and a modality is that of the token's id.
          branches: also return what each sublayer added to the stream.
        Returns:
          (h [b, t, d], outputs with a leading axis of layers).
        Raises:
          ConfigError: tokens and embeddings, or neither.
        """
        h = self._start(tokens, embeddings)
        t = h.shape[1]
        positions = jnp.arange(t)[None] if positions is None else positions
        kinds = trunk.specs(self.layers)
        masks = {spec.window: None for spec in kinds}
        if segments is not None:
            same = (segments[:, :, None] == segments[:, None, :]) & (segments[:, None, :] > 0)
            slots = jnp.arange(t)
            masks = {spec.window: (same & seen(slots, slots, spec))[:, None] for spec in kinds}
        facts = TokenFacts() if facts is None else facts
        if segments is not None:
            valid = segments > 0 if facts.valid is None else facts.valid
            facts = facts._replace(valid=valid, segments=segments)
        facts = facts if self.modalities is None else self.modalities.told(tokens, facts)
        context = Context(trunk.angles(self.layers, positions), masks, tokens=facts)
        h, _, outputs = trunk.run(
            self.layers,
            h,
            context,
            inputs=inputs,
            remat=self.remat,
            branches=branches,
            ensemble=self.ensemble,
        )
        return h, outputs

    def logits(self, h: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        """Final norm, head and soft cap: hidden states to logits, float32."""
        h = self.norm(h)
        logits = self.embed.logits(h) if self.head is None else self.head(h)
        logits = constrain(logits.astype(jnp.float32), (trunk.rows(self.layers), "length", "vocab"))
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
        Raises:
          ConfigError: a block has more than one attention that reads its own input, or the model is
        pipelined.
        """
        trunk.check_cache(self.layers, batch)
        dtype = self.compute_dtype if dtype is None else dtype

        def empty(block: Block) -> kv.KV | None:
            found = trunk.self_attentions(block)
            if len(found) > 1:
                raise ConfigError(f"a block has {len(found)} attentions; one can have a cache")
            if not found:
                return None
            spec = found[0].spec
            wanted = kind or spec.kv_format or "dense"
            return kv.empty(wanted, batch, length, spec.kv_heads, spec.head_dim, dtype)

        if isinstance(self.layers, Stacked):
            n = self.layers.repeats
            layers = tuple(
                jax.tree.map(lambda x: jnp.broadcast_to(x, (n, *x.shape)), empty(block))
                for block in self.layers.period
            )
        else:
            layers = tuple(empty(block) for block in period_of(self.layers))
        valid = jnp.zeros((batch, length), bool)
        return Cache(layers, jnp.int32(0), valid, jnp.zeros((batch,), jnp.int32))

    def extend(
        self,
        tokens: Int[Array, "b t"] | None,
        cache: Cache,
        *,
        embeddings: Float[Array, "b t d"] | None = None,
        valid: Bool[Array, "b t"] | None = None,
        last: bool = False,
    ) -> tuple[Float[Array, "b u v"], Cache]:
        """Logits of the next t tokens of each row, and the cache with them in it.

        Args:
          tokens: [b, t]; they fill slots index .. index + t - 1. The caller keeps within the
            length.
          embeddings: instead of tokens (None), what would stand for them, [b, t, d].
          valid: [b, t], False for padding (on the left of a prompt); all True when None.
          last: return the logits of the last token only, [b, 1, v].
        Raises:
          ConfigError: tokens and embeddings, or neither.
        """
        h = self._start(tokens, embeddings)
        t, length = h.shape[1], cache.valid.shape[1]
        valid = jnp.ones(h.shape[:2], bool) if valid is None else valid
        steps = jnp.cumsum(valid, axis=1)
        positions = jnp.maximum(cache.positions[:, None] + steps - 1, 0)
        filled = jax.lax.dynamic_update_slice_in_dim(cache.valid, valid, cache.index, axis=1)
        slots, keys = cache.index + jnp.arange(t), jnp.arange(length)
        masks = {
            spec.window: (filled[:, None, :] & seen(slots, keys, spec))[:, None]
            for spec in trunk.specs(self.layers)
        }
        angles = trunk.angles(self.layers, positions)
        facts = TokenFacts(valid=valid)
        facts = facts if self.modalities is None else self.modalities.told(tokens, facts)
        context = Context(angles, masks, cache.index, facts)
        h, layers, _ = trunk.run(
            self.layers, h, context, caches=cache.layers, ensemble=self.ensemble
        )
        logits = self.logits(h[:, -1:] if last else h)
        new = Cache(layers, cache.index + t, filled, cache.positions + steps[:, -1])
        return logits, new

    @property
    def compute_dtype(self) -> jnp.dtype:
        """Dtype of activations, see `trunk.compute_dtype`."""
        return trunk.compute_dtype(self.embed.weight.dtype)

    def blocks(self) -> list[Block]:
        """The blocks in order; of a stacked model, those of one period."""
        return period_of(self.layers)

    def embed_tokens(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """What stands for tokens at the beginning of the residual stream, in the compute dtype."""
        h = self.embed(tokens).astype(self.compute_dtype)
        scale = self.config.embed_scale
        # Rounded to the parameters' dtype first, as the models that scale embeddings were trained.
        return (
            h if scale == 1.0 else h * jnp.asarray(scale, self.embed.weight.dtype).astype(h.dtype)
        )

    def _start(self, tokens: Array | None, embeddings: Array | None) -> Float[Array, "b t d"]:
        trunk.check_given(tokens, embeddings, self.config.width)
        if embeddings is None:
            return self.embed_tokens(trunk.spread(self.layers, tokens))
        return embeddings.astype(self.compute_dtype)


def abstract(config: DecoderConfig) -> Decoder:
    """A decoder without arrays, float32: each kind of block is traced once, however many it has."""
    key = jax.random.key(0)
    windows = None if config.windows is None else config.windows[:1]
    ffns = None if config.ffns is None else config.ffns[:1]
    hidden = config.layer_hidden(0)
    audio = None if config.audio is None else dataclasses.replace(config.audio, start=0)
    outer = dataclasses.replace(
        config, layers=1, windows=windows, ffns=ffns, audio=audio, hidden=hidden, hiddens=None
    )
    model = jax.eval_shape(lambda key: Decoder(outer, key=key), key)
    kinds, order = {}, []
    for i in range(config.layers):
        kind = config.window(i), config.layer_rope(i), config.ffn(i), config.layer_hidden(i)
        if kind not in kinds:
            kinds[kind] = jax.eval_shape(functools.partial(make_block, config, i), key=key)
        order.append(kinds[kind])
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
    kind, hidden = config.ffn(layer), config.layer_hidden(layer)
    ffn = make_ffn(config, kind, key=ffn_key, dtype=dtype, hidden=hidden)
    norm = functools.partial(_norm, config, dtype)
    post = norm if config.sandwich_norms else lambda: None
    return Block(norm(), attn, norm(), ffn, post_attn_norm=post(), post_ffn_norm=post())


def make_ffn(
    config: DecoderConfig, kind: str, *, key: Array, dtype: DTypeLike, hidden: int | None = None
) -> nnx.Module:
    """An FFN of random weights, of one of the kinds that a decoder may have.

    Args:
      hidden: its channels, where it is no mixture; those of the config when None.
    """
    hidden = config.hidden if hidden is None else hidden
    options = {
        "key": key,
        "activation": config.activation,
        "bias": config.mlp_bias,
        "out_scale": (2 * config.layers) ** -0.5,
        "dtype": dtype,
    }
    if kind == "mixture":
        return MoE(config.width, config.mixture, **options)
    return (GatedFFN if kind == "gated" else FFN)(config.width, hidden, **options)
