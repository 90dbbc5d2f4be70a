"""Two images and their targets as one: mixup and cutmix. Targets are rows over the classes."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ffnlab.errors import ConfigError

__all__ = ["cutmix", "mixup"]

Images, Targets = Float[Array, "b h w c"], Float[Array, "b k"]


def mixup(
    key: Key[Array, ""], images: Images, targets: Targets, *, alpha: float = 0.2
) -> tuple[Images, Targets]:
    """share x_i + (1 - share) x_j, and the targets likewise; share ~ Beta(alpha, alpha).

    j is i's place in a permutation of the batch; every image has a share of its own.

    Args:
      key: of shares and permutation.
      images: floating.
      targets: of each image, for instance one-hot.
      alpha: > 0.
    Raises:
      ConfigError: another alpha.
    Source:
      mixup, arXiv 1710.09412, eq. 1.
    """
    check_alpha(alpha)
    own, order = jax.random.split(key)
    share = jax.random.beta(own, alpha, alpha, (len(images),))
    other = jax.random.permutation(order, len(images))
    of_images = share[:, None, None, None].astype(images.dtype)
    mixed = of_images * images + (1 - of_images) * images[other]
    return mixed, weighed(share, targets, other)


def cutmix(
    key: Key[Array, ""], images: Images, targets: Targets, *, alpha: float = 1.0
) -> tuple[Images, Targets]:
    """x_i with a rectangle of x_j in it, the targets by the shares of pixels.

    share ~ Beta(alpha, alpha); the rectangle has sides h sqrt(1 - share) and w sqrt(1 - share),
    rounded down, its middle is anywhere, and what of it lies outside is cut off. The share that
    weighs the targets is that of the pixels left.

    Args: as `mixup`.
    Raises: as `mixup`.
    Source:
      CutMix, arXiv 1905.04899, eq. 1 and 2.
    """
    check_alpha(alpha)
    b, h, w, _ = images.shape
    own, order, place = jax.random.split(key, 3)
    share = jax.random.beta(own, alpha, alpha, (b,))
    other = jax.random.permutation(order, b)
    inside = jnp.ones((b, 1, 1), bool)
    for axis, (size, k) in enumerate(zip((h, w), jax.random.split(place), strict=True)):
        half = jnp.floor(size * jnp.sqrt(1 - share)).astype(jnp.int32)
        middle = jax.random.randint(k, (b,), 0, size)
        start = middle - half // 2
        at = jnp.arange(size)
        along = (at >= start[:, None]) & (at < (start + half)[:, None])
        inside = inside & jnp.expand_dims(along, 2 - axis)
    mixed = jnp.where(inside[..., None], images[other], images)
    return mixed, weighed(1 - inside.mean((1, 2)), targets, other)


def weighed(share: Float[Array, "b"], targets: Targets, other: Array) -> Targets:
    """share of the own targets, the rest of the other's."""
    share = share[:, None].astype(targets.dtype)
    return share * targets + (1 - share) * targets[other]


def check_alpha(alpha: float) -> None:
    """Raises ConfigError unless alpha is above 0."""
    if not alpha > 0:
        raise ConfigError(f"alpha={alpha} must be above 0")
