"""Unrolling: sums are the model's outputs, components are the paths', of which 3^L make one."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ffnlab import models
from ffnlab.errors import ConfigError
from ffnlab.layers import Block, Context, EnsembleScale
from ffnlab.models import ViT, ViTConfig, trunk
from ffnlab.models.paths import with_ensemble
from ffnlab.pruning import combine, exits, unroll
from ffnlab.testing import batches, tiny, tiny_encoder

IMAGES = jax.random.uniform(jax.random.key(1), (3, 8, 8, 1))
CONFIG = ViTConfig((8, 8), 4, 8, 12, 2, 2, channels=1, classes=3, pool="token")
VIT = ViT(CONFIG, key=jax.random.key(0))
run = jax.jit(lambda model, x: model(x))
parts_of = jax.jit(unroll)
whole = jax.jit(combine)


class Fixed(nnx.Module):
    """x -> mix x w: attention whose pattern is fixed, or with mix = 1 a linear FFN."""

    def __init__(self, mix, w):
        self.mix, self.w = nnx.Param(mix), nnx.Param(w)

    def __call__(self, x):
        return jnp.einsum("ut,btd,de->bue", self.mix[...], x, self.w[...])


def test_a_linear_network_is_the_sum_of_all_products_of_its_layers():
    """Three layers of three branches each: identity, attention, FFN of both. 27 paths."""
    with jax.enable_x64(True):
        draw = np.random.default_rng(0)
        b, t, d = 2, 3, 4
        mixes, ws, fs = (draw.normal(size=(3, n, n)) / 2 for n in (t, d, d))
        fixed = lambda a, w: Fixed(jnp.asarray(a), jnp.asarray(w))  # noqa: E731
        blocks = [
            Block(None, fixed(mixes[i], ws[i]), None, fixed(np.eye(t), fs[i])) for i in range(3)
        ]
        h = draw.normal(size=(b, t, d))
        found, _, outputs = trunk.run(
            nnx.List(blocks), jnp.asarray(h), Context({}, {}), branches=True
        )
        attention = lambda i, x: np.einsum("ut,btd->bud", mixes[i], x) @ ws[i]  # noqa: E731
        branch = (
            lambda i, x: x,
            attention,
            lambda i, x: (x + attention(i, x)) @ fs[i],
        )
        total, by_unit = np.zeros_like(h), np.zeros((3, 3, b, t, d))
        for path in itertools.product(range(3), repeat=3):
            x = h
            for i, which in enumerate(path):
                x = branch[which](i, x)
            total += x
            last = max((i for i in range(3) if path[i]), default=None)
            if last is not None:  # it joins the stream with the last branch that it takes
                by_unit[last, path[last]] += x
        np.testing.assert_allclose(found, total, atol=1e-12)
        np.testing.assert_allclose(outputs.branches, by_unit[:, 1:], atol=1e-12)


@pytest.mark.parametrize(
    ("model", "x", "width"),
    [
        (VIT, IMAGES, 8),
        pytest.param(models.stack(tiny()), batches()[0], None, marks=pytest.mark.slow),
        pytest.param(models.remove(tiny(), [3]), batches()[0], 16, marks=pytest.mark.slow),
    ],
)
def test_combined_paths_are_the_model(model, x, width):
    parts = parts_of(model, x)
    p = len(parts)
    ones = jnp.ones(p if width is None else (p, width))
    np.testing.assert_allclose(whole(model, parts, ones), run(model, x), atol=1e-5)
    weights = jax.random.uniform(jax.random.key(3), ones.shape).at[2].set(0)
    weighed = with_ensemble(model, EnsembleScale(np.ones(p), weights))
    np.testing.assert_allclose(whole(model, parts, weights), run(weighed, x), atol=1e-5)


def test_a_weight_of_zero_takes_a_component_away():
    parts = parts_of(VIT, IMAGES)
    h = jax.jit(lambda m: m.embed_images(IMAGES))(VIT)
    read = jax.jit(lambda m, e: m.output(m.norm(e)))
    np.testing.assert_array_equal(parts[0], h)
    for j in range(5):
        kept = np.ones(5)
        kept[j] = 0
        less = read(VIT, parts.sum(0) - parts[j])
        found = run(with_ensemble(VIT, EnsembleScale(kept)), IMAGES)
        np.testing.assert_allclose(found, less, atol=1e-5)


@pytest.mark.slow
def test_segments_are_taken():
    model, tokens = tiny(), batches()[0]
    segments = jnp.ones_like(tokens).at[:, 6:].set(2)
    batch = {"tokens": tokens, "segments": segments}
    parts = parts_of(model, batch)
    y = jax.jit(lambda m: m(tokens, segments=segments))(model)
    np.testing.assert_allclose(whole(model, parts, jnp.ones(7)), y, atol=1e-5)


def test_exits_are_of_the_layers_before():
    at = jax.jit(exits, static_argnums=2)
    found = at(VIT, IMAGES, (1, 2))
    short = models.remove(VIT, [2, 3])
    np.testing.assert_allclose(found[0], run(short, IMAGES), atol=1e-5)
    np.testing.assert_allclose(found[1], run(VIT, IMAGES), atol=1e-5)
    weights = jnp.array([0.5, 1.0, 2.0, 0.0, 1.0])
    weighed = with_ensemble(VIT, EnsembleScale(np.array([1, 1, 0, 1, 1]), weights))
    own = jnp.array([0.5, 1.0, 0.0, 0.0, 0.0])
    want = whole(VIT, parts_of(VIT, IMAGES), own)
    np.testing.assert_allclose(at(weighed, IMAGES, (1,))[0], want, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: unroll(tiny_encoder(), batches()[0]), "a ViT or a Decoder"),
        (lambda: unroll(tiny(), [[1, 99]]), "the vocabulary is 0..63"),
        (lambda: combine(VIT, jnp.ones((5, 3, 5, 8)), jnp.ones(4)), "4 weights for 5 paths"),
        (lambda: exits(VIT, IMAGES, (0,)), "of 1 to 2 are accepted"),
        (lambda: exits(VIT, IMAGES, (3,)), "of 1 to 2 are accepted"),
        (lambda: exits(VIT, IMAGES, ()), "of 1 to 2 are accepted"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
