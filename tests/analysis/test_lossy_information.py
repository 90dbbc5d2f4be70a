"""Compression and what layers know: against closed forms, SVD and what must not change."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ffnlab import tree
from ffnlab.analysis import (
    activations,
    components_of,
    lossy_information,
    nearest_information,
    principal,
)
from ffnlab.analysis.principal import INPUT
from ffnlab.errors import ConfigError, NumericalError, SelectionError
from ffnlab.layers import MLP, Noisy
from ffnlab.learning import backprop, fitted_by
from ffnlab.models import ConvNetConfig
from ffnlab.transform import apply, calibrate

NET = MLP((5, 8, 7, 4), activation="tanh", key=jax.random.key(0))
X = jax.random.normal(jax.random.key(1), (60, 5)) @ jnp.diag(jnp.array([3.0, 1, 1, 0.5, 0.1]))


def fitted(model, *batches, **options):
    """Stats of `principal`."""
    return calibrate(principal(batches[0], **options), model, batches, progress=False)


def test_components_are_those_of_a_singular_value_decomposition():
    stats = fitted(NET, X[:13], X[13:])
    for name, rows in {
        INPUT: X,
        "maps[0]": jnp.tanh(NET.maps[0](X)),
        "maps[2]": NET(X),
    }.items():
        rows = np.asarray(rows, np.float64)
        found = components_of(stats[name], 3)
        _, values, axes = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
        assert np.asarray(found.mean) == pytest.approx(rows.mean(0), abs=1e-5)
        assert np.abs(np.asarray(found.axes.T @ axes[:3].T)) == pytest.approx(np.eye(3), abs=2e-3)
        assert np.asarray(found.shares) == pytest.approx(
            values[:3] ** 2 / (values**2).sum(), abs=1e-5
        )
        assert np.asarray(found.axes)[np.abs(found.axes).argmax(0), range(3)].min() > 0
        spread = np.asarray(found.codes(jnp.asarray(rows, jnp.float32)).std(0))
        assert spread == pytest.approx(values[:3] / math.sqrt(60), rel=1e-3)


def test_no_more_components_than_rank():
    flat = jnp.ones((30, 4)) * jnp.array([1.0, 2, 3, 4])
    net = MLP((4, 3), key=jax.random.key(0))
    assert components_of(fitted(net, flat)[INPUT], 4).axes.shape == (4, 0)
    line = jnp.linspace(-1, 1, 30)[:, None] * jnp.array([1.0, 2, 3, 4])
    found = components_of(fitted(net, line)[INPUT], 4)
    assert found.axes.shape == (4, 1) and found.shares == pytest.approx([1.0])
    report = lossy_information(fitted(net, flat))(net, [(flat, np.arange(30) % 2)], progress=False)
    assert report.layers["maps[0]"].x == (0.0, 0.0) == report.layers["maps[0]"].y


def test_a_rewritten_model_sees_the_components_alone():
    whole, stats = apply(principal(X, components=8), NET, [X], progress=False)
    assert np.asarray(whole(X)) == pytest.approx(np.asarray(NET(X)), abs=1e-5)
    less = principal(X, components=2, select="maps[1]").rewrite(NET, {"maps[1]": stats["maps[1]"]})
    h = jnp.tanh(NET.maps[1](jnp.tanh(NET.maps[0](X))))
    found = components_of(stats["maps[1]"], 2)
    seen = found.mean + found.codes(h) @ found.axes.T
    assert np.asarray(less(X)) == pytest.approx(np.asarray(NET.maps[2](seen)), abs=1e-5)
    assert not np.allclose(less(X), NET(X), atol=1e-2)
    last = principal(X, components=1).rewrite(NET, {"maps[2]": stats["maps[2]"]})
    assert np.linalg.matrix_rank(last(X) - last(X).mean(0), tol=1e-4) == 1
    noisy = principal(X, components=2).rewrite(Noisy(NET, 0.1), {"maps[1]": stats["maps[1]"]})
    assert isinstance(noisy, Noisy) and np.array_equal(noisy(X), less(X))


def test_convolutions_have_stats_and_are_not_rewritten():
    net = ConvNetConfig((1, 3, 4), 5).make(key=jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (30, 4, 4, 1))
    transform = principal(images, select="convs[*]")
    stats = calibrate(transform, net, [(images, np.zeros(30, int))], progress=False)
    assert {name: len(found.mean) for name, found in stats.items()} == {
        "convs[0]": 48,
        "convs[1]": 16,
        INPUT: 16,
    }
    with pytest.raises(ConfigError, match=r"convs\[0\] is a Conv; components are folded into"):
        transform.rewrite(net, stats)


def test_information_of_a_channel_of_gaussians():
    """T = X + s Z has d/2 log(1 + 1/s^2), which falls as s grows."""
    x = jax.random.normal(jax.random.key(0), (4000, 2))
    y = (np.asarray(x)[:, 0] > 0).astype(int)
    identity = MLP((2, 2), key=jax.random.key(0), bias=False)
    identity = jax.tree.map(lambda leaf: jnp.eye(2), identity)
    known = []
    for s in (0.1, 0.3, 0.6, 1.0, 2.0):
        model = Noisy(identity, s, relative=False)
        stats = fitted(model, x)
        probe = lossy_information(stats, key=jax.random.key(3))
        report = probe(model, [(x[:1000], y[:1000]), (x[1000:], y[1000:])], progress=False)
        found = report.layers["maps[0]"]
        nats = found.x.value * math.log(2)
        assert nats == pytest.approx(math.log(1 + 1 / s**2), abs=0.15)
        assert found.components == 2 and found.kept == pytest.approx(1, abs=1e-5)
        assert -0.1 < found.y.value < report.labels + 0.1
        known.append(nats)
    assert known == sorted(known, reverse=True)
    assert report.figures()["input/maps[0]"] == found.x.value


def test_what_is_lost_is_not_known():
    """One of two equal components carries half of the information."""
    random = np.random.default_rng(0)
    rho = math.sqrt(1 - math.exp(-2))  # one nat each
    x = random.standard_normal((5000, 2))
    t = rho * x + math.sqrt(1 - rho**2) * random.standard_normal((5000, 2))
    assert nearest_information(x, t).value == pytest.approx(2, abs=0.12)
    assert nearest_information(x[:, :1], t[:, :1]).value == pytest.approx(1, abs=0.12)


def test_layers_of_a_noisy_network_have_its_noise():
    model = Noisy(NET, 0.1, relative=False)
    quiet, told = activations(model, X), activations(model, X, key=jax.random.key(2))
    plain = activations(NET, X)
    assert list(quiet) == list(told) == list(plain) == ["maps[0]", "maps[1]", "maps[2]"]
    for name in plain:
        assert np.array_equal(quiet[name].value, plain[name].value)
        assert quiet[name].stage == told[name].stage == plain[name].stage
        assert 0.01 < jnp.abs(told[name].value - plain[name].value).mean() < 1
    only = activations(model, X, "maps[1]", key=jax.random.key(2))
    assert np.array_equal(only["maps[1]"].value, told["maps[1]"].value) and len(only) == 1


def test_rows_draw_alike_however_they_are_divided():
    model, y = Noisy(NET, 0.3), np.arange(60) % 2
    probe = lossy_information(fitted(model, X), components=2, key=jax.random.key(0))
    one = probe(model, [(X, y)], progress=False)
    parts = probe(model, [(X[:10], y[:10]), (X[10:20], y[10:20]), (X[20:], y[20:])], progress=False)
    for name, found in one.figures().items():
        assert parts.figures()[name] == pytest.approx(found, abs=1e-4)
    other = lossy_information(fitted(model, X), components=2, key=jax.random.key(1))
    assert other(model, [(X, y)], progress=False).figures() != one.figures()


def test_an_encoder_compresses_inputs():
    encode = tree.copy(NET.maps[0])
    stats = {name: found for name, found in fitted(NET, X).items() if name != INPUT}
    with pytest.raises(ConfigError, match="without 'input'; give encode"):
        lossy_information(stats)
    probe = lossy_information(stats, select="maps[1]", encode=lambda x: encode(x)[:, :2])
    report = probe(NET, [(X, np.arange(60) % 2)], progress=False)
    h = jnp.tanh(NET.maps[1](jnp.tanh(NET.maps[0](X))))
    codes = components_of(stats["maps[1]"]).codes(h)
    by_hand = nearest_information(np.asarray(encode(X)[:, :2]), np.asarray(codes))
    assert list(report.layers) == ["maps[1]"]
    assert report.layers["maps[1]"].x.value * math.log(2) == pytest.approx(by_hand.value, abs=1e-3)


def test_an_autoencoder_is_fitted_by_a_rule():
    net = MLP((5, 3, 5), key=jax.random.key(0), activation="tanh")

    def loss(model, batch):
        return jnp.mean((model(batch) - batch) ** 2), {}

    rule = backprop(loss, optax.adam(1e-2))
    transform = fitted_by(rule, key=jax.random.key(1), passes=3)
    new, stats = apply(transform, net, [X[:30], X[30:]], progress=False)
    assert int(stats.passes) == 3 and transform.name == "fitted_by(backprop)"
    state = rule.init(net, jax.random.key(1))
    for _ in range(3):
        for batch in (X[:30], X[30:]):
            state, _ = rule.step(state, batch)
    assert np.array_equal(new(X), rule.model(state)(X))
    assert loss(new, X)[0] < loss(net, X)[0]
    with pytest.raises(ConfigError, match="passes=0"):
        fitted_by(rule, key=jax.random.key(1), passes=0)


def test_bad_input_is_named():
    stats = fitted(NET, X)
    with pytest.raises(ConfigError, match="components=0"):
        principal(X, components=0)
    with pytest.raises(SelectionError):
        fitted(NET, X, select="nowhere")
    with pytest.raises(ConfigError, match="most=0"):
        lossy_information(stats, components=0)
    probe = lossy_information(stats)
    bad = fitted(NET, X.at[3, 1].set(jnp.nan))
    with pytest.raises(NumericalError, match="moments of a layer are not finite"):
        lossy_information(bad)
    with pytest.raises(ConfigError, match="pairs of inputs and classes"):
        probe(NET, [X], progress=False)
    with pytest.raises(ConfigError, match="labels are float32; classes, whole numbers"):
        probe(NET, [(X, np.ones(60, np.float32))], progress=False)
    same = components_of(stats["maps[0]"])
    probe = lossy_information(
        stats, select="maps[0]", encode=lambda x: same.codes(jnp.tanh(NET.maps[0](x)))
    )
    with pytest.raises(ConfigError, match="x and y together: the covariance has rank"):
        probe(NET, [(X, np.arange(60) % 2)], progress=False)
