"""The closed form of an edit: a generic solver, its limits, what it refuses."""

import hypothesis
import hypothesis.extra.numpy
import numpy as np
import pytest
import scipy.optimize
from hypothesis import strategies as st

from ffnlab.editing.pmet_core import share, update
from ffnlab.errors import ConfigError, NumericalError


def drawn(n, h, d, seed=0, tokens=40):
    """Keys, residuals and the second moment of so many tokens."""
    random = np.random.default_rng(seed)
    text = random.normal(size=(tokens, h)) @ random.normal(size=(h, h))
    return random.normal(size=(n, h)), random.normal(size=(n, d)), text.T @ text / tokens


def loss_of(change, keys, residuals, moment, preserve):
    """What is to be least, and its gradient."""
    off = keys @ change - residuals
    loss = np.sum(off**2) + preserve * np.trace(change.T @ moment @ change)
    return loss, 2 * (keys.T @ off + preserve * moment @ change)


@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_minimiser_that_a_generic_solver_finds(seed):
    keys, residuals, moment = drawn(3, 5, 4, seed)

    def flat(x):
        loss, gradient = loss_of(x.reshape(5, 4), keys, residuals, moment, 0.3)
        return loss, gradient.reshape(-1)

    options = {"gtol": 1e-12, "ftol": 1e-18, "maxiter": 10_000}
    found = scipy.optimize.minimize(
        flat, np.zeros(20), jac=True, method="L-BFGS-B", options=options
    )
    ours = update(keys, residuals, moment, preserve=0.3)
    np.testing.assert_allclose(ours, found.x.reshape(5, 4), atol=1e-6)


def test_it_is_the_formula_of_the_authors():
    """targets / sqrt(left) @ K^T @ inverse(K K^T + weight C), in their layout."""
    keys, residuals, moment = drawn(4, 6, 3)
    k, targets = keys.T, residuals.T
    theirs = (targets / np.sqrt(3)) @ k.T @ np.linalg.inv(k @ k.T + 15.0 * moment)
    ours = update(keys, share(3) * residuals, moment, preserve=15.0)
    np.testing.assert_allclose(ours, theirs.T, rtol=1e-9)


def test_its_limits():
    keys, residuals, moment = drawn(3, 6, 4)
    near = update(keys, residuals, moment, preserve=1e-9)
    np.testing.assert_allclose(keys @ near, residuals, atol=1e-6)
    far = update(keys, residuals, moment, preserve=1e12)
    assert np.abs(far).max() < 1e-9
    many, wanted, _ = drawn(6, 6, 4, seed=1)  # as many independent keys as channels
    np.testing.assert_allclose(many @ update(many, wanted, moment, preserve=0.0), wanted, atol=1e-8)


def test_channels_that_nothing_uses_get_nothing():
    keys, residuals, moment = drawn(3, 6, 4)
    idle = np.array([1, 4])
    keys[:, idle], moment[idle], moment[:, idle] = 0, 0, 0
    found = update(keys, residuals, moment, preserve=0.5)
    assert np.abs(found[idle]).max() < 1e-12
    used = np.setdiff1d(np.arange(6), idle)
    alone = update(keys[:, used], residuals, moment[np.ix_(used, used)], preserve=0.5)
    np.testing.assert_allclose(found[used], alone, rtol=1e-8)


def test_of_too_little_text_it_is_a_minimiser():
    keys, residuals, moment = drawn(2, 8, 3, tokens=4)  # six directions at most
    found = update(keys, residuals, moment, preserve=0.7)
    best, gradient = loss_of(found, keys, residuals, moment, 0.7)
    assert np.abs(gradient).max() < 1e-8 and np.abs(found).max() < 1e3
    null = np.linalg.svd(np.concatenate([keys, moment]))[2][-2:]
    assert np.abs(null @ found).max() < 1e-8, "the smallest of all minimisers"


sizes = st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 4), st.integers(0, 99))


@hypothesis.given(sizes, st.floats(1e-3, 1e3))
def test_no_other_change_is_better(size, preserve):
    *shape, seed = size
    keys, residuals, moment = drawn(*shape, seed)
    found = update(keys, residuals, moment, preserve=preserve)
    best, gradient = loss_of(found, keys, residuals, moment, preserve)
    assert np.abs(gradient).max() <= 1e-8 * (1 + np.abs(keys).max() ** 2 * np.abs(residuals).max())
    moved = found + 0.1 * np.random.default_rng(seed).normal(size=found.shape)
    assert loss_of(moved, keys, residuals, moment, preserve)[0] >= best


@hypothesis.given(sizes, st.floats(-3, 3))
def test_it_is_linear_in_what_is_missing(size, factor):
    *shape, seed = size
    keys, residuals, moment = drawn(*shape, seed)
    one = update(keys, residuals, moment, preserve=2.0)
    more = update(keys, factor * residuals, moment, preserve=2.0)
    np.testing.assert_allclose(more, factor * one, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("spread", ["root", "linear"])
def test_the_last_layer_takes_all_that_is_left(spread):
    shares = [share(left, spread) for left in (4, 3, 2, 1)]
    assert shares[-1] == 1 and shares == sorted(shares)
    assert shares[0] == (0.5 if spread == "root" else 0.25)


def test_bad_input():
    keys, residuals, moment = drawn(2, 3, 4)
    with pytest.raises(NumericalError, match=r"preserve=0: of 2 keys over 3 channels"):
        update(keys, residuals, moment, preserve=0.0)
    twice = np.concatenate([keys, keys[:1]])
    with pytest.raises(NumericalError, match="no inverse"):  # three keys, two of them one
        update(twice, residuals[[0, 1, 1]], moment, preserve=0.0)
    for change, said in (
        ({"preserve": -1.0}, "preserve=-1.0"),
        ({"preserve": np.nan}, "preserve=nan"),
        ({"residuals": residuals[:1]}, r"residuals \(1, 4\)"),
        ({"moment": moment[:2, :2]}, r"moment \(2, 2\)"),
    ):
        given = {"keys": keys, "residuals": residuals, "moment": moment, "preserve": 1.0} | change
        with pytest.raises(ConfigError, match=said):
            update(**given)
    with pytest.raises(NumericalError, match="moment: NaN"):
        update(keys, residuals, moment * np.nan, preserve=1.0)
