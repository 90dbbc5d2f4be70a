"""RandAugment (arXiv 1909.13719): a few operations drawn for each image, all of one magnitude.

Operations are Pillow's, on one image [h, w, c] with values in [0, 1]: affine ones take the nearest
pixel and fill with black; colours are changed as `ffnlab.data.images.colour` says. What counts
levels (equalize, posterize) counts 256 of them.
"""

import math
from collections.abc import Callable
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ffnlab.data.images.colour import blend, brightness, contrast, saturation
from ffnlab.errors import ConfigError, at_least

__all__ = ["OPERATIONS", "affine", "rand_augment"]

LEVELS = 30  # of the magnitude
Image = Float[Array, "h w c"]
Number = Float[Array, ""]


def affine(image: Image, matrix: Float[Array, "2 3"]) -> Image:
    """Pixel (x, y) of the result is the nearest one to matrix @ (x, y, 1), black beyond the edges.

    Coordinates are of pixels' middles, x to the right and y down, as in Pillow's `transform`.
    """
    h, w, _ = image.shape
    y, x = jnp.mgrid[:h, :w] + 0.5
    place = jnp.einsum("ij,jhw->ihw", matrix, jnp.stack([x, y, jnp.ones_like(x)]))
    column, row = jnp.floor(place).astype(jnp.int32)
    inside = (column >= 0) & (column < w) & (row >= 0) & (row < h)
    found = image[jnp.clip(row, 0, h - 1), jnp.clip(column, 0, w - 1)]
    return jnp.where(inside[..., None], found, 0)


def shear_x(image: Image, v: Number) -> Image:
    """Rows shifted by v for each row, the first ones least."""
    return affine(image, jnp.stack([jnp.stack([1.0, v, 0.0]), jnp.array([0.0, 1.0, 0.0])]))


def shear_y(image: Image, v: Number) -> Image:
    """Columns, likewise."""
    return affine(image, jnp.stack([jnp.array([1.0, 0.0, 0.0]), jnp.stack([v, 1.0, 0.0])]))


def translate_x(image: Image, v: Number) -> Image:
    """Shifted by a share of the width."""
    shift = v * image.shape[1]
    return affine(image, jnp.stack([jnp.stack([1.0, 0.0, shift]), jnp.array([0.0, 1.0, 0.0])]))


def translate_y(image: Image, v: Number) -> Image:
    """Shifted by a share of the height."""
    shift = v * image.shape[0]
    return affine(image, jnp.stack([jnp.array([1.0, 0.0, 0.0]), jnp.stack([0.0, 1.0, shift])]))


def rotate(image: Image, degrees: Number) -> Image:
    """Turned about the middle, against the clock."""
    cos, sin = jnp.cos(jnp.deg2rad(degrees)), jnp.sin(jnp.deg2rad(degrees))
    cx, cy = image.shape[1] / 2, image.shape[0] / 2
    across = jnp.stack([cos, -sin, cx - cos * cx + sin * cy])
    down = jnp.stack([sin, cos, cy - sin * cx - cos * cy])
    return affine(image, jnp.stack([across, down]))


def sharpness(image: Image, factor: Number) -> Image:
    """0 is smoothed, 1 the image; pixels at the edges stay."""
    kernel = jnp.ones((3, 3)).at[1, 1].set(5) / 13
    h, w, _ = image.shape
    inner = sum(
        kernel[i, j] * image[i : h - 2 + i, j : w - 2 + j] for i in range(3) for j in range(3)
    )
    smooth = image if min(h, w) < 3 else image.at[1:-1, 1:-1].set(inner)
    return blend(smooth, image, factor)


def levels(image: Image) -> Array:
    """Values as integers from 0 to 255."""
    return jnp.round(image * 255).astype(jnp.int32)


def posterize(image: Image, bits: Number) -> Image:
    """Of 8 bits of each value the first ones alone are left."""
    step = 2 ** (8 - jnp.round(bits).astype(jnp.int32))
    return (levels(image) // step * step / 255).astype(image.dtype)


def solarize(image: Image, threshold: Number) -> Image:
    """Values from the threshold on are turned round."""
    return jnp.where(image >= threshold, 1 - image, image)


def autocontrast(image: Image, _: Number) -> Image:
    """Every channel stretched to [0, 1]; one of a single value stays."""
    low, high = image.min((0, 1)), image.max((0, 1))
    span = jnp.where(high > low, high - low, 1.0)
    return jnp.where(high > low, (image - low) / span, image)


def equalize(image: Image, _: Number) -> Image:
    """Every channel's values, so that each range of them has about as many pixels."""

    def channel(values: Array) -> Array:
        counts = jnp.zeros(256, jnp.int32).at[values.reshape(-1)].add(1)
        last = counts[values.max()]
        step = (counts.sum() - last) // 255
        before = jnp.cumsum(counts) - counts
        table = jnp.clip((before + step // 2) // jnp.maximum(step, 1), 0, 255)
        return jnp.where(step > 0, table[values], values)

    found = jax.vmap(channel, in_axes=-1, out_axes=-1)(levels(image))
    return (found / 255).astype(image.dtype)


# By name: (image, value) -> image, and what a magnitude's share m in [0, 1] and a sign make of it.
Valued = tuple[Callable[[Image, Number], Image], Callable[[Number, Number], Number]]
OPERATIONS: MappingProxyType[str, Valued] = MappingProxyType(
    {
        "identity": (lambda image, _: image, lambda m, sign: m),
        "shear_x": (shear_x, lambda m, sign: sign * 0.3 * m),
        "shear_y": (shear_y, lambda m, sign: sign * 0.3 * m),
        "translate_x": (translate_x, lambda m, sign: sign * 150 / 331 * m),
        "translate_y": (translate_y, lambda m, sign: sign * 150 / 331 * m),
        "rotate": (rotate, lambda m, sign: sign * 30.0 * m),
        "brightness": (brightness, lambda m, sign: 1 + sign * 0.9 * m),
        "colour": (saturation, lambda m, sign: 1 + sign * 0.9 * m),
        "contrast": (contrast, lambda m, sign: 1 + sign * 0.9 * m),
        "sharpness": (sharpness, lambda m, sign: 1 + sign * 0.9 * m),
        "posterize": (posterize, lambda m, sign: 8 - 4.0 * m),
        "solarize": (solarize, lambda m, sign: 1 - m),
        "autocontrast": (autocontrast, lambda m, sign: m),
        "equalize": (equalize, lambda m, sign: m),
    }
)


def rand_augment(
    key: Key[Array, ""],
    images: Float[Array, "b h w c"],
    *,
    count: int = 2,
    magnitude: float = 9.0,
) -> Float[Array, "b h w c"]:
    """`count` operations on each image, each as likely, all of one magnitude, signs by chance.

    Args:
      key: of operations and signs.
      images: values in [0, 1].
      count: operations of an image, one after the other.
      magnitude: in [0, 30].
    Raises:
      ConfigError: an option out of its range.
    Source:
      arXiv 1909.13719, figure 2; the ranges are AutoAugment's (arXiv 1805.09501, table 6).
    """
    at_least(0, count=count)
    if not 0 <= magnitude <= LEVELS or not math.isfinite(magnitude):
        raise ConfigError(f"magnitude={magnitude} must lie in [0, {LEVELS}]")
    share = jnp.float32(magnitude / LEVELS)
    branches = [
        lambda image, sign, run=run, value=value: run(image, value(share, sign))
        for run, value in OPERATIONS.values()
    ]

    def one(key: Key[Array, ""], image: Image) -> Image:
        chosen, signs = jax.random.split(key)
        numbers = jax.random.randint(chosen, (count,), 0, len(branches))
        drawn = jax.random.rademacher(signs, (count,), image.dtype)
        for number, sign in zip(numbers, drawn, strict=True):
            image = jax.lax.switch(number, branches, image, sign)
        return image

    return jax.vmap(one)(jax.random.split(key, len(images)), images)
