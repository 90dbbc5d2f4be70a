"""The transformer over sequences of numbers: by hand, and what it is without its parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffnlab import models
from ffnlab.errors import ConfigError
from ffnlab.learning import backprop, squares
from ffnlab.models import SequenceConfig

X = jax.random.normal(jax.random.key(1), (5, 4, 2))


def made(**options):
    return SequenceConfig(4, 2, 3, 8, 16, **options).make(key=jax.random.key(0))


def by_hand(net, x):
    """The module's formulas, head by head."""
    spec = net.attn.spec
    h = x @ net.embed.weight.dense() + net.positions.get_value().dense()
    total = h
    for head in range(spec.heads):
        part = slice(head * spec.head_dim, (head + 1) * spec.head_dim)
        q, k, v = (h @ m.weight.dense()[:, part] for m in (net.attn.q, net.attn.k, net.attn.v))
        weights = jax.nn.softmax(q @ k.swapaxes(-1, -2) / spec.head_dim**0.5, -1)
        total = total + weights @ v @ net.attn.o.weight.dense()[part]
    first, second = net.mlp.maps
    hidden = jax.nn.relu(total @ first.weight.dense() + first.bias)
    return hidden @ second.weight.dense() + second.bias


def test_it_is_its_formulas():
    net = made(heads=2, head_dim=3)
    assert np.asarray(net(X)) == pytest.approx(np.asarray(by_hand(net, X)), abs=1e-5)
    assert net(X).shape == (5, 4, 3)


@given(st.permutations(range(4)))
def test_without_positions_turned_inputs_give_turned_outputs(order):
    net, told = made(heads=2, positions=False), made(heads=2)
    order = np.array(order)
    turned = np.asarray(net(X[:, order]))
    assert turned == pytest.approx(np.asarray(net(X)[:, order]), rel=1e-5, abs=1e-6)
    if list(order) != [0, 1, 2, 3]:
        assert not np.allclose(told(X[:, order]), told(X)[:, order], atol=1e-3)


def test_without_heads_places_do_not_meet():
    net, mixing = made(heads=0), made(heads=1)
    other = X.at[:, 1].add(1.0)
    for model, meets in ((net, False), (mixing, True)):
        changed = np.abs(model(other) - model(X)).max((0, 2)) > 0
        assert changed.tolist() == [meets, True, meets, meets]
    assert net.attn is None and len(jax.tree.leaves(net)) == 6


def test_it_is_saved_and_learns(tmp_path):
    net = made(heads=2)
    models.save(net, tmp_path / "m", format="ffnlab")
    assert np.array_equal(models.load(tmp_path / "m")(X), net(X))
    rule = backprop(squares)
    state = rule.init(net, jax.random.key(0))
    batch = (X, jnp.ones((5, 4, 3)))
    losses = []
    for _ in range(20):
        state, metrics = rule.step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]
    apart = np.asarray(net(X)) - 1
    mean, told = squares(net, batch)
    assert losses[0] == pytest.approx(float(np.mean(apart**2)), rel=1e-5)
    assert told["rms"] == pytest.approx(float(mean) ** 0.5, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"heads": -1}, "heads=-1"),
        ({"head_dim": 0}, "head_dim=0"),
        ({"activation": "step"}, "step"),
    ],
)
def test_bad_sizes_are_named(options, said):
    with pytest.raises(ConfigError, match=said):
        made(**options)
    with pytest.raises(ConfigError, match="length=0"):
        SequenceConfig(0, 1, 1, 8, 8)


def test_another_length_is_refused():
    with pytest.raises(ConfigError, match=r"x has shape \(5, 4, 6\); \[b, 4, 2\] is accepted"):
        made()(X.repeat(3, axis=2))
    with pytest.raises(ConfigError, match="x has 3 places, the model was made for length=4"):
        made()(X[:, :3])
