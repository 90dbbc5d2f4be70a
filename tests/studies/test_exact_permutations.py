"""The study of exact permutations: how networks are counted, and claims by all ensembles."""

import importlib
import math

import numpy as np
import pytest

from ffnlab.learning.exact_permutations.closed_form import last_layer, moments, ntk
from ffnlab.studies.exact_permutations_measure import (
    RECORDED,
    Ensemble,
    ensemble,
    exact,
    first,
)

study = importlib.import_module("ffnlab.studies.exact_permutations")


def test_networks_are_counted_from_where_it_stays():
    assert first(np.array([True, False, True, True])) == 3
    assert first(np.array([True, True])) == 1
    assert math.isnan(first(np.array([True, False])))


def test_shares_of_inputs_are_of_averages():
    outputs = np.array([[[0.3, 0.1], [0.9, 0.9]], [[0.1, -0.3], [0.9, 0.7]]])
    wanted = np.array([[True, False], [True, True]])
    np.testing.assert_allclose(exact(outputs, wanted, 0.0), [0.5, 1.0])
    np.testing.assert_allclose(exact(outputs, wanted, 0.25), [1.0, 0.5])


def drawn(kernel, k, scale=1.0, needed=None, whole=(20.0, 30.0), stuck=0.8):
    """An ensemble of normal outputs with a kernel's moments."""
    known, wanted = moments(k, 2, kernel), np.zeros((50, k), bool)
    wanted[:, :2] = True
    means = np.where(wanted, known.on, known.off)
    noise = np.random.default_rng(0).normal(size=(400, 50, k)) * np.sqrt(scale * known.variance)
    counts = {
        share: [float(known.get(k, 0)) if needed is None else needed] * 3
        for share, known in RECORDED.items()
    }
    return Ensemble(means + noise, wanted, counts, whole, stuck)


def test_moments_are_of_their_own_kernel():
    good = {("ntk", 5): drawn(ntk, 5), ("standard", 5): drawn(last_layer, 5)}
    assert study.moments_claim(good, "ntk", ntk, last_layer).holds
    assert study.moments_claim(good, "standard", last_layer, ntk).holds
    assert not study.moments_claim(good, "ntk", last_layer, ntk).holds
    wide = {("ntk", 5): drawn(ntk, 5, scale=1.2)}
    assert not study.moments_claim(wide, "ntk", ntk, last_layer).holds


def test_sizes_and_exactness_are_decided_by_all():
    good = {("standard", 5): drawn(last_layer, 5), ("standard", 10): drawn(last_layer, 10)}
    assert study.sizes_claim(good).holds
    for needed in (300.0, 40.0, math.nan):
        off = good | {("standard", 10): drawn(last_layer, 10, needed=needed)}
        assert not study.sizes_claim(off).holds
    for share in RECORDED:
        one = good["standard", 10].needed | {share: [300.0] * 3}
        off = good | {("standard", 10): good["standard", 10]._replace(needed=one)}
        assert not study.sizes_claim(off).holds, share
    exact_at_all, stuck = study.exact_claims({("ntk", 5): drawn(ntk, 5)})
    assert exact_at_all.holds and stuck.holds
    exact_at_all, stuck = study.exact_claims(
        {("ntk", 5): drawn(ntk, 5), ("ntk", 8): drawn(ntk, 8, whole=(20.0, 201.0), stuck=1.0)}
    )
    assert not exact_at_all.holds and not stuck.holds
    exact_at_all, _ = study.exact_claims({("ntk", 5): drawn(ntk, 5, whole=(20.0, math.nan))})
    assert not exact_at_all.holds and "(20 to inf)" in exact_at_all.ours


def test_closed_forms_hold_what_they_say(monkeypatch):
    monkeypatch.setattr(study, "SIZES", (3, 12))
    monkeypatch.setattr(study, "GROWTH", (8, 32))
    assert study.signs_claim().holds and study.recorded_claim().holds
    assert [claim.holds for claim in study.growth_claims()] == [True, True, False]


def test_growth_is_judged_by_every_kernel_and_size():
    """A ratio that grows at one doubling, of one kernel alone."""
    assert study.growth_claim("it grows", "O(k)", "so", lambda k, kernel: 1.0).holds
    for at in study.GROWTH[1:]:
        for rising in study.KERNELS.values():
            grows = lambda k, kernel: 1.0 + ((k, kernel) == (at, rising))  # noqa: B023, E731
            assert not study.growth_claim("it grows", "O(k)", "so", grows).holds


@pytest.mark.slow
def test_a_small_ensemble_is_measured():
    found = ensemble("standard", 4, 256, 60, 0)
    assert found.outputs.shape == (60, 6, 4) and found.wanted.sum() == 12
    assert all(1 <= n <= 60 for n in found.whole) and found.stuck < 1
