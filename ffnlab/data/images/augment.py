"""Augmentations of images: pure functions of a key, each image of a batch drawn by itself."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, Shaped

from ffnlab.errors import ConfigError, at_least

__all__ = ["crop", "erase", "flip"]

# Rectangles drawn for an image; with the default options a third of them fit into a square one.
TRIES = 100


def crop(
    key: Key[Array, ""], images: Shaped[Array, "b h w c"], *, pad: int
) -> Shaped[Array, "b h w c"]:
    """Pads with zeros on all sides and cuts a window of the old size out, anywhere.

    Args:
      key: of the places.
      images: of any dtype.
      pad: pixels on each side, >= 0; each of the (2 pad + 1)^2 places is as likely.
    Raises:
      ConfigError: a negative `pad`.
    """
    at_least(0, pad=pad)
    b, h, w, c = images.shape
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    corners = jax.random.randint(key, (b, 2), 0, 2 * pad + 1)
    cut = lambda image, at: jax.lax.dynamic_slice(image, (at[0], at[1], 0), (h, w, c))  # noqa: E731
    return jax.vmap(cut)(padded, corners)


def flip(
    key: Key[Array, ""], images: Shaped[Array, "b h w c"], *, rate: float = 0.5
) -> Shaped[Array, "b h w c"]:
    """Mirrors some images: left becomes right.

    Args:
      key: of the choice.
      images: of any dtype.
      rate: chance of each image, in [0, 1].
    Raises:
      ConfigError: another rate.
    """
    check_rate(rate)
    chosen = jax.random.bernoulli(key, rate, (len(images), 1, 1, 1))
    return jnp.where(chosen, images[:, :, ::-1], images)


def erase(
    key: Key[Array, ""],
    images: Float[Array, "b h w c"],
    *,
    rate: float = 0.5,
    area: tuple[float, float] = (0.02, 0.4),
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
    fill: float | None = None,
) -> Float[Array, "b h w c"]:
    """Random erasing: a rectangle anywhere in some of the images gets other values.

        height = floor(sqrt(A r)), width = floor(sqrt(A / r)),   A ~ h w U(area), r ~ U(aspect)

    Rectangles are drawn until one, from its corner (uniform over the pixels), is within the image.

    Args:
      key: of choice, rectangles and values.
      images: floating.
      rate: chance of each image, in [0, 1].
      area: smallest and largest share of the image, in (0, 1].
      aspect: smallest and largest ratio of height to width, > 0.
      fill: the value of what is erased; a value of U(0, 1) for each pixel and channel when None.
    Raises:
      ConfigError: an option out of its range.
    Source: arXiv 1708.04896, algorithm 1, with its options. Differs: an image for which none of
      100 rectangles fits stays whole (with the paper's options one in 10^15).
    """
    check_rate(rate)
    if not 0 < area[0] <= area[1] <= 1 or not 0 < aspect[0] <= aspect[1] < float("inf"):
        raise ConfigError(f"area={area} must rise within (0, 1], aspect={aspect} from above 0")
    choice, rectangles, values = jax.random.split(key, 3)
    b, h, w, c = images.shape
    chosen = jax.random.bernoulli(choice, rate, (b,))
    keys = jax.random.split(rectangles, b)
    inside = jax.vmap(lambda one: _rectangle(one, h, w, area, aspect))(keys)
    if fill is None:
        other = jax.random.uniform(values, images.shape, images.dtype)
    else:
        other = jnp.full_like(images, fill)
    return jnp.where((inside & chosen[:, None, None])[..., None], other, images)


def _rectangle(
    key: Key[Array, ""], h: int, w: int, area: tuple[float, float], aspect: tuple[float, float]
) -> Bool[Array, "h w"]:
    """Which pixels are in the first of `TRIES` rectangles that fits; none where none does."""
    keys = jax.random.split(key, 4)
    size = h * w * jax.random.uniform(keys[0], (TRIES,), minval=area[0], maxval=area[1])
    ratio = jax.random.uniform(keys[1], (TRIES,), minval=aspect[0], maxval=aspect[1])
    height = jnp.floor(jnp.sqrt(size * ratio)).astype(jnp.int32)
    width = jnp.floor(jnp.sqrt(size / ratio)).astype(jnp.int32)
    top = jax.random.randint(keys[2], (TRIES,), 0, h)
    left = jax.random.randint(keys[3], (TRIES,), 0, w)
    fits = (top + height <= h) & (left + width <= w)
    k = jnp.argmax(fits)  # the first
    row, column = jnp.arange(h)[:, None], jnp.arange(w)
    rows = (row >= top[k]) & (row < top[k] + height[k])
    columns = (column >= left[k]) & (column < left[k] + width[k])
    return rows & columns & fits[k]


def check_rate(rate: float) -> None:
    """Raises ConfigError unless a chance is one."""
    if not 0 <= rate <= 1:
        raise ConfigError(f"rate={rate} must lie in [0, 1]")
