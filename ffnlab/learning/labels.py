"""Checks of labelled batches that the rules for classification share."""

import numpy as np

__all__ = ["check_labels"]


def check_labels(y: object, classes: int) -> None:
    """Raises ValueError for classes outside [0, classes); those on a device are not looked at."""
    if isinstance(y, np.ndarray) and len(y) and not (0 <= y.min() and y.max() < classes):
        raise ValueError(f"y has classes from {y.min()} to {y.max()}; 0 to {classes - 1} are there")
