"""The loss of packed rows: next tokens, within each document alone."""

import math
from collections.abc import Callable

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from ffnlab.data import Packed

__all__ = ["packed_next_token"]


def packed_next_token(
    model: Callable, batch: Packed
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean cross-entropy of every token given those before it in its document.

    The first token of a document is not predicted, and tokens see their own document only.

    Args:
      model: (tokens [b, t - 1], positions=, segments=) -> logits [b, t - 1, v].
      batch: rows of t >= 2 tokens (`ffnlab.data.PackedBatches`).
    Returns:
      (nats per predicted token [], {"bits": bits per predicted token [], "count": predicted tokens
      []}); 0 where none is.
    """
    tokens, segments, positions = batch
    inputs = {"positions": positions[:, :-1], "segments": segments[:, :-1]}
    logits = model(tokens[:, :-1], **inputs).astype(jnp.float32)
    counted = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    count = jnp.sum(counted)
    mean = jnp.sum(nats * counted) / jnp.maximum(count, 1)
    return mean, {"bits": mean / math.log(2), "count": count}
