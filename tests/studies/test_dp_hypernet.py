"""The study of continual hypernetworks: what decides its claims, and what it measures."""

import importlib

import jax
import numpy as np
import pytest

from ffnlab.data import Labelled
from ffnlab.models import HypernetConfig
from ffnlab.studies import dp_hypernet_measure as measure
from ffnlab.studies.dp_hypernet_measure import APART, CHAINED, EACH, FINE, Followed, Scores
from ffnlab.studies.tuning import grid
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


HELD, LOOSE = {"beta": 0.1, "rate": 2e-3}, {"beta": 0.0, "rate": 8e-3}


def kept(held=(0.95, 0.95), free=(0.5, 0.5), lost=(0.01, 0.01)):
    """Whether a chain is said to be kept, where the second of two cases is of these figures."""

    def case(held, free, lost):
        """Runs of a chain, what it reached, and what it reached without being held."""
        scores = {(0.1, 2e-3): map(scored, held, lost), (0.0, 8e-3): map(scored, free, lost)}
        pairs = {(v, s): one for v, each in scores.items() for s, one in enumerate(each)}
        worse = {((0.1, 8e-3), s): scored(0.1, 0.4) for s in SEEDS}
        return (
            {CHAINED: Followed(pairs | worse, None, 9)},
            {CHAINED: reached(held, setting=HELD)},
            reached(free, setting=LOOSE),
        )

    parts = [case([0.95] * 2, [0.5] * 2, [0.01] * 2), case(held, free, lost)]
    return study.kept_claim(
        *(dict(zip("ab", part, strict=True)) for part in zip(*parts, strict=True))
    )


def test_what_is_kept_is_decided_by_every_case_and_seed():
    assert kept().holds and kept().seeds == 2
    assert "rate 0.002" in kept().ours and "beta 0 rate 0.008" in kept().ours
    for name, wrong in (("held", 0.929), ("free", 0.71), ("lost", 0.021)):
        for i in SEEDS:
            figures = {"held": [0.95, 0.95], "free": [0.5, 0.5], "lost": [0.01, 0.01]}[name]
            figures[i] = wrong
            assert not kept(**{name: figures}).holds, (name, i)


def test_sides_are_compared_in_all_cases_and_seeds():
    good = {FINE: [0.5, 0.5], EACH: [0.96, 0.96], APART: [0.95, 0.95], CHAINED: [0.951, 0.951]}
    found = cases(a=good, b=good)
    held = lambda found: [c.holds for c in study.compared_claims(found)]  # noqa: E731
    assert held(found) == [True] * 3
    assert held(with_scores(found, "b", FINE, [0.4, 0.951])) == [False, True, True]
    assert held(with_scores(found, "b", EACH, [0.9, 0.98])) == [True, False, True]
    assert held(with_scores(found, "b", APART, [0.951, 0.982])) == [True, True, False]
    claims = study.compared_claims(found)
    for claim, side in zip(claims, (FINE, EACH, APART), strict=True):
        assert_tuned(claim, side, CHAINED)
    assert "means differ by a +0.001, b +0.001" in claims[-1].evidence


def test_every_side_tries_as_many_settings():
    sizes = study.Sizes(5, 400, study.BETAS, study.RATES, study.PLAIN, SEEDS, True)
    tried = {side: len(sizes.settings(side)) for side in measure.SIDES}
    assert set(tried.values()) == {9} and len(tried) == 4
    assert {s["rate"] for s in sizes.free} == set(study.RATES) < set(study.PLAIN)
    assert all(s["beta"] == 0 for s in sizes.free)


def test_scores_of_a_run():
    test = np.array([[0.9, 0.2], [0.7, 0.8]])
    found = Scores(test, test)
    assert np.isclose(found.final, 0.75) and np.isclose(found.lost, 0.1)
    swapped = Scores(test, test - 0.5)  # validation rows choose, test rows do not
    run = Followed(
        {
            ((0.1, 1e-3), 0): swapped,
            ((0.1, 1e-2), 0): Scores(scored(0.6).test, test),
            ((0.0, 1e-3), 0): scored(0.99),
            **{((0.1, rate), 1): scored(0.3) for rate in (1e-3, 1e-2)},
        },
        None,
        5,
    )
    best = measure.tuned(run, grid(beta=(0.1,), rate=(1e-3, 1e-2)), SEEDS)
    assert best.setting == {"beta": 0.1, "rate": 1e-3} and best.parameters == 5
    assert [score for _, score in best.tried] == pytest.approx([0.75, 0.6])
    assert best.scores == pytest.approx((0.25, 0.3))


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
    for side, settings in (
        (FINE, grid(rate=(1e-2, 1e-3))),
        (EACH, grid(rate=(1e-2,))),
        (CHAINED, grid(beta=(0.0, 1.0), rate=(1e-3,))),
    ):
        found = measure.followed(case, side, settings, SEEDS)
        assert set(found.scores) == {(tuple(s.values()), d) for s in settings for d in SEEDS}
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
