"""Networks of physical systems: classes written into inputs, goodness, scores, what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import tree
from ffnlab.errors import ConfigError
from ffnlab.layers import Linear, Transmission
from ffnlab.layers.physical import BlackBox
from ffnlab.models import PhysicalConfig, PhysicalLayer, PhysicalNet
from ffnlab.models.physical_net import direction, goodness

SMALL = PhysicalConfig(5, 3, (7, 4), slots=4)


@pytest.fixture
def x(key):
    return jax.random.normal(key, (6, 5))


@pytest.mark.parametrize("slots", [0, 4])
@pytest.mark.parametrize("level", ["row", "batch"])
def test_a_class_is_written_as_high_as_the_largest_magnitude(slots, level, key, x):
    net = dataclasses.replace(SMALL, slots=slots, level=level).make(key=key)
    y = jnp.array([0, 1, 2, 0, 2, 1])
    found = np.asarray(net.written(x, y))
    for i, (row, c) in enumerate(zip(np.asarray(x), y, strict=True)):
        mark = np.zeros(slots or 3)
        mark[c] = np.abs(row if level == "row" else x).max()
        np.testing.assert_array_equal(found[i], [*mark, *(row if slots else row[3:])])


def test_goodness_is_a_cosine():
    with jax.enable_x64(True):
        random = np.random.default_rng(0)
        z, p = random.normal(size=(9, 4)), random.normal(size=4)
        expected = z @ p / np.linalg.norm(z, axis=1) / np.linalg.norm(p)
        np.testing.assert_allclose(goodness(jnp.array(z), jnp.array(p)), expected, rtol=1e-12)
        np.testing.assert_allclose(goodness(jnp.array(7 * z), jnp.array(p)), expected, rtol=1e-12)
    value, slope = jax.value_and_grad(goodness)(jnp.zeros(4), jnp.ones(4))
    assert value == 0 and not np.any(slope), "zero, and no NaN"
    assert goodness(jnp.ones((2, 4), jnp.bfloat16), jnp.ones(4, jnp.bfloat16)).dtype == jnp.float32
    assert jnp.linalg.norm(direction(50, jax.random.key(0))) == pytest.approx(1, rel=1e-6)


def test_signs_are_invisible_behind_a_system_and_seen_without(key):
    z = jax.random.normal(key, (3, 7))
    layer = SMALL.make(key=key).layers[0]
    np.testing.assert_array_equal(layer.goodness(z), layer.goodness(-z))
    plain = PhysicalConfig(5, 3, (7,), "none").make(key=key).layers[0]
    np.testing.assert_array_equal(plain.goodness(z), -plain.goodness(-z))
    alike = PhysicalLayer(layer.map, plain.p[...], layer.box)
    np.testing.assert_array_equal(alike.goodness(z), plain.goodness(jnp.abs(z)))


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("system", ["none", "tanh_chain", "transmission", "two_bit"])
def test_scores_are_sums_of_the_goodness_of_each_class(system, skip, key, x):
    if system == "none" and skip:
        return
    config = dataclasses.replace(SMALL, system=system, skip=skip, activation="gelu")
    net = config.make(key=key)
    expected = np.zeros((6, 3))
    for c in range(3):
        h = net.written(x, jnp.full(6, c))
        for layer in net.layers:
            read = h
            if layer.box is not None:
                read = layer.box(h) if not skip else jnp.concatenate([layer.box(h), h], 1)
            h = jax.nn.gelu(read @ layer.map.weight.dense() + layer.map.bias, approximate=False)
            judged = h if layer.box is None else jnp.abs(h)
            p = layer.p[...]
            expected[:, c] += judged @ p / jnp.linalg.norm(judged, axis=1) / jnp.linalg.norm(p)
    np.testing.assert_allclose(net(x), expected, rtol=1e-4, atol=1e-5)
    assert net.judged(net.written(x, jnp.zeros(6, int))).shape == (2, 6)


def test_a_row_has_the_same_scores_whatever_is_beside_it(key, x):
    net = SMALL.make(key=key)
    np.testing.assert_allclose(net(x)[3:4], net(x[3:4]), rtol=1e-5, atol=1e-6)
    of_batch = dataclasses.replace(SMALL, level="batch").make(key=key)
    assert np.abs(of_batch(x)[3:4] - of_batch(x[3:4])).max() > 1e-3


def test_all_classes_meet_the_same_noise(key, x):
    """And other layers other noise, drawn by `fold_in(key, layer)`."""
    net = dataclasses.replace(SMALL, noise=0.5).make(key=key)
    for c in range(3):
        alone = net.judged(net.written(x, jnp.full(6, c)), key).sum(0)
        np.testing.assert_allclose(net(x, key)[:, c], alone, rtol=1e-5, atol=1e-6)
    assert np.abs(net(x, key) - net(x)).max() > 1e-2
    h = net.written(x, jnp.zeros(6, int))
    z = net.layers[0](net.layers[0].read(h, jax.random.fold_in(key, 0)))
    second = net.layers[1](net.layers[1].read(z, jax.random.fold_in(key, 1)))
    np.testing.assert_allclose(net.judged(h, key)[1], net.layers[1].goodness(second), rtol=1e-5)


def test_only_maps_learn(key):
    trained, fixed = tree.trained(SMALL.make(key=key))
    count = lambda part: sum(leaf.size for leaf in jax.tree.leaves(part))  # noqa: E731
    assert count(trained) == (7 + 1) * 7 + (4 + 1) * 4
    assert count(fixed) == 9 * 2 * 7 + 7 * 2 * 4 + 7 + 4


def test_systems_are_replaced_and_nothing_else(key):
    net = SMALL.make(key=key)
    other = net.redrawn(jax.random.key(3))
    for i, (a, b) in enumerate(zip(net.layers, other.layers, strict=True)):
        assert np.abs(a.box.t[...] - b.box.t[...]).mean() > 0.1
        again = a.box.redrawn(jax.random.fold_in(jax.random.key(3), i))
        np.testing.assert_array_equal(b.box.t[...], again.t[...])
        np.testing.assert_array_equal(a.map.weight.dense(), b.map.weight.dense())
        np.testing.assert_array_equal(a.p[...], b.p[...])
    plain = PhysicalConfig(5, 3, (7,), "none").make(key=key)
    assert plain.redrawn(key).layers[0].box is None
    net.layers[1].box = BlackBox(lambda params, h, key: h, 7)
    with pytest.raises(ConfigError, match=r"layers\[1\].box is a BlackBox, not drawn"):
        net.redrawn(key)


def test_boxes_that_stand_for_the_layers_own(key, x):
    net = SMALL.make(key=key)
    h = net.written(x, jnp.zeros(6, int))
    same = [layer.box for layer in net.layers]
    np.testing.assert_array_equal(net.judged(h, None, same), net.judged(h))
    other = [None, lambda h, key: 0 * net.layers[1].box(h) + 1]
    found = net.judged(h, None, other)
    np.testing.assert_array_equal(found[0], net.judged(h)[0])
    assert np.ptp(found[1]) < 1e-6, "the second layer sees a constant"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": 1}, "classes=1 must be at least 2: of one there is no wrong class"),
        ({"slots": 2}, "slots=2 must be 0 or at least classes=3"),
        ({"slots": 0, "inputs": 2}, "inputs=2 are too few to write 3 classes over"),
        ({"inputs": 0}, "inputs=0 must be at least 1"),
        ({"widths": ()}, "widths=0"),
        ({"widths": (4, 0)}, "widths=0"),
        ({"system": "laser"}, "system='laser' is not one of"),
        ({"system": "none", "skip": True}, "nothing to skip"),
        ({"system": "none", "noise": 0.1}, "no noise"),
        ({"noise": -1.0}, "noise=-1.0 must not be negative"),
        ({"activation": "swish"}, "activation='swish'"),
        ({"level": "image"}, "level='image' is not one of"),
    ],
)
def test_configurations_that_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(SMALL, **change)


def test_layers_that_do_not_fit_together(key, x):
    linear = Linear(6, 4, key=key, axes=("embed", "mlp"))
    box = Transmission(5, 6, key=key)
    for given, options, message in (
        ((linear, jnp.ones(3)), {}, r"p has shape \(3,\); the map gives \[4\]"),
        ((linear, jnp.ones(4)), {"skip": True}, "no box with skip=True"),
        ((linear, jnp.ones(4), box), {"skip": True}, "a box of 6 outputs with skip=True"),
        ((linear, jnp.ones(4), Transmission(5, 7, key=key)), {}, "7 outputs with skip=False"),
        ((linear, jnp.ones(4), box), {"activation": "no"}, "activation='no'"),
    ):
        with pytest.raises(ConfigError, match=message):
            PhysicalLayer(*given, **options)
    layer = PhysicalLayer(linear, jnp.ones(4), BlackBox(lambda params, h, key: h, 6))
    with pytest.raises(ValueError, match=r"gives shape \(6, 5\) of \(6, 5\); it says \(6, 6\)"):
        layer.read(x)
    with pytest.raises(ConfigError, match="classes=1"):
        PhysicalNet([layer], inputs=6, classes=1)
