"""Augmentations against their definitions, and rows as images."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.data import Labelled, as_images, crop, digits, erase, find_folder, flip, mnist
from ffnlab.errors import ConfigError

# A mean or count of n draws may be this many of its standard errors off: one test in 10^6 fails.
ERRORS = 5

# Compiled as one: operation by operation takes seconds to compile.
erase_now = jax.jit(erase, static_argnames=("rate", "area", "aspect", "fill"))


def numbered(b, h, w, c, dtype=np.float32):
    """Images whose values are all different, and none is zero."""
    return jnp.asarray(1 + np.arange(b * h * w * c).reshape(b, h, w, c), dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.int16])
def test_a_crop_is_a_window_of_the_padded_image(key, dtype):
    b, h, w, c, pad = 500, 3, 4, 2, 1
    images = numbered(b, h, w, c, dtype)
    found = crop(key, images, pad=pad)
    assert found.shape == images.shape and found.dtype == dtype
    padded = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    places = np.zeros((3, 3))
    for image, whole in zip(np.asarray(found), padded, strict=True):
        at = [
            (i, j)
            for i in range(2 * pad + 1)
            for j in range(2 * pad + 1)
            if np.array_equal(whole[i : i + h, j : j + w], image)
        ]
        assert len(at) == 1
        places[at[0]] += 1
    likely = b / 9
    assert (abs(places - likely) < ERRORS * math.sqrt(likely)).all()
    np.testing.assert_array_equal(crop(key, images, pad=0), images)


def test_a_flip_mirrors_rows_of_some_images(key):
    b, rate = 400, 0.3
    images = numbered(b, 2, 3, 2)
    found = np.asarray(flip(key, images, rate=rate))
    mirrored = 0
    for image, before in zip(found, np.asarray(images), strict=True):
        turned = np.stack([row[::-1] for row in before])
        assert np.array_equal(image, before) or np.array_equal(image, turned)
        mirrored += np.array_equal(image, turned)
    assert abs(mirrored - b * rate) < ERRORS * math.sqrt(b * rate * (1 - rate))
    np.testing.assert_array_equal(flip(key, images, rate=0.0), images)
    np.testing.assert_array_equal(flip(key, images, rate=1.0), images[:, :, ::-1])


def erased(found, images):
    """(top, left, height, width) of what is other in each image that was changed; all channels."""
    rectangles = []
    for other in np.asarray(found != images):
        assert (other.all(-1) == other.any(-1)).all()
        rows, columns = np.nonzero(other.any((1, 2)))[0], np.nonzero(other.any((0, 2)))[0]
        if len(rows):
            height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
            assert other.sum() == height * width * other.shape[-1]  # a whole rectangle
            rectangles.append((rows[0], columns[0], height, width))
    return np.array(rectangles)


def algorithm_1(random, h, w, area=(0.02, 0.4), aspect=(0.3, 1 / 0.3)):
    """A rectangle as the paper draws it, in whole pixels."""
    while True:
        size, ratio = random.uniform(*area) * h * w, random.uniform(*aspect)
        height, width = int(math.sqrt(size * ratio)), int(math.sqrt(size / ratio))
        top, left = random.integers(h), random.integers(w)
        if top + height <= h and left + width <= w:
            return top, left, height, width


def test_rectangles_are_those_of_the_paper(key):
    b, h, w = 2000, 24, 16
    images = numbered(b, h, w, 1)
    found = erased(erase_now(key, images, rate=1.0), images)
    random = np.random.default_rng(0)
    wanted = np.array([algorithm_1(random, h, w) for _ in range(b)])
    assert len(found) == b
    for power in (1, 2):
        a, e = (rows.astype(float) ** power for rows in (found, wanted))
        error = np.sqrt((a.var(0) + e.var(0)) / b)
        assert (abs(a.mean(0) - e.mean(0)) < ERRORS * error).all()
    top, left, height, width = found.T
    assert (top + height).max() == h and (left + width).max() == w
    assert top.min() == left.min() == 0
    assert (height * width).max() <= 0.4 * h * w


def test_options_of_erasing(key):
    b, rate = 400, 0.25
    images = numbered(b, 10, 10, 3)
    found = erase_now(key, images, rate=rate, area=(0.2, 0.2), aspect=(1.0, 1.0), fill=-2.0)
    rectangles = erased(found, images)
    assert (rectangles[:, 2:] == 4).all()  # floor(sqrt(20))
    assert abs(len(rectangles) - b * rate) < ERRORS * math.sqrt(b * rate * (1 - rate))
    assert set(np.asarray(found[found != images]).tolist()) == {-2.0}
    tall = erased(erase_now(key, images, rate=1.0, area=(0.2, 0.2), aspect=(5.0, 5.0)), images)
    assert (tall[:, 2:] == (10, 2)).all()
    # No square of the area of a long image is within it: it stays whole.
    long = numbered(2, 2, 50, 1)
    kept = erase_now(key, long, rate=1.0, area=(0.4, 0.4), aspect=(1.0, 1.0))
    np.testing.assert_array_equal(kept, long)


def test_erased_values_are_uniform(key):
    images = numbered(300, 8, 8, 2)
    found = erase_now(key, images, rate=1.0)
    values = np.asarray(found[found != images])
    assert values.min() >= 0 and values.max() < 1
    for power in (1, 2):
        spread = math.sqrt(1 / (2 * power + 1) - 1 / (power + 1) ** 2)
        error = spread / math.sqrt(len(values))
        assert abs((values**power).mean() - 1 / (power + 1)) < ERRORS * error


@pytest.mark.parametrize("augment", [functools.partial(crop, pad=2), flip, erase])
def test_a_key_decides_and_a_batch_is_kept(key, augment):
    images = numbered(16, 6, 6, 3)
    before = np.asarray(images).copy()
    first = augment(key, images)
    np.testing.assert_array_equal(jax.jit(augment)(key, images), first)
    np.testing.assert_array_equal(images, before)
    assert not np.array_equal(augment(jax.random.key(1), images), first)
    same = jnp.broadcast_to(images[:1], images.shape)  # each image has its own draw
    assert len(np.unique(np.asarray(augment(key, same)), axis=0)) > 1


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        (lambda k, x: crop(k, x, pad=-1), "pad=-1"),
        (lambda k, x: flip(k, x, rate=1.5), "rate=1.5"),
        (lambda k, x: erase(k, x, rate=float("nan")), "rate=nan"),
        (lambda k, x: erase(k, x, area=(0.0, 0.1)), "area"),
        (lambda k, x: erase(k, x, area=(0.2, 0.1)), "area"),
        (lambda k, x: erase(k, x, area=(0.2, 1.1)), "area"),
        (lambda k, x: erase(k, x, aspect=(2.0, 1.0)), "aspect"),
        (lambda k, x: erase(k, x, aspect=(0.0, 1.0)), "aspect"),
    ],
)
def test_options_out_of_range_are_named(key, augment, message):
    with pytest.raises(ConfigError, match=message):
        augment(key, numbered(1, 4, 4, 1))


def test_rows_become_images():
    rows = Labelled(np.arange(24, dtype=np.float32).reshape(2, 12), np.array([1, 0], np.int32))
    found = as_images(rows, height=2, channels=3)
    assert found.x.shape == (2, 2, 2, 3) and found.y.tolist() == [1, 0]
    assert found.x[1, 1, 0].tolist() == [18, 19, 20]
    assert as_images(rows, channels=3).x.shape == (2, 2, 2, 3)
    for options in ({}, {"height": 5}, {"height": 13}, {"channels": 5}):
        with pytest.raises(ConfigError, match="rows of 12 values"):
            as_images(rows, **options)
    with pytest.raises(ConfigError, match="channels=0"):
        as_images(rows, channels=0)


def test_digits_are_images_of_eight_by_eight():
    train, _ = digits(test=1000)
    images = as_images(train)
    assert images.x.shape == (797, 8, 8, 1)
    np.testing.assert_array_equal(images.x[5, 2, :, 0], train.x[5, 16:24])


@pytest.mark.slow
@pytest.mark.skipif(find_folder("mnist") is None, reason="needs mnist")
def test_mnist_are_images():
    _, test = mnist()
    images = as_images(test).x
    assert images.shape == (5000, 28, 28, 1)
    # Upright: the frame of four pixels is empty, as the data's description says.
    assert images[:, :4].sum() + images[:, :, -2:].sum() < 0.01 * images.sum()
