"""Scoring a language model on held-out windows."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ffnlab.data import HeldOut


def held_out_bits(
    predict: Callable[[Int[Array, "b t"]], Float[Array, "b t v"]], windows: HeldOut, rows: int = 16
) -> float:
    """Mean bits of the counted tokens: bits per byte where tokens are bytes.

    bits = - sum log2 p(token | tokens before it in its window) / number of counted tokens

    Args:
      predict: tokens [b, t] -> logits [b, t, v]; called with `rows` rows each time.
      windows: from `ffnlab.data.held_out_windows`.
      rows: windows scored at once.
    """
    nats = 0.0
    for part in windows.batches(rows):
        logits = predict(jnp.asarray(part.tokens[:, :-1]))
        nats += float(_nats(logits, part.tokens[:, 1:], part.counted))
    return nats / math.log(2) / int(np.sum(windows.counted))


@jax.jit
def _nats(
    logits: Float[Array, "b t v"], targets: Int[Array, "b t"], counted: Bool[Array, "b t"]
) -> Float[Array, ""]:
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.sum((jax.nn.logsumexp(logits, axis=-1) - chosen) * counted)
