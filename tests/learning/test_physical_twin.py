"""Learning by a digital twin: slopes of a twin that is the system, what is measured, the loop."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ffnlab import tree
from ffnlab.data import ArrayBatches
from ffnlab.errors import ConfigError
from ffnlab.layers import MLP
from ffnlab.learning import BlackBox, contrast, digital_twin, opaque
from ffnlab.learning.physical.rule import opaque_boxes, whole_loss
from ffnlab.learning.physical.twin import measured_pairs, surrogates, twin_error, twins_of
from ffnlab.losses import Moment
from ffnlab.models import PhysicalConfig
from ffnlab.parallel import train
from ffnlab.weights import Dense
from tests.learning.test_physical import QUIET, bits, rows

SMALL = PhysicalConfig(5, 4, (8, 7), slots=4, skip=True)
RULE = digital_twin(optax.adam(1e-2), optax.adam(1e-2), hidden=(16,))


def linear(params, h, key):
    return h @ params


def of_linear_systems(key):
    """A network whose systems are linear, behind boxes that raise, and twins that are them."""
    net = SMALL.make(key=key)
    ws = [jax.random.normal(jax.random.fold_in(key, i), (9 - i, 8 - i)) for i in range(2)]
    for layer, w in zip(net.layers, ws, strict=True):
        layer.box = BlackBox(opaque(linear), w.shape[1], w)
    twins = twins_of(net, key, hidden=())
    for twin, w in zip(twins, ws, strict=True):
        twin.maps[0].w = twin.maps[0].replace(Dense(w)).w
    opened = tree.copy(net)
    for layer, w in zip(opened.layers, ws, strict=True):
        layer.box = BlackBox(linear, w.shape[1], w)
    return net, twins, opened


@pytest.mark.parametrize("forward", ["twin", "system"])
def test_a_twin_that_is_the_system_has_its_slopes(forward, key):
    net, twins, opened = of_linear_systems(key)
    x, y = map(jnp.asarray, rows())

    def of_net(net, boxes=None):
        return whole_loss(net, (x, y), key, 4.0, boxes)[0]

    boxes = surrogates(opaque_boxes(net), twins, forward)
    found = jax.jit(jax.value_and_grad(functools.partial(of_net, boxes=boxes)))(net)
    expected = jax.jit(jax.value_and_grad(of_net))(opened)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    for a, b in zip(found[1].layers, expected[1].layers, strict=True):
        np.testing.assert_allclose(a.map.weight.dense(), b.map.weight.dense(), rtol=1e-3, atol=1e-6)
    through = contrast(4.0)(opened, (x, y), Moment(jnp.int32(0), key))[0]
    np.testing.assert_allclose(through, expected[0], rtol=1e-6)


def test_the_way_forward_is_that_of_the_twin_or_of_the_system(key):
    net, twins, _ = of_linear_systems(key)
    twins = jax.tree.map(lambda leaf: 1.5 * leaf, twins)
    h = jax.random.normal(key, (3, 9))
    w = net.layers[0].box.params[...]
    for forward, factor in (("twin", 1.5), ("system", 1.0)):
        box = surrogates(opaque_boxes(net), twins, forward)[0]
        np.testing.assert_allclose(box(h, None), factor * h @ w, rtol=1e-4, atol=1e-5)
        slope = jax.grad(lambda h, box=box: box(h, None).sum())(h)
        np.testing.assert_allclose(slope[0], 1.5 * w.sum(1), rtol=1e-4)


def test_systems_are_measured_where_the_network_uses_them(key):
    net = SMALL.make(key=key)
    h = net.written(*map(jnp.asarray, rows()))
    first, second = measured_pairs(net, h, key)
    np.testing.assert_array_equal(first[0], h)
    np.testing.assert_allclose(first[1], net.layers[0].box(h), rtol=1e-6)
    z = net.layers[0](jnp.concatenate([net.layers[0].box(h), h], 1))
    np.testing.assert_allclose(second[0], z, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(second[1], net.layers[1].box(z), rtol=1e-4, atol=1e-5)
    twins = twins_of(net, key, hidden=(3,))
    by_hand = sum(
        np.sqrt(np.mean((np.asarray(twin(h)) - y) ** 2))
        for twin, (h, y) in zip(twins, (first, second), strict=True)
    )
    assert float(twin_error(twins, (first, second))) == pytest.approx(by_hand, rel=1e-5)
    assert [twin.sizes for twin in twins] == [[9, 3, 8], [8, 3, 7]]
    zero = jax.tree.map(jnp.zeros_like, twins)
    slopes = jax.grad(lambda twins: twin_error(twins, [(h, 0 * y) for h, y in (first, second)]))(
        zero
    )
    finite = [np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(slopes)]
    assert all(finite), "of twins that err nowhere"


def stepped(rule, state, count):
    metrics = []
    for position in range(count):
        state, found = rule.step(state, rows(position % 2, n=32))
        metrics.append({name: float(value) for name, value in found.items()})
    return state, metrics


def test_twins_learn_and_so_do_the_maps_through_them(key):
    net = SMALL.make(key=key)
    state, metrics = stepped(RULE, RULE.init(net, key), 80)
    errors = [row["twin_error"] for row in metrics]
    assert np.mean(errors[-10:]) < 0.6 * np.mean(errors[:5])
    losses = [row["loss"] for row in metrics]
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])
    assert metrics[-1]["gap"] > 0
    for before, after in zip(net.layers, state.model.layers, strict=True):
        assert np.any(before.map.weight.dense() != after.map.weight.dense())
        np.testing.assert_array_equal(before.box.t[...], after.box.t[...])
        np.testing.assert_array_equal(before.p[...], after.p[...])


def test_twins_stay_when_measuring_has_ended(key):
    rule = digital_twin(optax.adam(1e-2), optax.adam(1e-2), hidden=(16,), measured=2)
    net = SMALL.make(key=key)
    second, _ = stepped(rule, rule.init(net, key), 2)
    third, metrics = stepped(rule, rule.init(net, key), 3)
    for a, b in zip(jax.tree.leaves(second.twins), jax.tree.leaves(third.twins), strict=True):
        np.testing.assert_array_equal(a, b)
    assert [row["twin_error"] > 0 for row in metrics] == [True, True, False]
    moved = [s.model.layers[0].map.weight.dense() for s in (second, third)]
    assert np.any(moved[0] != moved[1])
    always, _ = stepped(RULE, RULE.init(net, key), 2)
    for a, b in zip(jax.tree.leaves(second.twins), jax.tree.leaves(always.twins), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_predictions_are_of_the_systems_themselves(key):
    net = SMALL.make(key=key)
    state = RULE.init(net, key)
    x = rows()[0]
    np.testing.assert_allclose(RULE.predict(state, x), net(jnp.asarray(x)), rtol=1e-4, atol=1e-5)


def test_a_layer_without_a_system_has_no_twin(key):
    net = SMALL.make(key=key)
    plain = PhysicalConfig(5, 4, (8, 7), "none", slots=4).make(key=key)
    net.layers[1] = plain.layers[1]
    state = RULE.init(net, key)
    assert state.twins[1] is None
    state, metrics = RULE.step(state, rows(n=32))
    assert np.isfinite(metrics["loss"]) and metrics["twin_error"] > 0


def test_a_resumed_run_ends_in_the_same_bits(key, tmp_path):
    source = ArrayBatches(rows(n=96), 32)
    net = dataclasses.replace(SMALL, noise=0.1).make(key=key)
    run = functools.partial(train, RULE, net, source, key=key, options=QUIET, together=2)
    whole = run(5)
    run(3, folder=tmp_path)
    assert bits(run(5, folder=tmp_path, resume=True).state) == bits(whole.state)


def test_refusals(key):
    for options, message in (
        ({"theta": -1.0}, "theta=-1.0 must be positive"),
        ({"forward": "device"}, "forward='device' is not one of"),
        ({"measured": -1}, "measured=-1 must be at least 0"),
        ({"hidden": (4, 0)}, "hidden=0"),
    ):
        with pytest.raises(ConfigError, match=message):
            digital_twin(**options)
    rule = digital_twin()
    with pytest.raises(ConfigError, match="model is a MLP; a PhysicalNet learns by this rule"):
        rule.init(MLP((5, 4), key=key), key)
    with pytest.raises(ConfigError, match="model has no physical system"):
        rule.init(PhysicalConfig(5, 4, (8,), "none").make(key=key), key)
    state, (x, y) = rule.init(SMALL.make(key=key), key), rows()
    with pytest.raises(ValueError, match=r"x has shape \(12, 4\)"):
        rule.check(state, (x[:, :4], y))
    with pytest.raises(ValueError, match="0 to 3 are there"):
        rule.check(state, (x, y + 1))
