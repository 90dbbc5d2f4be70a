"""The super-network of the study of hardware-aware NAS, and the digits that it learns.

The network is a vision transformer of one patch whose attentions are taken out: four residual FFNs
on 144 pixels. (No kind of model is a stack of residual FFNs alone; this one is of kind "vit", and
what is cut out of it is saved as such.) Digits are moved about on a larger canvas: where they stand
still, the smallest of all networks is as good as the largest, and nothing is left to search.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from ffnlab.data import ArrayBatches, Labelled
from ffnlab.learning import backprop, members
from ffnlab.losses import labelled
from ffnlab.models import ViT, ViTConfig, remove
from ffnlab.pruning import elastic
from ffnlab.pruning.search import Config, Supernet, drawn_alike, measuring, supernet
from ffnlab.studies.digit_images import digit_images
from ffnlab.studies.side_by_side import learned_members
from ffnlab.studies.tuning import Splits

__all__ = [
    "DEPTHS",
    "FORMATS",
    "HIDDEN",
    "IMAGE",
    "LAYERS",
    "SIDE",
    "WIDTH",
    "WIDTHS",
    "accuracy",
    "alike",
    "learned",
    "macs_of",
    "moved",
    "moved_digits",
    "network",
    "on_device",
    "stack",
]

WIDTH, HIDDEN, LAYERS, BATCH, RATE = 32, 32, 4, 64, 3e-3
WIDTHS, DEPTHS = (2, 4, 8, 16, 32), (1, 2, 3, 4)
FORMATS = ("float", "int8", "float8")
SIDE = 12  # pixels of the canvas, along a side
COPIES = (8, 4, 4)  # of each digit to train, to validate and to test, each at a place of its own
IMAGE = jax.ShapeDtypeStruct((1, SIDE, SIDE, 1), jnp.float32)


def moved(part: Labelled, copies: int, rng: np.random.Generator) -> Labelled:
    """Each image [h, w, 1] several times, each at a drawn place of a canvas [SIDE, SIDE, 1]."""
    images, classes = np.repeat(part.x, copies, axis=0), np.repeat(part.y, copies)
    n, height, width, _ = images.shape
    down, right = rng.integers(0, (SIDE - height + 1, SIDE - width + 1), (n, 2)).T
    canvas = np.zeros((n, SIDE, SIDE, 1), images.dtype)
    rows, columns = (
        start[:, None] + np.arange(size) for start, size in ((down, height), (right, width))
    )
    canvas[np.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]] = images
    return Labelled(canvas, classes)


def moved_digits(seed: int) -> Splits:
    """Digits on canvases; no digit is in two parts, wherever it stands."""
    rng = np.random.default_rng([3, seed])
    pairs = zip(digit_images(seed), COPIES, strict=True)
    return Splits(*(moved(part, copies, rng) for part, copies in pairs))


def stack(key: Array) -> ViT:
    """Residual FFNs on a canvas, drawn: a ViT of one patch without its attentions."""
    config = ViTConfig(
        (SIDE, SIDE), SIDE, WIDTH, HIDDEN, LAYERS, 1, channels=1, classes=10, pool="mean", eps=1e-5
    )
    return remove(ViT(config, key=key), range(0, 2 * LAYERS, 2))


def network() -> Supernet:
    """All networks that are searched."""
    shapes = jax.eval_shape(stack, jax.random.key(0))
    return supernet(shapes, WIDTHS, depths=DEPTHS, formats=FORMATS)


def learned(net: Supernet, train: Labelled, steps: int, seeds: Sequence[int]) -> list[ViT]:
    """A super-network of every seed, trained side by side by the sandwich rule."""
    loss, count = elastic(labelled, net.widths, depths=net.depths), len(seeds)
    rule = members(lambda: backprop(loss, optax.adam(RATE), informed=True), count)
    models = jax.vmap(stack)(jnp.stack([jax.random.key(seed) for seed in seeds]))
    batches = ArrayBatches(train, BATCH, seeds[0])
    return learned_members(rule, models, batches, steps, seeds[0], count)


def on_device(rows: Labelled) -> tuple[Array, Array]:
    """Images and classes as arrays of jax."""
    return jnp.asarray(rows.x), jnp.asarray(rows.y)


def accuracy(net: Supernet, model: ViT, configs: Sequence[Config], rows: Labelled) -> list[float]:
    """The accuracy of networks of a model, by masks."""
    measure = measuring(net, model, on_device(rows), turns=None)
    return [measure(config)["accuracy"] for config in configs]


def macs_of(config: Config) -> int:
    """Multiply-adds of a network for one image, from its sizes."""
    channels = [int(width) for width in config["width"][: int(config["depth"][0])]]
    return SIDE**2 * WIDTH + 10 * WIDTH + 2 * WIDTH * sum(channels)


def alike(net: Supernet, config: Config, seed: int, count: int) -> list[Config]:
    """Other networks, drawn, with as many multiply-adds as one."""
    rng, target = np.random.default_rng([7, seed]), macs_of(config)
    draw = lambda: drawn_alike(net.space, macs_of, target, rng, besides=config)  # noqa: E731
    return [draw() for _ in range(count)]
