"""Rotary position embeddings (arXiv 2104.09864, rotate-half form) and ways to stretch them.

The frequencies of "longrope" (arXiv 2402.13753) and "dynamic" (NTK-aware, with the length so far)
depend on the length of what is read. As in `transformers`, that is one length for a whole call:
the largest of its positions, over all rows, plus one. So the rows of a batch share it.

The trap is a cache of keys. A key that is in it keeps the rotation of the call that wrote it, and
queries of a later call may turn by other frequencies: once a text grows past the original length,
the logits of cached decoding are not those of one pass over the same text. That is how the
`forward` of `transformers` behaves with a cache too; its `generate` starts the cache anew for
Phi-3 at the switch. Where the difference matters, read the whole text anew when it passes
`Rope.original`. All other forms have one set of frequencies, and a cache changes nothing.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ffnlab.errors import ConfigError

SCALINGS = (None, "linear", "llama3", "yarn", "longrope", "dynamic")
WITH_ORIGINAL = ("llama3", "yarn", "longrope", "dynamic")
LENGTH_DEPENDENT = ("longrope", "dynamic")


@dataclasses.dataclass(frozen=True)
class Rope:
    """How positions rotate queries and keys.

    Attributes:
      theta: base of the wavelengths, above 1.
      scaling: None, "linear", "llama3", "yarn" (arXiv 2309.00071), "longrope" or "dynamic".
      factor: how many times longer the context became; for all scalings.
      original: context length before scaling, tokens; for all scalings but "linear".
      low: "llama3" low_freq_factor, "yarn" beta_slow.
      high: "llama3" high_freq_factor, "yarn" beta_fast.
      attention_factor: multiplies cos and sin; "yarn" and "longrope" derive it from the factor
        when None.
      fraction: share of the head's channels that rotate (Phi: partial_rotary_factor).
      truncate: the band in which "yarn" blends ends at whole pairs.
      short, long: "longrope" divides the frequency of each pair by these, up to the original
        length and beyond it.
    """

    theta: float = 10000.0
    scaling: str | None = None
    factor: float = 1.0
    original: int = 0
    low: float = 1.0
    high: float = 4.0
    attention_factor: float | None = None
    fraction: float = 1.0
    truncate: bool = True
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.scaling not in SCALINGS:
            raise ConfigError(f"rope scaling={self.scaling!r} is not one of {SCALINGS}")
        if not (self.theta > 1 and self.factor > 0 and 0 < self.fraction <= 1):
            raise ConfigError(f"rope needs theta > 1, factor > 0 and 0 < fraction <= 1, got {self}")
        if self.scaling in WITH_ORIGINAL and self.original <= 1:
            raise ConfigError(
                f"rope scaling {self.scaling!r} needs original > 1, got {self.original}"
            )

    @property
    def magnitude(self) -> float:
        """What cos and sin are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.scaling == "yarn" and self.factor > 1:
            return 0.1 * math.log(self.factor) + 1.0
        if self.scaling == "longrope" and self.factor > 1:
            return math.sqrt(1 + math.log(self.factor) / math.log(self.original))
        return 1.0

    @property
    def reach(self) -> int:
        """Tokens that the context was stretched to, where the scaling says so, else 0."""
        stretched = self.scaling in ("yarn", "longrope", "dynamic")
        return int(self.factor * self.original) if stretched else 0

    def call_of(self, first: int, last: int) -> int:
        """Which texts may share a call without changing each other's frequencies: those of one
        number.

        Args:
          first, last: length of a text when it is read, and after what is generated behind it.
        """
        if self.scaling not in LENGTH_DEPENDENT or last <= self.original:
            return 0
        return -1 if self.scaling == "longrope" and first > self.original else first


def rotated(rope: Rope, head_dim: int) -> int:
    """How many channels of a head rotate: an even number, so that an odd share is rounded up."""
    d = int(head_dim * rope.fraction)
    return d + d % 2


def frequencies(rope: Rope, head_dim: int, *, long: bool = False) -> Float[np.ndarray, " half"]:
    """Radians per position of each rotating pair, [rotated / 2] float32 (host arithmetic).

    Args:
      rope: the embedding; of "dynamic" those up to the original length.
      head_dim: channels of a head.
      long: those of "longrope" beyond the original length.
    """
    d = int(head_dim * rope.fraction)
    freq = 1.0 / rope.theta ** (np.arange(0, d, 2, dtype=np.float64) / d)
    if rope.scaling == "linear":
        freq = freq / rope.factor
    elif rope.scaling == "llama3":
        turns = rope.original * freq / (2 * np.pi)  # rotations within the original context
        smooth = np.clip((turns - rope.low) / (rope.high - rope.low), 0.0, 1.0)
        freq = (1 - smooth) * freq / rope.factor + smooth * freq
    elif rope.scaling == "yarn":
        freq = _yarn(rope, freq, d)
    elif rope.scaling == "longrope":
        freq = freq / np.asarray(rope.long if long else rope.short)
    return freq.astype(np.float32)


def _yarn(rope: Rope, freq: np.ndarray, d: int) -> np.ndarray:
    def pair(turns: float) -> float:  # index of the pair that makes so many turns
        return d * math.log(rope.original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair(rope.high), pair(rope.low)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(d // 2) - low) / (high - low), 0.0, 1.0)
    return freq / rope.factor * ramp + freq * (1 - ramp)


def check_rope(rope: Rope, head_dim: int) -> None:
    """Raises ConfigError unless a rotary embedding fits heads of this many channels."""
    d = int(head_dim * rope.fraction)
    if d < 1:
        raise ConfigError(f"rope rotates fraction={rope.fraction} of head_dim={head_dim}: nothing")
    if d % 2 and rope.scaling is not None:
        raise ConfigError(
            f"rope scaling {rope.scaling!r} needs an even number of rotating channels; "
            f"fraction={rope.fraction} of head_dim={head_dim} is {d}"
        )
    if rope.scaling == "dynamic" and d < 4:
        raise ConfigError(f"rope scaling 'dynamic' needs at least 4 rotating channels, not {d}")
    if rope.scaling == "longrope":
        sizes = (len(rope.short), len(rope.long))
        if sizes != (d // 2, d // 2):
            raise ConfigError(
                f"rope scaling 'longrope' has {sizes[0]} short and {sizes[1]} long factors; "
                f"{d} rotating channels need {d // 2} of each"
            )
    for long in (False, True):
        with np.errstate(all="ignore"):
            found = frequencies(rope, head_dim, long=long)
        if not np.isfinite(found).all() or found.min() <= 0:
            raise ConfigError(f"rope has frequencies that are not positive numbers: {rope}")


def tables(
    rope: Rope, head_dim: int, positions: Int[Array, "b t"]
) -> tuple[Float[Array, "b t 1 half"], Float[Array, "b t 1 half"]]:
    """cos and sin of every position, float32, ready to broadcast over heads.

    The length that "longrope" and "dynamic" go by is the largest position plus one.
    """
    angles = positions[..., None].astype(jnp.float32) * _at(rope, head_dim, positions)
    angles = angles[:, :, None, :]
    return jnp.cos(angles) * rope.magnitude, jnp.sin(angles) * rope.magnitude


def _at(rope: Rope, head_dim: int, positions: Int[Array, "b t"]) -> np.ndarray | Array:
    """`frequencies` for the length of these positions."""
    base = frequencies(rope, head_dim)
    if rope.scaling not in LENGTH_DEPENDENT:
        return base
    length = jnp.max(positions) + 1
    if rope.scaling == "longrope":
        return jnp.where(length > rope.original, frequencies(rope, head_dim, long=True), base)
    # theta * s ** (d / (d - 2)) in place of theta, where s is 1 up to the original length.
    beyond = jnp.maximum(length - rope.original, 0).astype(jnp.float32)
    d = rotated(rope, head_dim)
    exponents = (np.arange(0, d, 2) / (d - 2)).astype(np.float32)
    return base * (1 + rope.factor * beyond / rope.original) ** -exponents


def rotate(
    x: Float[Array, "b t heads d"],
    cos: Float[Array, "#b t 1 half"],
    sin: Float[Array, "#b t 1 half"],
) -> Float[Array, "b t heads d"]:
    """Rotates pairs (f, f + rotated / 2) of each head, in float32; other channels pass."""
    half = cos.shape[-1]
    x32 = x.astype(jnp.float32)
    a, b, rest = x32[..., :half], x32[..., half : 2 * half], x32[..., 2 * half :]
    parts = [a * cos - b * sin, b * cos + a * sin, rest]
    return jnp.concatenate(parts, axis=-1).astype(x.dtype)
