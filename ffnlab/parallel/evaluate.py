"""Scoring models on what is held out: windows of text, inputs with classes, inputs to restore."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, PyTree

from ffnlab.data import HeldOut, Labelled, MaskedWindows
from ffnlab.models.noise import TIMES, noised


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


def held_out_masked(
    predict: Callable[[Mapping[str, Array]], Float[Array, "b t v"]],
    windows: MaskedWindows,
    rows: int = 16,
) -> tuple[float, float]:
    """How well hidden tokens are found again: (bits of each, share with the largest logit).

    Args:
      predict: {"tokens": [b, t], "valid": [b, t]} -> logits [b, t, v]; called with `rows` rows each
        time.
      windows: from `ffnlab.data.masked_windows`.
      rows: windows scored at once.
    """
    nats = right = 0.0
    for part in windows.batches(rows):
        logits = predict({"tokens": jnp.asarray(part.tokens), "valid": jnp.asarray(part.valid)})
        counted = part.targets >= 0
        nats += float(_nats(logits, np.maximum(part.targets, 0), counted))
        right += float(jnp.sum((logits.argmax(-1) == part.targets) & counted))
    count = int(np.sum(windows.targets >= 0))
    return nats / math.log(2) / count, right / count


def held_out_accuracy(
    predict: Callable[[PyTree], Array], held_out: Iterable[Labelled], rows: int = 64
) -> float:
    """The share of inputs whose class has the largest score.

    Args:
      predict: inputs [rows, ...] -> scores [rows, classes]; called with as many rows each time.
      held_out: parts of any numbers of rows, their inputs an array or a tree of them.
      rows: inputs scored at once.
    """
    right = total = 0
    for x, y, count in padded(held_out, rows):
        found = np.asarray(predict(jax.tree.map(jnp.asarray, x))).argmax(-1)
        right, total = right + int(np.sum((found == y)[:count])), total + count
    return right / total


def held_out_spans(
    predict: Callable[[PyTree], Float[Array, "b t 2"]], inputs: PyTree, rows: int = 16
) -> Float32[np.ndarray, "n t 2"]:
    """Logits of the ends of answers in windows (`ffnlab.data.answers_of` makes texts of them).

    Args:
      predict: inputs [rows, ...] -> logits [rows, t, 2]; called with as many rows each time.
      inputs: of n >= 1 windows, a tree of arrays.
      rows: windows read at once.
    """
    n, found = len(jax.tree.leaves(inputs)[0]), []
    for start in range(0, n, rows):
        chosen = (start + np.arange(rows)) % n
        found.append(predict(jax.tree.map(lambda x, i=chosen: jnp.asarray(x[i]), inputs)))
    return np.concatenate([np.asarray(part, np.float32) for part in found])[:n]


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
        off = np.square(np.asarray(predict(jnp.asarray(x))) - np.asarray(x))[:count]
        squares, total = squares + float(off.sum(dtype=np.float64)), total + off.size
    return squares / total


def held_out_noise(
    predict: Callable[[Mapping[str, Array]], Array], held_out: Iterable[Labelled], rows: int = 64
) -> float:
    """The mean squared error of the noise found in images, at times and of noise drawn once.

    Args:
      predict: {"images": [rows, h, w, c], "times": [rows]} -> the noise, of the images' shape.
      held_out, rows: see `held_out_accuracy`; the classes are not looked at.
    """
    squares = total = 0.0
    for i, (x, _, count) in enumerate(padded(held_out, rows)):
        images, t, noise = noised(jnp.asarray(x), jax.random.fold_in(jax.random.key(0), i))
        off = np.square(np.asarray(predict({"images": images, "times": TIMES * t})) - noise)[:count]
        squares, total = squares + float(off.sum(dtype=np.float64)), total + off.size
    return squares / total


def padded(
    held_out: Iterable[Labelled], rows: int
) -> Iterator[tuple[PyTree, Int[np.ndarray, "n"], int]]:
    """(x, y, rows that count) of equal numbers of rows, the last ones filled with repetitions."""
    for part in held_out:
        for start in range(0, len(part.y), rows):
            count = min(rows, len(part.y) - start)
            chosen = start + np.arange(rows) % count
            yield *jax.tree.map(lambda leaf, chosen=chosen: leaf[chosen], tuple(part)), count
