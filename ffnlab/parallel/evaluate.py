"""Scoring models on what is held out: windows of text, inputs with classes, inputs to restore."""

import math
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ffnlab.data import HeldOut, Labelled


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


def held_out_accuracy(
    predict: Callable[[Array], Array], held_out: Iterable[Labelled], rows: int = 64
) -> float:
    """The share of inputs whose class has the largest score.

    Args:
      predict: inputs [rows, ...] -> scores [rows, classes]; called with as many rows each time.
      held_out: parts of any numbers of rows.
      rows: inputs scored at once.
    """
    right = total = 0
    for x, y, count in padded(held_out, rows):
        found = np.asarray(predict(jnp.asarray(x))).argmax(-1)
        right, total = right + int(np.sum((found == y)[:count])), total + count
    return right / total


def held_out_error(
    predict: Callable[[Array], Array], held_out: Iterable[Labelled], rows: int = 64
) -> float:
    """The mean squared difference between inputs and what a model makes of them.

    Args:
      predict: inputs [rows, ...] -> the same shape; called with as many rows each time.
      held_out, rows: see `held_out_accuracy`; the classes are not looked at.
    """
    squares = total = 0.0
    for x, _, count in padded(held_out, rows):
        off = np.square(np.asarray(predict(jnp.asarray(x))) - x)[:count]
        squares, total = squares + float(off.sum(dtype=np.float64)), total + off.size
    return squares / total


def padded(
    held_out: Iterable[Labelled], rows: int
) -> Iterator[tuple[Float[np.ndarray, "n *d"], Int[np.ndarray, "n"], int]]:
    """(x, y, rows that count) of equal numbers of rows, the last ones filled with repetitions."""
    for part in held_out:
        for start in range(0, len(part.x), rows):
            count = min(rows, len(part.x) - start)
            chosen = start + np.arange(rows) % count
            yield part.x[chosen], part.y[chosen], count
