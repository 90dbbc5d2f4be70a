"""The combination: its proximal map by its definition, its minimum beside a slow solver's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ffnlab.errors import ConfigError
from ffnlab.graphs import View, pair_rows, penalty, shrunk, sparse_group
from ffnlab.layers import MLP
from ffnlab.learning import members

GROUPS, WIDTH = 3, 4


def problem(outputs=1, rows=60):
    """Rows of which the first group tells the class, with noise."""
    random = np.random.default_rng(0)
    x = random.normal(size=(rows, GROUPS * WIDTH)).astype(np.float32)
    told = x[:, 0] - 2 * x[:, 1] + random.normal(size=rows)
    y = (told > 0).astype(np.int32) + (told > 2) * (outputs > 2)
    return jnp.asarray(x), jnp.asarray(y, jnp.int32)


def start(outputs=1):
    return MLP((GROUPS * WIDTH, outputs), key=jax.random.key(0))


def fitted(l1, l2, outputs=1, steps=25):
    rule = sparse_group(GROUPS, l1=l1, l2=l2)
    state, losses = rule.init(start(outputs), jax.random.key(0)), []
    for _ in range(steps):
        state, metrics = rule.step(state, problem(outputs))
        losses.append(float(metrics["loss"]))
    return state.model, losses


# l1 and l2: hardly any, of single weights, of groups, and of both more than any weight is worth.
PENALTIES = [(1e-4, 1e-3), (2e-2, 1e-4), (5e-3, 8e-2), (1e-3, 0.1), (10.0, 1.0)]


@pytest.fixture(scope="module")
def fits():
    """(weights and bias by penalty, mean losses by step), of members of one program."""
    make = lambda l1, l2: sparse_group(GROUPS, l1=l1, l2=l2)  # noqa: E731
    l1, l2 = zip(*PENALTIES, strict=True)
    count = len(PENALTIES)
    rule = members(make, count, vary={"l1": l1, "l2": l2}, chunk=1)
    models = jax.tree.map(lambda leaf: jnp.stack([leaf] * count), start())
    state, losses, zeros = rule.init(models, jax.random.key(0)), [], 0.0
    for _ in range(25):
        state, metrics = rule.step(state, problem())
        losses.append(float(metrics["loss"]))
        zeros = float(metrics["zeros"])
    (linear,) = rule.model(state).maps
    w, b = np.asarray(linear.weight.dense())[..., 0], np.asarray(linear.bias)[:, 0]
    assert zeros == pytest.approx(np.mean(w == 0))
    return dict(zip(PENALTIES, zip(w, b, strict=True), strict=True)), losses


def value_of(w, b, l1, l2):
    """F, in float64."""
    x, y = (np.asarray(part, np.float64) for part in problem())
    logits = x @ w + b
    lengths = np.linalg.norm(w.reshape(GROUPS, -1), axis=1).sum()
    return np.mean(np.logaddexp(0, logits) - y * logits) + l1 * np.abs(w).sum() + l2 * lengths


def by_numpy(l1, l2, steps=5000):
    """Where F is least, by proximal gradient alone in float64."""
    x, y = (np.asarray(part, np.float64) for part in problem())
    rate = 4 * len(x) / np.linalg.norm(np.c_[x, np.ones(len(x))], 2) ** 2
    w, b = np.zeros(x.shape[1]), 0.0
    for _ in range(steps):
        left = 1 / (1 + np.exp(-(x @ w + b))) - y
        v, b = w - rate * x.T @ left / len(x), b - rate * left.mean()
        v = np.sign(v) * np.maximum(np.abs(v) - rate * l1, 0)
        lengths = np.linalg.norm(v.reshape(GROUPS, -1), axis=1)
        share = np.maximum(0, 1 - rate * l2 / np.where(lengths > 0, lengths, 1))
        v = v * np.repeat(share, WIDTH)
        if np.abs(v - w).max() < 1e-10:
            break
        w = v
    return w, b


@settings(max_examples=30)
@given(st.integers(0, 9999), st.floats(0, 1), st.floats(0, 2))
def test_the_proximal_map_is_the_minimum_that_it_is_defined_by(seed, l1, l2):
    random = np.random.default_rng(seed)
    w = jnp.asarray(random.normal(size=(6, 2)), jnp.float32)
    found = shrunk(w, 3, l1, l2)

    def value(v):
        return float(jnp.sum((v - w) ** 2) / 2 + penalty(v, 3, l1, l2))

    least = value(found)
    for size in (1e-2, 0.3):
        for _ in range(4):
            moved = found + size * jnp.asarray(random.normal(size=w.shape), jnp.float32)
            assert value(moved) >= least - 1e-5
    assert value(jnp.zeros_like(w)) >= least - 1e-5 and value(w) >= least - 1e-5


@pytest.mark.parametrize("penalties", PENALTIES[:3])
def test_it_comes_to_the_minimum(fits, penalties):
    want, found = by_numpy(*penalties), fits[0][penalties]
    least = value_of(*want, *penalties)
    assert least - 1e-6 < value_of(*found, *penalties) < least + 2e-4
    np.testing.assert_allclose(found[0], want[0], atol=0.03)
    if max(penalties) > 1e-2:
        assert np.sum(found[0] == 0) >= 0.5 * np.sum(want[0] == 0) > 0
        assert np.all(found[0][np.abs(want[0]) > 0.03] != 0)


def test_the_loss_never_rises(fits):
    losses = fits[1]
    assert losses[-1] < losses[0]
    assert all(b <= a + 1e-6 for a, b in zip(losses, losses[1:], strict=False))


def test_groups_that_tell_nothing_are_dropped_whole(fits):
    lengths = np.linalg.norm(fits[0][1e-3, 0.1][0].reshape(GROUPS, -1), axis=1)
    assert lengths[0] > 0.5 and np.all(lengths[1:] == 0)
    assert not np.any(fits[0][10.0, 1.0][0])


@pytest.mark.slow
def test_several_classes_are_told_by_as_many_outputs():
    model, losses = fitted(1e-3, 1e-3, outputs=3)
    x, y = problem(3)
    assert np.mean(np.asarray(model(x)).argmax(1) == np.asarray(y)) > 0.8
    assert losses[-1] < losses[0] and model.maps[0].weight.shape == (12, 3)


def test_derivatives_at_zero_are_zero():
    w = jnp.zeros((6, 1)).at[5].set(2.0)
    found = jax.grad(penalty)(w, 3, 0.3, 0.5)
    np.testing.assert_allclose(found.ravel(), [0, 0, 0, 0, 0, 0.8])


def test_a_logit_is_the_authors_sum_over_components():
    """Of five linear maps with a bias each (models/proposed.py, `forward`)."""
    random = np.random.default_rng(0)
    views = {n: View(*jnp.asarray(random.normal(size=(2, 9, 4)))) for n in "URF"}
    ends = jnp.asarray(random.integers(9, size=(7, 2)))
    model = start()
    w = np.asarray(model.maps[0].weight.dense()).reshape(3, 4)
    parts = [
        (np.asarray(v.adjusted)[ends[:, 0]] * np.asarray(v.z)[ends[:, 1]]) @ w[m]
        for m, v in enumerate(views.values())
    ]
    found = model(pair_rows(views, ends).astype(jnp.float32))
    np.testing.assert_allclose(found[:, 0], np.sum(parts, 0), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_penalties_are_members_of_one_program(fits):
    alone, _ = fitted(*PENALTIES[1])
    w = np.asarray(alone.maps[0].weight.dense())[:, 0]
    np.testing.assert_allclose(fits[0][PENALTIES[1]][0], w, atol=1e-3)


def test_what_does_not_fit_is_refused(key):
    with pytest.raises(ConfigError, match="groups=0"):
        sparse_group(0)
    for name in ("l1", "l2"):
        with pytest.raises(ConfigError, match=f"{name}=-1"):
            sparse_group(3, **{name: -1.0})
    rule = sparse_group(GROUPS)
    with pytest.raises(ConfigError, match="an MLP of one map with a bias"):
        rule.init(MLP((12, 4, 1), key=key), key)
    with pytest.raises(ConfigError, match="an MLP of one map with a bias"):
        rule.init(MLP((12, 1), key=key, bias=False), key)
    with pytest.raises(ConfigError, match="groups=3 must divide the 10 inputs"):
        rule.init(MLP((10, 1), key=key), key)
    state, (x, y) = rule.init(start(), key), problem()
    with pytest.raises(ConfigError, match=r"\[p, 12\] with p are accepted"):
        rule.check(state, (x[:, :5], y))
    with pytest.raises(ValueError, match="classes from 0 to 2"):
        rule.check(state, (x, np.asarray(y) * 2))
