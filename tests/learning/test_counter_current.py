"""Counter-current learning: the authors' losses and gradients, locality, what feedback does."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from ffnlab.data import ArrayBatches, gaussian_clusters
from ffnlab.layers import MLP
from ffnlab.learning import backprop, labelled
from ffnlab.learning.counter_current import (
    PairLoss,
    centralize,
    counter_current,
    flow,
    local_losses,
    mirrored,
)
from ffnlab.models.convnet import ConvMirror, ConvNet
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
    from ffnlab.studies.classify import fit

    data = gaussian_clusters(seed)
    options = {"batch": 256, "steps": 15 * 8000 // 256, "seed": seed}
    key = jax.random.key(seed)
    model = MLP((64, 128, 128, 128, 10), key=key, activation="elu", bias=False)
    ours = fit(counter_current(), model, data, **options)
    theirs = fit(backprop(labelled, optax.sgd(0.3)), model, data, **options)
    zero = lambda m, k: jax.tree.map(jnp.zeros_like, mirrored(m, k))  # noqa: E731
    rest = optax.set_to_zero()
    readout = fit(counter_current(mirror_optimizer=rest, mirror=zero), model, data, **options)
    frozen = fit(counter_current(mirror_optimizer=rest), model, data, **options)
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
        rule.step(state, (x, np.where(y == 0, 4, y)))
    with pytest.raises(ValueError, match="no rows"):
        local_losses(*pair, jnp.zeros((0, 6)), jnp.zeros(0, int))
    with pytest.raises(ValueError, match="meet codes of shape"):
        local_losses(pair[0], MLP((4, 7, 9, 6), key=jax.random.key(0)), *map(jnp.asarray, batch))
    with pytest.raises(ValueError, match="3 and 1 stages"):
        local_losses(pair[0], MLP((4, 6), key=jax.random.key(0)), *map(jnp.asarray, batch))
    for bad in ({"kind": "l2"}, {"scale": 0.0}, {"contrast": -1.0}, {"rows": "all"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            PairLoss(**bad)
