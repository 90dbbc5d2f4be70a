"""An encoder: embeddings, blocks in which every token sees every other, and a head.

One class covers BERT and its kin (`EncoderConfig`): learned, rotary or no positions, norms after
the sums or before the sublayers, and heads for masked tokens, spans, classes of a text and of each
token. The blocks are a list, or a stack that is scanned (`ffnlab.models.stack`).
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
    ACTIVATIONS,
    FFN,
    Attention,
    AttentionSpec,
    Block,
    Context,
    Embedding,
    GatedFFN,
    Join,
    LayerInputs,
    LayerNorm,
    LayerOutputs,
    Linear,
    TokenFacts,
)
from ffnlab.layers.logical import constrain
from ffnlab.models import trunk
from ffnlab.models.encoder_config import EncoderConfig
from ffnlab.models.stack import Pipelined, Stacked, period_of

__all__ = ["Encoder", "MaskedTransform", "abstract", "sentence_vectors"]


class MaskedTransform(nnx.Module):
    """y = norm(act(dense(x))): what the masked head makes of hidden states before its logits.

    Attributes:
      dense: Linear [width, width]; norm: LayerNorm.
      activation: name of the non-linearity (static).
    """

    def __init__(self, config: EncoderConfig, *, key: Array, dtype: DTypeLike = jnp.float32):
        width = config.width
        axes = ("embed", "embed")
        self.dense = Linear(width, width, key=key, axes=axes, bias=True, dtype=dtype)
        self.norm = LayerNorm(width, eps=config.eps, dtype=dtype)
        self.activation = config.activation

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        return self.norm(ACTIVATIONS[self.activation](self.dense(x)))


class Encoder(nnx.Module):
    """output = model(tokens).

    Attributes:
      embed: Embedding [vocab, width].
      position_embed, type_embed: Embedding [max_positions, width] and [types, width], or None.
      embed_norm: LayerNorm of the embeddings where norms stand after the sums, else None.
      layers: nnx.List of Block, Stacked, or Pipelined.
      norm: final LayerNorm where norms stand before the sublayers, else None.
      pooler: Linear [width, width], or None.
      transform: MaskedTransform of a masked head, else None.
      head: Linear [width, outputs], or None where there is no head or the embedding is it.
      head_bias: Param [vocab] of a masked head, else None.
      config: EncoderConfig (static).
      remat: what blocks keep for a backward pass, see `ffnlab.models.remat` (static).
    """

    pipelines = True  # `ffnlab.models.pipeline` takes it

    def __init__(self, config: EncoderConfig, *, key: Array, dtype: DTypeLike = jnp.float32):
        """Draws random weights; residual outputs are scaled down by sqrt(2 * layers) where norms
        stand before the sublayers."""
        *keys, trunk_key = jax.random.split(key, 7)
        table = functools.partial(Embedding, width=config.width, dtype=dtype)
        norm = functools.partial(LayerNorm, config.width, eps=config.eps, dtype=dtype)
        self.embed = table(config.vocab, key=keys[0])
        self.position_embed = nnx.data(
            table(config.max_positions, key=keys[1], axes=("position", "embed"))
            if config.positions == "absolute"
            else None
        )
        self.type_embed = nnx.data(
            table(config.types, key=keys[2], axes=("type", "embed")) if config.types else None
        )
        self.embed_norm = nnx.data(norm() if config.norm == "after" else None)
        self.layers: Sequence[nnx.Module] | Stacked | Pipelined = nnx.List(
            [
                make_block(config, key=k, dtype=dtype)
                for k in jax.random.split(trunk_key, config.layers)
            ]
        )
        self.norm = nnx.data(norm() if config.norm == "before" else None)
        width, square = config.width, ("embed", "embed")
        self.pooler = nnx.data(
            Linear(width, width, key=keys[3], axes=square, bias=True, dtype=dtype)
            if config.pooler is not None
            else None
        )
        masked = config.head == "masked"
        self.transform = nnx.data(
            MaskedTransform(config, key=keys[4], dtype=dtype) if masked else None
        )
        self.head = nnx.data(_head(config, key=keys[5], dtype=dtype))
        self.head_bias = nnx.data(
            nnx.Param(jnp.zeros((config.vocab,), dtype), axes=("vocab",)) if masked else None
        )
        self.config = config
        self.remat: str | None = None

    def __call__(
        self,
        tokens: Int[Array, "b t"] | None = None,
        *,
        embeddings: Float[Array, "b t d"] | None = None,
        valid: Bool[Array, "b t"] | None = None,
        types: Int[Array, "b t"] | None = None,
        positions: Int[Array, "b t"] | None = None,
        inputs: LayerInputs | None = None,
    ) -> Float[Array, "b *s"]:
        """What the head gives, float32: see `output`; arguments and errors as `run`."""
        h = self.hidden(
            tokens,
            embeddings=embeddings,
            valid=valid,
            types=types,
            positions=positions,
            inputs=inputs,
        )
        return self.output(h)

    def hidden(
        self,
        tokens: Int[Array, "b t"] | None = None,
        *,
        embeddings: Float[Array, "b t d"] | None = None,
        valid: Bool[Array, "b t"] | None = None,
        types: Int[Array, "b t"] | None = None,
        positions: Int[Array, "b t"] | None = None,
        inputs: LayerInputs | None = None,
    ) -> Float[Array, "b t d"]:
        """The hidden states that heads read; arguments and errors as `run`."""
        options = {"valid": valid, "types": types, "positions": positions, "inputs": inputs}
        return self.run(tokens, embeddings=embeddings, **options)[0]

    def run(
        self,
        tokens: Int[Array, "b t"] | None = None,
        *,
        embeddings: Float[Array, "b t d"] | None = None,
        valid: Bool[Array, "b t"] | None = None,
        types: Int[Array, "b t"] | None = None,
        positions: Int[Array, "b t"] | None = None,
        inputs: LayerInputs | None = None,
        facts: TokenFacts | None = None,
        branches: bool = False,
    ) -> tuple[Float[Array, "b t d"], LayerOutputs]:
        """The hidden states that heads read, and what the layers report.

        Args:
          tokens: token ids, [b, t].
          embeddings: instead of tokens, what would stand for them before positions and types are
            added, [b, t, d].
          valid: False for padding, on either side; nothing sees it. All True when None.
          types: type of each token, 0 when None.
          positions: of each token, [b, t] or [1, t]; 0 .. t-1 when None, padding included.
          inputs: what each layer is given of its own, leaves [layers, ...].
          facts: of each token, for layers that treat tokens differently; padding is not valid
            unless they say otherwise.
          branches: also return what each sublayer added to the stream.
        Returns:
          (h [b, t, d], outputs with a leading axis of layers).
        Raises:
          ConfigError: tokens and embeddings, or neither; types of a model without; a text longer
            than the learned positions.
        """
        trunk.check_given(tokens, embeddings, self.config.width)
        words = self.embed(trunk.spread(self.layers, tokens)) if embeddings is None else embeddings
        h = self._start(words, types, positions)
        b, t = h.shape[:2]
        positions = jnp.arange(t)[None] if positions is None else positions
        seen = None if valid is None else jnp.broadcast_to(valid[:, None, None, :], (b, 1, t, t))
        facts = TokenFacts() if facts is None else facts
        if facts.valid is None:
            facts = facts._replace(valid=valid)
        masks = {spec.window: seen for spec in trunk.specs(self.layers)}
        context = Context(trunk.angles(self.layers, positions), masks, tokens=facts)
        h, _, outputs = trunk.run(
            self.layers, h, context, inputs=inputs, remat=self.remat, branches=branches
        )
        return (h if self.norm is None else self.norm(h)), outputs

    def output(self, h: Float[Array, "b t d"]) -> Float[Array, "b *s"]:
        """What the head makes of hidden states, float32.

        Returns:
          hidden states [b, t, d] without a head, logits [b, t, v] of masked tokens, spans
          [b, t, 2], classes of the text [b, c] or of each token [b, t, c].
        """
        kind = self.config.head
        if kind == "masked":
            h = self.transform(h)
            logits = self.embed.logits(h) if self.head is None else self.head(h)
            h = logits + self.head_bias.get_value().astype(logits.dtype)
            return constrain(h.astype(jnp.float32), (trunk.rows(self.layers), "length", "vocab"))
        if kind is not None:
            h = self.head(self.pooled(h) if kind == "classes" else h)
        return h.astype(jnp.float32)

    def pooled(self, h: Float[Array, "b t d"]) -> Float[Array, "b d"]:
        """What stands for the whole text: the first token, through the pooler if there is one.

        It is the token at index 0, as in `transformers`, also where padding stands there.
        """
        first = h[:, 0]
        if self.pooler is None:
            return first
        return ACTIVATIONS[self.config.pooler or "identity"](self.pooler(first))

    @property
    def compute_dtype(self) -> jnp.dtype:
        """Dtype of activations, see `trunk.compute_dtype`."""
        return trunk.compute_dtype(self.embed.weight.dtype)

    def blocks(self) -> list[Block]:
        """The blocks in order; of a stacked model, those of one period."""
        return period_of(self.layers)

    def embed_tokens(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """The beginning of the residual stream, in the compute dtype, of tokens of type 0."""
        return self._start(self.embed(tokens), None, None)

    def _start(
        self, words: Float[Array, "b t d"], types: Array | None, positions: Array | None
    ) -> Float[Array, "b t d"]:
        """The beginning of the residual stream, in the compute dtype."""
        config, dtype = self.config, self.compute_dtype
        if types is not None and self.type_embed is None:
            raise ConfigError("types are given, and this model has no token types")
        h = words.astype(dtype)
        if self.type_embed is not None:
            kinds = jnp.zeros(h.shape[:2], jnp.int32) if types is None else types
            h = h + self.type_embed(kinds).astype(dtype)
        if self.position_embed is not None:
            if positions is None and h.shape[1] > config.max_positions:
                raise ConfigError(
                    f"{h.shape[1]} tokens; this model has max_positions={config.max_positions}"
                )
            places = jnp.arange(h.shape[1])[None] if positions is None else positions
            h = h + self.position_embed(places).astype(dtype)
        return h if self.embed_norm is None else self.embed_norm(h)


def sentence_vectors(
    hidden: Float[Array, "b t d"], valid: Bool[Array, "b t"] | None = None
) -> Float[Array, "b d"]:
    """Unit vectors of texts: the mean of their tokens' hidden states, divided by its L2 norm.

    Args:
      hidden: of an encoder, [b, t, d].
      valid: False for padding, which does not count; all True when None.
    Returns:
      [b, d] float32; zeros for a text without tokens.
    Source:
      Sentence-BERT (arXiv 1908.10084), mean pooling.

    >>> sentence_vectors(jnp.array([[[3.0, 0.0], [3.0, 8.0]]])).tolist()
    [[0.6000000238418579, 0.800000011920929]]
    """
    hidden = hidden.astype(jnp.float32)
    weight = jnp.ones(hidden.shape[:2]) if valid is None else valid.astype(jnp.float32)
    # The norm of the sum is that of the mean times a number: the division by the count cancels.
    total = jnp.einsum("btd,bt->bd", hidden, weight)
    length = jnp.linalg.norm(total, axis=-1, keepdims=True)
    return total / jnp.where(length > 0, length, 1.0)


def abstract(config: EncoderConfig) -> Encoder:
    """An encoder without arrays, float32: one block is traced, however many it has."""
    key, outer = jax.random.key(0), dataclasses.replace(config, layers=1)
    model = jax.eval_shape(lambda key: Encoder(outer, key=key), key)
    block = model.layers[0]
    model.layers = nnx.List([jax.tree.map(lambda leaf: leaf, block) for _ in range(config.layers)])
    model.config = config
    return model


def make_block(config: EncoderConfig, *, key: Array, dtype: DTypeLike = jnp.float32) -> Block:
    """A block of random weights."""
    attn_key, ffn_key = jax.random.split(key)
    scale = (2 * config.layers) ** -0.5 if config.norm == "before" else 1.0
    spec = AttentionSpec(
        heads=config.heads,
        kv_heads=config.heads,
        head_dim=config.head_dim,
        rope=config.rope if config.positions == "rotary" else None,
        causal=False,
    )
    attn = Attention(
        spec,
        config.width,
        key=attn_key,
        qkv_bias=config.qkv_bias,
        o_bias=config.o_bias,
        out_scale=scale,
        dtype=dtype,
    )
    ffn = (GatedFFN if config.gated else FFN)(
        config.width,
        config.hidden,
        key=ffn_key,
        activation=config.activation,
        bias=config.mlp_bias,
        out_scale=scale,
        dtype=dtype,
    )
    norm = functools.partial(LayerNorm, config.width, eps=config.eps, dtype=dtype)
    return Block(norm(), attn, norm(), ffn, joins=(Join(norm=config.norm),) * 2)


def _head(config: EncoderConfig, *, key: Array, dtype: DTypeLike) -> Linear | None:
    if config.head is None or (config.head == "masked" and config.tie_embeddings):
        return None
    if config.head == "masked":
        axes = ("embed", "vocab")
        return Linear(config.width, config.vocab, key=key, axes=axes, dtype=dtype)
    outputs = 2 if config.head == "span" else config.classes
    axes = ("embed", "classes")
    return Linear(config.width, outputs, key=key, axes=axes, bias=True, dtype=dtype)
