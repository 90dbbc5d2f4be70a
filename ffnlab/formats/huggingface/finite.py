"""One token, two silent frames or a black image through a model: is what it says made of numbers?

And if not, since where.

Values that are finite one by one still overflow together: scales of 3e38, a divisor of 1e-40, a
norm's scale of 1e30. Weights are used block by block, and a dense head piece by piece, so that the
pass takes little memory beside the model's.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from ffnlab.formats.huggingface.dialects import Model
from ffnlab.layers import Block, Context
from ffnlab.models import trunk
from ffnlab.models.audio_encoder import AudioEncoder
from ffnlab.models.decoder import Decoder
from ffnlab.models.encoder import Encoder
from ffnlab.models.vit import ViT
from ffnlab.weights import Dense

PIECE = 2**24  # entries of a head that are widened at a time


def not_finite(model: Model) -> str | None:
    """The first part of a model that gives NaN or infinity for one token; None for none.

    Args:
      model: blocks in a list, all on one device.
    Returns:
      "embed", "layers[i]" or "head"; the token is the config's bos, where it has one, or 0.
    """
    if isinstance(model, AudioEncoder):
        h = model.embed_frames(jnp.zeros((1, 2, model.config.bands)))
    elif isinstance(model, ViT):
        h = model.embed_images(jnp.zeros((1, *model.config.image, model.config.channels)))
    else:
        h = model.embed_tokens(jnp.full((1, 1), getattr(model.config, "bos", None) or 0, jnp.int32))
    if not jnp.isfinite(h).all():
        return "embed"
    for i, block in enumerate(model.blocks()):
        h, is_sane = _after(block, h)
        if not is_sane:
            return f"layers[{i}]"
    if isinstance(model, AudioEncoder):
        parts = iter([model.norm(h)])
    elif isinstance(model, ViT):
        h = model.norm(h)
        parts = iter([h, model.pooled(h), model.output(h)])
    else:
        parts = _logits(model, h) if isinstance(model, Decoder) else _outputs(model, h)
    return None if all(bool(jnp.isfinite(part).all()) for part in parts) else "head"


@jax.jit
def _after(block: Block, h: Float[Array, "1 t d"]) -> tuple[Float[Array, "1 t d"], Bool[Array, ""]]:
    """The residual stream after a block, from position 0 on, and whether it is finite."""
    layers = nnx.List([block])
    masks = {spec.window: None for spec in trunk.specs(layers)}
    context = Context(trunk.angles(layers, jnp.arange(h.shape[1])[None]), masks)
    h = block(h, context)[0]
    return h, jnp.isfinite(h).all()


def _logits(model: Decoder, h: Float[Array, "1 1 d"]) -> Iterator[Array]:
    """The logits before any cap, in pieces where the head is dense."""
    h = model.norm(h)
    yield h
    yield from _products(model, h)


def _outputs(model: Encoder, h: Float[Array, "1 1 d"]) -> Iterator[Array]:
    """What an encoder's heads give; the bias of the masked one is looked at alone."""
    h = h if model.norm is None else model.norm(h)
    yield h
    yield model.pooled(h)
    if model.config.head != "masked":
        yield model.output(h)
        return
    h = model.transform(h)
    yield h
    yield model.head_bias.get_value()
    yield from _products(model, h)


def _products(model: Decoder | Encoder, h: Float[Array, "1 1 d"]) -> Iterator[Array]:
    """h times the head, in pieces where it is dense."""
    weight = model.embed.weight if model.head is None else model.head.weight
    if not isinstance(weight, Dense):
        yield model.embed.logits(h) if model.head is None else model.head(h)
        return
    axis = 0 if model.head is None else 1
    step = max(PIECE // weight.shape[1 - axis], 1)
    for start in range(0, weight.shape[axis], step):
        stop = min(start + step, weight.shape[axis])
        part = jax.lax.slice_in_dim(weight.w, start, stop, axis=axis).astype(h.dtype)
        yield h @ (part.T if model.head is None else part)
