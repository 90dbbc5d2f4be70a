"""Precoders: formulas of one channel at a time, absent users, limits, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ffnlab.errors import ConfigError
from ffnlab.graphs import (
    ascended_precoder,
    cellular,
    mrt,
    rates,
    rzf,
    structured,
    wmmse,
    zf,
)
from ffnlab.graphs.precoding import gram_of, gram_rates

POWER, NOISE = 10.0, 0.5
CASE = cellular(0, 4, (3, 4), 6)
H, VALID = jnp.asarray(CASE.h), jnp.asarray(CASE.valid)
CLOSE = 2e-4  # complex64, condition numbers of some hundreds


def alone(i):
    """A channel without its absent users, in double precision."""
    return np.asarray(H[i], np.complex128)[np.asarray(VALID[i])]


def check_columns(v, i, directions):
    """Columns are along the directions, with equal powers, and zero for absent users."""
    k = directions.shape[1]
    wanted = directions / np.linalg.norm(directions, axis=0) * np.sqrt(POWER / k)
    np.testing.assert_allclose(v[i][:, :k], wanted, atol=CLOSE)
    assert not np.asarray(v[i][:, k:]).any()


def test_the_cases_have_absent_users():
    assert CASE.valid.sum(1).tolist() == [4, 4, 4, 3] and not np.asarray(H[3, 3]).any()


def test_rates_are_those_of_the_signal_model():
    random = np.random.default_rng(0)
    v = (random.standard_normal((4, 6, 4)) + 1j * random.standard_normal((4, 6, 4))).astype("c8")
    found = np.asarray(rates(H, jnp.asarray(v), NOISE))
    for i in range(4):
        for k in range(4):
            heard = [abs(np.asarray(H[i, k]) @ v[i, :, j]) ** 2 for j in range(4)]
            sinr = heard[k] / (sum(heard) - heard[k] + NOISE)
            assert found[i, k] == pytest.approx(np.log2(1 + sinr), rel=1e-4, abs=1e-6)


def test_linear_precoders_are_their_formulas():
    along, forced = mrt(H, POWER, valid=VALID), zf(H, POWER, valid=VALID)
    regular = rzf(H, POWER, NOISE, valid=VALID)
    for i in range(4):
        h = alone(i)
        gram = h @ h.conj().T
        check_columns(along, i, h.conj().T)
        check_columns(forced, i, h.conj().T @ np.linalg.inv(gram))
        ridge = len(h) * NOISE / POWER
        check_columns(regular, i, h.conj().T @ np.linalg.inv(gram + ridge * np.eye(len(h))))
    heard = np.abs(np.asarray(H @ forced)) ** 2
    assert heard[:, ~np.eye(4, dtype=bool)].max() < 1e-8
    for v in (along, forced, regular):
        np.testing.assert_allclose((np.abs(v) ** 2).sum((1, 2)), POWER, rtol=1e-5)


@settings(max_examples=5)
@given(st.integers(0, 2**16))
def test_powers_make_the_best_directions(seed):
    random = np.random.default_rng(seed)
    p, q = (jnp.asarray(random.uniform(0, 3, (4, 4)).astype("f4") * VALID) for _ in range(2))
    v = np.asarray(structured(H, p, q, NOISE))
    for i in range(4):
        h = alone(i)
        k, up = len(h), np.asarray(q[i])[: len(h)]
        d = np.linalg.inv(NOISE * np.eye(6) + (h.conj().T * up) @ h) @ h.conj().T
        wanted = d / np.linalg.norm(d, axis=0) * np.sqrt(np.asarray(p[i])[:k])
        np.testing.assert_allclose(v[i][:, :k], wanted, atol=CLOSE * np.abs(wanted).max())
        assert not v[i][:, k:].any()
    inside = gram_rates(gram_of(H), p, q, NOISE)
    np.testing.assert_allclose(inside, rates(H, jnp.asarray(v), NOISE), atol=1e-3)


def test_a_user_without_power_still_has_a_direction():
    p, q = jnp.full((4, 4), 1.0) * VALID, jnp.zeros((4, 4)).at[:, 0].set(1)
    v = structured(H, p, q, NOISE)
    np.testing.assert_allclose((np.abs(v) ** 2).sum(1), p, rtol=1e-3)
    slope = jax.grad(lambda p, q: gram_rates(gram_of(H), p, q, NOISE).sum(), (0, 1))(p, q)
    assert all(np.isfinite(part).all() for part in slope)


def bisected(h, rounds):
    """WMMSE as it was published, with a search for the multiplier, of one channel."""
    k, n = h.shape
    v = h.conj().T @ np.linalg.inv(h @ h.conj().T + k * NOISE / POWER * np.eye(k))
    v *= np.sqrt(POWER / k) / np.linalg.norm(v, axis=0)
    for _ in range(rounds):
        t = h @ v
        u = np.diag(t) / ((np.abs(t) ** 2).sum(1) + NOISE)
        w = 1 / (1 - (u.conj() * np.diag(t)).real)
        a, b = (h.conj().T * (w * np.abs(u) ** 2)) @ h, h.conj().T * (w * u)
        low, high = 0.0, 1e6
        for _ in range(80):
            mu = (low + high) / 2
            v = np.linalg.solve(a + mu * np.eye(n), b)
            low, high = (mu, high) if (np.abs(v) ** 2).sum() > POWER else (low, mu)
    t = np.abs(h @ v) ** 2
    return np.log2(1 + np.diag(t) / (t.sum(1) - np.diag(t) + NOISE)).sum()


def test_wmmse_climbs_to_where_the_published_form_does():
    by_round = [wmmse(H, POWER, NOISE, valid=VALID, rounds=r, tolerance=0.0) for r in (0, 1, 2, 5)]
    found = np.array([rates(H, v, NOISE).sum(-1) for v in (*by_round, whole())])
    assert (np.diff(found, axis=0) > -1e-4).all()
    regular = rates(H, rzf(H, POWER, NOISE, valid=VALID), NOISE).sum(-1)
    np.testing.assert_allclose(found[0], regular, rtol=1e-4)
    for i in range(4):
        assert found[-1, i] == pytest.approx(bisected(alone(i), 300), rel=2e-3)
    v = np.asarray(whole())
    np.testing.assert_allclose((np.abs(v) ** 2).sum((1, 2)), POWER, rtol=1e-5)
    assert not v[3][:, 3].any()


def whole():
    return wmmse(H, POWER, NOISE, valid=VALID)


def test_the_search_beats_what_needs_no_search():
    found = rates(H, ascended_precoder(H, POWER, NOISE, valid=VALID, steps=100), NOISE).sum(-1)
    for v in (rzf(H, POWER, NOISE, valid=VALID), whole()):
        assert (found > rates(H, v, NOISE).sum(-1) * 0.995).all()
    assert (found > rates(H, rzf(H, POWER, NOISE, valid=VALID), NOISE).sum(-1)).all()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: mrt(H, 1.0), r"h\[3, 3\] is a row of zeros, a user without a channel"),
        (lambda: mrt(H * np.nan, 1.0, valid=VALID), "h is not finite"),
        (lambda: mrt(H, 0.0, valid=VALID), "power=0.0 must be positive"),
        (lambda: rzf(H, 1.0, 0.0, valid=VALID), "noise=0.0 must be positive"),
        (lambda: rzf(H, 1.0, np.full(4, np.nan), valid=VALID), "noise=.*must be positive"),
        (lambda: wmmse(H, 1.0, -1.0, valid=VALID), "noise=-1.0 must be positive"),
        (lambda: wmmse(H, 1.0, 1.0, valid=VALID, rounds=-1), "rounds=-1"),
        (lambda: mrt(H, 1.0, valid=VALID & False), "valid: a channel has no user at all"),
        (lambda: zf(H[..., :3], 1.0, valid=VALID), "4 users and 3 antennas: zero forcing"),
        (lambda: ascended_precoder(H, 1.0, 1.0), "a row of zeros"),
        (lambda: ascended_precoder(H, 1.0, 1.0, valid=VALID, steps=-1), "steps=-1"),
    ],
)
def test_what_is_refused(call, said):
    with pytest.raises(ConfigError, match=said):
        call()


def test_zero_forcing_of_three_users_with_three_antennas_of_four_rows():
    h, there = H[3:, :, :3], VALID[3:]
    assert np.isfinite(zf(h, 1.0, valid=there)).all()
