"""Models of a few thousand parameters and text for them, on which methods are checked."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from ffnlab import models

__all__ = ["batches", "tiny", "tiny_encoder"]


def tiny(key: Array | None = None, dtype: DTypeLike = jnp.float32) -> models.Decoder:
    """A decoder of three blocks of width 16 over 64 tokens, with grouped-query heads.

    Args:
      key: of its parameters, fixed ones when None.
      dtype: of the parameters.
    """
    model = _tiny(7 if key is None else int(jax.random.key_data(key)[-1]), jnp.dtype(dtype))
    return jax.tree.map(lambda leaf: leaf, model)


@functools.cache
def _tiny(seed: int, dtype: jnp.dtype) -> models.Decoder:
    config = models.DecoderConfig(
        vocab=64, width=16, hidden=32, layers=3, heads=4, kv_heads=2, head_dim=4
    )
    return models.Decoder(config, key=jax.random.key(seed), dtype=dtype)


def tiny_encoder(key: Array | None = None, **options: Any) -> models.Encoder:
    """A BERT of three blocks of width 16 over 64 tokens of two types, with a masked head.

    Args:
      key: of its parameters, fixed ones when None.
      options: fields of `EncoderConfig` that differ.
    """
    config = models.EncoderConfig(
        vocab=64,
        width=16,
        hidden=32,
        layers=3,
        heads=4,
        head_dim=4,
        max_positions=16,
        types=2,
        head="masked",
    )
    config = dataclasses.replace(config, **options)
    return models.Encoder(config, key=jax.random.key(7) if key is None else key)


def batches() -> list[Int[Array, "b t"]]:
    """Two batches [2, 12] of tokens for `tiny`, always the same."""
    return list(jax.random.randint(jax.random.key(3), (2, 2, 12), 0, 64))
