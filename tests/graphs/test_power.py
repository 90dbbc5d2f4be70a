"""Powers of links: the bound by Monte-Carlo, limits, baselines, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ffnlab.errors import ConfigError
from ffnlab.graphs import ascended, cell_free, cell_free_rates, fractional, powers
from ffnlab.graphs.channels import HEIGHT, LIMIT, NOISE, SHADOW, SIDE

CASE = cell_free(0, 3, 5, 3, 2, 4, padded=(6, 4))


def test_the_bound_is_that_of_drawn_channels():
    """Maximum ratio with long-term normalization, by 40,000 draws of small-scale fading."""
    points, users, n, draws = 5, 3, 4, 40_000
    case = cell_free(1, 1, points, users, 2, n)
    beta, served = np.asarray(case.gains[0], np.float64), np.asarray(case.served[0])
    rho = np.asarray(fractional(case.gains, case.served, exponent=0.5)[0], np.float64)
    random = np.random.default_rng(0)
    shape = (draws, points, users, n)
    fading = (random.standard_normal(shape) + 1j * random.standard_normal(shape)) / np.sqrt(2)
    h = np.sqrt(beta)[..., None] * fading
    scale = np.sqrt(np.where(served, rho / (n * beta), 0))
    gains = np.einsum("dlkn,dlin,li->dki", h.conj(), h, scale)  # what k hears of i
    own = np.abs(np.einsum("dkk->dk", gains).mean(0)) ** 2
    everything = (np.abs(gains) ** 2).mean(0).sum(1)
    drawn = np.log2(1 + own / (everything - own + 1))
    found = cell_free_rates(rho.astype("f4")[None], case.gains, case.antennas)[0]
    np.testing.assert_allclose(found, drawn, rtol=0.01)
    assert float(found.sum()) == pytest.approx(drawn.sum(), rel=4e-3)  # of the card


@settings(max_examples=20)
@given(arrays(np.float32, (3, 6, 4), elements=st.floats(-1e4, 1e4, width=32)))
def test_limits_hold_whatever_the_logits(logits):
    rho = np.asarray(powers(jnp.asarray(logits), jnp.asarray(CASE.served)))
    assert (rho.sum(-1, dtype=np.float64) <= LIMIT * (1 + 1e-6)).all() and (rho >= 0).all()
    assert not rho[~CASE.served].any() and np.isfinite(rho).all()


def test_padding_changes_nothing_and_slopes_are_finite():
    small = cell_free(0, 3, 5, 3, 2, 4)
    np.testing.assert_array_equal(small.gains, CASE.gains[:, :5, :3])
    for exponent in (0.0, 1.0):
        wide, narrow = (fractional(c.gains, c.served, exponent=exponent) for c in (CASE, small))
        np.testing.assert_allclose(wide[:, :5, :3], narrow, rtol=1e-5)
        rates = [
            cell_free_rates(r, c.gains, c.antennas) for r, c in ((wide, CASE), (narrow, small))
        ]
        np.testing.assert_allclose(rates[0][:, :3], rates[1], rtol=1e-5)
        assert not np.asarray(rates[0][:, 3]).any()
        active = small.served.any(-1)
        np.testing.assert_allclose(np.asarray(narrow).sum(-1)[active], LIMIT, rtol=1e-5)

    def total(logits):
        rho = powers(logits, jnp.asarray(CASE.served))
        return cell_free_rates(rho, CASE.gains, CASE.antennas).sum()

    for logits in (jnp.zeros((3, 6, 4)), jnp.full((3, 6, 4), -200.0)):
        assert np.isfinite(jax.grad(total)(logits)).all()


def test_split_by_gains():
    shares = np.asarray(fractional(CASE.gains, CASE.served, exponent=0.5)) / LIMIT
    for b, point in zip(*np.nonzero(CASE.served.any(-1)), strict=True):
        root = np.sqrt(CASE.gains[b, point]) * CASE.served[b, point]
        np.testing.assert_allclose(shares[b, point], root / root.sum(), rtol=1e-5)


def test_the_search_beats_every_split():
    best = cell_free_rates(
        ascended(CASE.gains, CASE.served, CASE.antennas, steps=150), CASE.gains, CASE.antennas
    ).sum(-1)
    for exponent in (0.0, 0.5, 1.0):
        rho = fractional(CASE.gains, CASE.served, exponent=exponent)
        assert (best > cell_free_rates(rho, CASE.gains, CASE.antennas).sum(-1)).all()


def test_networks_are_as_they_are_said_to_be():
    case = cell_free(5, 200, 8, 4, 3, 2)
    assert (case.served.sum(1) == 3).all()
    weakest = np.where(case.served, case.gains, np.inf).min(1)
    strongest = np.where(case.served, 0, case.gains).max(1)
    assert (weakest > strongest).all()
    # Mean of the logarithm over a wrapped square: distances from the middle, by quadrature.
    axis = np.abs((np.arange(2000) + 0.5) / 2000 - 0.5) * SIDE
    far = np.sqrt(axis[:, None] ** 2 + axis**2 + HEIGHT**2)
    mean = (-30.5 - 36.7 * np.log10(far)).mean() - NOISE
    db = 10 * np.log10(case.gains)
    assert db.mean() == pytest.approx(mean, abs=0.4)
    spread = np.sqrt((36.7 * np.log10(far)).var() + SHADOW**2)
    assert db.std() == pytest.approx(spread, rel=0.03)


GAINS, SERVED = np.asarray(CASE.gains), np.asarray(CASE.served)
ALONE = SERVED & (np.arange(4) != 1)
BEYOND = SERVED | (np.arange(4) == 3)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: fractional(GAINS, ALONE), r"served: user \[0, 1\] is served by no point"),
        (lambda: fractional(GAINS, BEYOND), "a link serves whose gain is 0"),
        (lambda: fractional(-GAINS, SERVED), "gains must be finite and not negative"),
        (lambda: fractional(GAINS * np.nan, SERVED), "gains must be finite"),
        (lambda: ascended(GAINS, SERVED, 0.0), "antennas=0.0 must be at least 1"),
        (lambda: cell_free(0, 1, 3, 2, 4, 1), "serving=4"),
        (lambda: cell_free(0, 1, 3, 2, 2, 1, padded=(3, 1)), r"padded=\(3, 1\)"),
        (lambda: cell_free(0, 1, 0, 2, 2, 1), "points=0 must be at least 1"),
    ],
)
def test_what_is_refused(call, said):
    with pytest.raises(ConfigError, match=said):
        call()
