"""The counter-current study on little data: its claims, its table, its picture."""

import dataclasses
import importlib
import json

import jax
import numpy as np
import pytest

from ffnlab.data import gaussian_clusters
from ffnlab.studies import load, tuning
from tuned import assert_tuned, cases, with_scores

autoencoder = importlib.import_module("ffnlab.studies.counter_current_autoencoder")
study = importlib.import_module("ffnlab.studies.counter_current")


def test_no_error_crosses_a_layer():
    claim = study.locality_claim(0)
    assert claim.holds and claim.ours.startswith("0 of 40 "), claim


def test_claims_are_decided_by_all_figures():
    """Each claim holds, and falls by one seed of one data set, whichever it is."""
    sides = dict(zip(study.ORDER, ([0.98] * 2, [0.97] * 2, [0.975] * 2, [0.9] * 2), strict=True))
    found = cases(clusters=sides, digits=sides)
    claims = study.accuracy_claims(found)
    assert [claim.holds for claim in claims] == [True, True, True]
    for claim, other in zip(claims, ("backprop", "feedback zero", "feedback frozen"), strict=True):
        assert_tuned(claim, "counter-current", other)
    for case in found:
        for scores in ([0.94, 0.97], [0.97, 0.94]):
            worse = with_scores(found, case, "counter-current", scores)
            assert [c.holds for c in study.accuracy_claims(worse)] == [False, False, False]


@pytest.mark.slow
def test_study_writes_its_result_and_picture(tmp_path, monkeypatch):
    small = lambda seed: gaussian_clusters(seed, train=75, test=20, width=6)  # noqa: E731
    monkeypatch.setattr(study, "clusters", small)
    monkeypatch.setattr(study, "digits", small)
    monkeypatch.setattr(study, "HIDDEN", (5, 5, 5))
    monkeypatch.setattr(study, "BATCH", 30)
    exact = study.Claim("a", "b", "c", True, "d", seeds=1)
    monkeypatch.setattr(study, "locality_claim", lambda seed: exact)
    short = [dataclasses.replace(case, steps=20) for case in autoencoder.CASES[:1]]
    monkeypatch.setattr(autoencoder, "CASES", short)
    result = load("counter-current").run(out=tmp_path, quick=True)
    saved = json.loads((tmp_path / "result.json").read_text())
    assert [row["side"] for row in saved["table"]] == [*study.ORDER * 2, *autoencoder.WAYS]
    for name in ("accuracy", "autoencoders"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
    assert all(0 <= row["accuracy"] <= 1 for row in result.table[:8]) and len(result.claims) == 6
    assert all(row["error"] > 0 for row in result.table[8:])
    for claim in result.claims:
        if claim.claim != "a":
            assert_tuned(claim, "counter-current")
    tried = saved["settings"]["validation"]["digits"]
    assert {len(each) for each in tried.values()} == {2}, "as many settings on each side"


def test_sides_differ_in_the_rule_alone():
    """All ways start from one network, take as many steps, and try the same rates."""
    data = study.sets(0)["digits"]
    sides = study.sides(study.rules(), data, 60, study.RATES)
    assert [side.name for side in sides] == list(study.ORDER)
    assert {(side.batch, side.steps) for side in sides} == {(256, 60 * 1150 // 256)}
    assert all(side.grid == tuning.grid(rate=study.RATES) for side in sides)
    first = jax.tree.leaves(sides[0].model(3))
    for side in sides[1:]:
        for a, b in zip(first, jax.tree.leaves(side.model(3)), strict=True):
            np.testing.assert_array_equal(a, b)


def test_autoencoders_are_judged_by_every_network_and_seed():
    errors = dict(
        zip(autoencoder.WAYS, ([0.3] * 2, [0.47] * 2, [0.46] * 2, [0.5] * 2), strict=True)
    )
    found = cases(rows=errors, images=errors)
    claims = autoencoder.claims(found)
    assert [claim.holds for claim in claims] == [True, True]
    assert_tuned(claims[0], "counter-current", "hidden frozen", "backprop")
    assert_tuned(claims[1], "counter-current", "feedback frozen")
    for case in found:
        worse = with_scores(found, case, "counter-current", [0.47, 0.485])
        assert [claim.holds for claim in autoencoder.claims(worse)] == [False, False]


def test_autoencoders_try_as_many_settings_each():
    for quick, count in ((False, 6), (True, 2)):
        assert {len(tried) for tried in autoencoder.grids(quick).values()} == {count}
    assert "contrast" not in autoencoder.grids(False)["hidden frozen"][0]


@pytest.mark.slow
@pytest.mark.parametrize("case", autoencoder.CASES, ids=lambda case: case.name)
def test_frozen_networks_of_the_autoencoders_stay_frozen(case):
    model = case.make(jax.random.key(0))
    x = jax.random.uniform(jax.random.key(1), (4, *case.shape))
    moved = {}
    for way, rule in autoencoder.rules(case, 10).items():
        rule = rule(autoencoder.grids(False)[way][0])
        state = rule.init(model, jax.random.key(2))
        before = jax.tree.map(np.asarray, (state.model, getattr(state, "mirror", None)))
        state, _ = rule.step(state, x)
        after = (state.model, getattr(state, "mirror", None))
        moved[way] = [
            {
                jax.tree_util.keystr(path)
                for (path, old), new in zip(
                    jax.tree_util.tree_leaves_with_path(was), jax.tree.leaves(now), strict=True
                )
                if np.any(old != new)
            }
            for was, now in zip(before, after, strict=True)
        ]
    every = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(model)}
    assert moved["backprop"] == [every, set()]
    assert moved["counter-current"][0] == moved["feedback frozen"][0] == every
    assert moved["counter-current"][1] and not moved["feedback frozen"][1]
    assert moved["hidden frozen"] == [{p for p in every if case.last in p}, set()]
