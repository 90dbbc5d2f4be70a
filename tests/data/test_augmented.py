"""A loss that sees augmented images: which, drawn how, and with which targets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.data import augmented, colour_jitter, crop, cutmix, erase, flip, mixup, rand_augment
from ffnlab.errors import ConfigError
from ffnlab.losses import Moment, labelled

CLASSES = 4


def model(images):
    """Logits of a fixed map."""
    weight = jnp.sin(jnp.arange(48 * CLASSES, dtype=jnp.float32)).reshape(48, CLASSES)
    return images.reshape(len(images), -1) @ weight


@pytest.fixture(scope="module")
def batch():
    images = jax.random.uniform(jax.random.key(0), (6, 4, 4, 3))
    return images, jnp.arange(6) % CLASSES


def seen(batch, key=0, **options):
    """What the model and the loss are given."""
    found = []

    def spy(model, batch):
        found.append(batch)
        return labelled(model, batch)

    moment = Moment(jnp.int32(3), jax.random.key(key))
    costs, metrics = augmented(spy, **options)(model, batch, moment)
    (given,) = found
    assert costs == labelled(model, given)[0] and "accuracy" in metrics
    return given


def test_without_options_images_are_as_they_are(batch):
    images, targets = seen(batch)
    np.testing.assert_array_equal(images, batch[0])
    np.testing.assert_array_equal(targets, batch[1])


ALONE = {
    "crop": ({"crop": 2}, 0, lambda key, x: crop(key, x, pad=2)),
    "flip": ({"flip": 0.5}, 1, lambda key, x: flip(key, x, rate=0.5)),
    "operations": (
        {"operations": 1, "magnitude": 20.0},
        2,
        lambda key, x: rand_augment(key, x, count=1, magnitude=20.0),
    ),
    "jitter": (
        {"jitter": 0.4},
        3,
        lambda key, x: colour_jitter(key, x, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1),
    ),
    "erase": ({"erase": 0.7}, 4, lambda key, x: erase(key, x, rate=0.7)),
}


@pytest.mark.parametrize("name", ALONE)
def test_each_is_the_augmentation_of_its_name(batch, name):
    options, place, wanted = ALONE[name]
    images, targets = seen(batch, **options)
    key = jax.random.split(jax.random.split(jax.random.key(0))[0], 5)[place]
    np.testing.assert_array_equal(images, wanted(key, batch[0]))
    assert not np.array_equal(images, batch[0])
    np.testing.assert_array_equal(targets, batch[1])


def test_they_follow_each_other_in_the_order_told(batch):
    """A crop and a flip of images that are neither symmetric nor constant do not commute."""
    first, second = jax.random.split(jax.random.split(jax.random.key(0))[0], 5)[:2]
    images, _ = seen(batch, crop=1, flip=1.0)
    cropped = crop(first, batch[0], pad=1)
    np.testing.assert_array_equal(images, flip(second, cropped, rate=1.0))


@pytest.mark.parametrize(("name", "way"), [("mixup", mixup), ("cutmix", cutmix)])
def test_mixed_images_have_shares_of_two_classes(batch, name, way):
    images, targets = seen(batch, **{name: 0.9})
    key = jax.random.split(jax.random.split(jax.random.key(0))[1])[1]
    wanted = way(key, batch[0], jax.nn.one_hot(batch[1], CLASSES), alpha=0.9)
    np.testing.assert_array_equal(images, wanted[0])
    np.testing.assert_array_equal(targets, wanted[1])
    np.testing.assert_allclose(targets.sum(-1), 1, rtol=1e-6)


def test_of_both_mixings_a_batch_takes_either(batch):
    for key in range(12):
        images, targets = seen(batch, key, mixup=0.9, cutmix=0.9)
        own = jax.random.split(jax.random.split(jax.random.key(key))[1])[1]
        hot = jax.nn.one_hot(batch[1], CLASSES)
        ways = [way(own, batch[0], hot, alpha=0.9) for way in (mixup, cutmix)]
        same = [np.array_equal(images, x) and np.array_equal(targets, y) for x, y in ways]
        assert sum(same) == 1
        if key == 0:
            first = same
        if same != first:
            return
    pytest.fail("twelve draws took the same")


def test_other_moments_draw_others(batch):
    one, other = (seen(batch, key, crop=2, mixup=0.5)[0] for key in (1, 2))
    assert not np.array_equal(one, other)


def test_what_is_refused(batch):
    for wrong in (
        {"crop": -1},
        {"operations": -1},
        {"flip": 1.5},
        {"erase": -0.1},
        {"magnitude": 31.0},
        {"jitter": -0.1},
        {"mixup": -1.0},
        {"cutmix": -1.0},
    ):
        with pytest.raises(
            ConfigError, match="rate" if {"flip", "erase"} & set(wrong) else "|".join(wrong)
        ):
            augmented(labelled, **wrong)
    rows = batch[0].reshape(6, -1), batch[1]
    with pytest.raises(ConfigError, match=r"inputs \(6, 48\) are no images"):
        augmented(labelled, crop=1)(model, rows, Moment(jnp.int32(0), jax.random.key(0)))
