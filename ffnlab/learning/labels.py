"""Checks of labelled batches that the rules for classification share."""

import jax
import numpy as np
from jax.typing import ArrayLike

__all__ = ["check_labels"]


def check_labels(y: ArrayLike | list[int], classes: int) -> None:
    """Raises ValueError for other than whole numbers in [0, classes), of those it can look at."""
    if isinstance(y, jax.Array) and not y.is_fully_addressable:
        return
    y = np.asarray(y)
    if y.size and y.dtype.kind not in "iu":
        raise ValueError(f"y is {y.dtype}; classes are whole numbers, 0 to {classes - 1}")
    if y.size and not (0 <= y.min() and y.max() < classes):
        raise ValueError(f"y has classes from {y.min()} to {y.max()}; 0 to {classes - 1} are there")
