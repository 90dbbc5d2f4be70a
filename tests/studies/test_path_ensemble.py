"""The study of path ensembles: how its claims are decided, and what it measures."""

import importlib

import jax
import numpy as np
import pytest

from ffnlab.models.paths import path_names
from ffnlab.pruning.paths.path_search import start
from ffnlab.studies import path_ensemble_measure as measure
from ffnlab.studies.path_ensemble_measure import PLAIN, SIDES, TAUGHT, VECTOR, Cut, Text
from ffnlab.studies.tuning import Tuned

study = importlib.import_module("ffnlab.studies.path_ensemble")


def search(deltas, gone=(), loss=1.0):
    """A search with these deltas, in nats, that left some paths out."""
    paths = len(deltas)
    found = start(np.ones(paths, bool))
    found.losses[0], found.whole[0] = loss + np.asarray(deltas), loss
    step = np.full(paths, -1)
    step[list(gone)] = np.arange(len(gone))
    return found._replace(step=step)


def cut(worst=1, moved=-0.1, most=12, gone=(1, 2), after=0.9):
    """A network's paths: the worst by validation rows, and the one that test rows need most."""
    chosen, tested = np.full(13, 0.1), np.full(13, 0.05)
    chosen[worst], tested[worst], tested[most] = -0.2, moved, 1.0
    return Cut(search(chosen, gone), tested, 0.5, after)


def test_paths_of_trained_networks_are_judged_by_means():
    held = lambda cuts, before: [c.holds for c in study.cut_claims(cuts, before)]  # noqa: E731
    assert held([cut(), cut(moved=0.05)], [0.9, 0.9]) == [True] * 4
    assert held([cut(), cut(moved=0.15)], [0.9, 0.9])[0] is False
    assert held([cut(most=10)], [0.9])[1] and not held([cut(most=11)], [0.9])[1]
    assert held([cut(gone=(4, 7))], [0.9])[2] and not held([cut(gone=(5, 7))], [0.9])[2]
    assert held([cut(), cut(after=0.88)], [0.9, 0.9])[3] is False
    assert "without attn 0, attn 0" in study.cut_claims([cut(), cut()], [0.9, 0.9])[0].ours


def reached(*scores):
    """A tuned side."""
    return Tuned({"rate": 1e-3}, [({"rate": 1e-3}, 0.9)], 10, 0, range(len(scores)), scores)


def every(gains, deep=None):
    """All sides, the mean accuracy of each so much above that of all paths alike."""
    sides = {side: reached(0.9 + g, 0.92 + g) for side, g in zip(SIDES, (0.0, *gains), strict=True)}
    more = {} if deep is None else {PLAIN: reached(0.9, 0.9), VECTOR: reached(0.9, 0.9 + deep)}
    return {study.CASE: sides} | ({study.DEEP_CASE: more} if more else {})


def test_sides_are_judged_by_means_within_a_point():
    held = lambda *given: [c.holds for c in study.learned_claims(every(*given))]  # noqa: E731
    assert held((0.001, 0.002, 0.0, 0.003)) == [True] * 5
    assert held((-0.01, 0.002, -0.011, 0.0)) == [True, True, False, True, False]
    assert held((0.01, 0.01, -0.02, 0.0)) == [True, True, False, True, False]
    assert held((0.0,) * 4, 0.01)[5] and not held((0.0,) * 4, 0.0)[5]


def test_exits_weights_and_text_are_judged():
    plain = np.array([[0.5, 0.6], [0.7, 0.6]])
    claims = study.taught_claims({PLAIN: plain, TAUGHT: plain + [0.0, -0.01]})
    assert [c.holds for c in claims] == [True, False]
    bands = np.zeros((2, 2, 3))
    bands[:, 1, -1] = 0.2, -0.1
    assert study.frequency_claim(bands).holds and not study.frequency_claim(-bands).holds
    chosen = search([0.1, 0.2, -0.3, 0.2, 0.2], gone=(2, 1))
    read = Text(chosen, search([0.1, 0.1, -0.1, 0.1, 0.1]), (1.0, 0.9, 1.0))
    assert [c.holds for c in study.text_claims(read)] == [True, True]
    assert "ffn 0, attn 0" in study.text_claims(read)[1].ours
    worse = Text(chosen, search([0.1, -0.1, 0.1, 0.1, 0.1]), (1.0, 0.9, 1.01))
    assert [c.holds for c in study.text_claims(worse)] == [False, False]
    assert [c.holds for c in study.exact_claims([1e-7, 1e-4], 1e-7)] == [False, True]
    assert [c.holds for c in study.exact_claims([1e-7], 1e-4)] == [True, False]


def test_sides_differ_in_their_weights_alone():
    forms = {side: jax.eval_shape(lambda s=side: measure.start(s, 6, 0)) for side in SIDES[:1]}
    forms |= {side: measure.start(side, 6, 0) for side in SIDES[1:4]}
    assert study.NAMES == path_names(forms[PLAIN])
    kept = forms[SIDES[1]].ensemble.kept[...]
    np.testing.assert_array_equal(np.flatnonzero(kept == 0), measure.DROPPED)
    assert forms[PLAIN].ensemble is None and forms[SIDES[1]].ensemble.scale is None
    assert forms[VECTOR].ensemble.scale.shape == (13, 32)
    assert forms[SIDES[3]].ensemble.scale.shape == (13,)


@pytest.mark.slow
def test_a_little_is_run_and_drawn(tmp_path, monkeypatch):
    little = measure.FULL._replace(seeds=2, rates=(1e-3, 3e-3), steps=10, calibration=1, held_out=1)
    monkeypatch.setattr(study, "FULL", little)
    result = study.run(out=tmp_path)
    assert result.claims[0].holds and result.claims[1].holds
    assert {path.stem for path in tmp_path.glob("*.png")} == {"digits", "text", "frequencies"}
    assert len(result.claims) == 17
