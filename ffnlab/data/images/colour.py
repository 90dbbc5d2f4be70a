"""Colours of images changed: one operation each as Pillow defines it, and jitter of all of them.

Images are [..., h, w, c] with values in [0, 1]; of one channel that channel is its own grey. An
operation takes one image; `jax.vmap` takes it to a batch.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ffnlab.errors import ConfigError

__all__ = ["brightness", "colour_jitter", "contrast", "grey", "hue", "saturation"]

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601

Image = Float[Array, "h w c"]
Number = Float[Array, ""] | float


def blend(other: Image, image: Image, factor: Number) -> Image:
    """other + factor (image - other), within [0, 1]."""
    return jnp.clip(other + factor * (image - other), 0.0, 1.0)


def grey(image: Image) -> Float[Array, "h w 1"]:
    """0.299 red + 0.587 green + 0.114 blue; the channel itself where there is one."""
    if image.shape[-1] == 1:
        return image
    return image @ jnp.asarray(LUMA, image.dtype)[:, None]


def brightness(image: Image, factor: Number) -> Image:
    """factor * image: 0 is black, 1 the image."""
    return blend(jnp.zeros_like(image), image, factor)


def contrast(image: Image, factor: Number) -> Image:
    """0 is the mean of the grey image everywhere, 1 the image."""
    return blend(jnp.broadcast_to(grey(image).mean(), image.shape), image, factor)


def saturation(image: Image, factor: Number) -> Image:
    """0 is the grey image, 1 the image."""
    return blend(jnp.broadcast_to(grey(image), image.shape), image, factor)


def hue(image: Image, turn: Number) -> Image:
    """Colours turned by so much of the circle; grey stays, and so do images of one channel."""
    if image.shape[-1] != 3:
        return image
    top, low = image.max(-1), image.min(-1)
    span = top - low
    safe = jnp.where(span > 0, span, 1.0)
    red, green, blue = jnp.moveaxis(image, -1, 0)
    angle = jnp.where(
        top == red,
        (green - blue) / safe,
        jnp.where(top == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    angle = angle + 6 * turn
    # Channel n of HSV: top - span * max(0, min(k, 4 - k, 1)), k = (n + angle) mod 6.
    k = (jnp.asarray([5.0, 3.0, 1.0], image.dtype) + angle[..., None]) % 6
    share = jnp.clip(jnp.minimum(k, 4 - k), 0.0, 1.0)
    return top[..., None] - span[..., None] * share


OPERATIONS = (brightness, contrast, saturation, hue)


def colour_jitter(
    key: Key[Array, ""],
    images: Float[Array, "b h w c"],
    *,
    brightness: float = 0.4,
    contrast: float = 0.4,
    saturation: float = 0.4,
    hue: float = 0.1,
) -> Float[Array, "b h w c"]:
    """Changes all four in an order of each image's own.

    Factors are U(max(0, 1 - s), 1 + s), turns of the hue U(-hue, hue).

    Args:
      key: of factors and orders.
      images: values in [0, 1].
      brightness, contrast, saturation: how far a factor goes from 1, >= 0; 0 for no change.
      hue: in [0, 0.5].
    Raises:
      ConfigError: an option out of its range.
    Source:
      ColorJitter of torchvision, which draws once for a batch.
    """
    spans = (brightness, contrast, saturation)
    if min(spans) < 0 or not 0 <= hue <= 0.5:
        raise ConfigError(
            f"brightness, contrast, saturation={spans} must be at least 0, hue={hue} in [0, 0.5]"
        )
    low = jnp.asarray([*(max(0.0, 1 - s) for s in spans), -hue])
    high = jnp.asarray([*(1 + s for s in spans), hue])

    def one(key: Key[Array, ""], image: Image) -> Image:
        order, values = jax.random.split(key)
        drawn = jax.random.uniform(values, (4,), minval=low, maxval=high)
        order = jax.random.permutation(order, 4)
        for i in range(4):
            image = jax.lax.switch(order[i], OPERATIONS, image, drawn[order[i]])
        return image

    return jax.vmap(one)(jax.random.split(key, len(images)), images)
