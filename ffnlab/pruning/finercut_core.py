"""Arrays-only core of FinerCut: how far two models' outputs are apart.

FinerCut: Finer-grained Interpretable Layer Pruning for Large Language Models (2024).
Y, Z: logits of the original and of the pruned model, [b, t, v]; or any outputs [b, ..., v], whose
last axis is then taken for logits: classes [b, v] of whole samples, hidden states.
P = softmax(Y), Q = softmax(Z), M = (P + Q) / 2,   d = log Q - log P.

Each distance is a sum of terms divided by their count, so that chunks of a calibration set add
up: `total` gives the sum over a chunk in float32, `terms` how many terms that was.

What differs from the authors' code, and why:
- The same functions are written as sums of terms that are >= 0 and exactly 0 where the logits
  agree, for example M (log M - (log P + log Q) / 2) = M log cosh(d / 2). Subtracting two float32
  logarithms instead leaves rounding of the size of a late round's differences.
- Angles come from 2 atan2(|y - z|, |y + z|) of unit vectors: the arccosine of a float32 cosine
  cannot tell an angle below 3e-4 from 0. Two zero vectors have angle 0, theirs have pi / 2.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

__all__ = ["DISTANCES", "Distance"]

Logits = Float[Array, "b *t v"]
Tokens = Int[Array, "b t"] | None
Valid = Bool[Array, "b *t"] | None
LOG2 = math.log(2.0)


class Distance(NamedTuple):
    """A distance that streams over chunks of samples: sum of `total` / sum of `terms`.

    Attributes:
      total: (original logits [b, t, v], pruned logits [b, t, v], tokens [b, t], valid [b, t]) ->
        sum of the terms in the chunk, float32 scalar. Positions that are not valid have no terms;
        None: all are. Tokens are read by "perplexity" alone.
      per: what one term is; a chunk counts b * t * v elements, b * t tokens or b samples. Chunks
        may cut a sample anywhere for "element" and "token", and only between samples for "sample".
    """

    total: Callable[[Logits, Logits, Tokens, Valid], Float[Array, ""]]
    per: Literal["element", "token", "sample"]

    def terms(self, samples: int, positions: int, outputs: int) -> int:
        """How many terms a chunk of `samples` with so many valid positions has, `outputs` each."""
        return {"element": positions * outputs, "token": positions, "sample": samples}[self.per]


def log_probabilities(logits: Logits) -> Logits:
    """log softmax over the vocabulary, in float32."""
    return jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)


def add_up(terms: Float[Array, "b *t v"], valid: Valid) -> Float[Array, ""]:
    """Sum over the vocabulary first: partial sums of like size lose less in float32."""
    return jnp.sum(counted(jnp.sum(terms, axis=-1), valid))


def counted(terms: Float[Array, "b *t"], valid: Valid) -> Float[Array, "b *t"]:
    """The terms of positions, 0 where a position does not count."""
    return terms if valid is None else jnp.where(valid, terms, 0.0)


def series(x: Float[Array, "..."], coefficients: Sequence[float]) -> Float[Array, "..."]:
    """c0 + c1 x + c2 x^2 + ... by Horner's rule."""
    value = jnp.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        value = value * x + c
    return value


def log_cosh(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """log cosh x, exact to rounding near 0 and without overflow."""
    size = jnp.abs(x)
    near = 0.5 * jnp.log1p(jnp.square(jnp.sinh(jnp.minimum(size, 1.0))))
    return jnp.where(size < 1.0, near, size - LOG2 + jnp.log1p(jnp.exp(-2.0 * size)))


def js_total(original: Logits, pruned: Logits, tokens: Tokens, valid: Valid) -> Float[Array, ""]:
    """The authors' Jensen-Shannon form: sum of [KL(M||P) + KL(M||Q)] / 2 = sum of M log cosh(d/2).

    Their mean is over all elements, thus smaller by the factor v than a mean over tokens, and the
    divergences are the reverse of the textbook's.
    """
    p, q = log_probabilities(original), log_probabilities(pruned)
    mean = 0.5 * (jnp.exp(p) + jnp.exp(q))
    return add_up(mean * log_cosh(0.5 * (q - p)), valid)


def js_textbook_total(
    original: Logits, pruned: Logits, tokens: Tokens, valid: Valid
) -> Float[Array, ""]:
    """Jensen-Shannon divergence in nats: sum over tokens of [KL(P||M) + KL(Q||M)] / 2.

    With s = tanh(d/2), P = M (1 - s) and Q = M (1 + s), so that each element contributes
    M [(1 + s) log(1 + s) + (1 - s) log(1 - s)] / 2; the bracket is the series
    sum over k >= 1 of s^2k / (k (2k - 1)) near 0.
    """
    p, q = log_probabilities(original), log_probabilities(pruned)
    mean = 0.5 * (jnp.exp(p) + jnp.exp(q))
    s = jnp.tanh(0.5 * (q - p))
    square = jnp.square(s)
    near = square * series(square, [1 / (k * (2 * k - 1)) for k in range(1, 8)])
    far = jax.scipy.special.xlog1py(1.0 + s, s) + jax.scipy.special.xlog1py(1.0 - s, -s)
    return add_up(0.5 * mean * jnp.where(jnp.abs(s) < 0.3, near, far), valid)


def kl_total(original: Logits, pruned: Logits, tokens: Tokens, valid: Valid) -> Float[Array, ""]:
    """Sum of KL(P||Q) = sum of P (exp(d) - 1 - d); the added sum of Q - P is 0."""
    p, q = log_probabilities(original), log_probabilities(pruned)
    d = q - p
    # (exp(d) - 1 - d) / d^2 = 1/2! + d/3! + d^2/4! + ...
    near = jnp.square(d) * series(d, [1 / 2, 1 / 6, 1 / 24, 1 / 120, 1 / 720, 1 / 5040, 1 / 40320])
    far = jnp.exp(q) - jnp.exp(p) - jnp.exp(p) * d
    return add_up(jnp.where(jnp.abs(d) < 0.5, jnp.exp(p) * near, far), valid)


def norm_total(original: Logits, pruned: Logits, tokens: Tokens, valid: Valid) -> Float[Array, ""]:
    """Sum over samples of the Frobenius norm of Z - Y over tokens and vocabulary."""
    gap = pruned.astype(jnp.float32) - original.astype(jnp.float32)
    squares = counted(jnp.sum(jnp.square(gap), axis=-1), valid)
    return jnp.sum(jnp.sqrt(jnp.sum(squares, axis=tuple(range(1, squares.ndim)))))


def angular_total(
    original: Logits, pruned: Logits, tokens: Tokens, valid: Valid
) -> Float[Array, ""]:
    """Sum over tokens of the angle between Y and Z along the vocabulary, at most pi / 2."""

    def unit(logits: Logits) -> Logits:
        wide = logits.astype(jnp.float32)
        length = jnp.linalg.norm(wide, axis=-1, keepdims=True)
        return wide / jnp.maximum(length, 1e-8)

    y, z = unit(original), unit(pruned)
    angle = 2.0 * jnp.arctan2(jnp.linalg.norm(z - y, axis=-1), jnp.linalg.norm(z + y, axis=-1))
    return jnp.sum(counted(jnp.minimum(angle, jnp.pi / 2), valid))


def perplexity_total(
    original: Logits, pruned: Logits, tokens: Tokens, valid: Valid
) -> Float[Array, ""]:
    """Sum over samples of exp(mean negative log-likelihood of each next token).

    No distance: it ignores the original model, as the authors' ablation does.
    """
    likely = log_probabilities(pruned)[:, :-1]
    chosen = jnp.take_along_axis(likely, tokens[:, 1:, None], axis=-1)[..., 0]
    if valid is None:
        return jnp.sum(jnp.exp(-jnp.mean(chosen, axis=-1)))
    asked = valid[:, 1:] & valid[:, :-1]
    total = jnp.sum(counted(chosen, asked), axis=-1)
    count = jnp.maximum(jnp.sum(asked, axis=-1, dtype=jnp.float32), 1.0)
    return jnp.sum(jnp.exp(-total / count))


DISTANCES: Mapping[str, Distance] = MappingProxyType(
    {
        "js": Distance(js_total, "element"),
        "js_textbook": Distance(js_textbook_total, "token"),
        "kl": Distance(kl_total, "element"),
        "norm": Distance(norm_total, "sample"),
        "angular": Distance(angular_total, "token"),
        "perplexity": Distance(perplexity_total, "sample"),
    }
)
