"""Vision transformers: tokens, positions, stages, forms, what is refused; files in `formats`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import models, transform
from ffnlab.errors import ConfigError
from ffnlab.layers import LayerInputs
from ffnlab.models import ImageInput, ViT, ViTConfig, account
from ffnlab.models.vit import abstract, interpolated
from ffnlab.pruning import finercut
from ffnlab.testing import equal

CONFIG = ViTConfig((8, 12), 4, 16, 24, 2, 4, channels=2, classes=3, distillation="head")
STAGED = ViTConfig((12, 12), 4, 8, 12, 3, 2, stride=2, classes=3, pool="mean", stages=(2, 1))
IMAGES = jax.random.uniform(jax.random.key(1), (2, 8, 12, 2))
SQUARES = jax.random.uniform(jax.random.key(1), (2, 12, 12, 3))
TOLERANCE = 1e-5  # the same sums in another order, float32; outputs of order 1
run = jax.jit(lambda model, images, **given: model(images, **given))


@functools.cache
def made(config=CONFIG):
    return ViT(config, key=jax.random.key(0))


def difference(a, b):
    return float(jnp.abs(a - b).max())


def test_patches_are_a_product_row_by_row():
    """The stream before the blocks, by one product for every patch."""
    model = made()
    h = model.embed_images(IMAGES)
    w, b = (np.asarray(v) for v in (model.patches.weight.dense(), model.patches.bias))
    table = np.asarray(model.positions.get_value().dense())
    assert h.shape == (2, 8, 16) and table.shape == (8, 16)
    for y in range(2):
        for x in range(3):
            patch = np.asarray(IMAGES)[:, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4].reshape(2, -1)
            want = patch @ w + b + table[2 + 3 * y + x]
            np.testing.assert_allclose(h[:, 2 + 3 * y + x], want, atol=TOLERANCE)
    for i, token in enumerate((model.class_token, model.distillation_token)):
        np.testing.assert_allclose(h[:, i], (token.get_value() + table[i])[None].repeat(2, 0))


def test_heads_and_what_they_read():
    model = made()
    h = model.hidden(IMAGES)
    mean = (model.head(h[:, 0]) + model.distilled_head(h[:, 1])) / 2
    assert difference(model.output(h), mean) < TOLERANCE
    alone = made(dataclasses.replace(CONFIG, distillation="token"))
    h = alone.hidden(IMAGES)
    assert alone.distilled_head is None
    assert difference(alone.output(h), alone.head(h[:, 0])) < TOLERANCE
    mean = made(dataclasses.replace(CONFIG, distillation=None, pool="mean"))
    h = mean.hidden(IMAGES)
    assert h.shape == (2, 6, 16), "no class token"
    assert difference(mean.output(h), mean.head(h.mean(1))) < TOLERANCE
    bare = made(dataclasses.replace(CONFIG, distillation=None, classes=None, pooler="tanh"))
    assert run(bare, IMAGES).shape == (2, 7, 16)
    first = bare.hidden(IMAGES)
    assert difference(bare.pooled(first), jnp.tanh(bare.pooler(first[:, 0]))) < TOLERANCE


def test_values_bytes_and_what_is_done_to_them():
    how = ImageInput((0.5, 0.4), (0.25, 0.2))
    model, given = made(), made(dataclasses.replace(CONFIG, preprocess=how))
    pixels = np.arange(2 * 8 * 12 * 2).reshape(2, 8, 12, 2).astype(np.uint8)
    values = jnp.asarray(pixels / np.float32(255))
    assert difference(run(given, pixels), run(given, values)) < TOLERANCE
    by_hand = (values - jnp.array(how.mean)) / jnp.array(how.std)
    assert difference(run(given, values), run(model, by_hand)) < TOLERANCE
    assert difference(run(given, values), run(model, values)) > 1e-3


@pytest.mark.parametrize(("config", "images"), [(CONFIG, IMAGES), (STAGED, SQUARES)])
def test_forms_gates_and_removed_sublayers(config, images):
    model = made(config)
    stacked = models.stack(model)
    assert equal(models.unstack(stacked), model)
    assert difference(run(stacked, images), run(model, images)) < TOLERANCE
    assert difference(run(models.remat(stacked, "nothing"), images), run(model, images)) < TOLERANCE
    n = config.layers
    gates = jnp.ones((n, 2)).at[n - 1, 0].set(0)
    gated = run(model, images, inputs=LayerInputs(gates=gates))
    assert difference(run(models.remove(model, [2 * n - 2]), images), gated) < TOLERANCE
    assert difference(gated, run(model, images)) > 1e-5, "the last block counts"
    if config is CONFIG:
        cut, _ = transform.apply(finercut(remove=1, distance="norm"), model, [np.asarray(images)])
        assert len(models.removed(cut)) == 1


def test_branches_are_of_one_stage():
    _, outputs = made().run(IMAGES, branches=True)
    assert outputs.branches.shape == (2, 2, 2, 8, 16)
    with pytest.raises(ConfigError, match="sizes differ from stage to stage"):
        made(STAGED).run(SQUARES, branches=True)


def test_stages_halve_the_grid_and_double_the_width():
    model = made(STAGED)
    assert STAGED.grid == (5, 5) and STAGED.out_width == 16
    assert [block.attn.spec.heads for block in model.layers] == [2, 2, 4]
    assert {block.attn.spec.head_dim for block in model.layers} == {4}
    h = model.hidden(SQUARES)
    assert h.shape == (2, 9, 16)
    x = jax.random.normal(jax.random.key(2), (1, 5, 5, 8))
    pool = model.pools[0]
    found, w = pool(x), np.asarray(pool.weight.dense()).reshape(3, 3, 16)
    padded = np.pad(np.asarray(x[0]), ((1, 1), (1, 1), (0, 0)))
    for out in range(16):  # channel `out` is made of channel out // 2 alone
        corner = (padded[2:5, 4:7, out // 2] * w[:, :, out]).sum() + pool.bias[out]
        assert abs(float(found[0, 1, 2, out]) - corner) < TOLERANCE


@pytest.mark.parametrize("config", [CONFIG, STAGED, dataclasses.replace(STAGED, stages=())])
def test_the_abstract_model_is_the_made_one(config):
    found = abstract(config)
    want = jax.eval_shape(lambda key: ViT(config, key=key), jax.random.key(0))
    assert jax.tree.structure(found) == jax.tree.structure(want)
    assert jax.tree.leaves(found) == jax.tree.leaves(want)


@pytest.mark.parametrize(
    ("width", "heads", "options", "count"),
    [  # published: ViT-B/16 and DeiT of `timm`, without distillation
        (768, 12, {}, 86_567_656),
        (192, 3, {}, 5_717_416),
        (192, 3, {"distillation": "head"}, 5_910_800),
    ],
)
def test_counts_of_known_models(width, heads, options, count):
    config = ViTConfig((224, 224), 16, width, 4 * width, 12, heads, classes=1000, **options)
    assert account.parameters(abstract(config)) == count


def test_positions_on_another_grid():
    model = made()
    assert models.resized(model, (8, 12)).config == model.config
    grid = jax.random.normal(jax.random.key(3), (3, 4, 2))
    assert difference(interpolated(grid, (3, 4)), grid) < TOLERANCE, "its own grid"
    ones = interpolated(
        jnp.ones((3, 4, 1)), (7, 5)
    )  # what else it is, `formats` compares with torch
    assert difference(ones, 1.0) < TOLERANCE
    larger = models.resized(model, (16, 12))
    images = jnp.concatenate([IMAGES, IMAGES], axis=1)
    assert run(larger, images).shape == (2, 3) and model.config.image == (8, 12)
    with pytest.raises(ConfigError, match=r"does not divide image=\[9, 12\]"):
        models.resized(model, (9, 12))


@pytest.mark.parametrize("images", [IMAGES[:, :4], IMAGES[..., :1], jnp.zeros((1, 12, 8, 2))])
def test_images_that_are_refused(images):
    with pytest.raises(ConfigError, match=r"images .*; \[b, 8, 12, 2\] is accepted"):
        made()(images)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"patch": 5}, r"patch=5 every 5 pixels does not divide image=\[8, 12\]"),
        ({"stride": 3}, "patch=4 every 3 pixels does not divide"),
        ({"stride": -1}, "stride=-1 >= 0"),
        ({"patch": 16}, "patch=16"),
        ({"image": (8,)}, r"image=\[8\] must be a height and a width"),
        ({"heads": 3}, "width=16 must be a multiple of heads=3"),
        ({"layers": 0}, "layers=0 must be a positive integer"),
        ({"classes": 0}, "classes=0"),
        ({"pool": "max"}, "pool='max' is not one of"),
        ({"pool": "mean"}, "pool='mean' has no class token; distillation='head'"),
        ({"pooler": "tanh"}, "a model with classes has none"),
        ({"classes": None}, "distillation='head' needs classes"),
        ({"labels": ("a",)}, "labels has 1 names for classes=3"),
        ({"stages": (1, 2)}, r"stages=\[1, 2\] must be positive and add up to layers=2"),
        ({"stages": (1, 1)}, "they need pool='mean'"),
        ({"activation": "swish"}, "activation='swish'"),
        ({"preprocess": ImageInput((0.0,) * 3, (1.0,) * 3)}, "for channels=2"),
    ],
)
def test_configurations_that_are_refused(change, told):
    with pytest.raises(ConfigError, match=told):
        dataclasses.replace(CONFIG, **change)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"mean": (0.5,)}, "a number of each for every channel"),
        ({"mean": (0.5,), "std": (0.0,)}, "std above 0"),
        ({"resize": (3,)}, r"resize=\[3\]"),
        ({"resample": "nearest"}, "resample='nearest' is not one of"),
    ],
)
def test_inputs_that_are_refused(fields, told):
    with pytest.raises(ConfigError, match=told):
        ImageInput(**fields)
