"""What is heard of sounds and asked about them: features by rows of equal stretches, questions."""

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from ffnlab.data.feature_cache import FeatureCache
from ffnlab.data.speech import HOP, RATE, log_mel, resampled
from ffnlab.errors import ConfigError, at_least
from ffnlab.models import AudioEncoder

__all__ = ["asked", "sound_rows"]

Sound = Float[np.ndarray, "_"]
PER_SECOND = RATE // HOP  # frames


def sound_rows(
    waves: Sequence[Sound],
    rate: int,
    encoder: AudioEncoder | None = None,
    *,
    seconds: int = 1,
    size: int = 8,
    cache: FeatureCache | None = None,
) -> tuple[Float[np.ndarray, "n r c"], Bool[np.ndarray, "n r"]]:
    """A row of features for every `size` frames, each 10 ms long, of the beginning of each sound.

    Args:
      waves: n sounds of any lengths, in [-1, 1).
      rate: of all, Hz.
      encoder: gives the mean of its states over the frames of a row, which run once for the same
        sounds where there is a cache; without one a row is its log-mel frames side by side.
      seconds: sounds are cut or filled with silence to this length; frames that fill no row are
        left out.
      size: frames of a row, >= 1; even with an encoder, which has a state for two.
      cache: where an encoder's features are kept.
    Returns:
      (features; which rows hold more than silence behind a sound's end, at least the first).
    Raises:
      ConfigError: no sounds, a size below 1, larger than a sound or odd with an encoder, or an
        encoder of other bands or shorter sounds; and as `log_mel` and `resampled`.
    """
    at_least(1, seconds=seconds, size=size)
    rows = seconds * PER_SECOND // size
    if not len(waves) or not rows or (encoder is not None and size % 2):
        raise ConfigError(
            f"{len(waves)} sounds, size={size} of {seconds * PER_SECOND} frames: one or more sounds"
            " and a size that fits, an even one with an encoder, are accepted"
        )
    bands = 80 if encoder is None else encoder.config.bands
    plain = [resampled(wave, rate, RATE)[: seconds * RATE] for wave in waves]
    frames = np.stack([log_mel(wave, seconds=seconds, bands=bands) for wave in plain])
    lengths = np.array([-(-len(wave) // (HOP * size)) for wave in plain])
    valid = np.arange(rows) < np.maximum(lengths, 1)[:, None]
    if encoder is None:
        return frames[:, : rows * size].reshape(len(frames), rows, -1), valid

    def means(encoder: AudioEncoder, frames: Float[Array, "b t c"]) -> Float[Array, "b r d"]:
        states = encoder(frames)[:, : rows * size // 2]
        return states.reshape(len(states), rows, size // 2, -1).mean(axis=2)

    if cache is None:
        return np.asarray(jax.jit(means)(encoder, frames)), valid
    return cache(f"means of {size} frames", means, encoder, frames), valid


def asked(
    question: str, answers: Sequence[str]
) -> tuple[Int32[np.ndarray, "n t"], Int32[np.ndarray, "n t"]]:
    """A question for each of n answers, in bytes: (tokens, targets).

    Targets are -1 but at the last token, where the answer follows (`ffnlab.losses.masked`).

    Args:
      question: one byte or more.
      answers: of one byte each.
    Raises:
      ConfigError: no question, or an answer of more or fewer bytes.

    >>> [x.tolist() for x in asked("n=", ["4"])]
    [[[110, 61]], [[-1, 52]]]
    """
    said = [answer.encode() for answer in answers]
    if not question or any(len(answer) != 1 for answer in said):
        raise ConfigError(f"question={question!r}: a question, and answers of one byte, are needed")
    tokens = np.tile(np.frombuffer(question.encode(), np.uint8).astype(np.int32), (len(said), 1))
    targets = np.full_like(tokens, -1)
    targets[:, -1] = [answer[0] for answer in said]
    return tokens, targets
