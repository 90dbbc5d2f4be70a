"""Choosing tokens: against brute force, and against the probabilities themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ffnlab.errors import ConfigError
from ffnlab.text import sample

VOCAB = 6
# Multiples of 1/4: ties are frequent and sums of probabilities are far from the tested p.
LOGITS = hnp.arrays(np.float32, (2, VOCAB), elements=st.integers(-12, 12).map(lambda n: n / 4))
candidates = jax.jit(sample.candidates, static_argnames="top_k")
draw = jax.jit(sample.draw, static_argnames="top_k")


def brute_force(row, k, p, m=0.0):
    """Ids that may be drawn, in order, one token at a time."""
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]
    weights = np.exp(np.array([row[i] for i in order], np.float64))
    weights /= weights.sum()
    kept, reached = [], 0.0
    for i, w in zip(order, weights, strict=True):
        if kept and (reached >= p or w < m * weights[0]):
            break
        kept.append(i)
        reached += w
    return kept


@settings(max_examples=60, deadline=None)
@given(
    LOGITS,
    st.sampled_from([None, 1, 3, 50]),
    st.sampled_from([None, 1e-6, 0.3, 0.7, 0.95]),
    # Between the shares that logits a multiple of 1/4 apart have: exp(-1/4) is .78, exp(-3) .05.
    st.sampled_from([None, 0.04, 0.3, 0.7, 1.0]),
)
def test_candidates_are_those_of_brute_force(logits, k, p, m):
    values, ids = candidates(jnp.asarray(logits), top_k=k, top_p=p, min_p=m)
    assert values.shape == ids.shape == (2, min(k or VOCAB, VOCAB))
    for row, value, index in zip(logits, np.asarray(values), np.asarray(ids), strict=True):
        kept = index[np.isfinite(value)].tolist()
        assert kept == brute_force(row, k, 2.0 if p is None else p, m or 0.0)
        np.testing.assert_array_equal(value[np.isfinite(value)], row[kept])


def test_top_p_of_one_keeps_everything():
    logits = jnp.array([[0.0, -30.0, -60.0]])
    values, _ = candidates(logits, top_p=jnp.float32(1.0))
    assert np.isfinite(values[0, 0])


def test_greedy_takes_the_lowest_id_among_equals():
    np.testing.assert_array_equal(
        sample.greedy(jnp.array([[1.0, 3.0, 3.0], [2.0, 2.0, 0.0]])), [1, 0]
    )


@pytest.mark.parametrize(
    ("temperature", "k", "p", "m"),
    [
        (1.0, None, None, None),
        (0.5, None, None, None),
        (1.0, 4, None, None),
        (2.0, 4, 0.8, None),
        (2.0, None, None, 0.5),
    ],
)
def test_frequencies_are_the_probabilities(temperature, k, p, m):
    row = np.array([0.5, -1.0, 1.5, 0.0, 1.0, -2.0], np.float32)
    n = 20_000
    keys = jax.random.split(jax.random.key(0), n)
    logits = jnp.broadcast_to(row, (n, VOCAB))
    ids = np.asarray(draw(keys, logits, temperature=temperature, top_k=k, top_p=p, min_p=m))
    kept = brute_force(row / temperature, k or VOCAB, 2.0 if p is None else p, m or 0.0)
    expected = np.zeros(VOCAB)
    expected[kept] = np.exp(row[kept] / temperature)
    expected = n * expected / expected.sum()
    counts = np.bincount(ids, minlength=VOCAB)
    assert counts[expected == 0].sum() == 0
    chi_square = np.sum((counts - expected)[kept] ** 2 / expected[kept])
    # The 0.999 quantile of chi-square with 5 degrees of freedom is 20.5; the key is fixed.
    assert chi_square < 20.5


def test_a_row_depends_on_its_own_key_only():
    keys = jax.random.split(jax.random.key(1), 3)
    logits = jax.random.normal(jax.random.key(2), (3, VOCAB))
    together = draw(keys, logits, temperature=1.0)
    alone = [int(draw(keys[i : i + 1], logits[i : i + 1], temperature=1.0)[0]) for i in range(3)]
    assert together.tolist() == alone


@pytest.mark.parametrize("options", [{"top_k": 0}, {"top_k": -1}, {"min_p": 0.0}])
def test_what_other_tools_write_for_no_limit_is_none(options):
    assert sample.Sampling(1.0, **options) == sample.Sampling(1.0)


def test_temperature_and_p_are_traced():
    keys, logits = jax.random.split(jax.random.key(1), 1), jnp.zeros((1, VOCAB))
    f = jax.jit(lambda *args, **options: sample.draw(*args, top_k=2, **options))
    for temperature, p in ((0.5, 0.1), (1.0, 0.9)):
        f(keys, logits, temperature=temperature, top_p=p, min_p=p)
    assert f._cache_size() == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 must be finite and >= 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": -2}, "top_k=-2 must be at least 1, or 0 for all"),
        ({"min_p": -0.1}, r"min_p=-0.1 must be in \[0, 1\]"),
        ({"min_p": 1.5}, "min_p=1.5"),
        ({"top_p": 0.0}, r"top_p=0.0 must be in \(0, 1\]"),
        ({"top_p": 1.5}, "top_p=1.5"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        sample.Sampling(**options)
