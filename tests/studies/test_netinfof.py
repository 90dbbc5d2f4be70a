"""The study of usable information: what decides its claims, and its sides on little data."""

import dataclasses
import importlib
import json

import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.data import block_model
from ffnlab.graphs import VIEWS, informative_graph
from ffnlab.scores import hits_at
from ffnlab.studies import netinfof_measure as measure
from ffnlab.studies.netinfof_measure import Budget, Problem
from ffnlab.studies.tuning import grid
from tuned import reached

study = importlib.import_module("ffnlab.studies.netinfof")
FULL = dataclasses.replace(study.sizes_of(0, quick=False), seeds=[0, 1])
CASES = [f"{features}-{edges}" for features in study.FEATURES for edges in study.EDGES]


def told(**changes):
    """Problems whose scores are those that are said, all others .6."""
    return [
        Problem(case, seed, None, {}, dict.fromkeys(VIEWS, 0.6) | changes.get(case, {}), {})
        for case in CASES
        for seed in (0, 1)
    ]


def test_scores_are_judged_by_means():
    def held(**changes):
        return [claim.holds for claim in study.score_claims(told(**changes), FULL)]

    coins = {"random-diag": {"F": 0.51}}
    assert held(**coins) == [True, True]
    assert held() == [False, True], "no more than F"
    assert held(**{"random-diag": {"F": 0.51, "R": 0.505}}) == [False, True]
    for case in ("local-diag", "local-offdiag"):
        for name in "FPS":
            assert held(**coins, **{case: {name: 0.55}}) == [True, False]
    assert held(**coins, **{"local-diag": {"U": 0.5}}) == [True, True]


def sides(ours, alone, gcn):
    found = {study.ALL: reached([ours] * 2), study.GCN: reached([gcn] * 2)}
    return found | {name: reached([alone] * 2) for name in VIEWS}


def test_hits_are_judged_on_all_graphs_but_one():
    good, even = sides(0.6, 0.5, 0.4), sides(0.6, 0.6, 0.6)
    bad = sides(0.6, 0.61, 0.61)

    def held(*unlike, cora=good):
        found = dict.fromkeys(CASES, good) | dict(zip(CASES, unlike, strict=False))
        return [c.holds for c in study.hit_claims(found | {study.CORA: cora}, FULL)]

    assert held() == held(bad) == held(cora=bad) == [True, True]
    assert held(even, even) == [True, False], "as good is no better"
    assert held(bad, bad) == [False, False]
    assert held(bad, cora=bad) == [True, False], "Cora is real, and counts for the second alone"


@pytest.mark.parametrize("k", [1, 3, 6])
def test_hits_of_traced_scores_are_those_of_scores(k):
    random = np.random.default_rng(k)
    for _ in range(5):
        scores = random.integers(0, 6, 20) / 4
        joined = np.arange(20) % 2 == 0
        found = float(measure.hits(jnp.asarray(scores), jnp.asarray(joined), k))
        assert found == pytest.approx(hits_at(k, scores, joined))


def test_unlike_nodes_are_joined_to_each_other_alone():
    nodes = measure.across(1, group=20, degree=3)
    assert np.all(nodes.y[np.asarray(nodes.graph.senders)] != nodes.y[nodes.graph.receivers])
    assert np.bincount(nodes.y).tolist() == [20, 20] and nodes.x.shape == (40, 2)


SMALL = {"nodes": 80, "width": 12, "density": 0.15, "walks": 20}
TINY = Budget(grid(l1=(1e-4,), l2=(1e-3, 1e-5)), grid(rate=(1e-3, 1e-2), decay=(0.0,)), 3, 4, 2, 6)


@pytest.fixture(scope="module")
def problems():
    """Two graphs of two seeds."""
    return [
        measure.prepared(
            case, informative_graph(case, "diag", seed, **SMALL), seed, dimension=4, walks=20
        )
        for case in ("random", "local")
        for seed in (0, 1)
    ]


def test_all_sides_learn_from_the_same_pairs_and_never_from_hidden_ones(problems):
    count, valid = measure.sizes_of(problems)
    for problem in problems:
        ends, joined, asked = measure.learned_pairs(problem, count, valid)
        edges = {tuple(e) for e in problem.split.train.ends[problem.split.train.joined].tolist()}
        assert {tuple(e) for e in ends[joined].tolist()} <= edges and joined.sum() == count
        assert len(ends) == 2 * count and asked.joined.sum() == valid == len(asked.ends) / 2
        again, _, _ = measure.learned_pairs(problem, count, valid)
        np.testing.assert_array_equal(again, ends)


@pytest.mark.slow
def test_settings_are_chosen_by_validation_and_scored_on_test(problems):
    wide = 5 * 4
    found = measure.by_embeddings(problems, TINY)
    alone = measure.by_each(problems, TINY)["S"]
    network = measure.by_network(problems, TINY)
    for side, size in ((found, wide + 1), (alone, 5), (network, 12 * 6 + 6 + 6 * 32 + 32)):
        assert list(side) == ["random", "local"]
        for one in side.values():
            assert one.seeds == (0, 1) and len(one.scores) == len(one.tried) == 2
            assert one.setting == max(one.tried, key=lambda t: t[1])[0]
            assert one.parameters == size and all(0 <= s <= 1 for s in one.scores)


def test_the_best_mean_validation_chooses(problems):
    pairs = {id(p.split.valid): (i, 0) for i, p in enumerate(problems)}
    pairs |= {id(p.split.test): (i, 1) for i, p in enumerate(problems)}

    def judged(i, j, asked):
        assert pairs[id(asked)][0] == i
        is_test = pairs[id(asked)][1]
        return (0.1 * i if is_test else [0.4, 0.5][j]) + 0.01 * j

    found = measure.chosen(problems, TINY.combined, judged, 9)
    assert found["local"].setting == TINY.combined[1]
    assert found["local"].scores == pytest.approx([0.21, 0.31])
    assert [value for _, value in found["random"].tried] == pytest.approx([0.4, 0.51])


@pytest.mark.slow
@pytest.mark.parametrize("quick", [True, False])
def test_study_writes_its_result_and_pictures(tmp_path, monkeypatch, quick):
    monkeypatch.setattr(study, "GRAPH", SMALL)
    monkeypatch.setattr(study, "LARGEST", (100, 8, 50_000))
    nodes = block_model(5, nodes=80, width=12, inside=0.3, train=10, valid=10)
    monkeypatch.setattr(study, "cora", lambda: nodes)
    monkeypatch.setattr(study, "find_folder", lambda name: tmp_path)
    sizes = dataclasses.replace(
        study.sizes_of(0, quick), seeds=[0], dimension=4, budget=TINY, cora=TINY
    )
    monkeypatch.setattr(study, "sizes_of", lambda seed, quick: sizes)
    result = study.run(out=tmp_path, quick=quick)
    saved = json.loads((tmp_path / "result.json").read_text())
    verdicts = [claim["holds"] for claim in saved["claims"]]  # as they come on tiny graphs
    assert verdicts == [claim.holds for claim in result.claims] and len(verdicts) == 6
    rows = {(row["case"], row["side"]) for row in saved["table"]}
    cases = CASES if quick else [*CASES, study.CORA]
    assert {(case, side) for case in cases for side in (*VIEWS, study.ALL, study.GCN)} == rows
    for name in ("usable_information", "hits"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
