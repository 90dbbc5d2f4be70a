"""A search on arrays: means of channels, pairs, schedules, products, the pull to a budget."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ffnlab.errors import ConfigError
from ffnlab.pruning.tas import core

KEY = jax.random.key(0)
SIZES = st.integers(1, 24)


@pytest.fixture(scope="module")
def official(fixtures):
    with np.load(fixtures / "tas" / "official.npz") as file:
        return dict(file)


def pooled(x, out):
    """Adaptive average pooling, one output at a time."""
    n = len(x)
    parts = [(math.floor(j * n / out), math.ceil((j + 1) * n / out)) for j in range(out)]
    return np.array([sum(x[a:b]) / (b - a) for a, b in parts])


@settings(max_examples=60, deadline=None)
@given(SIZES, SIZES, st.integers(0, 99))
def test_interpolation_is_adaptive_pooling(size, out, seed):
    x, m = np.random.default_rng(seed).normal(size=size), core.interpolation(size, out)
    assert m.dtype == np.float64
    np.testing.assert_allclose(m @ x, pooled(x, out), rtol=0, atol=1e-12)
    np.testing.assert_allclose(m.sum(1), 1, atol=1e-12)
    if size % out == 0:  # every channel counts as often as any other
        np.testing.assert_allclose((m @ x).mean(), x.mean(), atol=1e-12)
    if size == out:
        np.testing.assert_array_equal(m, np.eye(size))


def test_interpolation_of_the_authors(official):
    x = np.random.default_rng(0).normal(size=(2, 10, 3, 3))
    for out in (4, 7, 16, 23):
        found = np.einsum("oc,nchw->nohw", core.interpolation(10, out), x)
        np.testing.assert_allclose(found, official[f"interpolated {out}"], rtol=0, atol=1e-12)


def test_the_table_holds_the_means_of_all_choices():
    choices, size = (2, 3, 7, 8), 9
    table = core.windows(choices, size)
    for i, a in enumerate(choices):
        for j, b in enumerate(choices):
            m = np.asarray(core.averaging(jnp.asarray(table[i, j])))
            want = np.zeros((size, size))
            want[:b, :a] = core.interpolation(a, b)
            np.testing.assert_allclose(m, want, atol=1e-7)


def test_choices_are_the_authors():
    assert core.width_choices(16) == (4, 6, 8, 9, 11, 12, 14, 16)
    assert core.width_choices(64)[0] == 19 and core.width_choices(64)[-1] == 64
    assert core.width_choices(3) == (1, 2, 3)  # int(3 * .3) = 0 is none
    assert [core.depth_choices(n) for n in (1, 2, 3, 5, 9, 18)] == [
        (1,),
        (1, 2),
        (1, 2, 3),
        (1, 3, 5),
        (1, 3, 5, 7, 9),
        (1, 3, 5, 7, 9, 11, 13, 15, 17, 18),
    ]
    for ratios in ((), (0.0, 1.0), (0.5, 1.5)):
        with pytest.raises(ConfigError, match=r"must be one or more numbers in \(0, 1\]"):
            core.width_choices(8, ratios)
    with pytest.raises(ConfigError, match="leave none of the 2 channels"):
        core.width_choices(2, (0.3,))


def draws(logits, counts, tau, n=2000):
    one = lambda key: core.pairs(logits, counts, tau, key)  # noqa: E731
    return jax.jit(jax.vmap(one))(jax.random.split(KEY, n))


def test_pairs_are_two_candidates_of_each_row():
    logits = jnp.zeros((3, 4))
    index, weights = draws(logits, [4, 3, 1], 1.0)
    index, weights = np.asarray(index), np.asarray(weights)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
    assert (index[:, :2, 0] != index[:, :2, 1]).all()
    assert index[:, 1].max() == 2 and index[:, 2].max() == 0
    np.testing.assert_array_equal(weights[:, 2], [[1, 0]] * len(index))
    assert np.bincount(index[:, 0].ravel(), minlength=4).min() > 0.2 * index[:, 0].size


def test_pairs_are_drawn_without_putting_back():
    """Of three candidates at a temperature at which noise is nothing: p_i p_j / (1 - p_i) + …"""
    p = np.array([0.6, 0.3, 0.1])
    tau = 1e4
    index, _ = draws(tau * jnp.log(p)[None], [3], tau, 6000)
    found = np.array([(np.sort(index[:, 0]) == pair).all(-1).mean() for pair in ([0, 1], [0, 2])])
    each = lambda a, b: p[a] * p[b] * (1 / (1 - p[a]) + 1 / (1 - p[b]))  # noqa: E731
    np.testing.assert_allclose(found, [each(0, 1), each(0, 2)], atol=0.03)


def test_weights_of_a_pair_have_its_noise():
    """The pair and its weights come from one z; another noise would give other weights."""
    logits, key = jnp.array([[0.3, -0.2, 1.0]]), jax.random.key(3)
    index, weights = core.pairs(logits, [3], 0.7, key)
    noise = jax.random.gumbel(jax.random.split(key)[0], logits.shape)
    z = (np.asarray(jax.nn.log_softmax(logits)) + np.asarray(noise)) / 0.7
    chosen = np.exp(z[0, np.asarray(index)[0]])
    np.testing.assert_allclose(weights[0], chosen / chosen.sum(), rtol=1e-5)


def test_gradients_reach_the_weights_of_a_pair_and_not_its_draw():
    logits = jnp.array([[0.3, -0.2, 1.0, 0.1]])

    def first(logits):
        index, weights = core.pairs(logits, [4], 2.0, KEY)
        return weights[0, 0], index

    gradient, index = jax.grad(first, has_aux=True)(logits)
    gradient, index = np.asarray(gradient)[0], np.asarray(index)[0]
    assert (gradient[index] != 0).all()
    others = np.setdiff1d(range(4), index)
    np.testing.assert_allclose(gradient[others], 0, atol=1e-7)
    np.testing.assert_allclose(gradient.sum(), 0, atol=1e-6)


def test_the_widest_counts_only_where_it_has_a_weight():
    pairs = core.Pairs(
        jnp.array([[1, 3], [3, 1], [0, 2]]), jnp.array([[1.0, 0], [1, 0], [0.5, 0.5]])
    )
    assert pairs.widest.tolist() == [1, 3, 2]


def test_temperatures_fall_by_a_cosine():
    found = [float(core.temperature(step, 100)) for step in (0, 25, 50, 100, 130)]
    want = [0.1 + 4.9 * (1 + math.cos(math.pi * part)) / 2 for part in (0, 0.25, 0.5, 1, 1)]
    np.testing.assert_allclose(found, want, rtol=1e-5)
    for tau in (0.0, -1.0):
        with pytest.raises(ConfigError, match="tau=.* must be positive"):
            core.pairs(jnp.zeros((1, 2)), [2], tau, KEY)
        with pytest.raises(ConfigError, match="tau=.* must be positive"):
            core.shares(jnp.zeros((1, 2)), [2], tau, KEY)


def test_shares_of_missing_candidates_are_zero():
    found = np.asarray(core.shares(jnp.zeros((2, 3)), [3, 2], 1.0, KEY))
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-6)
    assert (found[0] > 0).all() and found[1, 2] == 0


TERMS = core.Terms(
    np.array([2e6, 3e6, 5e6]),
    np.array([0, 1, 2]),
    np.array([1, 2, 0]),
    np.array([1, 0, 1]),
    np.array([False, False, True]),
)


def test_products_by_hand():
    """2 a b + 3 b c k0, and 5 c a where c and a differ."""
    of = functools.partial(core.products, TERMS)
    sizes, kept = jnp.array([4.0, 5.0, 6.0]), jnp.array([0.5, 1.0])
    assert float(of(sizes, kept, bridges=False)) == 2 * 4 * 5 + 3 * 5 * 6 * 0.5
    assert float(of(sizes, kept, bridges=True)) == 2 * 4 * 5 + 45 + 5 * 6 * 4
    same = jnp.array([6.0, 5.0, 6.0])
    assert float(of(same, kept, bridges=True)) == float(of(same, kept, bridges=False)) == 60 + 45


@pytest.mark.parametrize("name", ["basic", "bottleneck"])
def test_the_pull_is_the_authors(official, name):
    expected, exact = (float(official[f"{name}.{part}"]) for part in ("expected", "exact"))
    for case, need in (("above", 2.0), ("inside", 8.0), ("below", 400.0)):
        found = core.budget_term(jnp.float32(expected), jnp.float32(exact), need, 5.0)
        assert float(found) == pytest.approx(float(official[f"{name}.term {case}"]), rel=1e-5)


def test_the_pull_ends_inside_the_budget():
    """The gradient is that of the expectation, its sign that of what is chosen."""
    pull = lambda expected, exact: core.budget_term(expected, jnp.float32(exact), 10.0, 2.0)  # noqa: E731
    for exact, sign in ((10.1, 1), (10.0, 0), (8.0, 0), (7.9, -1)):
        assert float(jax.grad(pull)(jnp.float32(4.0), exact)) == sign / 4


def test_probabilities_to_reach_a_choice():
    found = core.reached(jnp.array([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]]))
    np.testing.assert_allclose(found, [[1, 0.8, 0.5], [1, 0, 0]], rtol=1e-6)
