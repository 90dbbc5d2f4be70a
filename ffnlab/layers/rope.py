"""Rotary position embeddings (arXiv 2104.09864, rotate-half form) and ways to stretch them."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ffnlab.errors import ConfigError

SCALINGS = (None, "linear", "llama3", "yarn")


@dataclasses.dataclass(frozen=True)
class Rope:
    """How positions rotate queries and keys.

    Attributes:
      theta: base of the wavelengths.
      scaling: None, "linear", "llama3" or "yarn" (arXiv 2309.00071).
      factor: how many times longer the context became; for all scalings.
      original: context length before scaling, tokens ("llama3", "yarn").
      low: "llama3" low_freq_factor, "yarn" beta_slow.
      high: "llama3" high_freq_factor, "yarn" beta_fast.
      attention_factor: multiplies cos and sin; "yarn" derives it from the factor when None.
      fraction: share of the head's channels that rotate (Phi: partial_rotary_factor).
    """

    theta: float = 10000.0
    scaling: str | None = None
    factor: float = 1.0
    original: int = 0
    low: float = 1.0
    high: float = 4.0
    attention_factor: float | None = None
    fraction: float = 1.0

    def __post_init__(self) -> None:
        if self.scaling not in SCALINGS:
            raise ConfigError(f"rope scaling={self.scaling!r} is not one of {SCALINGS}")
        if not (self.theta > 0 and self.factor > 0 and 0 < self.fraction <= 1):
            raise ConfigError(f"rope needs theta > 0, factor > 0 and 0 < fraction <= 1, got {self}")
        if self.scaling in ("llama3", "yarn") and self.original <= 0:
            raise ConfigError(
                f"rope scaling {self.scaling!r} needs original > 0, got {self.original}"
            )

    @property
    def magnitude(self) -> float:
        """What cos and sin are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        return (
            0.1 * math.log(self.factor) + 1.0 if self.scaling == "yarn" and self.factor > 1 else 1.0
        )


def rotated(rope: Rope, head_dim: int) -> int:
    """How many channels of a head rotate: an even number."""
    return int(head_dim * rope.fraction) // 2 * 2


def frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Radians per position of each rotating pair, [rotated / 2] float32 (host arithmetic)."""
    d = rotated(rope, head_dim)
    freq = 1.0 / rope.theta ** (np.arange(0, d, 2, dtype=np.float64) / d)
    if rope.scaling == "linear":
        freq = freq / rope.factor
    elif rope.scaling == "llama3":
        turns = rope.original * freq / (2 * np.pi)  # rotations within the original context
        smooth = np.clip((turns - rope.low) / (rope.high - rope.low), 0.0, 1.0)
        freq = (1 - smooth) * freq / rope.factor + smooth * freq
    elif rope.scaling == "yarn":
        freq = _yarn(rope, freq, d)
    return freq.astype(np.float32)


def _yarn(rope: Rope, freq: np.ndarray, d: int) -> np.ndarray:
    def pair(turns: float) -> float:  # index of the pair that makes so many turns
        return d * math.log(rope.original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = max(math.floor(pair(rope.high)), 0)
    high = min(math.ceil(pair(rope.low)), d - 1)
    ramp = np.clip((np.arange(d // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
    return freq / rope.factor * ramp + freq * (1 - ramp)


def tables(
    rope: Rope, head_dim: int, positions: Int[Array, "b t"]
) -> tuple[Float[Array, "b t 1 half"], Float[Array, "b t 1 half"]]:
    """cos and sin of every position, float32, ready to broadcast over heads."""
    angles = positions[..., None].astype(jnp.float32) * frequencies(rope, head_dim)
    angles = angles[:, :, None, :]
    return jnp.cos(angles) * rope.magnitude, jnp.sin(angles) * rope.magnitude


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
