"""Routers and what drops choices, against loops over tokens and experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ffnlab.errors import ConfigError
from ffnlab.layers import TokenFacts, routers
from ffnlab.parallel import on, parse_mesh, place_batch
from tests.contracts import input_of

RTOL = 1e-5  # float32 against float64
NAN = jnp.nan


def scores_of(logits, kind):
    """Softmax or sigmoid in float64."""
    x = np.asarray(logits, np.float64)
    if kind == "sigmoid":
        return 1 / (1 + np.exp(-x))
    p = np.exp(x - x.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


TOP_K = {"softmax": routers.softmax_top_k, "sigmoid": routers.sigmoid_top_k}


@pytest.mark.parametrize("kind", TOP_K)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("k", [1, 3])
def test_top_k_is_the_loop(kind, normalize, k):
    logits = input_of((2, 5, 4)) * 3
    found = TOP_K[kind](logits, k, normalize=normalize)
    p = scores_of(logits, kind)
    np.testing.assert_allclose(found.scores, p, rtol=RTOL)
    for row, chosen, weight in zip(
        p.reshape(-1, 4), found.chosen.reshape(-1, k), found.weight.reshape(-1, k), strict=True
    ):
        best = sorted(range(4), key=lambda i: -row[i])[:k]
        assert chosen.tolist() == best
        expected = row[best] / row[best].sum() if normalize else row[best]
        np.testing.assert_allclose(weight, expected, rtol=RTOL)
    assert found.kept.all() and found.valid.all() and found.experts == 4
    expected = np.log(np.exp(np.asarray(logits, np.float64)).sum(-1))
    np.testing.assert_allclose(found.log_norm, expected, rtol=RTOL)


@pytest.mark.parametrize("kind", TOP_K)
@pytest.mark.parametrize("bad", [NAN, jnp.inf])
def test_a_row_that_cannot_be_read_chooses_nothing(kind, bad):
    logits = input_of((3, 4)).at[1, 2].set(bad)

    def loss(logits):
        found = TOP_K[kind](logits, 2)
        return (found.weight * jnp.arange(1, 3)).sum() + found.scores.sum(), found

    gradient, found = jax.grad(loss, has_aux=True)(logits)
    assert found.chosen[1].tolist() == [4, 4] and not found.kept[1].any()
    assert (found.weight[1] == 0).all() and (found.scores[1] == 0).all()
    assert found.kept[0].all() and jnp.isfinite(gradient).all() and (gradient[1] == 0).all()


def test_an_excluded_expert_is_not_chosen_and_all_excluded_are_nothing():
    logits = jnp.array([[0.0, -jnp.inf, 1.0], [-jnp.inf] * 3])
    found = routers.softmax_top_k(logits, 2)
    assert found.chosen.tolist() == [[2, 0], [3, 3]]


def test_padding_is_not_routed():
    valid = jnp.array([[True, False, True]])
    facts = TokenFacts(jnp.array([[1, 1, 0]]), valid)
    logits = input_of((1, 3, 2))
    for found in (
        routers.softmax_top_k(logits, 1, valid=valid),
        routers.expert_choice(logits, 3, valid=valid),
        routers.by_modality(facts, 2),
        routers.by_hash(jnp.array([[5, 6, 7]]), 2, valid=valid),
        routers.random(jax.random.key(0), (1, 3), 2, valid=valid),
    ):
        assert (found.chosen[0, 1] == 2).all() and (found.weight[0, 1] == 0).all()
        assert not found.kept[0, 1].any() and (found.scores[0, 1] == 0).all()
        assert found.kept[0, [0, 2]].any() and found.valid.tolist() == valid.tolist()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), capacity=st.integers(1, 7))
def test_experts_choose_their_best_tokens(seed, capacity):
    logits = jax.random.normal(jax.random.key(seed), (2, 5, 3))
    valid = jax.random.uniform(jax.random.key(seed + 1), (2, 5)) < 0.8
    found = routers.expert_choice(logits, capacity, valid=valid)
    p = scores_of(logits, "softmax")
    for b in range(2):
        tokens = [i for i in range(5) if valid[b, i]]
        for e in range(3):
            best = sorted(tokens, key=lambda i: -p[b, i, e])[:capacity]
            assert sorted(best) == np.flatnonzero(found.kept[b, :, e]).tolist()
    np.testing.assert_allclose(found.weight, np.where(found.kept, p, 0), rtol=RTOL)
    chosen = np.where(found.kept, np.arange(3), 3)
    assert (found.chosen == chosen).all()


def test_fixed_choices_and_modalities():
    found = routers.fixed(jnp.array([2, 0, -1, 3]), 3)
    assert found.chosen[:, 0].tolist() == [2, 0, 3, 3]
    np.testing.assert_array_equal(found.scores, [[0, 0, 1], [1, 0, 0], [0, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(found.weight[:, 0], [1, 1, 0, 0])
    with pytest.raises(ConfigError, match="tokens have no modality; give facts"):
        routers.by_modality(TokenFacts(), 2)


def test_hashes_depend_on_the_token_and_the_salt_alone():
    tokens = jnp.arange(4000).reshape(2, 2000)
    one, other = (routers.by_hash(tokens, 7, salt=s).chosen for s in (0, 1))
    np.testing.assert_array_equal(one[1], routers.by_hash(tokens[1], 7).chosen)
    shares = np.bincount(one.reshape(-1), minlength=7) / 4000
    assert abs(shares - 1 / 7).max() < 0.025  # four deviations of a fair draw
    assert abs((one == other).mean() - 1 / 7) < 0.025


def test_random_choices_are_different_and_follow_the_shares():
    key = jax.random.key(0)
    found = routers.random(key, (3000,), 4, 2, shares=[1.0, 0.0, 2.0, 1.0])
    chosen = np.asarray(found.chosen)
    assert (chosen[:, 0] != chosen[:, 1]).all() and not (chosen == 1).any()
    first = np.bincount(chosen[:, 0], minlength=4) / 3000
    np.testing.assert_allclose(first, [0.25, 0, 0.5, 0.25], atol=0.037)  # four deviations
    np.testing.assert_allclose(found.weight, 0.5)
    again = routers.random(key, (3000,), 4, 2, shares=[1.0, 0.0, 2.0, 1.0])
    np.testing.assert_array_equal(again.chosen, chosen)


def queue(routing, capacity, order):
    """[b, t, k] who is kept: choice by choice, tokens of each in an order [b, k, t]."""
    kept = np.zeros(routing.kept.shape, bool)
    for b in range(len(kept)):
        taken = [0] * routing.experts
        for j in range(kept.shape[2]):
            for i in order[b][j]:
                e = int(routing.chosen[b, i, j])
                if routing.kept[b, i, j] and taken[e] < capacity:
                    taken[e] += 1
                    kept[b, i, j] = True
    return kept


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), capacity=st.integers(1, 5))
@pytest.mark.parametrize("drop", ["last", "lightest", "random"])
def test_no_expert_is_over_capacity(drop, seed, capacity):
    keys = jax.random.split(jax.random.key(seed), 3)
    logits = jax.random.normal(keys[0], (2, 6, 3)) + jnp.array([1.0, 0.0, 0.0])
    valid = jax.random.uniform(keys[1], (2, 6)) < 0.8
    whole = routers.softmax_top_k(logits, 2, valid=valid)
    whole = routers.thinned(whole, "threshold", threshold=0.3)
    key = keys[2] if drop == "random" else None
    found = routers.limited(whole, capacity, drop=drop, key=key)
    used = [
        [(np.where(found.kept[b], found.chosen[b], 3) == e).sum() for e in range(3)] for b in (0, 1)
    ]
    assert np.max(used) <= capacity
    if drop == "random":  # as many as can be are kept, whoever it is
        alike = queue(whole, capacity, np.tile(np.arange(6), (2, 2, 1)))
        assert found.kept.sum() == alike.sum()
    else:
        order = np.tile(np.arange(6), (2, 2, 1))
        if drop == "lightest":
            order = np.argsort(-np.asarray(whole.weight), axis=1, kind="stable").swapaxes(1, 2)
        np.testing.assert_array_equal(found.kept, queue(whole, capacity, order))
    np.testing.assert_array_equal(found.weight, np.where(found.kept, whole.weight, 0))
    np.testing.assert_array_equal(found.chosen, whole.chosen)  # losses see what was asked for


def test_later_choices_are_thinned():
    logits = jnp.log(jnp.array([[0.6, 0.4, 0.0001], [0.95, 0.05, 0.0001]]))
    found = routers.softmax_top_k(logits, 2)
    kept = lambda *a, **k: routers.thinned(found, *a, **k).kept.tolist()  # noqa: E731
    assert kept("all") == [[True, True], [True, True]]
    assert kept("none") == [[True, False], [True, False]]
    assert kept("threshold", threshold=0.2) == [[True, True], [True, False]]
    many = routers.softmax_top_k(jnp.tile(logits[1:], (4000, 1)), 2)
    share = routers.thinned(many, "random", threshold=0.2, key=jax.random.key(0)).kept[:, 1].mean()
    assert abs(share - 0.25) < 0.028  # 0.05 / 0.2, four deviations


def test_capacity():
    assert routers.capacity_of(384, 16, 1.25, least=4) == 30
    assert routers.capacity_of(10, 16, 2.0, least=4) == 4
    assert routers.capacity_of(10, 2, 16.0) == 10


ONE = jnp.zeros((2, 3, 4))
MESHED = {
    "softmax": lambda logits: routers.softmax_top_k(logits, 2),
    "sigmoid": lambda logits: routers.sigmoid_top_k(logits, 3, normalize=False),
    "choice": lambda logits: routers.expert_choice(logits, 2),
    "random": lambda logits: routers.random(jax.random.key(3), logits.shape[:-1], 8, 2),
}


@pytest.mark.parametrize("kind", MESHED)
@pytest.mark.parametrize("mesh", ["dp=2,ep=4", "dp=2,sp=2,tp=2"])
def test_on_a_mesh_each_device_chooses_for_its_own_tokens(kind, mesh):
    """Gradients too; only experts that choose among cut rows need the scores of all of them."""
    logits, mesh = input_of((8, 6, 8)), parse_mesh(mesh)

    def weighed(logits):
        found = MESHED[kind](logits)
        return (found.weight * jnp.cos(found.chosen)).sum(), found

    run = jax.grad(weighed, has_aux=True)
    wanted = jax.jit(run)(logits)
    with on(mesh):
        compiled = jax.jit(run).lower(place_batch(np.asarray(logits), mesh)).compile()
        found = compiled(place_batch(np.asarray(logits), mesh))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert "all-gather(" not in compiled.as_text() or (kind, "sp" in mesh.shape) == ("choice", True)


BAD = {
    "k=5 of experts=4": lambda: routers.softmax_top_k(ONE, 5),
    "k=0 of experts=4": lambda: routers.sigmoid_top_k(ONE, 0),
    "capacity=0": lambda: routers.expert_choice(ONE, 0),
    "capacity=-1": lambda: routers.limited(routers.softmax_top_k(ONE, 2), -1),
    "drop='first' is not": lambda: routers.limited(routers.softmax_top_k(ONE, 2), 1, drop="first"),
    "drop='random': a key": lambda: routers.limited(
        routers.softmax_top_k(ONE, 2), 1, drop="random"
    ),
    "drop='last': a key": lambda: routers.limited(
        routers.softmax_top_k(ONE, 2), 1, key=jax.random.key(0)
    ),
    "policy='most' is not": lambda: routers.thinned(routers.softmax_top_k(ONE, 2), "most"),
    "policy='random': a key": lambda: routers.thinned(routers.softmax_top_k(ONE, 2), "random"),
    "threshold=0": lambda: routers.thinned(
        routers.softmax_top_k(ONE, 2), "threshold", threshold=0.0
    ),
    "factor=0": lambda: routers.capacity_of(8, 2, 0.0),
    "factor=nan": lambda: routers.capacity_of(8, 2, float("nan")),
    "k=1 of experts=0": lambda: routers.fixed(jnp.zeros((2,), jnp.int32), 0),
    r"shares=\[1.0, 0.0\]: 2 numbers": lambda: routers.random(
        jax.random.key(0), (3,), 2, 2, shares=[1.0, 0.0]
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    with pytest.raises(ConfigError, match=message):
        BAD[message]()
