"""What methods that calibrate on a decoder are given, checked before any compute."""

import jax
import numpy as np
from jaxtyping import Array, Int

from ffnlab.errors import ConfigError

__all__ = ["check_tokens"]


def check_tokens(batch: object, vocab: int, *, least: int = 1) -> Int[np.ndarray | Array, "b t"]:
    """A batch of token ids as int32 on the host; a traced one as it is, its values not looked at.

    Args:
      batch: integers [b, t], b >= 1, t >= `least`, from 0 to `vocab` - 1.
      vocab: number of ids of the model.
      least: tokens that a row needs.
    Returns:
      the ids, [b, t] int32.
    Raises:
      ConfigError: it is anything else.

    >>> check_tokens([[1, 2], [0, 3]], 4).shape
    (2, 2)
    """
    is_traced = isinstance(batch, jax.core.Tracer)
    try:
        tokens = batch if is_traced else np.asarray(batch)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"a batch of {type(batch).__name__} is no array: {error}") from None
    is_tokens = tokens.ndim == 2 and np.issubdtype(tokens.dtype, np.integer)
    if not is_tokens or tokens.shape[0] < 1 or tokens.shape[1] < least:
        raise ConfigError(
            f"a batch of {tokens.dtype} {tokens.shape}; integer tokens [b, t] with b >= 1 and "
            f"t >= {least} are accepted"
        )
    if is_traced:
        return tokens.astype(np.int32)
    if tokens.min() < 0 or tokens.max() >= vocab:
        raise ConfigError(
            f"token ids from {tokens.min()} to {tokens.max()}; the vocabulary is 0..{vocab - 1}"
        )
    return tokens.astype(np.int32)
