"""What an attention layer is, and which keys its queries see."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool

from ffnlab.errors import ConfigError
from ffnlab.layers.attention.rope import Rope
from ffnlab.storage.structure import later

__all__ = ["AttentionSpec", "causal_mask", "seen"]


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """Static facts of an attention layer.

    Attributes:
      heads, kv_heads, head_dim: sizes; heads is a multiple of kv_heads.
      rope: rotary embedding; None for none.
      window: a token sees itself and window - 1 tokens before it (and after it, where attention is
        not causal); None for all.
      softcap: scores become softcap * tanh(scores / softcap).
      scale: multiplies the scores; 1 / sqrt(head_dim) when None.
      kv_format: None, "float8" or "int4": how keys and values are rounded, with a cache or without.
      query_format: None or "e4m3".
      causal: a token sees none that comes later.
      memory: keys and values are made of `Context.memory` instead of the layer's own input; they
        are not rotated, neither causal nor cached.
    """

    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope | None
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None
    kv_format: str | None = None
    query_format: str | None = None
    causal: bool = later(True)
    memory: bool = later(False)

    def __post_init__(self) -> None:
        if self.memory and (self.causal or self.rope is not None or self.window is not None):
            raise ConfigError(
                "memory=True: keys from elsewhere have neither causality, rope nor window; "
                "use causal=False, rope=None, window=None"
            )


def seen(q_slots: Array, k_slots: Array, spec: AttentionSpec) -> Bool[Array, "t s"]:
    """Whether the query in slot q sees the key in slot k, in a layer of this kind."""
    if spec.causal:
        return causal_mask(q_slots, k_slots, spec.window)
    distance = jnp.abs(q_slots[:, None] - k_slots[None, :])
    return jnp.full(distance.shape, True) if spec.window is None else distance < spec.window


def causal_mask(q_slots: Array, k_slots: Array, window: int | None) -> Bool[Array, "t s"]:
    """Whether the query in slot q sees the key in slot k: k <= q, and q - k < window."""
    distance = q_slots[:, None] - k_slots[None, :]
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)
