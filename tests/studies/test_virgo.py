"""The study of starts: what decides its claims, and its measures on little data."""

import dataclasses
import importlib
import json

import numpy as np
import pytest

from ffnlab.data import block_model
from ffnlab.graphs import STARTS, Signals
from ffnlab.models import GraphNetworkConfig
from ffnlab.studies import virgo_measure as measure
from ffnlab.studies.virgo_measure import FEATURES, Budget, Raced
from tuned import reached

study = importlib.import_module("ffnlab.studies.virgo")


def seen_with(forward, backward):
    """Signals of three layers whose ratios are those by start, for both kinds of features."""

    def of(ratio, far):
        line = np.ones((len(STARTS), 2, 3))
        line[:, :, far] = np.array([ratio[start] for start in STARTS])[:, None]
        return line

    found = Signals(of(forward, 1), of(backward, 0))
    return dict.fromkeys(FEATURES, found)


GOOD = {"virgo": 0.9, "virgofor": 0.8, "virgoback": 0.8, "kaifor": 0.5, "kaiback": 2.0}
GOOD |= {"xavier": 0.01}


def held(forward=GOOD, backward=GOOD):
    return [claim.holds for claim in study.signal_claims(seen_with(forward, backward), 2)]


def test_signals_are_judged_by_how_far_they_are_off_one():
    assert held() == [True, True, True]
    assert held(forward=GOOD | {"virgofor": 3.1}) == [False, True, True]
    assert held(forward=GOOD | {"xavier": 0.06}) == [False, True, True]
    assert held(backward=GOOD | {"virgo": 0.55}) == [True, True, True]
    assert held(backward=GOOD | {"virgo": 0.49}) == [True, False, False]
    assert held(backward=GOOD | {"virgo": 1.9}) == [True, True, True]
    assert held(backward=GOOD | {"xavier": 0.03}) == [True, False, True]
    assert held(forward=GOOD | {"kaiback": 1.05}) == [True, True, False]


def test_halves_are_judged_beside_the_whole():
    def holds(half, whole):
        line = lambda ratio: Signals(*[np.array([[[1.0, ratio, 9.0]] * 2])] * 2)  # noqa: E731
        names = {study.WHOLE: whole, study.HALF: half, study.GAT: 5.0}
        return study.halved_claim({name: line(ratio) for name, ratio in names.items()}).holds

    assert holds(0.4, 25.0)
    assert not holds(0.29, 25.0) and not holds(3.1, 25.0) and not holds(0.4, 2.9)


def raced(losses, scores):
    return Raced(reached(scores), losses, scores)


def test_the_race_is_judged_by_means_of_loss_and_of_accuracy():
    theirs = raced([1.0, 0.9], [0.5, 0.6])

    def holds(losses, scores):
        return study.race_claim({"virgo": raced(losses, scores), "xavier": theirs}).holds

    assert holds([0.96, 0.9], [0.6, 0.701])
    assert not holds([0.96, 0.95], [0.7, 0.7])
    assert not holds([0.5, 0.5], [0.6, 0.69])


def test_tuned_races_are_judged_beside_the_best_usual_start():
    sizes = dataclasses.replace(study.sizes_of(0, quick=False), depths=(2, 4))
    sides = {"virgo": reached([0.8, 0.8]), "virgofor": reached([0.7, 0.7])}
    sides |= {"xavier": reached([0.5, 0.5]), "kaifor": reached([0.79, 0.79])}
    found = {study.SBM: sides | {"kaiback": reached([0.6, 0.6])}}
    found |= {study.at_depth(d): sides for d in (2, 4)}
    assert study.tuned_claim(found).holds and study.depth_claim(found, sizes).holds
    better = sides | {"kaiback": reached([0.81, 0.81])}
    assert not study.tuned_claim(found | {study.SBM: better}).holds
    worse = sides | {"kaifor": reached([0.81, 0.79])}
    assert not study.depth_claim(found | {study.at_depth(4): worse}, sizes).holds, "a tie is none"


def test_graphs_of_the_race_are_alike_and_their_features_the_cards():
    found = measure.block_graphs([0, 1], nodes=60, train=20, valid=10, width=8)
    for nodes in found:
        own = nodes.x[np.arange(60), nodes.y]
        assert own.min() >= 0.5 and own.max() <= 1.5
        assert nodes.x.min() >= 0 and np.mean(nodes.x) == pytest.approx(0.5 + 0.5 / 8, abs=0.03)
    padded = measure.alike(found)
    assert len({nodes.graph.num_edges for nodes in padded}) == 1
    assert not any(part[60] for nodes in padded for part in nodes[3:])


TINY = Budget((1e-3, 3e-2), 6, 2, 3)


@pytest.fixture(scope="module")
def race():
    graphs = measure.block_graphs([0, 1], nodes=40, train=16, valid=12, width=8, inside=0.3)
    config = GraphNetworkConfig((8, 6, 6, 6, 4))
    return measure.raced(("virgo", "xavier"), config, graphs, [0, 1], TINY)


def test_a_rate_is_chosen_by_validation_and_the_first_is_reported(race):
    assert list(race) == ["virgo", "xavier"]
    for one in race.values():
        assert len(one.losses) == len(one.scores) == len(one.tuned.scores) == 2
        assert one.tuned.setting == max(one.tuned.tried, key=lambda t: t[1])[0]
        assert one.tuned.parameters == 8 * 6 + 6 + 2 * 42 + 6 * 4 + 4
        assert all(np.isfinite(one.losses))
    assert race["virgo"].losses != race["xavier"].losses


def test_members_are_in_order_of_starts_rates_and_seeds():
    figures = np.zeros((2, 2, 3))
    figures[1, :, 1], figures[1, :, 2] = 0.6, (0.1, 0.2)
    figures[0, :, 1], figures[0, :, 2] = 0.5, (0.9, 0.9)
    found = measure.chosen(figures, TINY, [0, 1], 5)
    assert found.setting == {"rate": 3e-2} and found.scores == [0.1, 0.2]


@pytest.mark.slow
@pytest.mark.parametrize("quick", [True, False])
def test_study_writes_its_result_and_pictures(tmp_path, monkeypatch, quick):
    small = {"nodes": 40, "width": 8, "inside": 0.3}
    monkeypatch.setattr(measure, "BLOCKS", measure.BLOCKS | small)
    monkeypatch.setattr(measure, "PARTS", {"train": 16, "valid": 12})
    monkeypatch.setattr(measure, "NODES", 40)
    nodes = block_model(5, nodes=40, width=8, train=16, valid=12)
    monkeypatch.setattr(study, "cora", lambda: nodes)
    monkeypatch.setattr(study, "find_folder", lambda name: tmp_path)
    sizes = study.sizes_of(0, quick)
    depths = (2, 4) if sizes.depths else ()
    sizes = dataclasses.replace(sizes, blocks=TINY, cora=TINY, depths=depths)
    monkeypatch.setattr(study, "sizes_of", lambda seed, quick: sizes)
    result = study.run(out=tmp_path, quick=quick)
    saved = json.loads((tmp_path / "result.json").read_text())
    assert len(result.claims) == (4 if quick else 7)
    cases = {row["case"] for row in saved["table"]}
    assert {f"signals, {kind}" for kind in FEATURES} | {study.SBM} <= cases
    names = ["signals_by_layer"] + ([] if quick else ["accuracy_by_depth"])
    for name in names:
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
