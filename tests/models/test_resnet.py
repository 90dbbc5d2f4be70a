"""Residual networks: counts, logits of the original code, ops, shortcuts, what is refused."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import models
from ffnlab.errors import ConfigError
from ffnlab.layers import Residual, Spatial, fold
from ffnlab.layers.residual import OPS, unlearned
from ffnlab.models import (
    ResNet,
    ResNetConfig,
    account,
    narrow,
    resnet50,
    resnet_cifar,
)
from ffnlab.models.cost import multiply_adds
from ffnlab.models.resnet import sizes_of

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
    block = Residual.of_sizes((3, 4, 4), key=jax.random.key(0), stride=2)
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


# Multiplications, by hand: k^2 a b for every pixel of a convolution's output.


def by_hand(sizes, blocks, classes, *, whole=None):
    """Of a network for images of 32 x 32, shortcuts of 1 x 1 convolutions where sizes change.

    Args:
      sizes: after the stem and after each convolution.
      blocks: that are computed, of each stage.
      whole: blocks of each stage that `sizes` has, where some are left out; then what follows a
        stage reads as many channels as its last block would have given, as the authors count.
    """
    whole = blocks if whole is None else whole
    each = (len(sizes) - 1) // sum(whole)
    total, at = 9 * 32 * 32 * 3 * sizes[0], 0
    for stage, (kept, count) in enumerate(zip(blocks, whole, strict=True)):
        side = 32 >> stage
        for i in range(count):
            halves = stage > 0 and i == 0
            c, at = sizes[at : at + each + 1], at + each
            if i >= kept:
                continue
            before = (2 * side) ** 2 if halves else side**2
            if each == 2:
                total += 9 * side**2 * (c[0] * c[1] + c[1] * c[2])
            else:
                total += before * c[0] * c[1] + side**2 * (9 * c[1] * c[2] + c[2] * c[3])
            if halves or c[0] != c[-1]:
                total += side**2 * c[0] * c[-1]
    return total + sizes[-1] * classes


def counted(config):
    model = jax.eval_shape(lambda key: ResNet(config, key=key), jax.random.key(0))
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    return multiply_adds(lambda model, x: model(x), model, image)


@pytest.mark.parametrize(
    ("depth", "published"),
    [
        (20, 40.8),
        (32, 69.1),
        pytest.param(56, 125.7, marks=pytest.mark.slow),
        pytest.param(110, 253.1, marks=pytest.mark.slow),
        pytest.param(164, 247.6, marks=pytest.mark.slow),
    ],
)
def test_multiplications_of_the_networks_for_small_images(depth, published):
    """The figures of arXiv 1905.09717, whose shortcuts are convolutions."""
    block = "bottleneck" if depth == 164 else "basic"
    config = resnet_cifar(depth, block=block, shortcut="pooled")
    want = by_hand(config.usual_sizes, config.blocks, 10)
    assert want / 1e6 == pytest.approx(published, rel=1e-3)
    assert counted(config) == want
    assert counted(dataclasses.replace(config, shortcut="projected")) == want


LONG = ["C100-20", "C010-32", "C100-56", "C010-110", "C100-110", "C010-164", "C100-164"]


@pytest.mark.parametrize(
    "name",
    ["C010-20", "C100-32", "C010-56", *(pytest.param(n, marks=pytest.mark.slow) for n in LONG)],
)
def test_multiplications_of_searched_networks(name, fixtures):
    """The authors count a network that is cut in depth as if the last block that is left out still
    gave the channels that the next stage reads; the network itself has up to 3.4 % more."""
    found = json.loads((fixtures / "tas" / "shapes.json").read_text())[name]
    depth = int(name.partition("-")[2])
    full = resnet_cifar(depth, block="bottleneck" if depth == 164 else "basic")
    given = found["sizes"], tuple(found["blocks"]), found["classes"]
    assert by_hand(*given, whole=full.blocks) / 1e6 == pytest.approx(found["megamacs"], rel=1e-4)
    n, sizes, at = full.convolutions, found["sizes"][:1], 0
    for kept, count in zip(found["blocks"], full.blocks, strict=True):
        sizes += found["sizes"][1 + n * at : 1 + n * (at + kept)]
        at += count
    config = dataclasses.replace(
        full, blocks=given[1], sizes=tuple(sizes), classes=given[2], shortcut="pooled"
    )
    want = by_hand(sizes, given[1], given[2])
    assert counted(config) == want
    assert -1e-4 < want / 1e6 / found["megamacs"] - 1 < 0.035
    assert (want / 1e6 == pytest.approx(found["megamacs"], rel=1e-3)) == (given[1] == full.blocks)


def test_sizes_are_a_configuration():
    make = lambda config: jax.eval_shape(lambda key: ResNet(config, key=key), jax.random.key(0))  # noqa: E731
    call = lambda model, x: jax.eval_shape(lambda m, x: m(x), model, x).shape  # noqa: E731
    config = dataclasses.replace(BASIC, sizes=(3, 2, 3, 4, 5, 1, 4), shortcut="projected")
    model = make(config)
    assert sizes_of(model) == config.sizes
    assert call(model, jnp.zeros((2, 6, 6, 2))) == (2, 3)
    assert [block.shortcut is None for block in model.residuals] == [True, False, False]
    bottleneck = dataclasses.replace(BOTTLENECK, sizes=(4, 2, 1, 7, 3, 2, 7))
    assert sizes_of(make(bottleneck)) == bottleneck.sizes
    assert call(make(bottleneck), jnp.zeros((1, 8, 8, 3))) == (1, 5)
    assert dataclasses.replace(BASIC, sizes=BASIC.usual_sizes) == BASIC
    with pytest.raises(ConfigError, match="has 2 entries; 7 positive numbers are accepted"):
        dataclasses.replace(BASIC, sizes=(3, 3))
    with pytest.raises(ConfigError, match="'max' gives as many channels as it reads, 2, not 1"):
        make(dataclasses.replace(bottleneck, op="max"))
    with pytest.raises(ConfigError, match=r"depth=21 of basic blocks must be 6 n \+ 2"):
        resnet_cifar(21)


def test_a_narrowed_network_says_its_sizes():
    model = ResNet(dataclasses.replace(BASIC, shortcut="pooled"), key=jax.random.key(0))
    small = narrow(model, {"stem": [0, 2], "residuals[1].expand": [1, 2, 3]})
    assert small.config.sizes == (2, 4, 2, 6, 3, 6, 3)
    again = jax.eval_shape(lambda key: ResNet(small.config, key=key), jax.random.key(0))
    shapes = lambda m: jax.tree.map(lambda leaf: leaf.shape, jax.tree.leaves(m))  # noqa: E731
    assert shapes(again) == shapes(small)


def test_shortcuts_of_means():
    """Over the pixels that are there, at the edge of an odd grid too."""
    block = Residual.of_sizes((2, 3, 4), key=jax.random.key(0), stride=2, shortcut="pooled")
    x = images(1, 3, 3, 2)
    parts = slice(0, 2), slice(2, 3)
    means = jnp.stack([jnp.stack([x[0, a, b].mean((0, 1)) for b in parts]) for a in parts])[None]
    inner = block.expand(jax.nn.relu(block.spatial(x)))
    want = jax.nn.relu(inner + block.shortcut.norm(means @ block.shortcut.conv.weight.dense()))
    assert difference(block(x), want) < TOLERANCE


def test_a_shortcut_without_parameters_to_fewer_channels_keeps_those_in_the_middle():
    x = images(1, 4, 4, 5)
    np.testing.assert_array_equal(unlearned(x, 2, 2), x[:, ::2, ::2, 2:4])
