"""The study of physical local learning: what decides its claims, and a run on little data."""

import dataclasses
import importlib
import json

import jax
import numpy as np
import optax
import pytest

from ffnlab.data import gaussian_clusters
from ffnlab.learning import physical_ff
from ffnlab.models import PhysicalConfig
from ffnlab.studies import load
from ffnlab.studies import physical_ff_measure as measure
from ffnlab.studies.physical_ff_measure import Case, Life, Moved
from tuned import assert_tuned, cases, with_scores

study = importlib.import_module("ffnlab.studies.physical_ff")
SIDES = OURS, THROUGH, TWIN = study.OURS, study.THROUGH, study.TWIN


def life(before=0.98, dropped=0.7, after=0.97, seeds=2):
    each = [[value] * seeds for value in (before, dropped, after)]
    return Life(*each, {0.0: [0.1] * seeds, 1.0: each[0], 2.0: each[2]})


LIVES = {name: {OURS: life(), TWIN: life(0.95, 0.8, 0.94)} for name in ("clusters", "vowels")}


def with_life(case, side, **change):
    changed = LIVES[case][side]._replace(**change)
    return {**LIVES, case: {**LIVES[case], side: changed}}


def test_accuracy_is_decided_by_all_figures():
    scores = dict(zip(SIDES, ([0.97, 0.96], [0.975, 0.979], [0.97, 0.97]), strict=True))
    found = cases(clusters=scores, vowels=scores)
    held = lambda found: [c.holds for c in study.accuracy_claims(found, LIVES)]  # noqa: E731
    assert held(found) == [True] * 3
    assert_tuned(study.accuracy_claims(found, LIVES)[0], OURS)
    for i, rival in enumerate((THROUGH, TWIN), 1):
        assert_tuned(study.accuracy_claims(found, LIVES)[i], OURS, rival)
        for case in found:
            assert held(with_scores(found, case, rival, [0.97, 0.985])) == [
                True,
                *(j != i for j in (1, 2)),
            ]
    assert held(with_scores(found, "clusters", OURS, [0.97, 0.949])) == [False, False, False]
    assert held(with_scores(found, "vowels", OURS, [0.97, 0.949])) == [True, False, False]


def test_changes_are_decided_by_all_figures():
    held = lambda lives: [c.holds for c in study.change_claims(lives, [0, 1])]  # noqa: E731
    assert held(LIVES) == [True] * 3
    assert held(with_life("clusters", OURS, dropped=[0.7, 0.86])) == [False, True, True]
    assert held(with_life("vowels", OURS, dropped=[0.7, 0.86])) == [True] * 3
    assert held(with_life("clusters", OURS, after=[0.97, 0.94])) == [False, False, True]
    assert held(with_life("vowels", OURS, after=[0.97, 0.955])) == [True, False, True]
    for case in LIVES:
        assert held(with_life(case, TWIN, dropped=[0.8, 0.97])) == [True, True, False]
        assert held(with_life(case, TWIN, after=[0.99, 0.99])) == [True] * 3
    without = {**LIVES, "clusters": {OURS: LIVES["clusters"][OURS]}}
    assert held(without) == [True] * 3, "the quick form has twins of one case"


def test_what_goes_on_inside_is_decided_by_all_figures():
    good = measure.Order(np.full((2, 3), 0.1), np.full((2, 3), np.log(2)))
    apart = Moved(np.eye(3, dtype=bool), np.zeros((3, 3), bool))

    def held(found=apart, **change):
        orders = {"clusters": good, "vowels": good._replace(**change)}
        return [c.holds for c in study.inside_claims(orders, found, [0, 1])]

    worst = np.zeros((2, 3))
    worst[1, 2] = 1
    assert held() == [True] * 3
    assert held(gaps=0.1 - 0.11 * worst) == [False, True, True]
    assert held(gaps=0.1 + np.nan * worst) == [False, True, True]
    assert held(first=np.log(2) * (1 + 0.06 * worst)) == [True, False, True]
    assert held(first=np.log(2) * (1 - 0.06 * worst)) == [True, False, True]
    assert held(apart._replace(maps=np.tri(3, dtype=bool))) == [True, True, False]
    assert held(apart._replace(maps=np.zeros((3, 3), bool))) == [True, True, False]
    assert held(apart._replace(systems=np.eye(3, dtype=bool))) == [True, True, False]


def test_work_is_decided_on_every_data_set():
    work = {"clusters": {OURS: 1e3, TWIN: 2e3}, "vowels": {OURS: 2e3, TWIN: 3e3}}
    assert study.work_claim(work).holds
    assert not study.work_claim({**work, "vowels": {OURS: 3e3, TWIN: 3e3}}).holds


def test_slopes_are_those_of_the_rule():
    found = measure.moved(0)
    np.testing.assert_array_equal(found.maps, np.eye(3, dtype=bool))
    assert not found.systems.any() and found.systems.shape == (3, 3)


def test_work_leaves_the_systems_out():
    """Rows of both classes, twice each way for the map of each layer, and once for its output."""
    case = Case(PhysicalConfig(6, 3, (8, 7), slots=4, skip=True), gaussian_clusters, 10, 1, 1)
    maps = (8 + 10) * 8 + (7 + 8) * 7
    found = measure.digital_work(physical_ff(inner=3), case, 0)
    assert found == 2 * 10 * maps * (3 * 2 + 1)
    wide = dataclasses.replace(case, config=dataclasses.replace(case.config, system="two_bit"))
    assert measure.digital_work(physical_ff(inner=3), wide, 0) == found


def small(seed):
    return gaussian_clusters(seed, train=250, test=60, classes=3, per_class=1, width=6, noise=0.4)


SMALL = Case(PhysicalConfig(6, 3, (12, 10), slots=3, skip=True), small, 50, 6, 4, (6, 4), True)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(measure, "CASES", {"clusters": SMALL})


def test_members_live_on_after_their_systems_are_replaced(tiny):
    data, rule = measure.ready(SMALL, 0), physical_ff(optax.adam(1e-2), inner=2)
    found = measure.lived(rule, SMALL, data, [0, 3], points=4)
    assert SMALL.steps(data) == (24, 16)
    assert list(found.curve)[:2] == [0.0, 0.25] and max(found.curve) == measure.CHANGED + 16 / 24
    assert all(len(row) == 2 for row in (found.before, found.dropped, found.after))
    np.testing.assert_allclose(found.curve[1.0], found.before)
    assert np.mean(found.before) > np.mean(found.curve[0.0]) + 0.2
    assert found.dropped != found.before and found.curve[measure.CHANGED] == found.dropped


def test_cases_of_forms(monkeypatch, tmp_path):
    monkeypatch.delenv("FFNLAB_DATA", raising=False)
    assert list(measure.cases(quick=True)) == list(measure.cases(quick=False))
    (tmp_path / "vowels").mkdir()
    monkeypatch.setenv("FFNLAB_DATA", str(tmp_path))
    assert list(measure.cases(quick=True)) == ["clusters", "digits"]
    assert measure.cases(quick=True)["digits"].epochs < measure.CASES["digits"].epochs
    assert measure.cases(quick=False) == measure.CASES


def test_vowels_of_other_speakers_are_in_test(data, monkeypatch):
    monkeypatch.setenv("FFNLAB_DATA", str(data))
    train, test = measure.spoken(0)
    assert train.x.shape[1] == 5 and train.x.min() == 0 and set(train.y) == set(range(12))
    np.testing.assert_allclose(train.x.std(0), 1, rtol=1e-4)
    assert 0.15 < len(test.x) / (len(test.x) + len(train.x)) < 0.25


def test_sides_try_as_many_settings(tiny):
    data = measure.ready(SMALL, 0)
    for quick, count in ((False, 6), (True, 1)):
        compared = study.sides(SMALL, data, quick)
        assert [side.name for side in compared] == list(SIDES)
        assert {len(side.grid) for side in compared} == {count}
        assert [side.steps for side in compared] == [24, 48, 48], "as many changes of the maps"
    apart = dataclasses.replace(SMALL, has_twins=False)
    assert [side.name for side in study.sides(apart, data, True)] == [OURS, THROUGH]
    assert len(study.sides(apart, data, False)) == 3


@pytest.mark.slow
def test_study_writes_its_result_and_picture(tiny, tmp_path, monkeypatch):
    exact = Moved(np.eye(3, dtype=bool), np.zeros((3, 3), bool))
    monkeypatch.setattr(study, "moved", lambda seed: exact)
    lives = {OURS: life(seeds=1), TWIN: life(0.95, 0.8, 0.94, seeds=1)}
    monkeypatch.setattr(study, "changed", lambda *given: lives)
    result = load("physical-ff").run(out=tmp_path, quick=True)
    saved = json.loads((tmp_path / "result.json").read_text())
    assert [row["side"] for row in saved["table"]] == list(SIDES)
    assert saved["table"][0]["before"] > 0.5 > saved["table"][0]["untrained"]
    assert saved["table"][0]["multiply-adds of a row"] < saved["table"][2]["multiply-adds of a row"]
    assert (tmp_path / "replaced.png").stat().st_size > 5000
    assert len(result.claims) == 10 and jax.tree.leaves(result.table)
    assert_tuned(result.claims[1], OURS, THROUGH)
