"""Physical local learning: the authors' layers and steps, locality, black boxes, what it learns.

What the authors' code does with a batch is recorded by tests/fixtures/physical_ff/record.py.
"""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ffnlab import tree
from ffnlab.data import ArrayBatches, gaussian_clusters
from ffnlab.errors import ConfigError
from ffnlab.layers import MLP, Linear
from ffnlab.learning import (
    BlackBox,
    backprop,
    contrast,
    external,
    from_state,
    members,
    opaque,
    physical_ff,
)
from ffnlab.learning.physical import rule as home
from ffnlab.learning.physical.rule import (
    contrastive,
    layer_losses,
    opaque_boxes,
    other_classes,
    pairs_of,
)
from ffnlab.losses import Moment
from ffnlab.models import PhysicalConfig, PhysicalLayer, PhysicalNet
from ffnlab.parallel import LoopOptions, train
from ffnlab.weights import Dense

SMALL = PhysicalConfig(5, 4, (8, 7), slots=4, skip=True, noise=0.1)
RULE = physical_ff(optax.adam(1e-2), inner=2)
QUIET = LoopOptions(log_every=0, progress=False)


@pytest.fixture(scope="module")
def official(fixtures):
    """The recorded figures, and the script that drew the weights."""
    folder = fixtures / "physical_ff"
    spec = importlib.util.spec_from_file_location("record", folder / "record.py")
    record = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(record)
    return record, np.load(folder / "official.npz")


def tanh_of(params, h, key):
    """The acoustic system as the script draws it, with the authors' conditioning."""
    return jnp.tanh(jnp.abs(h) / (jnp.linalg.norm(h, axis=1, keepdims=True) + 1e-6) @ params)


def network(case, record):
    """Ours with the recorded weights."""
    _, classes, dims, width = record.CASES[case]
    is_acoustic, layers = case == "acoustic", []
    for i in range(2):
        w, b, p = map(jnp.asarray, record.weights(case, i))
        box = BlackBox(tanh_of, width, record.drawn("system", (width, width)))
        given = {"skip": True} if is_acoustic else {"activation": "gelu"}
        linear = Linear.of(Dense(w), b, axes=("embed", "mlp"))
        layers.append(PhysicalLayer(linear, p, box if is_acoustic else None, **given))
    slots = record.SLOTS if is_acoustic else 0
    shape = {"inputs": width - slots, "classes": classes, "slots": slots, "level": "batch"}
    return PhysicalNet(layers, **shape)


@pytest.mark.parametrize("case", ["acoustic", "digital"])
def test_a_step_is_the_authors(case, official, key, monkeypatch):
    """Inputs, goodness, losses; weights after five inner steps of each layer, and classes."""
    record, expected = official
    with jax.enable_x64(True):
        net = network(case, record)
        x, y, wrong = map(jnp.asarray, record.batch(case))
        x = x[:, net.slots :]
        monkeypatch.setattr(home, "other_classes", lambda y, classes, key: wrong)
        right, bad = pairs_of(net, x, y, key)
        np.testing.assert_array_equal(right, expected[f"{case}.right"])
        np.testing.assert_array_equal(bad, expected[f"{case}.wrong"])
        before = jnp.stack([net.judged(right)[0], net.judged(bad)[0]])
        np.testing.assert_allclose(before, expected[f"{case}.goodness0"], atol=1e-10)
        first = contrastive(*map(jnp.asarray, expected[f"{case}.goodness0"]))
        np.testing.assert_allclose(layer_losses(net, x, y, key)[0], first, atol=1e-10)
        rate = 5e-4 if case == "acoustic" else 1e-4
        rule = physical_ff(optax.adam(rate), inner=record.INNER)
        state, metrics = rule.step(rule.init(net, key), (x, y))
        for i, layer in enumerate(state.model.layers):
            np.testing.assert_allclose(
                layer.map.weight.dense(), expected[f"{case}.w{i}"], atol=1e-9
            )
            np.testing.assert_allclose(layer.map.bias, expected[f"{case}.b{i}"], atol=1e-9)
        losses = [expected[f"{case}.loss{i}"] for i in range(2)]
        np.testing.assert_allclose(metrics["loss"], np.mean(losses), atol=1e-9)
        gaps = [cosines(expected[f"{case}.out{i}"], record.weights(case, i)[2]) for i in range(2)]
        if case == "digital":  # outputs of the acoustic layers lack the modulus
            np.testing.assert_allclose(metrics["gap"], np.mean([a - b for a, b in gaps]), atol=1e-9)
        predicted = rule.predict(state, x).argmax(-1)
        np.testing.assert_array_equal(predicted, expected[f"{case}.predicted"])


def cosines(z, p):
    return z @ p / np.linalg.norm(z, axis=-1) / np.linalg.norm(p)


def test_the_loss_is_softplus_of_the_scaled_difference():
    right, wrong = jnp.array([0.5, -0.2]), jnp.array([0.1, 0.3])
    expected = np.log1p(np.exp(-3 * np.array([0.4, -0.5]))).mean()
    assert contrastive(right, wrong, 3.0) == pytest.approx(expected, rel=1e-6)
    assert contrastive(right, right) == pytest.approx(np.log(2), rel=1e-6)


def test_wrong_classes_are_all_but_the_right_one_as_often():
    y = jnp.repeat(jnp.arange(4), 3000)
    found = np.asarray(other_classes(y, 4, jax.random.key(2))).reshape(4, 3000)
    counts = np.stack([np.bincount(row, minlength=4) for row in found])
    assert not counts.diagonal().any()
    # A count of 1,000 has a standard deviation of 26.
    assert np.abs(counts[~np.eye(4, dtype=bool)] - 1000).max() < 4 * 26
    assert other_classes(jnp.array([0, 1, 1]), 2, jax.random.key(0)).tolist() == [1, 0, 0]
    narrow = other_classes(jnp.full(99, 250, jnp.uint8), 256, jax.random.key(0))
    assert narrow.max() < 256 and not np.any(narrow == 250) and len(set(narrow.tolist())) > 50


def rows(seed=0, n=12):
    random = np.random.default_rng(seed)
    x = random.normal(size=(n, 5)).astype(np.float32)
    return x, random.integers(0, 4, n).astype(np.int32)


def test_a_loss_moves_its_own_map_and_nothing_else(key):
    """Not those of other layers, and not the systems, which have a slope if anyone asks."""
    net = dataclasses.replace(SMALL, widths=(8, 7, 6)).make(key=key)
    batch = tuple(map(jnp.asarray, rows()))
    losses = lambda net: layer_losses(net, *batch, key)  # noqa: E731
    across = jax.jit(jax.jacobian(losses))(net)
    for j, layer in enumerate(across.layers):
        moved = [np.any([np.any(leaf[i]) for leaf in jax.tree.leaves(layer.map)]) for i in range(3)]
        assert moved == [i == j for i in range(3)]
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(layer.box))
    moment = Moment(jnp.int32(0), key)
    through = jax.jit(jax.grad(lambda net: contrast()(net, batch, moment)[0]))(net)
    assert all(np.any(leaf) for leaf in jax.tree.leaves([part.box for part in through.layers]))


def test_layers_learn_with_the_rest_absent(key):
    """The first layer of two is bit for bit the one that learns alone, whatever the second is."""
    net = SMALL.make(key=key)
    alone = tree.copy(net)
    alone.layers = type(net.layers)([tree.copy(net.layers[0])])
    other = tree.copy(net)
    other.layers[1].map = other.layers[1].map.replace(Dense(jnp.ones((15, 7))))
    found = []
    for model in (net, alone, other):
        state = RULE.init(model, key)
        for position in range(2):
            state, _ = RULE.step(state, rows(position))
        found.append(jax.tree.leaves(state.model.layers[0]))
    for a, b, c in zip(*found, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)


def test_rows_of_zeros_say_nothing_and_break_nothing(key):
    x, y = rows()
    x[:3] = 0
    state, metrics = RULE.step(RULE.init(SMALL.make(key=key), key), (x, y))
    finite = [np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state.model)]
    assert all(finite) and np.isfinite(metrics["loss"]) and np.isfinite(metrics["gap"])
    net = dataclasses.replace(SMALL, noise=0.0).make(key=key)
    assert np.ptp(net(jnp.zeros((1, 5)))) == 0 < np.ptp(net(jnp.ones((1, 5))))


def test_the_first_loss_is_that_of_guessing():
    """About log 2, whatever the draw: goodness of right and wrong classes is alike at first."""
    config = PhysicalConfig(16, 4, (64, 64), slots=4, skip=True)
    train_rows, _ = gaussian_clusters(0, train=256, test=1, classes=4, per_class=2, width=16)
    first = jax.jit(lambda key, x, y: layer_losses(config.make(key=key), x, y, key))
    for seed in range(3):
        np.testing.assert_allclose(first(jax.random.key(seed), *train_rows), np.log(2), rtol=0.05)


@functools.cache
def learned(system="transmission"):
    """A network that has learned small clusters, its rule, and rows that it has not seen."""
    data = gaussian_clusters(0, train=600, test=200, classes=4, per_class=2, width=16, noise=0.7)
    config = PhysicalConfig(16, 4, (32, 32), system, slots=4, skip=True, noise=0.02)
    rule, key = physical_ff(optax.adam(5e-3), inner=3), jax.random.key(0)
    found = train(
        rule,
        config.make(key=key),
        ArrayBatches(data[0], 100),
        60,
        key=key,
        options=QUIET,
        together=30,
    )
    return rule, found.state, data


def accuracy(rule, state, rows):
    return np.mean(np.argmax(rule.predict(state, jnp.asarray(rows.x)), -1) == rows.y)


@pytest.mark.parametrize("system", ["transmission", "tanh_chain"])
def test_it_learns(system):
    rule, state, (_, held_out) = learned(system)
    assert accuracy(rule, state, held_out) > 0.9


def test_goodness_is_in_order_in_every_layer():
    _, state, (_, held_out) = learned()
    net, key = state.model, jax.random.key(5)
    right, wrong = pairs_of(net, *map(jnp.asarray, held_out), key)
    gaps = (net.judged(right) - net.judged(wrong)).mean(1)
    assert gaps.shape == (2,) and (gaps > 0.1).all()


def test_it_learns_new_systems_by_going_on():
    rule, state, (first, held_out) = learned("tanh_chain")
    changed = state.model.redrawn(jax.random.key(10))
    after = state._replace(model=changed)
    dropped = accuracy(rule, after, held_out)
    found = train(
        from_state(rule, after),
        changed,
        ArrayBatches(first, 100, 1),
        60,
        key=jax.random.key(1),
        options=QUIET,
        together=30,
    )
    assert dropped < 0.9 < accuracy(rule, found.state, held_out)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_ten_classes_are_learned_in_five_epochs_and_again_in_two(seed):
    """30 clusters of width 64 behind two media, whose inputs the maps read too.

    Right after the change .87 and .86 are left, more than the .85 that the study asks for.
    """
    data = gaussian_clusters(seed)
    net = PhysicalConfig(64, 10, (128, 128), skip=True, slots=10).make(key=jax.random.key(seed))
    rule, source = physical_ff(optax.adam(1e-3), inner=2), ArrayBatches(data[0], 256, seed)
    run = functools.partial(train, key=jax.random.key(seed), options=QUIET, together=31)
    epoch = len(data[0].x) / 256
    state = run(rule, net, source, round(5 * epoch)).state
    assert accuracy(rule, state, data[1]) >= 0.95
    changed = state._replace(model=state.model.redrawn(jax.random.key(seed + 10)))
    assert accuracy(rule, changed, data[1]) < 0.95
    state = run(from_state(rule, changed), changed.model, source, round(2 * epoch)).state
    assert accuracy(rule, state, data[1]) >= 0.95


def test_right_and_wrong_rows_meet_noise_of_their_own_in_every_layer_and_step(key):
    """The seeds that hardware is given, of all layers, halves and steps."""
    asked = set()

    def device(params, h, seed):
        asked.add(seed.tobytes())
        return h[:, :8]

    net = dataclasses.replace(SMALL, widths=(8, 8), skip=False).make(key=key)
    net = with_boxes(net, lambda system: external(device, 8))
    state, batch = RULE.init(net, key), tuple(map(jnp.asarray, rows()))
    for steps in (1, 2):
        state, metrics = RULE.step(state, batch)
        jax.block_until_ready(metrics)
        assert len(asked) == steps * 2 * 2
    asked.clear()
    jax.block_until_ready(contrast()(net, batch, Moment(jnp.int32(0), key))[0])
    assert len(asked) == 2 * 2
    asked.clear()
    quiet = state._replace(key=jax.random.key(9))
    for found in (state, quiet):
        jax.block_until_ready(RULE.predict(found, batch[0]))
    assert len(asked) == 2 * 2, "of both layers, drawn from the key of the state"


def test_wrong_classes_differ_from_step_to_step(key, monkeypatch):
    """From the key of the step; those of a run of the same key are the same."""
    drawn = []

    def other(y, classes, key):
        jax.debug.callback(lambda words: drawn.append(words.tobytes()), jax.random.key_data(key))
        return other_classes(y, classes, key)

    monkeypatch.setattr(home, "other_classes", other)
    rule = physical_ff(optax.sgd(0.1), inner=1)
    for _ in range(2):
        state = rule.init(SMALL.make(key=key), key)
        for _ in range(3):
            state, _ = rule.step(state, rows())
    jax.effects_barrier()
    assert len(drawn) == 6 and len(set(drawn)) == 3


def test_directions_of_a_plain_network_are_drawn_apart(key):
    first, second, last = RULE.init(MLP((8, 8, 8, 4), key=key), key).directions
    assert np.any(first != second) and last.shape == (4,)
    np.testing.assert_allclose([np.linalg.norm(p) for p in (first, second, last)], 1, rtol=1e-6)


# Black boxes.


def square(params, h, key):
    return params * h**2


def test_differentiation_of_a_black_box_raises_by_name():
    box = opaque(square)
    assert float(box(2.0, jnp.float32(3), None)) == 18
    h = jnp.arange(3.0)
    np.testing.assert_array_equal(jax.jit(jax.vmap(box, (None, 0, None)))(2.0, h, None), 2 * h**2)
    for broken in (
        lambda: jax.grad(lambda h: box(2.0, h, None).sum())(h),
        lambda: jax.grad(lambda p: box(p, h, None).sum())(2.0),
        lambda: jax.jvp(lambda h: box(2.0, h, None), (h,), (h,)),
        lambda: jax.jit(jax.grad(lambda h: jax.vmap(box, (None, 0, None))(2.0, h, None).sum()))(h),
    ):
        with pytest.raises(ConfigError, match="black box 'square' was differentiated"):
            broken()
    assert jax.grad(lambda h: (h * box(2.0, jax.lax.stop_gradient(h), None)).sum())(h).shape == (3,)


def with_boxes(net, wrap):
    """A network whose systems are wrapped as boxes of one's own."""
    new = tree.copy(net)
    for layer in new.layers:
        layer.box = BlackBox(wrap(layer.box), layer.box.outputs)
    return new


def test_a_box_that_raises_when_differentiated_changes_nothing(key):
    """The same bits as of the systems themselves, and backpropagation does raise."""
    net = SMALL.make(key=key)
    closed = with_boxes(net, lambda system: opaque(lambda params, h, key: system(h, key)))
    ends = []
    for model in (net, closed):
        state = RULE.init(model, key)
        for position in range(2):
            state, _ = RULE.step(state, rows(position))
        ends.append([layer.map for layer in state.model.layers])
        scores = RULE.predict(state, rows()[0])
    for a, b in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_array_equal(a, b)
    assert scores.shape == (12, 4)
    other = backprop(contrast(), informed=True)
    with pytest.raises(ConfigError, match="black box .*lambda.* was differentiated"):
        other.step(other.init(closed, key), rows())
    with pytest.raises(ConfigError, match="black box 'Transmission' was differentiated"):
        jax.grad(lambda x: net(x, key, opaque_boxes(net)).sum())(jnp.asarray(rows()[0]))


def noise_of(seed, shape):
    return np.random.default_rng(seed).normal(size=shape)


def test_hardware_is_asked_from_inside_of_compiled_steps(key):
    asked = []

    def device(params, h, seed):
        asked.append((type(h), h.shape, seed.dtype))
        return np.tanh(h @ params) + 0.1 * noise_of(seed, (len(h), 3))

    w = jax.random.normal(key, (5, 3))
    h = jax.random.normal(key, (4, 5))
    box = external(device, 3)
    words = np.asarray(jax.random.key_data(key))
    expected = np.tanh(np.asarray(h) @ np.asarray(w)) + 0.1 * noise_of(words, (4, 3))
    for call in (box, jax.jit(box)):
        np.testing.assert_allclose(call(w, h, key), expected, rtol=1e-5)
    np.testing.assert_allclose(box(w, h, jax.random.key_data(key)), expected, rtol=1e-5)
    quiet = np.tanh(np.asarray(h) @ np.asarray(w)) + 0.1 * noise_of(np.zeros(2, np.uint32), (4, 3))
    np.testing.assert_allclose(box(w, h, None), quiet, rtol=1e-5)
    several = jax.vmap(box, (None, 0, None))(w, jnp.stack([h, 2 * h]), key)
    np.testing.assert_allclose(several[0], expected, rtol=1e-5)
    assert {shape for _, shape, _ in asked} == {(4, 5)} and asked[0][2] == np.uint32
    assert box(w, h.astype(jnp.bfloat16), key).dtype == jnp.bfloat16
    with pytest.raises(Exception, match="black box 'device' gives shape .4, 3., and not .4, 2."):
        jax.block_until_ready(external(device, (2,))(w, h, key))
    with pytest.raises(ConfigError, match="shape=0"):
        external(device, 0)
    with pytest.raises(ConfigError, match="black box 'device' was differentiated"):
        jax.grad(lambda h: opaque(box)(w, h, key).sum())(h)


@pytest.mark.parametrize("together", [1, 3])
def test_a_network_learns_around_hardware(together, key):
    """What a simulation on the host answers is learned from as the same simulation in JAX."""
    config = dataclasses.replace(SMALL, system="tanh_chain", noise=0.0)
    net = config.make(key=key)

    def on_host(system):
        a, b, c = np.asarray(system.gains[...])

        def chain(params, h, seed):
            u, s = np.abs(h) / np.sqrt((h**2).mean(-1, keepdims=True)), np.zeros_like(h)
            for _ in range(8):
                before, after = np.zeros_like(h), np.zeros_like(h)
                before[:, 1:], after[:, :-1] = s[:, :-1], s[:, 1:]
                s = np.tanh(a * u + b * before + c * after)
            return s

        return external(chain, system.outputs)

    outside, rule = with_boxes(net, on_host), physical_ff(optax.sgd(0.5), inner=2)
    run = functools.partial(train, key=key, options=QUIET, together=together)
    source = ArrayBatches(rows(n=24), 8)
    states = [run(rule, model, source, 3).state for model in (net, outside)]
    for a, b in zip(*(s.model.layers for s in states), strict=True):
        np.testing.assert_allclose(a.map.weight.dense(), b.map.weight.dense(), atol=2e-4)
    found = [rule.predict(state, rows()[0]) for state in states]
    np.testing.assert_allclose(*found, atol=1e-3)


# The loop.


def bits(state):
    data = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x  # noqa: E731
    return [np.asarray(data(leaf)).tobytes() for leaf in jax.tree.leaves(state)]


def test_a_resumed_run_ends_in_the_same_bits(key, tmp_path):
    source = ArrayBatches(rows(n=60), 12)
    run = functools.partial(
        train, RULE, SMALL.make(key=key), source, key=key, options=QUIET, together=2
    )
    whole = run(5)
    run(3, folder=tmp_path)
    assert bits(run(5, folder=tmp_path, resume=True).state) == bits(whole.state)


@pytest.mark.slow
def test_members_are_runs_of_their_own(key):
    make = lambda theta: physical_ff(optax.sgd(0.1), inner=2, theta=theta)  # noqa: E731
    start = jax.vmap(lambda key: SMALL.make(key=key))(jax.random.split(key, 2))
    rule = members(make, 2, vary={"theta": [2.0, 5.0]})
    state = rule.init(start, key)
    state, metrics = rule.step(state, rows())
    losses = []
    for i, theta in enumerate((2.0, 5.0)):
        alone, mine = make(theta), jax.tree.map(lambda leaf, i=i: leaf[i], start)
        mine, found = alone.step(alone.init(mine, jax.random.fold_in(key, i)), rows())
        losses.append(float(found["loss"]))
        for a, b in zip(*map(jax.tree.leaves, (rule.model(state), mine.model)), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=2e-5, atol=2e-6)
        scores = rule.predict(state, rows()[0])[i]
        np.testing.assert_allclose(scores, alone.predict(mine, rows()[0]), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-5)


# A plain network.


def test_a_plain_network_learns_by_it(key):
    """An MLP stays one; its class is written over its first inputs, its outputs count them."""
    data = gaussian_clusters(0, train=600, test=200, classes=4, per_class=2, width=24, noise=0.7)
    model = MLP((24, 32, 32, 4), key=key, activation="gelu")
    rule = physical_ff(optax.adam(5e-3), inner=3)
    found = train(
        rule, model, ArrayBatches(data[0], 100), 60, key=key, options=QUIET, together=30
    ).state
    assert accuracy(rule, found, data[1]) > 0.8
    assert jax.tree.structure(rule.model(found)) == jax.tree.structure(model)
    assert [p.shape for p in found.directions] == [(32,), (32,), (4,)]
    x = jnp.asarray(data[1].x)
    by_hand = np.zeros((200, 4))
    for c in range(4):
        h = x.at[:, :4].set(jax.nn.one_hot(c, 4) * jnp.abs(x).max(1, keepdims=True))
        for stage, p in zip(found.model.stages, found.directions, strict=True):
            h = stage(h)
            by_hand[:, c] += cosines(np.asarray(h), np.asarray(p))
    np.testing.assert_allclose(rule.predict(found, x), by_hand, rtol=1e-3, atol=1e-4)


def test_refusals(key):
    for options, message in (
        ({"inner": 0}, "inner=0 must be at least 1"),
        ({"theta": 0.0}, "theta=0.0 must be positive"),
        ({"theta": float("nan")}, "theta=nan"),
        ({"theta": float("inf")}, "theta=inf must be positive and finite"),
    ):
        with pytest.raises(ConfigError, match=message):
            physical_ff(**options)
    with pytest.raises(ConfigError, match="theta=-1.0"):
        contrast(-1.0)
    rule = physical_ff()
    for model, message in (
        (Linear(3, 2, key=key, axes=("embed", "mlp")), "model is a Linear; a PhysicalNet or"),
        (MLP((5, 1), key=key), "classes=1 must be at least 2"),
        (MLP((3, 8, 4), key=key), "inputs=3 are too few to write 4 classes over"),
    ):
        with pytest.raises(ConfigError, match=message):
            rule.init(model, key)
    net = SMALL.make(key=key)
    net.layers[1].box = BlackBox(lambda params, h, key: h[:, :3], 7)
    with pytest.raises(ValueError, match=r"gives shape \(1, 3\) of \(1, 8\); it says \(1, 7\)"):
        rule.init(net, key)
    state, (x, y) = rule.init(SMALL.make(key=key), key), rows()
    rule.check(state, (x, y))
    with pytest.raises(ValueError, match=r"x has shape \(12, 4\); the network takes rows \[n, 5\]"):
        rule.check(state, (x[:, :4], y))
    with pytest.raises(ValueError, match="0 to 3 are there"):
        rule.check(state, (x, y + 1))
    for batch, message in (
        (x, "batch is a ndarray; .x, y. is accepted"),
        ((x, y, y), "batch is a tuple"),
        ((x, y[:4]), r"x has 12 rows, y shape \(4,\); a class for each"),
        ((x, np.zeros((12, 4), int)), r"y shape \(12, 4\)"),
        ((x[:0], y[:0]), "x has 0 rows"),
        ((x, y + 0.5), "y is float64; classes are whole numbers, 0 to 3"),
    ):
        with pytest.raises(ValueError, match=message):
            rule.check(state, batch)
    first = SMALL.make(key=key).layers[0]
    with pytest.raises(ConfigError, match=r"the layers do not read rows of 4 \+ 5 one after"):
        rule.init(PhysicalNet([first, first], inputs=5, classes=4, slots=4), key)
    with pytest.raises(ConfigError, match="layers=0 must be at least 1"):
        PhysicalNet([], inputs=5, classes=4, slots=4)
