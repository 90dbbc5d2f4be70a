"""Scikit-learn's digits as images of 8 x 8, and the networks that studies of structure train on
them."""

from jaxtyping import Array

from ffnlab.data import Labelled, digits
from ffnlab.models import ViT, ViTConfig
from ffnlab.studies import tuning
from ffnlab.studies.tuning import Splits

__all__ = ["DIGITS", "digit_images", "vit"]

DIGITS = "scikit-learn's digits, 8 x 8, a fifth of the training rows for validation"


def digit_images(seed: int) -> Splits:
    """Images [n, 8, 8, 1] with classes."""
    first, second = (Labelled(part.x.reshape(-1, 8, 8, 1), part.y) for part in digits(seed))
    return tuning.splits((first, second), seed=seed)


def vit(width: int, layers: int, key: Array, *, eps: float = 1e-6) -> ViT:
    """A ViT of 16 patches, 4 heads, FFNs of 4 widths, and the mean of all patches."""
    config = ViTConfig(
        (8, 8), 2, width, 4 * width, layers, 4, channels=1, classes=10, pool="mean", eps=eps
    )
    return ViT(config, key=key)
