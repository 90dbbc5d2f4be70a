"""How a decoder takes sound: by which ways, from which layer on, through which connectors.

`ffnlab.routing.pal` is what is done with it.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from ffnlab.errors import ConfigError
from ffnlab.layers import MLP

__all__ = ["WAYS", "AudioInput", "make_connectors"]

WAYS = ("prepended", "attended")


@dataclasses.dataclass(frozen=True)
class AudioInput:
    """What a decoder hears, a row of features for each stretch of sound.

    Attributes:
      widths: of the features of each encoder of sound.
      ways: of each encoder: "prepended" rows go through every layer before the text; "attended"
        ones are keys and values of attention alone, and the same in every layer.
      start: first layer that hears; as many as there are, and none does.
      hidden: channels between the two maps of a connector; 0 for one map.
      indexed: rows of an encoder have the rotary positions 0, 1, …; else none, as of position 0.
    """

    widths: tuple[int, ...]
    ways: tuple[str, ...]
    start: int = 0
    hidden: int = 0
    indexed: bool = False

    def __post_init__(self) -> None:
        sizes = all(type(width) is int and width >= 1 for width in self.widths)
        if not self.widths or not sizes:
            raise ConfigError(f"widths={self.widths!r} must be one or more positive integers")
        if len(self.ways) != len(self.widths) or not set(self.ways) <= set(WAYS):
            raise ConfigError(
                f"ways={self.ways!r} must be one of {WAYS} for each of the {len(self.widths)} "
                f"encoders of widths={self.widths}"
            )
        for name in ("start", "hidden"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise ConfigError(f"{name}={value!r} must be an integer >= 0")


def make_connectors(
    audio: AudioInput, width: int, *, key: Array, dtype: DTypeLike = jnp.float32
) -> list[MLP]:
    """A network from the features of each encoder to the residual stream, of random weights.

    Args:
      audio: of the decoder.
      width: of its residual stream.
      key: of the draw.
      dtype: of the parameters.
    Returns:
      an `MLP` [width of the features] -> [width] for each encoder.
    """
    hidden = (audio.hidden,) if audio.hidden else ()
    keys = jax.random.split(key, len(audio.widths))
    return [
        MLP((own, *hidden, width), key=k, activation="gelu", dtype=dtype)
        for own, k in zip(audio.widths, keys, strict=True)
    ]
