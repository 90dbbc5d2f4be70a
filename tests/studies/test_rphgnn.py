"""The study of RpHGNN: what decides its claims, and its ways on little data."""

import dataclasses
import importlib
import json

import numpy as np
import pytest

from ffnlab.clock import Times
from ffnlab.data import academic
from ffnlab.graph import Hetero
from ffnlab.models.account import CompiledCost
from ffnlab.studies import rphgnn_measure as measure
from ffnlab.studies.rphgnn_measure import Budget, Costs
from tuned import cases, with_scores

study = importlib.import_module("ffnlab.studies.rphgnn")
FULL = dataclasses.replace(study.sizes_of(0, quick=False), seeds=[0, 1])
TINY = Budget((1e-2, 3e-2), 20, 30, 5, 8, 0.1, 0.1)


def small(seed):
    return academic(seed, papers=80, authors=40, venues=8, terms=20, inside=40.0, width=6)


def results():
    """Of all ways, so that every claim holds."""
    sides = {study.OURS: [0.94] * 2, study.ONE: [0.9] * 2, study.ODD: [0.92] * 2}
    sides |= {study.LABELS: [0.95] * 2, study.TWO_HOP: [0.9] * 2, study.OWN: [0.8] * 2}
    on_cora = {study.OURS: [0.8] * 2, study.OWN: [0.6] * 2, study.GCN: [0.81] * 2}
    return cases(**{study.ACADEMIC: sides, study.CORA: on_cora})


def held(found):
    return [claim.holds for claim in study.accuracy_claims(found, FULL)]


def test_accuracy_is_judged_by_means():
    found, here = results(), study.ACADEMIC
    assert held(found) == [True] * 4
    assert held(with_scores(found, here, study.OWN, [0.84, 0.84])) == [True] * 4, "10 points"
    assert held(with_scores(found, here, study.OWN, [0.85, 0.84])) == [False, True, True, True]
    assert held(with_scores(found, here, study.TWO_HOP, [0.95, 0.9])) == [True] * 4, "means"
    assert held(with_scores(found, here, study.TWO_HOP, [0.94, 0.93])) == [True, False, True, True]
    assert held(with_scores(found, here, study.ODD, [0.95, 0.95])) == [True] * 4, "a point below"
    assert held(with_scores(found, here, study.ODD, [0.96, 0.95])) == [True, True, False, True]
    assert held(with_scores(found, study.CORA, study.OWN, [0.7, 0.71]))[3] is False
    alone = {here: found[here]}
    assert len(study.accuracy_claims(alone, FULL)) == 3
    for claim in study.accuracy_claims(found, FULL):
        assert claim.seeds == 2 and "Rates 0.001, 0.003, 0.01" in claim.evidence
        assert "rate 0.3" in claim.evidence


def costs_of(eight=8.0, added=100, stored=80, peak=11.0, held=11.0):
    rounds = {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0, 6: 6.0, 8: eight}
    return Costs(
        Times({k: np.array([s, s]) for k, s in rounds.items()}),
        {k: 10 * k if k < 8 else stored for k in rounds},
        {
            k: CompiledCost(0, 0, 10 * k, 100 * k if k < 8 else 400 + 4 * added, 0.0)
            for k in (2, 4, 8)
        },
        7,
        {2: 5.0, 4: 7.0, 8: peak},  # half of which is there whatever the rounds
        {2: 5.0, 4: 7.0, 8: held},
    )


def test_costs_are_linear_or_not():
    grown = [2**k for k in range(1, 9)]
    holds = lambda costs, whole=grown: [  # noqa: E731
        c.holds for c in study.cost_claims(costs, whole, FULL)
    ]
    assert holds(costs_of()) == [True] * 4
    assert holds(costs_of(eight=10.0)) == [False, True, True, True]
    assert holds(costs_of(eight=6.0)) == [False, True, True, True]
    assert holds(costs_of(stored=100)) == [True, False, True, True]
    assert holds(costs_of(peak=13.0)) == [True, False, True, True], "rises thrice as far"
    assert holds(costs_of(peak=9.0)) == [True, False, True, True]
    assert holds(costs_of(held=13.0)) == [True, False, True, True], "either way of measuring"
    assert holds(costs_of(added=101)) == [True, True, False, True]
    assert holds(costs_of(), [10 * k for k in range(1, 9)]) == [True, True, True, False]


def test_unsquashed_summaries_are_counted():
    graph = Hetero.make(
        {"a": 3, "b": 2}, {("a", "x", "b"): ([0], [1]), ("a", "y", "a"): ([0], [1])}
    )
    # a hears b (1) and its echo (5) by x, itself (5) and its echo (5) by y: 16; b 5 and 1: 6.
    first, second = measure.unsquashed(graph, "a", {"a": 5, "b": 1}, 2)
    assert first == 2 * 3 * 16
    assert second == first + 2 * 3 * (6 + 16 + 2 * 16)


def test_what_is_heard_and_left_out_on_a_small_graph():
    claims = study.heard_claims(small(0), dataclasses.replace(FULL, width=5, shuffled=3))
    found = {claim.claim: claim for claim in claims}
    groups = found.pop("the target has a group for each relation that ends or begins at it")
    assert groups.ours.startswith("6 groups of") and all(c.holds for c in found.values())


def test_paths_of_two_hops_are_merged_whatever_the_relation():
    nodes = small(1)
    rows = measure.merged(nodes).features.groups[1][:, 0]
    reach = np.zeros((80, 80))
    for relation in nodes.graph.names:
        edges = nodes.graph.edges_of(relation)
        ends = np.asarray(edges.senders), np.asarray(edges.receivers)
        papers, others = ends if relation[0] == "paper" else ends[::-1]
        joined = np.zeros((80, nodes.graph.counts[relation[2 if relation[0] == "paper" else 0]]))
        np.add.at(joined, (papers, others), 1)
        reach += joined @ joined.T
    expected = reach @ nodes.x["paper"] / np.maximum(reach.sum(1, keepdims=True), 1)
    np.testing.assert_allclose(rows, expected, atol=2e-3)  # half precision


@pytest.mark.slow
def test_a_rate_is_chosen_by_validation_alone():
    seeds = (0, 1)
    graphs = [small(s) for s in seeds]
    rows = [measure.summarized(g, s, width=6, rounds=1) for g, s in zip(graphs, seeds, strict=True)]
    found = measure.tuned(rows, TINY, seeds)
    assert [setting["rate"] for setting, _ in found.tried] == [1e-2, 3e-2]
    best = max(found.tried, key=lambda pair: pair[1])
    assert found.setting == best[0] and found.seeds == seeds and len(found.scores) == 2
    assert np.mean(found.scores) > 0.5


@pytest.mark.slow
def test_the_quick_form(tmp_path):
    result = study.run(out=tmp_path, quick=True)
    assert len(result.claims) == 11 and sum(c.holds for c in result.claims) >= 8
    written = json.loads((tmp_path / "result.json").read_text())
    assert written["slug"] == "rphgnn" and len(written["pictures"]) == 3
