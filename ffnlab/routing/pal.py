"""PAL: how the features of frozen audio encoders enter a language model (arXiv 2506.10423, 2025).

Three findings, as v1 has them; v2 and v3 call the second LAL and the usual way PLITS. Rows of
audio A, a connector P and text h; layer l of those that hear:

    prepended (PLITS)   A <- block_l(A), text attends to keys and values of [A_l ; h]
    attended (PAL)      text attends to keys and values of [P A ; h]; A passes no FFN and no query
    late                layers before `start` see the text alone
    several encoders    rows of all stand side by side along the axis of keys

Whatever the way, the text asks for keys and values of some rows and nothing else, and what stands
before the text never depends on it. So `hear` computes those once for each layer and puts them
beside its attention; the model that it gives is a `Decoder` like any, and text of any length is
read, or generated token by token, against them. The text-only function is that of no audio: a
text keeps the positions it has alone.

    model, _ = transform.apply(pal.connect(AudioInput((384,), ("attended",), start=2)), model)
    rule = learning.backprop(pal.heard(next_token))          # batches: (Sounds, tokens)
    models.generate(pal.hear(model, Sounds((states,))), prompts, max_tokens=8)

Ours where the sources say nothing: rows have no rotary phase unless `AudioInput.indexed`; rows of
several prepended encoders are one causal stream, which sees the attended ones as the text does;
layers that hear are those from `start` on.
"""

import dataclasses
import functools
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PyTree

from ffnlab import tree
from ffnlab.errors import ConfigError
from ffnlab.layers import (
    MLP,
    Attention,
    Block,
    Context,
    GroupedLinear,
    GroupedNorm,
    TokenFacts,
)
from ffnlab.layers.attention.rope import tables
from ffnlab.losses import InformedLoss, Loss
from ffnlab.models import AudioInput, Decoder, trunk
from ffnlab.models.audio_input import WAYS, make_connectors
from ffnlab.models.rewriting import rewriting
from ffnlab.models.stack import in_list, period_of
from ffnlab.transform import Transform
from ffnlab.weights import kv

__all__ = ["TRAINS", "Sounds", "answer", "connect", "hear", "heard"]

TRAINS = tree.at("connectors**")  # for `learning.backprop(trainable=...)`: encoder and text frozen


class Sounds(NamedTuple):
    """What is heard by each row of a batch; arrays of jax or NumPy.

    Attributes:
      features: of each encoder, [b, n, width]; b = 1 for one sound that all rows hear.
      valid: of each encoder, [b, n] False for rows of features that are padding, whatever they
        hold; None where all are sound.
    """

    features: tuple[Float[Array | np.ndarray, "b _ _"], ...]
    valid: tuple[Bool[Array | np.ndarray, "b _"], ...] | None = None


class Rows(NamedTuple):
    """Rows of audio, of all encoders that come by one way.

    Attributes:
      h: in the residual stream, [b, n, d].
      valid: [b, n].
      positions: [1, n], rotary.
    """

    h: Float[Array, "b n d"]
    valid: Bool[Array, "b n"]
    positions: Int[Array, "1 n"]


def connect(audio: AudioInput, *, seed: int = 0) -> Transform:
    """Gives a decoder connectors of random weights, through which it can hear.

    Args:
      audio: the design: encoders, their ways, the first layer that hears.
      seed: of the draw.
    Returns:
      a transform of Decoders, which observes nothing; without sound the model computes the same.
    Raises:
      ConfigError: of a model, it is no Decoder, has connectors, or fewer layers than `start`.

    >>> from ffnlab import transform
    >>> from ffnlab.testing import tiny
    >>> model, _ = transform.apply(connect(AudioInput((5, 8), ("attended", "prepended"))), tiny())
    >>> [connector.sizes for connector in model.connectors]
    [[5, 16], [8, 16]]
    """

    def problems(model: object) -> list[str]:
        if not isinstance(model, Decoder):
            return [f"a {type(model).__name__} is no Decoder"]
        if model.config.audio is not None:
            return [f"the model has connectors already, {model.config.audio}"]
        dataclasses.replace(model.config, audio=audio)  # refuses what only the config can
        return untied(model, audio)

    def change(model: Decoder) -> Decoder:
        new, dtype = tree.copy(model), model.embed.weight.dtype
        new.config = dataclasses.replace(model.config, audio=audio)
        key = jax.random.key(seed)
        new.connectors = nnx.List(make_connectors(audio, model.config.width, key=key, dtype=dtype))
        return new

    return rewriting("pal", problems, change)


def hear(model: Decoder, sounds: Sounds) -> Decoder:
    """The decoder with sounds in its ears: every attention that hears sees them beside its text.

    Differentiable in model and features. It costs 2 n d d_kv products in a layer where rows are
    attended, and all of a layer's where they are prepended; no call of the model pays them again.

    Args:
      model: a decoder with connectors, in a list or stacked.
      sounds: of as many rows as the texts that it will be called with, or of one.
    Returns:
      a decoder for these sounds. What stands beside its attention are no parameters: what is
      trained, saved or rewritten is `model`.
    Raises:
      ConfigError: no connectors, features or masks of other shapes than the design asks for, a
        model that hears already, or a block with several attentions that read their own input.
    """
    audio = model.config.audio
    if audio is None or model.connectors is None:
        raise ConfigError("the model has no connectors; pal.connect(AudioInput(...)) gives it some")
    check_sounds(audio, sounds)
    if odd := untied(model, audio):
        raise ConfigError(odd[0])
    if any(getattr(node, "beside", None) is not None for _, node in tree.walk(model)):
        raise ConfigError("the model hears already; give `hear` the model that it was made of")
    dtype = model.compute_dtype
    rows = [
        connected(connector, dtype, audio.indexed, *rest)
        for connector, *rest in zip(model.connectors, *masked(sounds), strict=True)
    ]
    by_way = {
        way: joined(found)
        for way in WAYS
        if (found := [r for r, w in zip(rows, audio.ways, strict=True) if w == way and r.h.size])
    }

    def change(model: Decoder) -> Decoder:
        stream, attended, blocks = by_way.get("prepended"), by_way.get("attended"), []
        for i, block in enumerate(cast(list[Block], period_of(model.layers))):
            if i < audio.start:
                blocks.append(tree.copy(block))
                continue
            block, stream = listening(block, attended, stream)
            blocks.append(block)
        new = tree.copy(model)
        new.layers = nnx.List(blocks)
        return new

    return in_list(model, change)


def untied(model: Decoder, audio: AudioInput) -> list[str]:
    """What of a model has copies by modality that rows of sound would have to choose from.

    Rows that are attended meet norms and attention alone.
    """
    if model.modalities is None:
        return []
    attended = set(audio.ways) == {"attended"}
    met = [
        path
        for path, node in tree.walk(model.layers)
        if isinstance(node, GroupedNorm | GroupedLinear)
        and (not attended or isinstance(node, GroupedNorm) or ".attn." in f".{path}.")
    ]
    said = f"{met[:3]} have a copy for each modality of text, and rows of sound have none"
    return [said] if met else []


def heard(loss: Loss | InformedLoss) -> Loss | InformedLoss:
    """A loss of a model that hears: batches are pairs (Sounds, what the loss takes).

    Args:
      loss: see `ffnlab.losses`, informed or not.
    """

    @functools.wraps(loss)  # type: ignore[bad-argument-type]  # it says whether it is informed
    def of_heard(model: Decoder, batch: tuple[Sounds, PyTree], *moment: PyTree) -> tuple:
        sounds, rest = batch
        return loss(hear(model, sounds), rest, *moment)

    return of_heard


def answer(
    model: Decoder, sounds: Sounds, tokens: Int[Array | np.ndarray, "b t"]
) -> Float[Array, "b v"]:
    """Logits of what follows each text, by a model that hears; see `hear`."""
    hearing = hear(model, sounds)
    return hearing.logits(hearing.hidden(jnp.asarray(tokens))[:, -1:])[:, 0]


def check_sounds(audio: AudioInput, sounds: Sounds) -> None:
    """Raises ConfigError unless sounds are of the encoders of a design, each with its mask."""
    features, valid = sounds
    shapes = [jnp.shape(f) for f in features]
    widths = [shape[2] if len(shape) == 3 else None for shape in shapes]
    if widths != list(audio.widths) or len({shape[0] for shape in shapes}) != 1:
        wanted = ", ".join(f"[b, n, {width}]" for width in audio.widths)
        raise ConfigError(f"features {shapes}; one array {wanted} for each encoder is accepted")
    masks = None if valid is None else [jnp.shape(mask) for mask in valid]
    if masks is not None and masks != [shape[:2] for shape in shapes]:
        raise ConfigError(
            f"valid {masks}; one mask for each encoder, {[s[:2] for s in shapes]}, is accepted"
        )


def masked(sounds: Sounds) -> tuple[list[Array], list[Array]]:
    """Features, zero where there is padding, whatever it held; and the masks of all encoders."""
    features = [jnp.asarray(f) for f in sounds.features]
    shapes = [f.shape[:2] for f in features]
    valid = [jnp.ones(s, bool) for s in shapes] if sounds.valid is None else sounds.valid
    valid = [jnp.asarray(mask, bool) for mask in valid]
    pairs = zip(features, valid, strict=True)
    return [jnp.where(mask[..., None], f, 0) for f, mask in pairs], valid


def connected(
    connector: MLP,
    dtype: jnp.dtype,
    indexed: bool,
    features: Float[Array, "b n c"],
    valid: Bool[Array, "b n"],
) -> Rows:
    """The rows of an encoder in the residual stream."""
    n = features.shape[1]
    places = jnp.arange(n) if indexed else jnp.zeros(n, jnp.int32)
    return Rows(connector(features.astype(dtype)), valid, places[None])


def joined(rows: list[Rows]) -> Rows:
    """The rows of several encoders side by side."""
    return Rows(*(jnp.concatenate(parts, axis=1) for parts in zip(*rows, strict=True)))


def listening(
    block: Block, attended: Rows | None, stream: Rows | None
) -> tuple[Block, Rows | None]:
    """A block with keys and values of rows beside its attention, and the stream behind it."""
    slots = [i for i, name in enumerate(block.slots) if is_mixing(getattr(block, name))]
    if len(slots) > 1:
        raise ConfigError(f"a block has {len(slots)} attentions; one can hear")
    if not slots:  # it was removed: rows of a stream pass the FFN as text does
        if stream is None:
            return tree.copy(block), None
        context = Context({}, {}, tokens=TokenFacts(valid=stream.valid))
        return tree.copy(block), stream._replace(h=block(stream.h, context)[0])
    name, caches = block.slots[slots[0]], []
    if attended is not None:
        caches.append((attended_keys(block, slots[0], attended), attended.valid))
    if stream is not None:
        seeing = beside(block, name, caches)
        after, cache = streamed(seeing, getattr(block, name), stream)
        caches.append((cache, stream.valid))
        stream = stream._replace(h=after)
    return beside(block, name, caches), stream


def is_mixing(sublayer: object) -> bool:
    """Whether a sublayer attends to its own input."""
    return isinstance(sublayer, Attention) and not sublayer.spec.memory


def attended_keys(block: Block, slot: int, rows: Rows) -> kv.KV:
    """Keys and values of rows that are the same before every layer, behind the layer's norm."""
    name, join = block.slots[slot], block.joins[slot]
    attention, norm = getattr(block, name), getattr(block, f"{name}_norm")
    x = norm(rows.h) if join.norm == "before" and norm is not None else rows.h
    rope, head_dim = attention.spec.rope, attention.spec.head_dim
    return attention.cache_of(x, None if rope is None else tables(rope, head_dim, rows.positions))


def streamed(block: Block, attention: Attention, stream: Rows) -> tuple[Array, kv.KV]:
    """Prepended rows behind a block, and their keys and values: those that a cache would keep."""
    spec, (b, n, _) = attention.spec, stream.h.shape
    order = jnp.arange(n)
    mask = (stream.valid[:, None] & (order[:, None] >= order))[:, None]
    context = Context(
        trunk.angles([block], stream.positions),
        {spec.window: mask},
        index=jnp.int32(0),
        tokens=TokenFacts(valid=stream.valid),
    )
    empty = kv.empty(spec.kv_format, b, n, spec.kv_heads, spec.head_dim, stream.h.dtype)
    h, cache, _ = block(stream.h, context, cache=empty)
    return h, cast(kv.KV, cache)


def beside(block: Block, name: str, caches: list[tuple[kv.KV, Bool[Array, "b _"]]]) -> Block:
    """The block with caches beside its attention, in the order of their keys."""
    if not caches:
        return block
    cache, mask = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *caches)
    new = tree.copy(block)
    setattr(new, name, getattr(block, name).with_beside(cache, mask))
    return new
