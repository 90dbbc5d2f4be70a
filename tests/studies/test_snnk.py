"""The SNNK study: what decides its claims, and what it measures."""

import importlib
import math

import jax
import numpy as np
import pytest

from ffnlab import transform
from ffnlab.models import adapters
from ffnlab.structure import snnk_adapter
from ffnlab.studies import snnk_measure as measure
from ffnlab.studies import snnk_polarity as polarity
from ffnlab.studies.snnk_measure import COUNTS, Fit
from ffnlab.testing import tiny_encoder
from tuned import assert_tuned, cases, with_scores

study = importlib.import_module("ffnlab.studies.snnk")
PLAIN, FIRST, BOTH, NARROW = study.PLAIN, study.FIRST, study.BOTH, study.NARROW
HALVED = np.array(COUNTS) ** -0.5


def wrong(relu=HALVED, cos=HALVED, share=0.9):
    found = {("relu", False): relu, ("cos", False): cos}
    return found | {(kind, True): share * found[kind, False] for kind in ("relu", "cos")}


EVEN = {0.0: (0.01, 0.01), 0.1: (-0.02, 0.01)}


def test_kernel_claims_are_decided_by_all_kinds_and_counts():
    held = lambda *given: [c.holds for c in study.kernel_claims(*given, 9)]  # noqa: E731
    assert held(wrong(), EVEN) == [True] * 3
    flat = np.array(COUNTS) ** -0.35
    assert held(wrong(cos=flat), EVEN) == [False, True, True]
    assert held(wrong(relu=np.array(COUNTS) ** -0.65), EVEN) == [False, True, True]
    worse = wrong()
    worse["cos", True] = worse["cos", True] * np.array([1, 1, 1, 1, 1.2])
    assert held(worse, EVEN) == [True, False, True]
    assert held(wrong(), EVEN | {0.2: (-0.04, 0.01)}) == [True, True, False]


def test_closed_forms_are_judged_by_their_worst():
    good = Fit(0.96, 1.0, 1.0, 1e-7)
    held = lambda **of: [  # noqa: E731
        c.holds for c in study.closed_claims({1: good, 8: good._replace(**of)}, 5)
    ]
    assert held() == [True, True]
    assert held(gradient=2e-6) == [False, True]
    assert held(adam=0.99) == [False, True]
    assert held(r2=0.94) == [True, False]


def test_sizes_are_judged_by_means():
    names = (PLAIN, FIRST, BOTH, NARROW)
    found = cases(digits={n: [s, s] for n, s in zip(names, (0.96, 0.95, 0.95, 0.94), strict=True)})
    held = lambda found: [c.holds for c in study.size_claims(found)]  # noqa: E731
    assert held(found) == [True] * 3
    pairs = (PLAIN, FIRST), (PLAIN, BOTH), (BOTH, NARROW)
    for claim, sides in zip(study.size_claims(found), pairs, strict=True):
        assert_tuned(claim, *sides)
    assert held(with_scores(found, "digits", FIRST, [0.93, 0.93])) == [False, True, True]
    assert held(with_scores(found, "digits", BOTH, [0.93, 0.93])) == [True, False, False]
    assert held(with_scores(found, "digits", NARROW, [0.95, 0.951])) == [True, True, False]


def test_adapters_are_judged_against_both():
    names = (polarity.KERNEL, polarity.NETWORK, polarity.NOTHING)
    found = cases(polarity={n: [s, s] for n, s in zip(names, (0.8, 0.81, 0.7), strict=True)})
    held = lambda found: [c.holds for c in study.text_claims(found["polarity"])]  # noqa: E731
    assert held(found) == [True, True]
    assert held(with_scores(found, "polarity", polarity.NETWORK, [0.83, 0.83])) == [False, True]
    assert held(with_scores(found, "polarity", polarity.NOTHING, [0.8, 0.81])) == [True, False]
    assert study.text_claims({}) == []


def test_a_fifth_of_the_numbers_is_trained():
    count = lambda model, name: sum(  # noqa: E731
        x.size for x in jax.tree.leaves(getattr(model.layers[0].ffn, name))
    )
    plain, first, both, narrow = (
        make(0)
        for make in (
            lambda s: study.plain(study.HIDDEN, s),
            study.first_replaced,
            study.both_replaced,
            lambda s: study.plain(study.NARROW_HIDDEN, s),
        )
    )
    assert count(plain, "up") / count(first, "psi") == pytest.approx(5, abs=0.01)
    whole = count(plain, "up") + count(plain, "down")
    assert whole / count(both, "down") == pytest.approx(5, rel=0.01)
    assert count(narrow, "up") + count(narrow, "down") == pytest.approx(whole / 5, rel=0.01)


def test_adapters_of_the_texts_have_a_fifth_of_the_numbers():
    encoder = tiny_encoder()
    made = [
        transform.apply(t, encoder)[0]
        for t in (
            snnk_adapter(features=polarity.FEATURES),
            adapters.adapter(bottleneck=polarity.BOTTLENECK),
        )
    ]
    few, many = (polarity.sizes_of(model).adapters for model in made)
    width = encoder.config.width
    slots = 2 * len(encoder.layers)
    assert few == slots * (polarity.FEATURES + 1) * width
    assert many == slots * (2 * polarity.BOTTLENECK * width + polarity.BOTTLENECK + width)
    assert many / few > 5


def test_slopes_and_errors():
    assert measure.slope((1, 10, 100), np.array([1.0, 0.1, 0.01])) == pytest.approx(-1)
    wanted = {"relu": 0.066, "cos": 0.24}  # at 64 features
    for kind, near in wanted.items():
        found = measure.errors(kind, orthogonal=False, draws=4, seed=0)
        assert found.shape == (len(COUNTS),) and (np.diff(found) < 0).all()
        assert found[1] == pytest.approx(near, rel=0.3)
    mean, error = measure.bias_of(0.0, draws=20, seed=0)
    assert abs(mean) < 4 * error < 0.5


def test_a_fit_is_exact_and_better_than_a_few_steps():
    fit = measure.fitted(1, features=32, steps=20, rates=(1e-2,), seed=0)
    assert fit.gradient < 1e-6 and fit.closed < fit.adam and 0.9 < fit.r2 <= 1
    data = measure.smooth(200, 8, 1)
    assert data.x.shape == (200, 8) and data.y.shape == (200, 1)
    assert np.abs(data.x).max() <= 1 and math.isfinite(data.y.std())
