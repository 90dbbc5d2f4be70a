"""All binary inputs of twelve points on a ring, with a label that turning the ring leaves as it is.

A finite world: every input is there, each as likely, so that what a layer knows of them is counted
and not estimated. The authors of arXiv 1703.00810 have such a set, which may not be shipped; this
rule is our own.
"""

import itertools
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int32

from ffnlab.errors import ConfigError

__all__ = ["Ring", "ring"]

POINTS = 12


class Ring(NamedTuple):
    """The inputs and their labels.

    Attributes:
      x: [4096, 12] float32 of 0 and 1.
      y: [4096], 1 where the score is above its median.
      p: [4096], probability of label 1: y itself, or a soft one.
    """

    x: Float32[np.ndarray, "n 12"]
    y: Int32[np.ndarray, "n"]
    p: Float[np.ndarray, "n"]


def ring(gain: float | None = None) -> Ring:
    """The world, in the order of the numbers that inputs write.

        score = (ones - 6) + 0.15 (|F_2|^2 - |F_1|^2),   F the discrete Fourier transform of x - 1/2

    Args:
      gain: p = sigmoid(gain (score - median)); None for a label that follows from the input.
    Raises:
      ConfigError: a gain that is not positive and finite.
    """
    if gain is not None and not 0 < gain < math.inf:
        raise ConfigError(f"gain={gain} must be positive and finite")
    x = np.array(list(itertools.product([0, 1], repeat=POINTS)), np.float64)
    waves = np.abs(np.fft.fft(x - 0.5, axis=1)) ** 2
    score = np.round((x.sum(1) - POINTS / 2) + 0.15 * (waves[:, 2] - waves[:, 1]), 9)
    above = score - np.median(score)
    y = above > 0
    p = y.astype(np.float64) if gain is None else 0.5 * (1 + np.tanh(gain * above / 2))
    return Ring(x.astype(np.float32), y.astype(np.int32), p)
