"""Fields and series brought to mean 0 and deviation 1, and back."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32

__all__ = ["Scaling", "scaling_of"]


class Scaling(NamedTuple):
    """Mean and standard deviation of every field, [c]."""

    mean: Float[np.ndarray, "c"]
    deviation: Float[np.ndarray, "c"]

    def __call__(self, fields: Float[np.ndarray, "*b c"]) -> Float32[np.ndarray, "*b c"]:
        """Fields of mean 0 and deviation 1."""
        return ((fields - self.mean) / self.deviation).astype(np.float32)

    def back(self, fields: Float[np.ndarray, "*b c"]) -> Float[np.ndarray, "*b c"]:
        """Fields in their own units, float64."""
        return np.asarray(fields, np.float64) * self.deviation + self.mean


def scaling_of(fields: Float[np.ndarray, "*b c"]) -> Scaling:
    """The scaling of fields to learn from; a field that hardly changes (by less than float32 tells
    from its mean) is only shifted.
    """
    rows = np.asarray(fields, np.float64).reshape(-1, np.shape(fields)[-1])
    mean, deviation = rows.mean(0), rows.std(0)
    changes = deviation > np.finfo(np.float32).eps * np.abs(mean)
    return Scaling(mean, np.where(changes, deviation, 1.0))
