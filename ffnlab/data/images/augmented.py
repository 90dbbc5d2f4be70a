"""Training on augmented images: a loss that draws each step's augmentations by its key."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree, Shaped

from ffnlab.data.images.augment import check_rate
from ffnlab.data.images.augment import crop as cropped
from ffnlab.data.images.augment import erase as erased
from ffnlab.data.images.augment import flip as flipped
from ffnlab.data.images.colour import colour_jitter
from ffnlab.data.images.mixing import cutmix as cut_mixed
from ffnlab.data.images.mixing import mixup as mixed_up
from ffnlab.data.images.randaugment import LEVELS, rand_augment
from ffnlab.errors import ConfigError, at_least

if TYPE_CHECKING:
    from ffnlab.losses import InformedLoss, Loss, Moment

__all__ = ["augmented"]

Images, Host = Float[Array, "b h w c"], Array | np.ndarray


def augmented(
    loss: "Loss",
    *,
    crop: int = 0,
    flip: float = 0.0,
    operations: int = 0,
    magnitude: float = 9.0,
    jitter: float = 0.0,
    erase: float = 0.0,
    mixup: float = 0.0,
    cutmix: float = 0.0,
) -> "InformedLoss":
    """A loss of labelled images that sees others at every step, drawn by the moment's key.

    In this order, each where it is not 0: `crop`, `flip`, `rand_augment`, `colour_jitter`, `erase`,
    then `mixup` or `cutmix`; with both, a batch takes either, each as likely. Mixed images have the
    shares of two classes as targets [b, classes], which `labelled` takes.

    Args:
      loss: (model, (images, targets)) -> costs, as `ffnlab.losses.labelled`.
      crop: pixels around an image from which one of its size is cut.
      flip: chance of an image to be mirrored.
      operations: of RandAugment on an image.
      magnitude: of those, in [0, 30].
      jitter: how far brightness, contrast and saturation go from 1; the hue goes a quarter of it.
      erase: chance of an image to lose a rectangle.
      mixup, cutmix: alpha of the shares; 0 for none.
    Returns:
      a loss of a model, a batch (images [b, h, w, c] in [0, 1], classes [b]) and a moment.
    Raises:
      ConfigError: an option out of its range; from the loss, images that are none.
    """
    at_least(0, crop=crop, operations=operations)
    for rate in (flip, erase):
        check_rate(rate)
    if not 0 <= magnitude <= LEVELS or not 0 <= jitter <= 2 or min(mixup, cutmix) < 0:
        raise ConfigError(
            f"magnitude={magnitude} must lie in [0, {LEVELS}], jitter={jitter} in [0, 2], "
            f"mixup={mixup} and cutmix={cutmix} must be 0 or more"
        )

    def changed(key: Key[Array, ""], images: Images) -> Images:
        keys = jax.random.split(key, 5)
        if crop:
            images = cropped(keys[0], images, pad=crop)
        if flip:
            images = flipped(keys[1], images, rate=flip)
        if operations:
            images = rand_augment(keys[2], images, count=operations, magnitude=magnitude)
        if jitter:
            hue = jitter / 4 if images.shape[-1] == 3 else 0.0
            how = {"brightness": jitter, "contrast": jitter, "saturation": jitter, "hue": hue}
            images = colour_jitter(keys[3], images, **how)
        return erased(keys[4], images, rate=erase) if erase else images

    def mixed(
        key: Key[Array, ""], images: Images, targets: Float[Array, "b k"]
    ) -> tuple[Images, Float[Array, "b k"]]:
        which, own = jax.random.split(key)
        ways = {mixed_up: mixup, cut_mixed: cutmix}
        drawn = [way(own, images, targets, alpha=alpha) for way, alpha in ways.items() if alpha]
        if len(drawn) == 1:
            return drawn[0]
        return jax.tree.map(lambda *both: jnp.where(jax.random.bernoulli(which), *both), *drawn)

    def informed(
        model: Callable,
        batch: tuple[Shaped[Host, "..."], Int[Host, "b"]],
        moment: "Moment",
    ) -> tuple[PyTree, ...]:
        images, targets = batch
        if jnp.ndim(images) != 4:
            raise ConfigError(
                f"inputs {jnp.shape(images)} are no images [b, h, w, c]; only those are augmented"
            )
        first, second = jax.random.split(moment.key)
        images = changed(first, jnp.asarray(images))
        if mixup or cutmix:
            classes = jax.eval_shape(model, images).shape[-1]
            images, targets = mixed(second, images, jax.nn.one_hot(targets, classes))
        return loss(model, (images, targets))

    return informed  # type: ignore[return-value]
