"""Labelled rows as images: what `digits`, `mnist` and `vowels` give is flat."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32

from ffnlab.data.clusters import Labelled
from ffnlab.errors import ConfigError, at_least

__all__ = ["Images", "as_images"]


class Images(NamedTuple):
    """Images with classes; a batch of it is a pair (x, y).

    Attributes:
      x: channels last, [n, h, w, c].
      y: classes, [n].
    """

    x: Float32[np.ndarray, "n h w c"]
    y: Int32[np.ndarray, "n"]


def as_images(data: Labelled, *, height: int | None = None, channels: int = 1) -> Images:
    """The same data, each row as an image of height * width * channels values in this order.

    Args:
      data: x [n, d], for instance a part of `digits` or `mnist`.
      height: of an image; as high as wide when None.
      channels: values of a pixel (c).
    Returns:
      x [n, h, w, c].
    Raises:
      ConfigError: d values are no such image.

    >>> rows = Labelled(np.arange(8, dtype=np.float32).reshape(2, 4), np.zeros(2, np.int32))
    >>> as_images(rows).x[0, :, :, 0]
    array([[0., 1.],
           [2., 3.]], dtype=float32)
    """
    at_least(1, height=height, channels=channels)
    n, d = data.x.shape
    h = max(1, math.isqrt(d // channels)) if height is None else height
    w = h if height is None else d // (h * channels)
    if h * w * channels != d or not d:
        raise ConfigError(
            f"rows of {d} values are no images of height={height} with channels={channels}; "
            "without a height they must be square"
        )
    return Images(data.x.reshape(n, h, w, channels), data.y)
