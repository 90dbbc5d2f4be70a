"""Colours, RandAugment and mixing against Pillow and their definitions."""

import colorsys
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.data import colour_jitter, cutmix, mixup, rand_augment
from ffnlab.data.images import colour, randaugment
from ffnlab.errors import ConfigError

pil = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
enhance = pytest.importorskip("PIL.ImageEnhance", reason="Pillow is not installed")
ops = pytest.importorskip("PIL.ImageOps", reason="Pillow is not installed")

ONE = 1.01 / 255  # Pillow rounds to bytes, once; twice where it rounds a mean or a smoothed image


def image(channels=3, h=9, w=12, seed=0):
    """Smooth bytes, so that operations change them visibly, with some that are equal."""
    draw = np.random.default_rng(seed)
    rough = draw.integers(20, 220, (h // 3, w // 3, channels)).astype(np.float64)
    fine = np.kron(rough, np.ones((3, 3, 1))) + draw.integers(-20, 30, (h, w, channels))
    return np.clip(fine, 0, 255).astype(np.uint8)


def ours(operation, pixels, *value):
    found = jax.jit(operation)(jnp.asarray(pixels, jnp.float32) / 255, *map(jnp.float32, value))
    return np.asarray(found)


def theirs(pixels):
    return np.asarray(pixels, np.float64).reshape(*np.asarray(pixels).shape[:2], -1) / 255


ENHANCERS = {
    "brightness": (colour.brightness, "Brightness", ONE),
    "saturation": (colour.saturation, "Color", 2 * ONE),
    "contrast": (colour.contrast, "Contrast", 2 * ONE),
    "sharpness": (randaugment.sharpness, "Sharpness", 2 * ONE),
}


@pytest.mark.parametrize("name", ENHANCERS)
@pytest.mark.parametrize("factor", [0.0, 0.4, 1.7])
def test_enhancers_are_pillow_s(name, factor):
    operation, kind, tolerance = ENHANCERS[name]
    pixels = image()
    want = theirs(getattr(enhance, kind)(pil.fromarray(pixels)).enhance(factor))
    assert np.abs(ours(operation, pixels, factor) - want).max() < tolerance
    assert np.abs(ours(operation, pixels, 1.0) - pixels / 255).max() < 1e-6


@pytest.mark.parametrize("turn", [0.0, 0.13, 0.5, -0.3])
def test_the_hue_is_colorsys_s(turn):
    pixels = image() / 255
    pixels[0, 0] = 0.4  # grey
    want = np.array(
        [
            [
                colorsys.hsv_to_rgb((h + turn) % 1, s, v)
                for h, s, v in (colorsys.rgb_to_hsv(*p) for p in row)
            ]
            for row in pixels
        ]
    )
    found = ours(colour.hue, pixels * 255, turn)
    assert np.abs(found - want).max() < 1e-5


AFFINE = {
    "shear_x": lambda v, h, w: (1, v, 0, 0, 1, 0),
    "shear_y": lambda v, h, w: (1, 0, 0, v, 1, 0),
    "translate_x": lambda v, h, w: (1, 0, v * w, 0, 1, 0),
    "translate_y": lambda v, h, w: (1, 0, 0, 0, 1, v * h),
}


@pytest.mark.parametrize("name", AFFINE)
@pytest.mark.parametrize("value", [-0.29, 0.17])
def test_affine_operations_are_pillow_s(name, value):
    pixels = image()
    h, w, _ = pixels.shape
    form = AFFINE[name](value, h, w)
    want = pil.fromarray(pixels).transform((w, h), pil.Transform.AFFINE, form)
    found = ours(getattr(randaugment, name), pixels, value)
    np.testing.assert_allclose(found, theirs(want), atol=1e-6)


@pytest.mark.parametrize("degrees", [-29.0, 11.0])
def test_a_rotation_is_pillow_s(degrees):
    pixels = image()
    want = theirs(pil.fromarray(pixels).rotate(degrees))
    np.testing.assert_allclose(ours(randaugment.rotate, pixels, degrees), want, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_operations_on_levels_are_pillow_s(channels):
    pixels = image(channels, 30, 30)
    whole = pil.fromarray(pixels if channels == 3 else pixels[..., 0])
    for name, value, want in (
        ("posterize", 5, ops.posterize(whole, 5)),
        ("solarize", 128 / 255, ops.solarize(whole, 128)),
        ("equalize", 0, ops.equalize(whole)),
        ("autocontrast", 0, ops.autocontrast(whole)),
    ):
        found = ours(getattr(randaugment, name), pixels, value)
        tolerance = ONE if name == "autocontrast" else 1e-6
        assert np.abs(found - theirs(want)).max() < tolerance, name
    flat = np.full((4, 4, channels), 77, np.uint8)
    for name in ("equalize", "autocontrast"):
        np.testing.assert_allclose(ours(getattr(randaugment, name), flat, 0), 77 / 255, atol=1e-6)


@pytest.mark.slow
def test_what_is_drawn_is_one_of_the_operations_at_that_magnitude(key):
    pixels = jnp.asarray(image(h=6, w=6), jnp.float32)[None] / 255
    images = jnp.repeat(pixels, 100, axis=0)
    found = np.asarray(
        jax.jit(functools.partial(rand_augment, count=1, magnitude=15.0))(key, images)
    )
    share, seen = jnp.float32(0.5), set()
    cases = {}
    for name, (run, value) in randaugment.OPERATIONS.items():
        for sign in (-1.0, 1.0):
            cases[name, sign] = np.asarray(run(pixels[0], value(share, jnp.float32(sign))))
    for one in found:
        near = [name for name, want in cases.items() if np.abs(one - want).max() < 1e-5]
        assert near
        seen |= {name for name, _ in near}
    assert len(seen) >= len(randaugment.OPERATIONS) - 2
    np.testing.assert_array_equal(rand_augment(key, images[:2], count=0), images[:2])


def test_jitter_stays_within_its_spans(key):
    images = jnp.repeat(jnp.asarray(image(), jnp.float32)[None] / 255, 40, axis=0)
    run = jax.jit(colour_jitter, static_argnames=("brightness", "contrast", "saturation", "hue"))
    none = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
    np.testing.assert_allclose(run(key, images[:2], **none), images[:2], atol=1e-6)
    bright = np.asarray(run(key, images, **none | {"brightness": 0.3}))
    factor = bright.sum((1, 2, 3)) / np.asarray(images).sum((1, 2, 3))
    assert factor.min() > 0.69 and factor.max() < 1.31 and factor.std() > 0.1
    every = np.asarray(run(key, images))
    assert every.min() >= 0 and every.max() <= 1
    assert len(np.unique(every.round(5), axis=0)) == len(images), "each is drawn by itself"


def rows(b=64):
    """Images whose pixels all have their number, and one-hot targets."""
    images = jnp.broadcast_to(jnp.arange(1.0, b + 1)[:, None, None, None], (b, 6, 8, 2))
    return images, jnp.eye(b)


def test_mixup_is_a_sum_of_two(key):
    images, targets = rows()
    mixed, soft = map(np.asarray, mixup(key, images, targets, alpha=0.7))
    np.testing.assert_allclose(soft.sum(1), 1, atol=1e-6)
    for i, (one, row) in enumerate(zip(mixed, soft, strict=True)):
        assert (row > 0).sum() <= 2 and row[i] > 0
        np.testing.assert_allclose(one, (row * np.arange(1, 65)).sum(), rtol=1e-5)
    shares = soft[np.arange(64), np.arange(64)]
    assert len(np.unique(shares.round(4))) > 40, "each has a share of its own"


def test_cutmix_puts_one_rectangle_of_another_in(key):
    images, targets = rows()
    mixed, soft = map(np.asarray, cutmix(key, images, targets))
    for i, (one, row) in enumerate(zip(mixed, soft, strict=True)):
        is_other = one[..., 0] != i + 1
        assert (one[..., 0] == one[..., 1]).all()
        assert row[i] == pytest.approx(1 - is_other.mean(), abs=1e-6)
        if is_other.any():
            (other,) = np.unique(one[is_other])
            assert row[int(other) - 1] == pytest.approx(is_other.mean(), abs=1e-6)
            y, x = np.nonzero(is_other)
            box = (np.ptp(y) + 1) * (np.ptp(x) + 1)
            assert box == is_other.sum(), "a rectangle"
    areas = 1 - soft[np.arange(64), np.arange(64)]
    assert areas.max() > 0.3 and math.isfinite(areas.std()) and areas.std() > 0.05


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda k, x: mixup(k, x, jnp.eye(2), alpha=0.0), "alpha=0.0 must be above 0"),
        (lambda k, x: cutmix(k, x, jnp.eye(2), alpha=-1.0), "alpha=-1.0"),
        (lambda k, x: rand_augment(k, x, count=-1), "count=-1"),
        (lambda k, x: rand_augment(k, x, magnitude=31.0), r"magnitude=31.0 must lie in \[0, 30\]"),
        (lambda k, x: colour_jitter(k, x, hue=0.6), r"hue=0.6 in \[0, 0.5\]"),
        (lambda k, x: colour_jitter(k, x, contrast=-0.1), "must be at least 0"),
    ],
)
def test_options_that_are_refused(call, told, key):
    with pytest.raises(ConfigError, match=told):
        call(key, jnp.zeros((2, 4, 4, 3)))
