"""The information plane: what layers are, both informations of them, the bottleneck's curve."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import models
from ffnlab.analysis import (
    Cells,
    Kernels,
    activations,
    bottleneck,
    entropy,
    information_plane,
    joint_states,
    mutual_information,
)
from ffnlab.errors import ConfigError, NumericalError, SelectionError
from ffnlab.layers import MLP
from ffnlab.models import ConvNet
from ffnlab.testing import tiny

BITS = np.array(list(itertools.product([0, 1], repeat=5)), np.float32)
LABELS = (BITS.sum(1) > 2).astype(int)


@pytest.fixture
def net(key):
    return MLP((5, 4, 3, 2), key=key, activation="tanh")


def halves():
    return [(BITS[:20], LABELS[:20]), (BITS[20:], LABELS[20:])]


# What layers are.


def test_maps_of_an_mlp_are_looked_at_behind_their_nonlinearity(net):
    found, x = activations(net, BITS), jnp.asarray(BITS)
    assert [r.stage for r in found.values()] == ["after", "after", "output"]
    h = jnp.tanh(net.maps[0](x))
    np.testing.assert_array_equal(found["maps[0]"].value, h)
    np.testing.assert_array_equal(found["maps[1]"].value, jnp.tanh(net.maps[1](h)))
    np.testing.assert_array_equal(found["maps[2]"].value, net(x))
    assert list(activations(net, BITS, "maps[1]")) == ["maps[1]"]


def test_members_are_looked_at_together(key):
    nets = jax.vmap(lambda key: MLP((5, 4, 2), key=key))(jax.random.split(key, 3))
    found = jax.vmap(lambda net: {n: r.value for n, r in activations(net, BITS).items()})(nets)
    one = activations(jax.tree.map(lambda leaf: leaf[1], nets), BITS)
    assert found["maps[0]"].shape == (3, 32, 4)
    np.testing.assert_allclose(found["maps[0]"][1], one["maps[0]"].value, rtol=1e-6)


def test_modules_of_other_models_give_what_they_give(key):
    image = jnp.ones((2, 4, 4, 1))
    found = activations(ConvNet((1, 2, 3), 4, key=key), image, "convs[*]")
    assert {n: (r.value.shape, r.stage) for n, r in found.items()} == {
        "convs[0]": ((2, 4, 4, 2), "before"),
        "convs[1]": ((2, 2, 2, 3), "before"),
    }
    blocks = activations(models.unstack(models.stack(tiny())), jnp.ones((1, 3), int), "layers[*]")
    assert {r.stage for r in blocks.values()} == {"output"} and len(blocks) == 3
    inner = activations(tiny(), jnp.ones((1, 3), int))
    assert "layers[0].ffn.up" in inner and not {"layers[0]", "layers[0].ffn"} & set(inner)
    with pytest.raises(SelectionError):
        activations(tiny(), jnp.ones((1, 3), int), "nothing")
    with pytest.raises(SelectionError):
        activations(MLP((3, 2), key=key), jnp.ones((1, 3)), "nothing")


# The probe.


def test_it_is_the_information_of_all_rows(net):
    report = information_plane(bins=8)(net, halves())
    values = np.asarray(activations(net, BITS)["maps[0]"].value)
    states = joint_states(np.digitize(values, np.linspace(-1, 1, 8)))
    at = report.layers["maps[0]"]
    assert at.x == pytest.approx(entropy(states) / math.log(2), abs=1e-5)
    assert at.y == pytest.approx(mutual_information(states, LABELS) / math.log(2), abs=1e-5)
    assert (at.width, at.stage) == (4, "after")
    assert report.ceiling == pytest.approx(5) and report.labels == pytest.approx(1)
    for at in report.layers.values():
        assert -1e-6 <= at.y <= min(report.labels, at.x) + 1e-5 <= report.ceiling + 2e-5
    xs = [at.x for at in report.layers.values()]
    assert report.figures()["input/maps[0]"] == xs[0]


def test_the_end_of_an_mlp_is_its_probabilities(net):
    scores = np.asarray(net(jnp.asarray(BITS)))
    for probabilities, values in ((True, np.asarray(jax.nn.softmax(scores))), (False, scores)):
        report = information_plane(bins=8, probabilities=probabilities)(net, halves())
        states = joint_states(np.digitize(values, np.linspace(-1, 1, 8)))
        want = entropy(states) / math.log(2)
        assert report.layers["maps[2]"].x == pytest.approx(want, abs=1e-5)


def test_inputs_that_repeat_are_one_input(net):
    """H(T | X) is 0 of a network that draws nothing: twice the rows say nothing more."""
    once, twice = information_plane()(net, halves()), information_plane()(net, halves() + halves())
    assert twice.ceiling == pytest.approx(once.ceiling)
    for name, at in twice.layers.items():
        assert at.x == pytest.approx(once.layers[name].x, abs=1e-5)
        assert at.y == pytest.approx(once.layers[name].y, abs=1e-5)


def test_other_estimators_take_their_place(net):
    kernels = information_plane(estimate=Kernels(2, 0.01))(net, halves())
    values = activations(net, BITS)["maps[1]"].value
    want = Kernels(2, 0.01)(values, LABELS)
    assert kernels.layers["maps[1]"].x == pytest.approx(float(want.x) / math.log(2), abs=1e-4)
    assert "variance=0.01" in kernels.estimator
    adaptive = information_plane(adaptive=True, bins=4, low=-1.000001)(net, halves())
    want = Cells(4, -1.000001, adaptive=True)(values, LABELS)
    assert adaptive.layers["maps[1]"].x == pytest.approx(float(want.x) / math.log(2), abs=1e-5)


def test_a_network_that_gives_one_value_knows_nothing(net):
    still = jax.tree.map(jnp.zeros_like, net)
    report = information_plane()(still, halves())
    assert all(abs(at.x) < 1e-6 and abs(at.y) < 1e-6 for at in report.layers.values())


def test_places_of_a_text_are_inputs_and_the_next_tokens_their_classes():
    tokens = jnp.array([[1, 2, 3, 1, 2], [1, 2, 4, 1, 5]])
    flat = tiny()
    report = information_plane(select="layers[*].ffn.up", bins=3)(flat, [tokens])
    assert list(report.layers) == [f"layers[{i}].ffn.up" for i in range(3)]
    contexts = [tuple(row[: i + 1].tolist()) for row in np.asarray(tokens) for i in range(4)]
    states = [sorted(set(contexts)).index(c) for c in contexts]
    assert report.ceiling == pytest.approx(entropy(np.array(states)) / math.log(2), abs=1e-5)
    following = np.asarray(tokens)[:, 1:].ravel()
    assert report.labels == pytest.approx(entropy(following) / math.log(2), abs=1e-5)
    values = np.asarray(
        activations(flat, tokens[:, :-1], "layers[0].ffn.up")["layers[0].ffn.up"].value
    )
    codes = np.digitize(values.reshape(8, -1), np.linspace(-1, 1, 3))
    want = mutual_information(joint_states(codes), following) / math.log(2)
    assert report.layers["layers[0].ffn.up"].y == pytest.approx(want, abs=1e-5)
    stacked = information_plane(select="layers[*].ffn.up", bins=3)(models.stack(flat), [tokens])
    assert stacked.figures() == pytest.approx(report.figures(), abs=1e-5)


def test_what_cannot_be_measured_is_said(net):
    with pytest.raises(ConfigError, match="labels are float32"):
        information_plane()(net, [(BITS, LABELS.astype(np.float32))])
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, net)
    with pytest.raises(NumericalError, match=r"maps\[0\] gives NaN"):
        information_plane()(broken, halves())
    with pytest.raises(ConfigError, match="bins=1"):
        information_plane(bins=1)


# The curve.


def channel(flip):
    return jnp.array([[1 - flip, flip], [flip, 1 - flip]]) / 2


def nats(joint):
    joint = np.asarray(joint, float)
    p, q = joint.sum(1, keepdims=True), joint.sum(0, keepdims=True)
    return float((joint * np.log(np.maximum(joint, 1e-30) / (p * q))).sum())


def test_the_curve_of_a_two_by_two_channel_is_that_of_a_search(key):
    """Over encoders of two states, on a grid: none has a smaller objective."""
    joint, betas = channel(0.1), jnp.array([1.2, 3.0, 8.0])
    found = bottleneck(joint, betas, states=2, turns=400, key=key)
    p = np.linspace(0, 1, 201)
    a, b = np.meshgrid(p, p)
    encoders = np.stack([np.stack([a, 1 - a], -1), np.stack([b, 1 - b], -1)], -2)  # [., ., x, t]
    jt = encoders * 0.5
    pt = jt.sum(-2)
    log = lambda v: np.log(np.maximum(v, 1e-30))  # noqa: E731
    x = (jt * (log(encoders) - log(pt)[..., None, :])).sum((-1, -2))
    ty = np.einsum("...xt,xy->...ty", encoders, np.asarray(joint))
    y = (ty * (log(ty) - log(pt)[..., None] - math.log(0.5))).sum((-1, -2))
    for i, beta in enumerate(np.asarray(betas)):
        best = (x - beta * y).min()
        assert float(found.objective[i, -1]) == pytest.approx(best, abs=1e-4)
        assert float(found.x[i] - beta * found.y[i]) == pytest.approx(best, abs=1e-4)


def test_the_objective_does_not_rise(key):
    joint = jax.random.dirichlet(key, jnp.ones(24)).reshape(8, 3)
    found = bottleneck(joint, jnp.array([2.0, 5.0, 20.0]), states=4, turns=60, key=key)
    assert np.all(np.diff(np.asarray(found.objective), axis=1) <= 5e-6), "rounding of beta I(T;Y)"
    assert np.all(found.y <= nats(joint) + 1e-5) and np.all(found.y <= found.x + 1e-5)
    np.testing.assert_allclose(found.encoder.sum(-1), 1, atol=1e-5)


def test_a_great_beta_keeps_everything(key):
    found = bottleneck(channel(0.2), jnp.array([500.0]), states=2, key=key)
    assert float(found.y[0]) == pytest.approx(nats(channel(0.2)), abs=1e-4)
    assert float(found.x[0]) == pytest.approx(math.log(2), abs=1e-3)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"joint": channel(0.1) * 2}, "joint adds up to 2"),
        ({"joint": jnp.array([[1.5, -0.5]])}, "its least is -0.5"),
        ({"betas": jnp.array([0.0])}, "betas="),
        ({"betas": jnp.array([jnp.inf])}, "betas=.* positive and finite"),
        ({"states": 0}, "states=0"),
        ({"turns": 0}, "turns=0"),
    ],
)
def test_bad_distributions_are_named(key, changed, says):
    given = {"joint": channel(0.1), "betas": jnp.ones(1), "states": 2, "key": key} | changed
    with pytest.raises(ConfigError, match=says):
        bottleneck(given.pop("joint"), given.pop("betas"), **given)
