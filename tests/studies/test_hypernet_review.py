"""The study of hypernetworks: what decides its claims, and what it measures."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.data import Labelled
from ffnlab.data.vowels import Vowels
from ffnlab.studies import hypernet_review_measure as measure
from ffnlab.studies.hypernet_review_measure import CHUNKS, ONCE, ONE, OWN, SIDES, TOLD
from tuned import assert_tuned, cases, with_scores

study = importlib.import_module("ffnlab.studies.hypernet_review")
GOOD = {OWN: 0.5, ONE: 0.4, TOLD: 0.4, ONCE: 0.4, CHUNKS: 0.25}


def errors(**changed):
    """Two cases of three seeds, and scores of a setting that was not chosen and of the card's."""
    names = {f"{name}": [s] * 3 for name, s in (GOOD | changed).items()}
    best = cases(**{study.MANY: names, study.FEW: names})
    card = {(3e-3, 750): [9.0] * 3, (3e-3, 100): [0.1] * 3}
    many = {side: card | {(3e-3, 1500): [GOOD[side]] * 3} for side in SIDES}
    return best, {study.MANY: many}


def test_sharing_is_decided_at_one_setting_and_at_the_best_of_each_case():
    held = lambda best, scores: [c.holds for c in study.sharing_claims(best, scores)]  # noqa: E731
    best, scores = errors()
    claims = study.sharing_claims(best, scores)
    assert [claim.holds for claim in claims] == [True] * 4
    assert "0.50 of its error in chunks, 0.80 at once" in claims[0].ours and claims[0].seeds == 3
    about = [(OWN, ONCE, CHUNKS)] * 2 + [(ONE, TOLD, CHUNKS)]
    for claim, sides in zip(claims[1:], about, strict=True):
        assert_tuned(claim, *sides)
    for side, value in ((CHUNKS, 0.31), (ONCE, 0.46)):
        worse = {study.MANY: scores[study.MANY] | {side: {(3e-3, 1500): [value] * 3}}}
        assert held(best, worse) == [False, True, True, True]
        few = with_scores(best, study.FEW, side, [value] * 3)
        assert held(few, scores) == [True, True, False, True]
    for side in (ONE, TOLD):
        assert held(with_scores(best, study.FEW, side, [0.24] * 3), scores)[3] is False


def test_vowels_are_decided_in_all_cases():
    rates = {OWN: 0.6, ONE: 0.7, TOLD: 0.7, ONCE: 0.7, CHUNKS: 0.8}
    names = {name: [s, s] for name, s in rates.items()}
    found = cases(**{study.VOWELS: names, study.FIVE: names})
    held = lambda found: [c.holds for c in study.vowel_claims(found)]  # noqa: E731
    assert held(found) == [True, True] and study.vowel_claims({}) == []
    assert held(with_scores(found, study.FIVE, OWN, [0.8, 0.8])) == [False, True]
    for side in (ONE, TOLD):
        assert held(with_scores(found, study.FIVE, side, [0.8, 0.8])) == [True, False]
    for claim, sides in zip(
        study.vowel_claims(found), ((OWN, ONCE, CHUNKS), (ONE, TOLD, CHUNKS)), strict=True
    ):
        assert_tuned(claim, *sides)


def test_starts_reductions_and_sizes():
    good, bad = ([1.0, 1.2], [0.6, 1.9]), ([3.0], [9.0])
    held = lambda **of: study.start_claim({"hyperfan": good, "uniform": bad} | of).holds  # noqa: E731
    assert held() and not held(uniform=good)
    assert not held(hyperfan=([1.3, 1.0], [1.0, 1.0])) and not held(hyperfan=([1.0], [2.1]))
    assert study.reduction_claim(9e-7).holds and not study.reduction_claim(2e-6).holds
    assert study.size_claim().holds
    assert measure.reduction(3, 0) < 1e-6


def test_the_family_of_regressions():
    case, again = measure.regression(5, (0, 1)), measure.regression(5, (1,))
    rows = case.train[1](7)
    assert rows.x.shape == (4, 5, 8) and rows.y.shape == (4, 5, 1)
    assert np.array_equal(rows.x, again.train[0](0).x)
    assert [len(task.x) for task in case.validation[0]] == [200] * 4
    assert [len(task.x) for task in case.test[0]] == [2000] * 4
    draw = np.random.default_rng(1)
    common, own = draw.standard_normal(8), draw.standard_normal((4, 8))
    for task, rows in enumerate(again.test[0]):
        wanted = np.sin(0.4 * rows.x @ (common + own[task] / 4))
        assert np.std(rows.y[:, 0] - wanted) == pytest.approx(0.05, rel=0.1)


def test_vowels_are_cut_by_speakers(monkeypatch):
    """Ten speakers of each of four groups, twelve vowels each, of which one was not measured."""
    speaker = np.repeat(np.arange(40), 12).astype(np.int32)
    x = np.exp(np.random.default_rng(0).normal(size=(480, 5))).astype(np.float32)
    x[:, 0] = speaker + 1
    x[3, 2] = np.nan
    names = tuple("abcdefghijkl")
    y = np.tile(np.arange(12, dtype=np.int32), 40)
    data = Vowels(x, y, speaker // 10, speaker, names, tuple("bgmw"))
    monkeypatch.setattr(measure, "vowels", lambda: data)
    for count, learned in ((None, 6), (2, 2)):
        case = measure.speech(count, 16, (0, 1))
        assert case.classes and case.outputs == 12 and case.width == 5
        for seed in range(2):
            for task in range(4):
                parts = [case.validation[seed][task], case.test[seed][task]]
                heard = [set(np.round(part.x[:, 0], 4).tolist()) for part in parts]
                drawn = [case.train[seed](i) for i in range(40)]
                mine = {v for rows in drawn for v in np.round(rows.x[task, :, 0], 4).tolist()}
                assert len(mine) == learned and not (mine & heard[0] | mine & heard[1])
                assert len(heard[0]) == len(heard[1]) == 2 and not heard[0] & heard[1]
        rows = case.train[0](3)
        assert rows.x.shape == (4, 16, 5) and np.isfinite(rows.x).all()
        assert not np.array_equal(rows.x, case.train[0](4).x)


def test_what_every_side_says(key):
    case = measure.regression(5, (0,))
    x = jnp.asarray(case.test[0][2].x[:3])
    sizes = {}
    for side in SIDES:
        model = measure.network_of(case, side)(key)
        sizes[side] = sum(leaf.size for leaf in jax.tree.leaves(model))
        found = [np.asarray(measure.answers(side, model, jnp.int32(t), x)) for t in (1, 2)]
        assert found[0].shape == (3, 1)
        assert np.array_equal(*found) == (side == ONE)
        rows = jax.tree.map(jnp.asarray, case.train[0](0))
        cost = measure.loss_of(case, side)(model, rows)[0]
        said = [measure.answers(side, model, jnp.int32(t), rows.x[t]) for t in range(4)]
        each = [np.mean((y - rows.y[t]) ** 2) for t, y in enumerate(said)]
        np.testing.assert_allclose(cost, np.mean(each), rtol=1e-5)
    assert sizes == {OWN: 5508, ONE: 1377, TOLD: 1505, ONCE: 90_113, CHUNKS: 9528}


def test_the_first_seed_chooses_on_validation_rows():
    """Validation and test scores of three settings and two seeds."""
    case = measure.regression(3, (0, 1))
    scores = {
        (0.1, 5): [(0.3, 0.9), (0.1, 0.8)],
        (0.1, 9): [(0.2, 0.7), (0.9, 0.6)],
        (0.3, 5): [(0.4, 0.1), (0.2, 0.1)],
    }
    found, test = measure.chosen(case, scores, 7, (0, 1))
    assert found.setting == {"rate": 0.1, "steps": 9} and found.scores == (0.7, 0.6)
    assert [score for _, score in found.tried] == [0.3, 0.2, 0.4] and found.parameters == 7
    assert test[0.3, 5] == [0.1, 0.1]
    by_class = measure.Case((), (), (), 2, True)
    assert measure.chosen(by_class, scores, 7, (0, 1))[0].setting == {"rate": 0.3, "steps": 5}


def test_runs_are_looked_at_on_the_way():
    case = measure.regression(6, (0, 1))
    case = measure.Case(
        case.train,
        [[Labelled(t.x[:20], t.y[:20]) for t in tasks] for tasks in case.validation],
        [[Labelled(t.x[:20], t.y[:20]) for t in tasks] for tasks in case.test],
        1,
        False,
    )
    found, test = measure.tuned(case, ONE, (1e-7, 3e-2), (2, 30), (0, 1))
    assert set(test) == {(rate, stop) for rate in (1e-7, 3e-2) for stop in (2, 30)}
    assert found.setting == {"rate": 3e-2, "steps": 30} and found.seeds == (0, 1)
    still = [abs(a - b) for a, b in zip(test[1e-7, 2], test[1e-7, 30], strict=True)]
    assert max(still) < 0.02 < abs(test[3e-2, 2][0] - test[3e-2, 30][0])
    assert found.scores[0] != found.scores[1]
