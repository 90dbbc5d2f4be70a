"""Residual networks: counts, logits of the original code, ops, shortcuts, what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import models
from ffnlab.errors import ConfigError
from ffnlab.layers import Residual, Spatial, fold
from ffnlab.layers.residual import OPS, unlearned
from ffnlab.models import ResNet, ResNetConfig, account, resnet50

BASIC = ResNetConfig((1, 2), (4, 6), 3, channels=2)
BOTTLENECK = ResNetConfig((1, 1), (2, 3), 5, block="bottleneck", stem="large", stem_width=4)
TOLERANCE = 1e-5  # the same sums in another order, float32; values of order 1


def images(*shape):
    return jax.random.uniform(jax.random.key(1), shape)


def difference(a, b):
    return np.abs(np.asarray(a) - np.asarray(b)).max()


@pytest.mark.parametrize(
    ("config", "count"),
    [  # published, or of the official code
        (resnet50(), 25_557_032),
        (resnet50("max"), 14_232_232),
        (resnet50("hybrid"), 17_330_600),
        (ResNetConfig((3, 3, 3), (16, 32, 64), 10), 269_722),
        (ResNetConfig((9, 9, 9), (16, 32, 64), 10), 853_018),
    ],
)
def test_counts_of_known_networks_without_arrays(config, count):
    model = jax.eval_shape(lambda key: ResNet(config, key=key), jax.random.key(0))
    assert account.parameters(model) == count


def test_shortcuts_that_learn_nothing():
    x = images(1, 5, 4, 3)
    y = np.asarray(unlearned(x, 2, 8))
    assert y.shape == (1, 3, 2, 8)
    np.testing.assert_array_equal(y[..., 2:5], x[:, ::2, ::2])
    assert not y[..., :2].any() and not y[..., 5:].any()
    assert unlearned(x, 1, 3) is not None and difference(unlearned(x, 1, 3), x) == 0


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("stride", [1, 2])
def test_every_op_gives_the_same_grid(op, stride):
    """Odd grids and those smaller than a window too; a bottleneck takes any."""
    for side in (1, 2, 5):
        block = Residual.bottleneck(3, 2, key=jax.random.key(0), op=op, stride=stride)
        found = jax.eval_shape(block, jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32))
        assert found.shape == (1, -(-side // stride), -(-side // stride), 8)


def test_what_ops_without_parameters_do():
    x = images(1, 4, 4, 1) - 2.0  # negative: zeros beyond the edges would show
    grid = np.asarray(x[0, ..., 0])
    make = functools.partial(Spatial, 1, key=jax.random.key(0))
    top = np.asarray(make(op="max")(x))[0, ..., 0]
    assert top[0, 0] == grid[:2, :2].max() and top[2, 1] == grid[1:4, :3].max()
    mean = np.asarray(make(op="average", stride=2)(x))[0, ..., 0]
    assert mean.shape == (2, 2) and mean[0, 0] == pytest.approx(grid[:2, :2].mean())
    assert mean[1, 1] == pytest.approx(grid[1:4, 1:4].mean())
    np.testing.assert_array_equal(make(op="identity", stride=2)(x), x[:, ::2, ::2])
    for op in ("max", "average", "identity"):
        assert jax.tree.leaves(make(op=op)) == []
        flat = jnp.full((1, 5, 5, 1), -3.0)
        np.testing.assert_array_equal(make(op=op, stride=2)(flat), -3.0)


def test_a_norm_folds_into_its_convolution():
    block = Residual.basic(3, 4, key=jax.random.key(0), stride=2, projected=True)
    norm = block.spatial.norm.with_statistics(jnp.arange(4.0), 1 + jnp.arange(4.0))
    x = images(2, 6, 6, 3)
    folded = fold(block.spatial.conv, norm)
    assert difference(folded(x), norm(block.spatial.conv(x))) < TOLERANCE


@pytest.mark.parametrize("config", [BASIC, BOTTLENECK])
def test_any_size_of_image_and_any_form(config, tmp_path):
    model = ResNet(config, key=jax.random.key(0))
    for side in (1, 6, 9):
        assert model(images(2, side, side, config.channels)).shape == (2, config.classes)
    models.save(model, tmp_path, format="ffnlab")
    x = images(2, 6, 6, config.channels)
    assert difference(models.load(tmp_path, kinds=("resnet",))(x), model(x)) == 0
    bytes_ = (np.asarray(x) * 255).astype(np.uint8)
    assert difference(model(bytes_), model(jnp.asarray(bytes_ / np.float32(255)))) < TOLERANCE


def test_images_and_configurations_that_are_refused():
    with pytest.raises(ConfigError, match=r"\[b, height, width, 2\] is accepted"):
        ResNet(BASIC, key=jax.random.key(0))(images(1, 8, 8, 3))
    for change, told in (
        ({"blocks": (1,)}, r"blocks=\[1\], widths=\[4, 6\]: one of each"),
        ({"blocks": (1, 0)}, r"blocks=\(1, 0\) must be at least 1"),
        ({"classes": 0}, "classes=0 must be at least 1"),
        ({"block": "wide"}, "block='wide' is not one of"),
        ({"op": "max"}, "op='max' is of bottlenecks"),
        ({"op": "swish"}, "op='swish' is not one of"),
        ({"image": (3,)}, r"image=\[3\] must be a height"),
        ({"stem": "huge"}, "stem='huge' is not one of"),
    ):
        with pytest.raises(ConfigError, match=told):
            dataclasses.replace(BASIC, **change)
    with pytest.raises(ConfigError, match="stride=3 not 1 or 2"):
        Spatial(3, key=jax.random.key(0), stride=3)
