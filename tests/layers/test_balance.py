"""Losses and counts of routings, against loops and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.errors import ConfigError
from ffnlab.layers import balance, routers
from tests.contracts import input_of

RTOL = 1e-5
VALID = jnp.array([[True, True, False, True], [False, True, True, True]])


def routing(k=2, valid=None):
    """Of two sequences of four tokens, three experts, one of them liked."""
    logits = input_of((2, 4, 3)) + jnp.array([1.0, 0.0, 0.0])
    return routers.softmax_top_k(logits, k, valid=valid)


def balance_loop(found, choices, tokens):
    """e sum f p over some tokens (b, i)."""
    f, p = np.zeros(3), np.zeros(3)
    for b, i in tokens:
        p += np.asarray(found.scores[b, i], np.float64)
        for e in np.asarray(found.chosen[b, i, :choices]):
            f[e] += 1
    return 3 * (f / f.sum() * p / len(tokens)).sum()


@pytest.mark.parametrize("choices", [1, 2])
@pytest.mark.parametrize("valid", [None, VALID])
def test_load_balance_is_the_loop(choices, valid):
    found = routing(valid=valid)
    seen = np.ones((2, 4), bool) if valid is None else np.asarray(valid)
    tokens = [tuple(at) for at in np.argwhere(seen)]
    got = balance.load_balance(found, choices=choices)
    np.testing.assert_allclose(got, balance_loop(found, choices, tokens), rtol=RTOL)
    each = [balance_loop(found, choices, [at for at in tokens if at[0] == b]) for b in (0, 1)]
    got = balance.load_balance(found, choices=choices, per_sequence=True)
    np.testing.assert_allclose(got, np.mean(each), rtol=RTOL)


def test_layers_are_averaged_and_dropped_choices_count():
    one, other = routing(), routing(valid=VALID)
    both = jax.tree.map(lambda *x: jnp.stack(x), one, other)
    mean = (balance.load_balance(one) + balance.load_balance(other)) / 2
    np.testing.assert_allclose(balance.load_balance(both), mean, rtol=RTOL)
    cut = routers.limited(one, 1)
    assert cut.kept.sum() < one.kept.sum()
    assert balance.load_balance(cut) == balance.load_balance(one)


def test_even_is_one_and_collapsed_is_the_number_of_experts():
    even = routers.fixed(jnp.arange(6) % 3, 3)
    np.testing.assert_allclose(balance.load_balance(even), 1.0, rtol=RTOL)
    np.testing.assert_allclose(balance.load_balance(routers.fixed(jnp.zeros(6, int), 3)), 3.0)
    alike = routers.softmax_top_k(jnp.zeros((6, 3)), 1)
    np.testing.assert_allclose(balance.entropy(alike), np.log(3), rtol=RTOL)
    assert balance.entropy(even) == 0


def test_the_gradient_stops_at_the_shares():
    logits = input_of((5, 3))
    loss = lambda x: balance.load_balance(routers.softmax_top_k(x, 1))  # noqa: E731
    gradient, step = jax.grad(loss)(logits), 1e-2
    for i in range(3):
        moved = [loss(logits.at[2, i].add(s * step)) for s in (1, -1)]
        np.testing.assert_allclose((moved[0] - moved[1]) / (2 * step), gradient[2, i], atol=1e-3)
    assert jnp.abs(gradient).max() > 0.01


def test_entropy_z_and_specialization_are_their_formulas():
    logits = input_of((2, 4, 3)) * 2
    found = routers.softmax_top_k(logits, 2, valid=VALID)
    x, seen = np.asarray(logits, np.float64), np.asarray(VALID)
    norm = np.log(np.exp(x).sum(-1))
    p = np.exp(x - norm[..., None])
    h = -(p * np.log(p)).sum(-1)[seen].mean()
    np.testing.assert_allclose(balance.z_loss(found), (norm[seen] ** 2).mean(), rtol=RTOL)
    np.testing.assert_allclose(balance.entropy(found), h, rtol=RTOL)
    for sign in (1, -1):
        got = balance.specialization(found, balance=0.3, certainty=sign * 0.2)
        expected = 0.3 * balance.load_balance(found) / 3 + sign * 0.2 * h
        np.testing.assert_allclose(got, expected, rtol=RTOL)
    collapsed = routers.fixed(jnp.zeros((2, 4), int), 3)
    np.testing.assert_allclose(balance.specialization(collapsed, balance=0.3), 0.3, rtol=RTOL)
    for weights in ({"balance": -1.0}, {"balance": np.nan}, {"certainty": np.nan}):
        with pytest.raises(ConfigError, match="both finite"):
            balance.specialization(collapsed, **weights)


def test_budget_is_of_the_mean_over_layers_and_tokens_of_a_sequence():
    logits = input_of((3, 2, 4, 2))
    valid = jnp.broadcast_to(VALID, (3, 2, 4))
    found = routers.softmax_top_k(logits, 1, valid=valid)
    p = np.asarray(found.scores, np.float64)[..., 0]
    means = [p[:, b][np.asarray(valid[:, b])].mean() for b in (0, 1)]
    got = balance.budget_loss(found, jnp.array([1.0, 0.0]), 0.3)
    np.testing.assert_allclose(got, np.mean((np.array(means) - 0.3) ** 2), rtol=RTOL)
    with pytest.raises(ConfigError, match=r"costs has shape \(3,\), there are 2 branches"):
        balance.budget_loss(found, jnp.ones(3), 0.3)
    with pytest.raises(ConfigError, match="kept by each sequence"):
        balance.budget_loss(routers.fixed(jnp.zeros(3, int), 2), jnp.ones(2), 0.3)


def test_counts():
    found = routers.limited(routing(valid=VALID), 2)
    for dropped in (False, True):
        table = np.zeros(3, int)
        for b, i, j in np.argwhere(np.asarray(found.kept | dropped)):
            e = int(found.chosen[b, i, j])
            if e < 3:
                table[e] += 1
        np.testing.assert_array_equal(balance.counts(found, dropped=dropped), table)
    layers = jax.tree.map(lambda x: jnp.stack([x, x]), found)
    assert balance.counts(layers).shape == (2, 3)


def test_nan_is_counted_and_padding_is_not():
    logits = input_of((2, 4, 3)).at[0, 1, 2].set(jnp.nan).at[0, 2, 0].set(jnp.nan)
    found = routers.softmax_top_k(logits, 2, valid=VALID)  # the second of them is padding
    assert balance.unrouted(found) == 1
    assert balance.upkeep([found])["unrouted"] == 1 / int(found.valid.sum())
    for loss in (balance.load_balance, balance.z_loss, balance.entropy):
        assert jnp.isfinite(loss(found))


def test_a_batch_of_padding_has_no_loss():
    found = routing(valid=jnp.zeros((2, 4), bool))
    losses = (balance.load_balance, balance.z_loss, balance.entropy, balance.specialization)
    assert all(float(loss(found)) == 0 for loss in losses)
    assert balance.budget_loss(found, jnp.ones(3), 0.5) == 0
    with pytest.raises(ConfigError, match="choices=3: 1..2 are accepted"):
        balance.load_balance(found, choices=3)


def test_affinities_of_sigmoids_are_balanced_by_their_shares():
    """1 where all are alike, e where all go to one, and the same for all logits shifted up."""
    alike = routers.sigmoid_top_k(jnp.zeros((8, 4)), 1)
    np.testing.assert_allclose(balance.load_balance(alike), 1.0, rtol=1e-6)
    one = jnp.where(jnp.arange(4) == 0, -4.0, -40.0) * jnp.ones((8, 1))
    np.testing.assert_allclose(balance.load_balance(routers.sigmoid_top_k(one, 1)), 4, rtol=1e-5)
    np.testing.assert_allclose(balance.entropy(alike), np.log(4), rtol=1e-6)


def test_an_expert_that_is_excluded_is_no_choice():
    found = routers.softmax_top_k(jnp.array([[0.0, -jnp.inf, -jnp.inf]]), 2)
    assert found.kept.tolist() == [[True, False]] and found.chosen.tolist() == [[0, 3]]
    np.testing.assert_array_equal(balance.counts(found), [1, 0, 0])
