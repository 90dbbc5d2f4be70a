"""Counter-current learning: the authors' losses and gradients, locality, what feedback does."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from ffnlab.data import ArrayBatches, digits, gaussian_clusters
from ffnlab.layers import MLP
from ffnlab.learning import backprop, labelled
from ffnlab.learning.counter_current.rule import (
    MapLoss,
    PairLoss,
    centralize,
    counter_current,
    flow,
    local_losses,
    mirrored,
)
from ffnlab.models.convnet import ConvAutoencoder, ConvMirror, ConvNet
from ffnlab.weights import Dense

COSINE = {"kind": "cosine", "scale": 1.0, "contrast": 0.5}
CASES = {
    "mlp": PairLoss(),
    "mlp_skip": PairLoss(skip_confident=True),
    "cnn": PairLoss(**COSINE),
    "cnn_skip": PairLoss(**COSINE, skip_confident=True),
}


@pytest.fixture(scope="module")
def official(fixtures):
    """The recorded figures, and the script that drew the weights."""
    folder = fixtures / "counter_current"
    spec = importlib.util.spec_from_file_location("record", folder / "record.py")
    record = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(record)
    return record, np.load(folder / "official.npz")


def networks(name, record, key):
    """Our pair of networks with the recorded weights, layers of F in order and of B in reverse."""
    if "mlp" in name:
        model = MLP(record.MLP_SIZES, key=key, activation="elu", bias=False)
        mirror = mirrored(model, key)
        up, down = list(model.maps), list(mirror.maps)[::-1]
    else:
        model = ConvNet(record.CHANNELS, 10, key=key)
        mirror = ConvMirror(model, key)
        up = [*model.convs, model.head]
        down = [mirror.head, *mirror.convs][::-1]
    for side, layers in enumerate((up, down)):
        for i, layer in enumerate(layers):
            w = record.weights(layer.weight.shape, 100 * side + i)
            w = w * 30 if "skip" in name and not side and i == len(layers) - 1 else w
            layer.w = type(layer.w)(Dense(jnp.asarray(w)), axes=layer.w.axes)
    return model, mirror, up, down


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_the_authors(name, official, key):
    record, expected = official
    with jax.enable_x64(True):
        model, mirror, *_ = networks(name, record, key)
        x, _ = record.batch((784,) if "mlp" in name else (32, 32, 3), 7)
        y = jnp.asarray(expected[f"{name}.y"])

        @jax.jit
        @jax.value_and_grad
        def total(both):
            return sum(local_losses(*both, jnp.asarray(x), y, CASES[name])[0])

        loss, (model, mirror) = total((model, mirror))
        np.testing.assert_allclose(loss, expected[f"{name}.total"], rtol=1e-10)
        layers = {
            "up": list(model.maps) if "mlp" in name else [*model.convs, model.head],
            "down": list(mirror.maps)[::-1]
            if "mlp" in name
            else [mirror.head, *mirror.convs][::-1],
        }
        for side, parts in layers.items():
            for i, layer in enumerate(parts):
                gradient = np.asarray(layer.weight.dense())
                found = gradient @ record.probe(gradient.shape[1])
                np.testing.assert_allclose(found, expected[f"{name}.{side}{i}"], atol=1e-10)


def test_inputs_are_left_out_from_nine_tenths_of_confidence_on():
    """Of the pairs below the scores, not of the cross-entropy."""
    codes = [jnp.eye(3, 4), jnp.eye(3)]
    low = jnp.ones((1, 4))

    def losses(p, skip):
        rest = (1 - p) / 2
        scores = jnp.log(jnp.array([[p, rest, rest]]))
        return PairLoss(skip_confident=skip).losses([low, scores], codes, jnp.array([0]))

    for p in (0.5, 0.89):
        np.testing.assert_array_equal(losses(p, True), losses(p, False))
    pair, entropy = losses(0.91, True)
    assert pair == 256 / 4 * 0.5 / 3, "activations of 0 against the one class"
    assert pair != losses(0.91, False)[0]
    assert entropy == pytest.approx(-np.log(0.91), rel=1e-5)


SIZES = (6, 8, 7, 4)


@pytest.fixture
def pair(key):
    model = MLP(SIZES, key=key, activation="elu", bias=False)
    return model, mirrored(model, jax.random.key(1))


@pytest.fixture
def batch():
    random = np.random.default_rng(0)
    return random.normal(size=(12, 6)).astype(np.float32), random.integers(0, 4, 12)


def nonzero(tree):
    """Which maps of a network have any gradient."""
    return [bool(np.any(linear.weight.dense() != 0)) for linear in tree.maps]


def test_each_loss_changes_its_own_layer_only(pair, batch):
    x, y = jnp.asarray(batch[0]), jnp.asarray(batch[1])
    for i in range(4):
        up, down = jax.jit(jax.grad(lambda b, i=i: local_losses(*b, x, y)[0][i]))(pair)
        # Pair i: W_i (maps[i - 1]) and V_{i + 1}, the mirror's map number L - 1 - i.
        assert nonzero(up) == [layer == i - 1 for layer in range(3)]
        assert nonzero(down) == [layer == 2 - i for layer in range(3)] if i < 3 else True
    assert nonzero(down) == [False] * 3, "the cross-entropy changes the scores' map alone"


def test_activations_depend_on_all_layers_but_derivatives_do_not(pair, batch):
    """The Jacobian across layers is zero though the function is not constant."""
    model, _ = pair
    x = jnp.asarray(batch[0])
    through = jax.jacobian(lambda x: flow(model, x)[-1])(x)
    assert not np.any(through)
    assert np.any(flow(model, x)[-1] != flow(model, x + 1)[-1])


def test_a_step_is_two_clipped_gradient_steps(pair, batch):
    model, mirror = pair
    rule = counter_current(mirror=lambda m, k: mirror)
    state, metrics = rule.step(rule.init(model, jax.random.key(0)), batch)
    x, y = map(jnp.asarray, batch)
    total = lambda both: sum(local_losses(*both, x, y)[0])  # noqa: E731
    loss, gradients = jax.value_and_grad(total)(pair)
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)
    for old, new, gradient in zip(pair, (state.model, state.mirror), gradients, strict=True):
        flat, unravel = ravel_pytree(gradient)
        clipped = unravel(flat / max(1.0, float(jnp.linalg.norm(flat))))
        expected = jax.tree.map(lambda w, g: w - g, old, clipped)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), new, expected)


def test_the_mirror_never_changes_the_way_forward(key, batch):
    model = MLP(SIZES, key=key, activation="elu", bias=False)
    rule = counter_current()
    a, b = (rule.init(model, jax.random.key(seed)) for seed in (0, 1))
    assert np.any(a.mirror.maps[0].weight.w != b.mirror.maps[0].weight.w)
    for state in (a, b):
        np.testing.assert_array_equal(rule.predict(state, batch[0]), jax.jit(model)(batch[0]))


def test_without_feedback_hidden_layers_rest(pair, batch):
    model, mirror = pair
    still = jax.tree.map(jnp.zeros_like, mirror)
    rule = counter_current(mirror_optimizer=optax.set_to_zero(), mirror=lambda m, k: still)
    state, _ = rule.step(rule.init(model, jax.random.key(0)), batch)
    for i, (old, new) in enumerate(zip(model.maps, state.model.maps, strict=True)):
        assert np.array_equal(old.weight.w, new.weight.w) == (i < 2)


def test_rows_of_the_batch_may_be_read(pair, batch):
    x, y = jnp.asarray(batch[0]), jnp.asarray(batch[1])
    losses, _ = local_losses(*pair, x, y, PairLoss(rows="batch"))
    codes = flow(pair[1], jax.nn.one_hot(y, 4))[::-1]
    activations = flow(pair[0], x)
    same = (y[:, None] == y[None, :]).astype(np.float32)
    for loss, a, c in zip(losses[:-1], activations[:-1], codes[:-1], strict=True):
        expected = 128 / a.shape[1] * np.mean(np.square(a @ c.T - same))
        assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_centralized_gradients_sum_to_zero(key):
    gradient = {"w": jax.random.normal(key, (9, 5)), "k": jax.random.normal(key, (3, 3, 4, 5))}
    gradient["b"] = jnp.ones(5)
    found, _ = centralize().update(gradient, centralize().init(gradient))
    for name in ("w", "k"):
        assert np.abs(found[name].reshape(-1, 5).sum(axis=0)).max() < 1e-5
    np.testing.assert_array_equal(found["b"], 1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_it_learns_as_backpropagation_does(seed):
    """The card's third and fourth points."""
    from ffnlab.studies.classify import accuracy, learned

    rows, test = gaussian_clusters(seed)
    options = {"batch": 256, "steps": 15 * 8000 // 256, "seed": seed}
    key = jax.random.key(seed)
    model = MLP((64, 128, 128, 128, 10), key=key, activation="elu", bias=False)

    def reached(rule):
        return accuracy(rule, learned(rule, model, rows, **options), test)

    ours = reached(counter_current())
    theirs = reached(backprop(labelled, optax.sgd(0.3)))
    zero = lambda m, k: jax.tree.map(jnp.zeros_like, mirrored(m, k))  # noqa: E731
    rest = optax.set_to_zero()
    readout = reached(counter_current(mirror_optimizer=rest, mirror=zero))
    frozen = reached(counter_current(mirror_optimizer=rest))
    assert ours >= 0.97 and ours >= readout + 0.05 and ours >= theirs - 0.02
    assert ours >= frozen - 0.01


def test_it_learns_clusters():
    data = gaussian_clusters(0, train=600, test=200, classes=4, per_class=2, width=16, noise=0.6)
    rule = counter_current()
    model = MLP((16, 32, 32, 4), key=jax.random.key(0), activation="elu", bias=False)
    state, batches = rule.init(model, jax.random.key(0)), ArrayBatches(data[0], 100)
    for position in range(60):
        state, metrics = rule.step(state, batches(position))
    scores = rule.predict(state, jnp.asarray(data[1].x))
    assert np.mean(np.argmax(scores, -1) == data[1].y) > 0.9
    assert int(state.step) == 60 and 0 <= float(metrics["accuracy"]) <= 1


def test_refusals(pair, batch):
    x, y = batch
    rule = counter_current()
    state = rule.init(pair[0], jax.random.key(0))
    with pytest.raises(ValueError, match="; 0 to 3 are there"):
        rule.check(state, (x, np.where(y == 0, 4, y)))
    with pytest.raises(ValueError, match="no rows"):
        local_losses(*pair, jnp.zeros((0, 6)), jnp.zeros(0, int))
    with pytest.raises(ValueError, match="meet codes of shape"):
        local_losses(pair[0], MLP((4, 7, 9, 6), key=jax.random.key(0)), *map(jnp.asarray, batch))
    with pytest.raises(ValueError, match="3 and 1 stages"):
        local_losses(pair[0], MLP((4, 6), key=jax.random.key(0)), *map(jnp.asarray, batch))
    for bad in ({"kind": "l2"}, {"scale": 0.0}, {"contrast": -1.0}, {"rows": "all"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            PairLoss(**bad)


def autoencoders(key):
    """(F, B, inputs) of rows and of images."""
    first, second, third = jax.random.split(key, 3)
    rows = MLP((6, 5, 3, 5, 6), key=first, activation="elu")
    images = ConvAutoencoder((1, 3, 2), key=first)
    return {
        "rows": (rows, mirrored(rows, second), jax.random.normal(third, (7, 6))),
        "images": (images, images.mirror(second), jax.random.normal(third, (3, 8, 8, 1))),
    }


def per_stage(network):
    """The weights of a network by stage."""
    maps = network.maps if isinstance(network, MLP) else [*network.down, *network.up]
    return [layer.weight.dense() for layer in maps]


def loss_in_numpy(a, c, is_end):
    """The formula of `MapLoss`, written out, with scale 1 and contrast 1."""
    if is_end:
        return np.mean((a - c) ** 2)
    total, normal = 0.0, []
    for z in (a, c):
        axes = tuple(range(z.ndim - 1))
        normal.append((z - z.mean(axes)) / np.sqrt(z.var(axes) + 1e-5))
        rows = normal[-1].reshape(len(z), -1)
        cosines = rows @ rows.T / np.outer(*[np.sqrt((rows**2).sum(1)) + 1e-8] * 2)
        total += np.mean((cosines - np.eye(len(z))) ** 2)
    return total + np.mean((normal[0] - normal[1]) ** 2)


@pytest.mark.parametrize("kind", ["rows", "images"])
def test_each_loss_of_an_autoencoder_changes_its_own_layer_only(kind, key):
    model, mirror, x = autoencoders(key)[kind]
    losses = lambda both: jnp.stack(local_losses(*both, x, x, MapLoss())[0])  # noqa: E731
    up, down = jax.jit(jax.jacobian(losses))((model, mirror))
    for i in range(5):
        moved = [[bool(np.any(w[i] != 0)) for w in per_stage(side)] for side in (up, down)]
        assert moved[0] == [layer == i - 1 for layer in range(4)]
        assert moved[1] == [layer == 3 - i for layer in range(4)]


@pytest.mark.parametrize("kind", ["rows", "images"])
def test_gradients_of_an_autoencoder_are_differences_of_the_written_formula(kind, key):
    with jax.enable_x64(True):
        to64 = lambda t: jax.tree.map(lambda p: p.astype(float), t)  # noqa: E731
        model, mirror, x = to64(autoencoders(key)[kind])
        activations = [np.asarray(a) for a in flow(model, x)]
        codes = [np.asarray(c) for c in flow(mirror, x)[::-1]]
        total = lambda both: sum(local_losses(*both, x, x, MapLoss())[0])  # noqa: E731
        loss, sides = jax.jit(jax.value_and_grad(total))((model, mirror))
        pairs = enumerate(zip(activations, codes, strict=True))
        written = sum(loss_in_numpy(a, c, i in (0, 4)) for i, (a, c) in pairs)
        assert float(loss) == pytest.approx(written, rel=1e-10)
        # Stage i of F makes a[i + 1], stage i of B c[3 - i]; the input of either is held.
        for up, network, found in zip((True, False), (model, mirror), sides, strict=True):
            for i, gradient in enumerate(per_stage(found)):
                level = i + 1 if up else 3 - i
                start = activations[i] if up else codes[4 - i]
                flat, unravel = ravel_pytree(network)
                step = 1e-6 * np.random.default_rng(i).normal(size=flat.shape)

                def value(shifted, i=i, start=start, level=level, up=up):
                    made = np.asarray(shifted.stages[i](jnp.asarray(start)))
                    pair = (made, codes[level]) if up else (activations[level], made)
                    return loss_in_numpy(*pair, level in (0, 4))

                # `value` runs stage i alone: shifts of the other stages are without effect.
                moved = per_stage(unravel(jnp.asarray(step)))[i]
                slope = float(jnp.sum(gradient * moved)) + bias_part(found, unravel(step), i)
                change = (value(unravel(flat + step)) - value(unravel(flat - step))) / 2
                assert change == pytest.approx(slope, rel=1e-4, abs=1e-11)


def bias_part(gradient, shift, i):
    """What the bias of stage i adds to a directional derivative."""
    if not isinstance(gradient, MLP) or gradient.maps[i].b is None:
        return 0.0
    return float(jnp.sum(gradient.maps[i].b[...] * shift.maps[i].b[...]))


@pytest.mark.slow
def test_an_autoencoder_of_digits_learns_without_labels(key):
    train, test = digits(0)
    model = MLP((64, 128, 32, 128, 64), key=key, activation="elu")
    rule = counter_current(MapLoss(), optax.adam(2e-3))
    state, batches = rule.init(model, key), ArrayBatches(train.x, 64)
    for position in range(400):
        state, metrics = rule.step(state, batches(position))
    error = np.mean((rule.predict(state, jnp.asarray(test.x)) - test.x) ** 2)
    of_mean = np.mean((train.x.mean(0) - test.x) ** 2)
    assert error < 0.6 * of_mean and float(metrics["error"]) < 0.6 * of_mean
    assert float(metrics["top"]) == pytest.approx(float(metrics["error"]))


def test_an_autoencoder_s_constant_maps_have_finite_gradients(key):
    model, mirror, x = autoencoders(key)["rows"]
    still = jax.tree.map(jnp.zeros_like, (model, mirror))
    total = lambda both: sum(local_losses(*both, x, x, MapLoss())[0])  # noqa: E731
    assert np.isfinite(ravel_pytree(jax.jit(jax.grad(total))(still))[0]).all()


def test_refusals_of_an_autoencoder(key):
    model, mirror, x = autoencoders(key)["rows"]
    rule = counter_current(MapLoss())
    for bad in ((x, x), np.zeros((3, 6), np.uint8), x[:, None]):
        with pytest.raises(ValueError, match="takes its inputs alone"):
            rule.check(rule.init(model, key), bad)
    with pytest.raises(ValueError, match="no rows"):
        local_losses(model, mirror, x[:0], x[:0], MapLoss())
    with pytest.raises(ValueError, match="the mirror must fit"):
        local_losses(model, MLP((6, 5, 4, 5, 6), key=key), x, x, MapLoss())
    for bad in ({"scale": 0.0}, {"contrast": -1.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            MapLoss(**bad)
    for channels in ((1,), (1, 0)):
        with pytest.raises(ValueError, match="channels="):
            ConvAutoencoder(channels, key=key)
    with pytest.raises(ValueError, match="6 x 6|3 x 3"):
        ConvAutoencoder((1, 3, 2), key=key)(jnp.zeros((2, 6, 6, 1)))
