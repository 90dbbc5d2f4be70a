"""Choosing the next token, greedily or by temperature, top-k, top-p and min-p: functions of logits.

softmax(logits / T) is cut to the k most likely tokens, then to the nucleus: the fewest most likely
tokens whose probabilities reach p (arXiv 1904.09751), then to the tokens that are at least so many
times as likely as the most likely one (arXiv 2407.01082), and one token is drawn. The order is that
of `transformers`: temperature, top-k, top-p, min-p. Ties go to the lower id, so that exactly k
tokens stay (`transformers` keeps all that tie with the k-th).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ffnlab.errors import ConfigError

__all__ = ["Sampling", "candidates", "draw", "greedy"]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
      temperature: divides the logits; 0 takes the most likely token, and the rest is ignored.
      top_k: how many of the most likely tokens may be drawn, >= 1; None for all, as which 0 and -1
        are taken too: other tools write it so.
      top_p: probability that the tokens that may be drawn must reach, 0 < p <= 1; None for all.
      min_p: probability that a token must have, as a share of the most likely one's, 0 < p <= 1;
        None, or 0, for any.
    Raises:
      ConfigError: a value out of its range.

    >>> Sampling(temperature=0.0).is_greedy
    True
    >>> Sampling(1.0, top_k=0) == Sampling(1.0, top_k=-1) == Sampling(1.0)
    True
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature={self.temperature} must be finite and >= 0")
        if self.top_k in (0, -1):
            object.__setattr__(self, "top_k", None)
        if self.min_p == 0:
            object.__setattr__(self, "min_p", None)
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k} must be at least 1, or 0 for all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} must be in (0, 1], or None for all tokens")
        if self.min_p is not None and not 0 < self.min_p <= 1:
            raise ConfigError(f"min_p={self.min_p} must be in [0, 1]")

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature == 0


def greedy(logits: Float[Array, "*b v"]) -> Int[Array, "*b"]:
    """The most likely token of each row, the lowest id among equals.

    Args:
      logits: [..., v].
    Returns:
      ids, [...] int32.

    >>> greedy(jnp.array([[0.0, 2.0, 2.0]]))
    Array([1], dtype=int32)
    """
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def candidates(
    logits: Float[Array, "*b v"],
    *,
    top_k: int | None = None,
    top_p: float | Array | None = None,
    min_p: float | Array | None = None,
) -> tuple[Float[Array, "*b k"], Int[Array, "*b k"]]:
    """The tokens that may be drawn, the most likely first.

    A token of rank r stays when r < k and the probabilities of the ranks before it (renormalized
    over the first k) sum to less than p, and when its own is at least min_p times the first one's;
    so the most likely token always stays.

    Args:
      logits: [..., v], after the temperature.
      top_k: static, >= 1; more than v means v.
      top_p, min_p: in (0, 1]; may be traced.
    Returns:
      logits [..., k] float32 in falling order, -inf where a token fell to top_p or min_p, and their
      ids [..., k] int32; k is v without top_k.
    Source:
      top-k: arXiv 1805.04833, top-p: arXiv 1904.09751, min-p: arXiv 2407.01082.
    """
    vocab = logits.shape[-1]
    values, ids = jax.lax.top_k(logits.astype(jnp.float32), min(top_k or vocab, vocab))
    if top_p is not None:
        probabilities = jax.nn.softmax(values, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        # Rounding of the sum must not cost the first token its place.
        keep = (before < top_p).at[..., 0].set(True)
        values = jnp.where(keep, values, -jnp.inf)
    if min_p is not None:
        values = jnp.where(jnp.exp(values - values[..., :1]) >= min_p, values, -jnp.inf)
    return values, ids.astype(jnp.int32)


def draw(
    keys: Array,
    logits: Float[Array, "b v"],
    *,
    temperature: float | Array,
    top_k: int | None = None,
    top_p: float | Array | None = None,
    min_p: float | Array | None = None,
) -> Int[Array, "b"]:
    """Draws one token per row.

    Args:
      keys: random keys, one per row, [b].
      logits: [b, v].
      temperature: > 0; may be traced.
      top_k, top_p, min_p: as in `candidates`; None for all tokens.
    Returns:
      ids, [b] int32.
    """
    scaled = logits.astype(jnp.float32) / temperature
    if top_k is None and top_p is None and min_p is None:
        return jax.vmap(jax.random.categorical)(keys, scaled).astype(jnp.int32)
    values, ids = candidates(scaled, top_k=top_k, top_p=top_p, min_p=min_p)
    rank = jax.vmap(jax.random.categorical)(keys, values)
    return jnp.take_along_axis(ids, rank[:, None], axis=-1)[:, 0]
