"""The study of continual hypernetworks: what decides its claims, and what it measures."""

import importlib

import jax
import numpy as np
import pytest

from ffnlab.data import Labelled
from ffnlab.models import HypernetConfig
from ffnlab.studies import dp_hypernet_measure as measure
from ffnlab.studies.dp_hypernet_measure import APART, CHAINED, EACH, FINE, Followed, Scores
from tuned import assert_tuned, cases, reached, with_scores

study = importlib.import_module("ffnlab.studies.dp_hypernet")
SEEDS = (0, 1)


def data(rows=60):
    """Images of four pixels of ten classes."""
    random = np.random.default_rng(0)
    y = np.arange(rows, dtype=np.int32) % 10
    part = Labelled(random.normal(size=(rows, 4)).astype(np.float32), y)
    return part, part


def small(tasks=2, steps=3):
    """Permuted tasks of three steps each."""
    case = measure.permuted_case(data(), tasks=tasks, hidden=3, chunk=16, steps=steps, seed=0)
    return measure.Case(case.tasks, case.target, 16, 3, steps, 8)


def scored(final, lost=0.0):
    """Two tasks that end at an accuracy and were at more."""
    test = np.array([[final + 2 * lost, 0.1], [final, final]])
    return Scores(test, test)


def runs(held=0.95, free=0.5, lost=0.01):
    scores = {(b, s): scored(held if b else free, lost) for b in (0.0, 0.1) for s in SEEDS}
    return {CHAINED: Followed(scores, None, 9)}


def test_what_is_kept_is_decided_by_every_seed():
    found = {CHAINED: reached([0.95, 0.95], setting={"beta": 0.1})}
    held = lambda runs: study.kept_claim(runs, found, SEEDS).holds  # noqa: E731
    assert held(runs())
    for wrong in ({"held": 0.92, "free": 0.1}, {"free": 0.71}, {"lost": 0.021}):
        assert not held(runs(**wrong))
    one = runs()
    one[CHAINED].scores[0.1, 1] = scored(0.92)
    assert not held(one)


def test_sides_are_compared_in_all_cases():
    good = {FINE: [0.5, 0.5], EACH: [0.96, 0.96], APART: [0.95, 0.95], CHAINED: [0.951, 0.951]}
    found = cases(a=good, b=good)
    held = lambda found: [c.holds for c in study.compared_claims(found)]  # noqa: E731
    assert held(found) == [True] * 3 and study.better_claim(found).holds
    assert held(with_scores(found, "b", FINE, [0.96, 0.96])) == [False, True, True]
    assert held(with_scores(found, "b", EACH, [0.98, 0.98])) == [True, False, True]
    better = with_scores(found, "b", APART, [0.951, 0.982])
    assert held(better) == [True, True, False] and not study.better_claim(better).holds
    pairs = (FINE, CHAINED), (EACH, CHAINED), (APART, CHAINED), (APART, CHAINED)
    claims = [*study.compared_claims(found), study.better_claim(found)]
    for claim, sides in zip(claims, pairs, strict=True):
        assert_tuned(claim, *sides)


def test_scores_of_a_run():
    test = np.array([[0.9, 0.2], [0.7, 0.8]])
    found = Scores(test, test)
    assert np.isclose(found.final, 0.75) and np.isclose(found.lost, 0.1)
    run = Followed({(0.1, 0): found, (1.0, 0): scored(0.6), (0.0, 0): scored(0.99)}, None, 5)
    best = measure.tuned(run, (0.1, 1.0), (0,), "beta")
    assert best.setting == {"beta": 0.1} and best.parameters == 5 and len(best.tried) == 2
    assert np.isclose(best.mean, 0.75)


def test_tasks_and_batches():
    case = small()
    assert len(case.tasks) == 2 and case.target.sizes == (4, 3, 3, 10)
    found = measure.sources(case, 0)
    batch = measure.rows_at(found, CHAINED, 3, 4)
    assert batch.task == 1 and batch.rows[0].shape == (8, 4)
    assert np.array_equal(batch.rows[0], found[1](1).x)
    both = measure.rows_at(found, EACH, 3, 1)
    assert both[0].shape == (2, 8, 4) and np.array_equal(both[0][1], found[1](1).x)
    pairs = measure.split_case(data(), hidden=3, chunk=9, steps=2, seed=0)
    assert len(pairs.tasks) == 5 and pairs.target.sizes[-1] == 2
    assert all(set(task.test.y.tolist()) == {0, 1} for task in pairs.tasks)


@pytest.mark.slow
def test_every_side_learns_its_tasks():
    """A step of a task leaves networks of others alone, and figures are those of the members."""
    case = small()
    for side, settings in ((FINE, (1e-2, 1e-3)), (EACH, (1e-2,)), (CHAINED, (0.0, 1.0))):
        found = measure.followed(case, side, settings, SEEDS)
        assert set(found.scores) == {(s, seed) for s in settings for seed in SEEDS}
        for scores in found.scores.values():
            assert scores.test.shape == scores.validation.shape == (2, 2)
            assert ((scores.test >= 0) & (scores.test <= 1)).all()
        last = [scores.test[-1] for scores in found.scores.values()]
        again = measure.known(case, side, found.state.model)[1]
        np.testing.assert_allclose(again, np.stack(last))
    state = measure.one_of(found.state, 3)
    assert state.learned.tolist() == [True, False] and state.task == 1
    claim = study.growth_claim(found, 0)
    assert claim.holds
    assert study.size_claim({CHAINED: found, APART: found}, case).holds


def test_a_chain_depends_on_what_came_before(key):
    case = small()
    for side in (CHAINED, APART):
        net = jax.jit(HypernetConfig(case.target, case.spec(side)).make)(key=key)
        found, before = measure.dependency(net)
        assert found.shape == before.shape == (5, 5)
        if side == CHAINED:
            np.testing.assert_array_equal(found, before)
        else:
            assert not (found & ~np.eye(5, dtype=bool)).any()
    assert study.dependency_claim(case, 0).holds
