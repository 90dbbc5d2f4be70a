"""The study of forward learning: what decides its claims, and its ways on little data."""

import dataclasses
import importlib
import json

import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.data import block_model
from ffnlab.learning import ForwardGNNOptions
from ffnlab.studies import forward_gnn_claims as said
from ffnlab.studies import forward_gnn_measure as measure
from ffnlab.studies.forward_gnn_claims import BP, CORA, FEATURES, FF, LINKS, SBM, SF, TOLD, named
from ffnlab.studies.forward_gnn_measure import Budget, Memory
from tuned import cases, with_scores

study = importlib.import_module("ffnlab.studies.forward_gnn")
FULL = dataclasses.replace(study.sizes_of(0, quick=False), seeds=[0, 1])
ONE, TWO, THREE = (named(SF, d) for d in (1, 2, 3))
THROUGH = [named(BP, d) for d in (1, 2, 3)]


def results():
    """Of all ways, so that every claim holds."""
    by_depth = {ONE: [0.75] * 2, TWO: [0.8] * 2, THREE: [0.8] * 2, FEATURES: [0.6] * 2}
    by_depth |= dict(zip(THROUGH, ([0.76] * 2, [0.81] * 2, [0.81] * 2), strict=True))
    others = {named(name, 2): [0.8] * 2 for name in (*FF.values(), *TOLD.values())}
    others |= {f"{named(side, 2)}, {k}": [0.8] * 2 for side in (SF, BP) for k in ("sage", "gat")}
    links = {TWO: [0.9] * 2, THROUGH[1]: [0.91] * 2}
    return cases(**{SBM: by_depth | others, CORA: by_depth, LINKS: links})


def held(found, claims=said.depth_claims):
    return [claim.holds for claim in claims(found, FULL)]


def test_depth_is_judged_by_means_and_backpropagation_by_every_figure():
    found = results()
    assert held(found) == [True] * 3
    assert held(with_scores(found, SBM, ONE, [0.77, 0.78])) == [False, True, True]
    assert held(with_scores(found, SBM, ONE, [0.74, 0.79])) == [True, True, True], "means"
    assert held(with_scores(found, SBM, FEATURES, [0.71, 0.71])) == [False, True, True]
    assert held(with_scores(found, SBM, THROUGH[2], [0.9, 0.9])) == [True, False, False]
    for case in (SBM, CORA):
        for ours, theirs in zip((ONE, TWO, THREE), THROUGH, strict=True):
            scores = [found[case][ours].scores[0], found[case][ours].scores[1] + 0.021]
            assert not held(with_scores(found, case, theirs, scores))[2], (case, theirs)


def test_other_ways_are_judged_by_every_figure():
    found = results()
    assert held(found, said.other_claims) == [True] * 4
    for name in FF.values():
        better = with_scores(found, SBM, named(name, 2), [0.8, 0.83])
        assert held(better, said.other_claims) == [False, True, True, True]
    for name in TOLD.values():
        worse = with_scores(found, SBM, named(name, 2), [0.8, 0.77])
        assert held(worse, said.other_claims) == [True, False, True, True]
    for kind in ("sage", "gat"):
        worse = with_scores(found, SBM, f"{TWO}, {kind}", [0.69, 0.69])
        assert held(worse, said.other_claims) == [True, True, False, True]
        better = with_scores(found, SBM, f"{THROUGH[1]}, {kind}", [0.9, 0.9])
        assert held(better, said.other_claims) == [True, True, False, True]
    worse = with_scores(found, LINKS, TWO, [0.9, 0.88])
    assert held(worse, said.other_claims) == [True, True, True, False]
    without = {case: sides for case, sides in found.items() if case != LINKS}
    assert len(held(without, said.other_claims)) == 3
    quick = dataclasses.replace(FULL, is_full=False)
    assert len(said.other_claims(without, quick)) == 1


def test_evidence_names_rates_tried_and_chosen():
    for claim in said.depth_claims(results(), FULL):
        assert "rates 0.001, 0.003, 0.01, 0.03, 0.1 by" in claim.evidence
        assert "parameters, rate 0.3" in claim.evidence and "Seeds 0, 1 of graphs" in claim.evidence
        assert claim.seeds == 2


def test_memory_is_flat_or_not():
    depths = (1, 2, 3)
    sizes = dataclasses.replace(FULL, memory=depths)

    def holds(ours, theirs):
        curves = {
            name: {d: Memory(1024 * t, 5) for d, t in zip(depths, each, strict=True)}
            for name, each in ((SF, ours), (BP, theirs))
        }
        return said.memory_claim(curves, sizes).holds

    assert holds((50, 100, 104), (50, 100, 150))
    assert not holds((50, 100, 106), (50, 100, 150)), "it grows"
    assert not holds((50, 100, 100), (50, 100, 100)), "and the other does not"


def test_no_error_crosses_a_layer():
    claim = study.locality_claim(0)
    assert claim.holds and claim.ours.startswith("0 of 12")


def test_graphs_are_alike_in_size_and_the_node_that_is_added_is_of_no_part():
    found = measure.block_graphs([0, 1], nodes=60, train=30, valid=10)
    assert len({nodes.graph.num_edges for nodes in found}) == 1
    for seed, nodes in enumerate(found):
        plain = block_model(seed, **measure.BLOCKS | {"nodes": 60, "train": 30, "valid": 10})
        assert nodes.graph.num_nodes == 61 and nodes.x.shape[0] == 61
        loops = np.asarray(nodes.graph.senders) == np.asarray(nodes.graph.receivers)
        assert np.asarray(nodes.graph.senders)[loops].min() == 60 and loops.sum() >= 1
        assert (~loops).sum() == plain.graph.num_edges
        assert not any(part[60] for part in (nodes.train, nodes.valid, nodes.test))
        assert [p.sum() for p in (nodes.train, nodes.valid, nodes.test)] == [30, 10, 20]


def test_features_alone_are_nearest_means():
    nodes = block_model(0, nodes=60, classes=3, width=4, noise=0.0, train=30, valid=10)
    assert measure.by_features([nodes], [0]).scores == [1.0]


def test_a_rate_is_chosen_by_validation_alone():
    """Members in order of rates, then seeds; the best mean validation has the worst test."""
    figures = {0.0: (0.5, 0.9), 1.0: (0.6, 0.8), 2.0: (0.9, 0.1), 3.0: (0.7, 0.2)}
    config = study.layered(3, 4, 1)
    way = measure.Way(
        config,
        lambda like, rate: None,
        lambda graph, seed: None,
        lambda graph, seed: (0, 0),
        lambda like: lambda model, given, depth: model,
        lambda graph, valid, test: figures[float(valid)],
        1,
        (1,),
    )
    budget = Budget((0.1, 0.2), 1, 1, 1, 1)
    found = measure.chosen(way, budget, 1, np.arange(4.0), None, ["one", "other"], [0, 1])
    assert found.setting == {"rate": 0.2} and found.scores == [0.1, 0.2]
    assert [score for _, score in found.tried] == pytest.approx([0.55, 0.8])


def test_both_sides_have_the_same_steps_validation_and_decay():
    nodes = block_model(0, nodes=60, classes=3, width=4, train=30, valid=10)
    budget = Budget((1e-2,), 7, 2, 3, 1)
    ours = measure.by_forward(ForwardGNNOptions(), study.layered(4, 8, 2), budget)
    theirs = measure.by_backprop(study.scored(4, 8, 2, 3), budget)
    assert ours.steps == theirs.steps == 14
    batch, (_, learned, held_out) = ours.batch(nodes, 0), theirs.batch(nodes, 0)
    np.testing.assert_array_equal(learned, batch.targets)
    np.testing.assert_array_equal(held_out, batch.held_out)
    np.testing.assert_array_equal(held_out >= 0, nodes.valid)
    w = jnp.array([2.0, 2.0])
    for options in (None, ForwardGNNOptions(), ForwardGNNOptions(top_down="loss")):
        made, gradient = measure.adam(1e-3, options), jnp.array([-1e-3, 0.0])
        update = made.update(gradient, made.init(w), w)[0]
        np.testing.assert_allclose(update, [0, -1e-3], rtol=1e-4, atol=1e-7)


TINY = Budget((1e-2, 3e-2), 4, 2, 2, 2)


@pytest.mark.slow
def test_a_rate_is_chosen_by_validation_and_scored_on_test():
    graphs = measure.block_graphs([0, 1], nodes=60, train=30, valid=10)
    way = measure.by_forward(ForwardGNNOptions(), study.layered(32, 8, 2), TINY, (1, 2))
    found = measure.tuned(way, TINY, graphs, [0, 1])
    assert set(found) == {1, 2}
    for depth, one in found.items():
        assert one.seeds == (0, 1) and len(one.tried) == 2
        assert one.setting == max(one.tried, key=lambda t: t[1])[0]
        assert one.parameters == 32 * 8 + 8 + (depth - 1) * (64 + 8)


@pytest.mark.slow
@pytest.mark.parametrize("quick", [True, False])
def test_study_writes_its_result_and_pictures(tmp_path, monkeypatch, quick):
    """All ways, on graphs of sixty nodes in the place of block models and of Cora."""
    small = {"nodes": 60, "inside": 0.3, "across": 0.05}
    monkeypatch.setattr(measure, "BLOCKS", measure.BLOCKS | small)
    monkeypatch.setattr(study, "BLOCKS", measure.BLOCKS | small)
    monkeypatch.setattr(measure, "PARTS", {"train": 30, "valid": 10})
    monkeypatch.setattr(study, "cora", lambda: block_model(5, **measure.BLOCKS, train=30, valid=10))
    monkeypatch.setattr(study, "find_folder", lambda name: tmp_path)
    sizes = dataclasses.replace(
        study.sizes_of(0, quick), hidden=8, blocks=TINY, cora=TINY, memory=(2, 3), nodes=60
    )
    monkeypatch.setattr(study, "sizes_of", lambda seed, quick: sizes)
    result = study.run(out=tmp_path, quick=quick)
    saved = json.loads((tmp_path / "result.json").read_text())
    assert len(result.claims) == (6 if quick else 9)
    sides = {(row["case"], row["side"]) for row in saved["table"]}
    wanted = {(SBM, named(side, d)) for side in (SF, BP) for d in (1, 2, 3)}
    wanted |= {(SBM, FEATURES), (SBM, named(FF["label_appending"], 2))}
    if not quick:
        wanted |= {(CORA, named(SF, 3)), (LINKS, named(BP, 2)), (SBM, f"{TWO}, gat")}
        wanted |= {(SBM, named(TOLD[signal], 2)) for signal in TOLD}
    assert wanted <= sides
    for name in ("accuracy_by_depth", "memory_by_depth"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
